"""
Whether two answers are the same mathematics, by math-verify, in a process of its own: its time limits are signals, which
work only in a main thread, and rewards may be scored in another; a comparison that hangs can be ended.
"""

import json
import logging
import queue
import re
import subprocess
import sys
import threading

SPARE, START = 2.0, 60.0        # seconds that a worker may be late, and may take to start, before it is ended

WORDS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")       # not \frac


def make_reward(timeout):
    """The reward function of mlx_grpo.more_rewards.math_verify. Raises ConfigError where math-verify isn't installed."""
    from importlib.util import find_spec

    from mlx_grpo import ConfigError, completion_text, extract_answer

    if not find_spec("math_verify"):
        raise ConfigError("reward 'math_verify' needs math-verify: pip install math-verify")
    worker = Worker(timeout)

    def score(completions, answer, log_metric, **_):
        texts = [completion_text(c) for c in completions]
        pairs = [(gold, extract_answer(text) or stated(text)) for text, gold in zip(texts, answer)]
        found, late = worker.compare(pairs)
        if late:
            log_metric("math_verify/timeouts", late, "sum")
        return [None if same is None else float(same) for same in found]
    return score


def stated(text):
    """What a completion without tags states as its answer: its \\boxed{}, or all of it if it is a bare formula; not just any
    number in it, which a copied prompt holds as well."""
    return text if "\\boxed" in text or not WORDS.search(text) else ""


class Worker:
    """A process that compares; started at the first use, ended with ours, replaced when it hangs. One caller at a time."""

    def __init__(self, timeout, script=__file__):
        self.timeout, self.script, self.lock, self.process = timeout, script, threading.Lock(), None

    def start(self):
        code = "import runpy, sys; runpy.run_path(sys.argv[1])['main'](float(sys.argv[2]))"
        self.process = subprocess.Popen([sys.executable, "-I", "-c", code, self.script, str(self.timeout)], text=True,
                                        encoding="utf-8", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.replies = queue.SimpleQueue()
        threading.Thread(target=forward, args=(self.process.stdout, self.replies), daemon=True).start()

    def compare(self, pairs):
        """([True, False or None], number that ran out of time) for pairs of texts; what ran out of time is False."""
        found, late = [], 0
        with self.lock:
            for gold, answer in pairs:
                if gold is None:
                    found.append(None)
                    continue
                if starts := self.process is None or self.process.poll() is not None:
                    self.start()
                try:
                    self.process.stdin.write(json.dumps([gold, answer]) + "\n")
                    self.process.stdin.flush()
                    reply = self.replies.get(timeout=3 * self.timeout + SPARE + START * starts)
                    found.append(json.loads(reply))
                except (queue.Empty, BrokenPipeError, ValueError):      # it hangs, or has died of this pair
                    self.process.kill()
                    self.process.wait()
                    self.process = None
                    found.append(False)
                    late += 1
        return found, late


def forward(lines, replies):
    """Each line into the queue, then an empty one when the worker has ended."""
    for line in lines:
        replies.put(line)
    replies.put("")


def main(timeout):
    """The worker: reads lines ["gold", "answer"], writes true, false, or null where the gold answer is no mathematics."""
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException

    logging.disable(logging.ERROR)                        # math-verify tells of each timeout
    seconds = max(1, round(timeout))                      # alarms are in whole seconds

    def read(text):
        """What the text holds as mathematics. Marks ($, \\boxed) or words make it a text with a formula somewhere, else it is
        a formula, of which math-verify would see only the last number."""
        prose = re.search(r"\$|\\boxed|\\\(|\\\[", text) or WORDS.search(text)
        return parse(text if prose else f"${text}$", parsing_timeout=seconds)

    for line in sys.stdin:
        gold, answer = json.loads(line)
        try:
            expected = read(gold)
            same = verify(expected, read(answer), timeout_seconds=seconds) if expected else None
        except TimeoutException:
            same = False
        print(json.dumps(same), flush=True)
