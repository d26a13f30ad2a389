"""
Training on rows as another process appends them to a JSONL file (`train --watch FILE`), each one once, in their order of
arrival, behind a gate: checkpoint-best is only moved to a model that evaluates better than the one before.
"""

import hashlib
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from mlx_grpo import ConfigError, MLXGRPOTrainer, UserError, make_problem, point_to, render_prompt
from mlx_grpo.few_shot import Examples
from mlx_grpo.hooks import closes_callbacks
from mlx_grpo.run_files import ENDLESS

POLL_S = 0.2     # seconds between two looks at the file


class NoMoreRows(Exception):
    """The wait for rows was ended, by a signal or by watch_idle."""


class WatchedRows:
    """The rows of a JSONL file that grows: `problems`, from row `first` on, and for each of them, and for the place before
    the first, a mark of how far the file had been read: what a checkpoint needs to go on there.

    accept(row, where) gives a Problem, or raises UserError for a row to be skipped. mark: of an earlier run; reading goes on
    behind it. Raises UserError where the file before that place is not what it was."""

    def __init__(self, path, accept, mark=None):
        self.path, self.accept, self.problems, self.hash = Path(path), accept, [], hashlib.sha256()
        mark = mark or {"rows": 0, "bytes": 0, "lines": 0, "skipped": 0, "sha256": self.hash.hexdigest()}
        self.first, self.bytes, self.lines, self.skipped = mark["rows"], mark["bytes"], mark["lines"], mark["skipped"]
        self.marks = [mark]
        if not self.path.absolute().parent.is_dir():
            raise UserError(f"watch: there is no directory {self.path.parent}; create it, or check the name")
        self.hash.update(self.content(0, self.bytes))
        if self.hash.hexdigest() != mark["sha256"]:
            raise UserError(f"{self.path} is not the file that this run was trained on: its first {self.bytes} bytes have "
                            "changed; rows may only be appended. Put it back, or start a new run from the checkpoint with "
                            "--set model_name=CHECKPOINT")

    @property
    def count(self):
        """How many rows there are, those before `first` included."""
        return self.first + len(self.problems)

    def take(self, start, count):
        return self.problems[start - self.first:start - self.first + count]

    def mark(self, rows):
        """The place behind so many rows."""
        return self.marks[rows - self.first]

    def content(self, start, size=-1):
        """Bytes of the file from `start`; none of a file that isn't there yet. Raises UserError."""
        try:
            with open(self.path, "rb") as file:
                if os.fstat(file.fileno()).st_size < start:
                    raise UserError(f"{self.path} has become shorter than the {start} bytes that were read; rows may only "
                                    "be appended: put it back and go on with --resume")
                file.seek(start)
                return file.read(size)
        except FileNotFoundError as error:
            if start:
                raise UserError(f"{self.path} has vanished; put it back and go on with --resume") from error
            return b""
        except OSError as error:
            raise UserError(f"{self.path}: can't read the rows: {error.strerror or error}") from error

    def read(self):
        """Take in what has been appended, but for a last line without its end; returns the number of lines. What can't be
        used is told in one line, skipped and counted."""
        lines = self.content(self.bytes).split(b"\n")[:-1]
        for line in lines:
            self.bytes, self.lines = self.bytes + len(line) + 1, self.lines + 1
            self.hash.update(line + b"\n")
            if not line.strip():
                continue
            try:
                self.problems.append(self.problem(line, f"{self.path}:{self.lines}"))
            except UserError as error:
                self.skipped += 1
                print(f"{error} (row skipped, {self.skipped} so far)", file=sys.stderr, flush=True)
            else:
                self.marks.append({"rows": self.count, "bytes": self.bytes, "lines": self.lines, "skipped": self.skipped,
                                   "sha256": self.hash.hexdigest()})
        return len(lines)

    def problem(self, line, where):
        try:
            row = json.loads(line.decode("utf-8-sig"))
            json.dumps(row, ensure_ascii=False).encode()      # half a surrogate pair is no text
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected an object with columns, got {type(row).__name__}")
        return self.accept(row, where)


class WatchTrainer(MLXGRPOTrainer):
    """GRPO on the rows of args.watch. The data set's held-out problems are the gate's, its training problems only a subset
    to evaluate on. save_best names the gate's metric (eval/exact_match unless set)."""

    STATE = (*MLXGRPOTrainer.STATE, "watched", "promoted")

    def __init__(self, model, tokenizer, reward_funcs, args, train_dataset, eval_dataset=None, **options):
        args = replace(args, save_best=args.save_best or "eval/exact_match")
        super().__init__(model, tokenizer, reward_funcs, args, train_dataset, eval_dataset, **options)
        if args.save_best.startswith("eval/") and not (self.eval_dataset and args.eval_steps):
            raise ConfigError(f"watch promotes by {args.save_best}, and there is no evaluation: set eval_steps, and "
                              "eval_samples with a data set that has held-out problems")
        self.total_steps = args.max_steps or ENDLESS
        self.asked = {self.question(problem) for problem in self.eval_dataset}
        self.examples = Examples(self.train_dataset, args)
        self.rows = WatchedRows(args.watch, self.accept)
        self.watched, self.promoted = self.rows.mark(0), 0         # how far the file is trained on; step of checkpoint-best

    def accept(self, row, where):
        """The Problem of a row. Raises UserError for one that can't be trained on, or that the gate asks as well."""
        problem = self.examples.put(make_problem(row, self.args, where))
        try:
            length = len(render_prompt(self.tokenizer, problem, self.args))
        except UserError as error:                            # the chat template's refusal
            raise UserError(f"{where}: {error}") from error
        if length > self.args.max_prompt_length:
            raise UserError(f"{where}: the prompt has {length} tokens, more than max_prompt_length = "
                            f"{self.args.max_prompt_length}")
        if self.question(problem) in self.asked:
            raise UserError(f"{where}: a held-out problem asks the same, so the gate would measure memory")
        return problem

    def question(self, problem):
        """What a problem asks, its examples left out."""
        asked = problem.columns.get(self.args.prompt_column) if problem.examples else None
        return json.dumps(problem.prompt if asked is None else asked)

    # -- rows instead of an order

    def next_problems(self, count):
        """The next `count` rows, waited for. Raises NoMoreRows."""
        self.wait_for(self.prompts_drawn + count)
        self.prompts_drawn += count
        return self.rows.take(self.prompts_drawn - count, count)

    def last_problems(self):
        return self.rows.take(self.prompts_drawn, self.args.prompts_per_step)

    def wait_for(self, rows):
        self.rows.read()
        since, told = time.monotonic(), False
        while self.rows.count < rows:
            drawn = self.prompts_drawn
            here = f"{self.rows.count - drawn} of {rows - drawn} rows for step {self.step_count + 1}"
            if self.interrupted:
                raise NoMoreRows(f"stopped while waiting: {here}")
            if self.args.watch_idle and time.monotonic() - since >= self.args.watch_idle:
                raise NoMoreRows(f"no new row in {self.rows.path} for {self.args.watch_idle:g} s: {here}, which stay for "
                                 "--resume")
            if not told:
                print(f"waiting for {self.rows.path}: {here}", flush=True)
                self.phase("wait")
                told = True
            time.sleep(POLL_S)
            if self.rows.read():
                since = time.monotonic()

    def step(self, problems=None):
        drawn = self.prompts_drawn
        try:
            metrics = super().step(problems)
        except NoMoreRows:
            self.prompts_drawn = drawn                # a step that isn't made has used no row
            raise
        del metrics["epoch"]
        return metrics | {"watch/rows": self.prompts_drawn, "watch/skipped": self.rows.mark(self.prompts_drawn)["skipped"],
                          "watch/waiting": self.rows.count - self.prompts_drawn}

    @closes_callbacks
    def train(self):
        """Steps until max_steps, a signal, or watch_idle; the last step is saved in any case."""
        try:
            return super().train.__wrapped__(self)    # closing comes after what stands below
        except NoMoreRows as end:
            if not self.step_count and not self.interrupted:
                raise UserError(f"{end}; not one step was made (a step takes batch_size * gradient_accumulation_steps "
                                "rows)") from end
            self.writer.wait()
            if self.step_count and not (self.run_dir / f"checkpoint-{self.step_count}").exists():
                self.save_run()
                self.writer.wait()
            self.notify("on_train_end")
            print(end, flush=True)
            return {}

    # -- the gate

    def evaluate(self, at_end=False, at_start=False):
        found = super().evaluate(at_end, at_start)
        if at_start:                                  # what the first promotion has to beat
            self.best = found.get(self.args.save_best)
        return found

    def is_best(self, metrics):
        """Whether this step's model is promoted: evaluated, at watch_target or above, and better than the best so far."""
        value, target, before = metrics.get(self.args.save_best), self.args.watch_target, self.best
        if value is None:
            return False
        promoted = (not target or value >= target) and super().is_best(metrics)
        if promoted:
            self.promoted = self.step_count
        bar = ("" if before is None else f", best so far {before:.4g}") + (f", target {target:g}" if target else "")
        decision = f"checkpoint-best is now step {self.step_count}" if promoted else "not promoted"
        print(f"gate: {self.args.save_best} {value:.4g}{bar}: {decision}", flush=True)
        return promoted

    # -- checkpoints

    def checkpoint_writer(self, path):
        self.watched = self.rows.mark(self.prompts_drawn)
        return super().checkpoint_writer(path)

    def load_checkpoint(self, path):
        super().load_checkpoint(path)
        self.rows = WatchedRows(self.args.watch, self.accept, self.watched)
        if self.promoted == self.step_count and Path(path).resolve().parent == self.run_dir.resolve():
            point_to(self.run_dir, "checkpoint-best", path)          # a kill may have come between checkpoint and link
