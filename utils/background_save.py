"""Checkpoints written by a thread while training goes on (save_in_background)."""

import threading
import time


class Writer:
    """Calls functions one after the other: at once, or in a thread with at most one in flight. What a call raises comes
    out of the next `start` or `wait`."""

    def __init__(self, in_background):
        self.in_background = in_background
        self.thread = self.error = self.done = None
        self.seconds = 0.0                 # that calls took in the background since `times` was last asked

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """What is in flight is finished, whatever ended the block."""
        if self.thread:
            self.thread.join()

    def start(self, function, done):
        """Run function() after the call before it has ended; then, in the caller's thread, done()."""
        self.wait()
        self.done = done
        if not self.in_background:
            self.run(function)
            self.check()
            return
        self.thread = threading.Thread(target=self.run, args=(function,), name="checkpoint")
        self.thread.start()

    def run(self, function):
        started = time.perf_counter()
        try:
            function()
        except BaseException as error:     # of the thread: raised again in the trainer's
            self.error = error
        self.seconds += time.perf_counter() - started

    def wait(self):
        """Until nothing is in flight; raises what the call raised."""
        if self.thread:
            self.thread.join()
        self.check()

    def check(self):
        """Without waiting: raise what a call that has ended raised, or else call its done()."""
        if self.done is None or (self.thread and self.thread.is_alive()):
            return
        error, done, self.thread, self.error, self.done = self.error, self.done, None, None, None
        if error:
            raise error
        done()

    def times(self):
        """{"save_background_s": seconds of writing in the background since this was last asked}; {} without it."""
        seconds, self.seconds = self.seconds, 0.0
        return {"save_background_s": seconds} if self.in_background else {}
