"""
reasoning_gym's tasks as data (`dataset = "reasoning_gym:<task>"`) and their scorers as the reward "reasoning_gym".

Rows are made and answers scored in a process of their own (gym_worker.py): the same rows on every start, no completion
evaluated in the trainer, and an answer that takes too long to score is worth 0.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import select
import subprocess
import sys
import threading
import time
from functools import cache
from pathlib import Path

from mlx_grpo import UserError, completion_text, extract_answer

SCORE_LIMIT_S = 10.0               # for one answer; scorers that search or simplify can be sent astray
WORKER = "import sys; sys.path.append(sys.argv[1]); import gym_worker; gym_worker.serve()"


class GymWorker:
    """The process that reasoning_gym runs in; started when it is first asked, and again after it was stopped."""

    def __init__(self):
        self.process, self.buffer, self.lock = None, b"", threading.Lock()

    def ask(self, request, limit_s=None):
        """The reply to a request (gym_worker.reply), or None where it takes longer than limit_s seconds."""
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.start()
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
            line = self.line(limit_s)
            return line and json.loads(line)

    def line(self, limit_s=None):
        """The next line of the process; None, and the process is ended, where none comes in limit_s seconds."""
        deadline = None if limit_s is None else time.monotonic() + limit_s
        while b"\n" not in self.buffer:
            wait = None if deadline is None else max(deadline - time.monotonic(), 0)
            if not select.select([self.process.stdout], [], [], wait)[0]:
                self.stop()
                return None
            part = os.read(self.process.stdout.fileno(), 1 << 20)
            if not part:
                raise RuntimeError(f"the process of reasoning_gym ended with code {self.process.wait()}")
            self.buffer += part
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line

    def start(self):
        """Raises UserError where reasoning_gym is not installed."""
        if importlib.util.find_spec("reasoning_gym") is None:
            raise UserError("reasoning_gym is not installed: pip install reasoning-gym")
        kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "HOME", "TMPDIR", "LANG") if name in os.environ}
        self.buffer, self.process = b"", subprocess.Popen(
            [sys.executable, "-c", WORKER, str(Path(__file__).parent)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            bufsize=0, env=kept | {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True)                # Ctrl-C is the trainer's
        assert self.line() == b"ready", "the worker speaks another protocol"

    def stop(self):
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self.process, self.buffer = None, b""


@cache
def worker():
    """The one worker of this process; it ends with it, when its standard input does."""
    return GymWorker()


def gym_rows(task, count, seed, options):
    """[(row, where)] of the first `count` entries of a task: question, answer, metadata, and `reasoning_gym`, which says
    how to make the entry again. Raises UserError for an unknown task or option and for a missing package."""
    if reserved := [name for name in ("seed", "size") if name in options]:
        raise UserError(f"reasoning_gym:{task}: dataset_options has {reserved[0]!r}, which follows from seed and "
                        "max_train_samples here; remove it")
    digest = hashlib.sha256(f"{task} {seed}".encode()).digest()
    source = {"task": task, "options": options, "seed": int.from_bytes(digest[:4], "big") >> 1, "size": count}
    rows = []
    for start in range(0, count, 100):
        reply = worker().ask(source | {"rows": list(range(start, min(start + 100, count)))})
        if "error" in reply:
            raise UserError(f"reasoning_gym:{task}: {' '.join(reply['error'].split())}")
        rows += reply["rows"]
    return [(row | {"reasoning_gym": source | {"rows": [i]}}, f"reasoning_gym:{task} row {i}") for i, row in enumerate(rows)]


def score_answer(answer, entry):
    """The task's own score of an answer (text or None), 0 to 1; entry: the column `reasoning_gym` of its row. An answer
    that its scorer can't take in, or not in SCORE_LIMIT_S, is worth 0 (in the second case this is told)."""
    reply = worker().ask(entry | {"answer": answer}, SCORE_LIMIT_S)
    if reply is None:
        print(f"reasoning_gym:{entry['task']}: scoring took more than {SCORE_LIMIT_S:g} s, so this answer gets 0: "
              f"{answer[:200]!r}", file=sys.stderr)
        return 0.0
    if "error" in reply:
        raise UserError(f"reasoning_gym:{entry['task']}: {reply['error']}")
    return reply["score"]


def reasoning_gym_reward_func(completions, reasoning_gym=None, **_):
    """The score, 0 to 1, that reasoning_gym's task gives the extracted answer (XML, else after ####); None for rows of
    other data."""
    entries = reasoning_gym or [None] * len(completions)
    return [None if entry is None else score_answer(extract_answer(completion_text(c)), entry)
            for c, entry in zip(completions, entries)]
