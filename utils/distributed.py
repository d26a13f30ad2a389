"""
Data parallel training: several processes, on one machine or several, do the steps of one (docs/distributed.md).

    mlx.launch -n 2 -- python mlx_grpo.py --config configs/prod.toml

Each process samples and scores its share of a step's prompts; then all of them know all rollouts, so that advantages,
dynamic sampling, metrics and log are computed as by one process. Each computes the gradients of its share of the groups with
the divisors of the whole step; their sum is the step's gradient, and every process makes the same update. The first one
writes. Random numbers belong to a prompt's place in the step, so who samples it changes nothing.

Every exchange begins with a `meet`, in which a process that has failed says so: then all of them end. Nothing but JSON and
arrays is exchanged, so that what comes over the network runs no code.
"""

import base64
import contextlib
import fcntl
import functools
import json
import os
import sys
import tempfile
import threading
import time
import zlib
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlx_grpo import ConfigError, MLXGRPOConfig, NotFinite, RewardError, Rollout, UserError

PATIENCE_S = 1800      # that a process waits in one exchange for the others, before it takes them for lost
CHECK_STEPS = 10       # steps between comparisons of the processes' weights
PIECE = 64 << 20       # bytes of a file that are sent at once
SENT = ("prompt_ids", "completion_ids", "logprobs", "env_mask", "ended", "texts", "inputs")     # of a Rollout, as JSON


class PeerFailed(UserError):
    """Another process has ended with an error, so this one does too."""


def launched():
    """How many processes the launcher says that there are; 0 where none has started this one."""
    env = os.environ
    if env.get("MLX_HOSTFILE"):
        text = Path(env["MLX_HOSTFILE"]).read_text().strip()
        return len(json.loads(text)) if text else 1
    if env.get("MLX_IBV_DEVICES"):
        return len(json.loads(Path(env["MLX_IBV_DEVICES"]).read_text()))
    return int(next((env[name] for name in ("MLX_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE") if env.get(name)), 0))


@functools.cache
def find_world():
    """The World of this process; of one where no launcher has started it. Raises UserError where the others can't be
    reached."""
    count = launched()
    if count < 2:
        return World()
    try:
        group = mx.distributed.init()
    except RuntimeError as error:
        raise UserError(f"the {count} processes can't be connected: {error}") from error
    if group.size() != count:
        raise UserError(f"the launcher started {count} processes, and MLX connects {group.size()}: this MLX has no backend "
                        "for it")
    return World(group)


class World:
    """The processes of a run: `rank` of `size`; `first` is the one that writes. With one process everything is given back as
    it is, at no cost."""

    def __init__(self, group=None):
        self.group = group
        self.rank, self.size = (group.rank(), group.size()) if group else (0, 1)
        self.first = self.rank == 0
        self.over, self.since, self.folders, self.told = threading.Event(), None, contextlib.ExitStack(), None

    # -- exchanges

    def all_gather(self, array):
        self.since = time.monotonic()
        found = np.array(mx.distributed.all_gather(mx.array(array), group=self.group)).reshape(self.size, *array.shape)
        self.since = None
        return found

    def meet(self, length=0, error=None):
        """(size,) the lengths that the processes give; where one gives an error, PeerFailed, or its NotFinite, in the
        others."""
        kind = 0 if error is None else 2 if isinstance(error, NotFinite) else 1
        heads = self.all_gather(np.array([kind, length], dtype=np.int32))
        if not heads[:, 0].any():
            return heads[:, 1]
        said = "" if error is None else str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        data = said.encode()[:4000]
        lengths = self.all_gather(np.array([len(data)], dtype=np.int32))[:, 0]
        texts = [raw.decode(errors="replace") for raw in self.exchange(data, lengths)]
        rank = min(np.flatnonzero(heads[:, 0]), key=lambda rank: heads[rank, 0])     # an end counts more than a bad batch
        if heads[rank, 0] == 1 and kind != 1:
            self.over.set()
            raise PeerFailed(f"process {rank} failed: {texts[rank]}")
        if not kind:
            self.told = NotFinite(texts[rank])
            raise self.told

    def exchange(self, data, lengths):
        """[bytes of each process]; lengths: theirs."""
        padded = np.zeros(max(int(lengths.max()), 1), dtype=np.uint8)
        padded[:len(data)] = np.frombuffer(data, dtype=np.uint8)
        return [row[:length].tobytes() for row, length in zip(self.all_gather(padded), lengths)]

    def gather(self, value):
        """[the value of each process]; values that JSON holds."""
        if self.size == 1:
            return [value]
        data = zlib.compress(json.dumps(value, default=lambda array: array.tolist()).encode(), 1)
        return [json.loads(zlib.decompress(raw)) for raw in self.exchange(data, self.meet(len(data)))]

    def sum(self, tree):
        """The sum of the processes' trees of arrays."""
        if self.size == 1:
            return tree
        self.meet()
        self.since = time.monotonic()
        total = tree_map(lambda a: a * self.size, nn.average_gradients(tree, self.group))
        mx.eval(total)
        self.since = None
        return total

    def not_finite(self, error):
        """Tell the others of a NotFinite that this process has met; not of one that it was told of."""
        if self.size > 1 and error is not self.told:
            self.meet(error=error)

    def stop(self, trainer, stop):
        """Whether any process wants to stop after this step; trainer.interrupted becomes the signal that any of them got.
        Now and then also compares the weights."""
        if self.size == 1:
            return stop
        if trainer.step_count % CHECK_STEPS == 0 or trainer.step_count == trainer.total_steps:
            self.check_weights(trainer)
        found = self.gather([stop, trainer.signalled])
        trainer.interrupted = next((number for _, number in found if number), None)
        return any(stop for stop, _ in found)

    def check_same(self, what, value):
        """Raises UserError where the processes' values differ."""
        if self.size > 1 and len({json.dumps(found) for found in self.gather(value)}) > 1:
            raise UserError(f"the processes differ in {what}, so they can't train together: start them with the same files "
                            "and versions")

    # -- shares

    def share(self, items):
        """(this process's items, how many come before them), in order."""
        start, end = (rank * len(items) // self.size for rank in (self.rank, self.rank + 1))
        return items[start:end], start

    def rows(self, count):
        """The rows of a Batch, of `count`, that this process scores; None = all."""
        return None if self.size == 1 else self.share(list(range(count)))[0]

    def groups(self, batches, rows):
        """`rows` of each Batch without those of other processes: groups stay whole, the largest go first to the process that
        has least."""
        if self.size == 1:
            return rows
        prompt_of, sizes = [np.array(b.prompt_of) for b in batches], [np.array(b.mask).sum(axis=1) + 1 for b in batches]
        tokens, load, mine = {}, [0] * self.size, [[] for _ in batches]
        for b, chosen in enumerate(rows):
            for i in chosen:
                tokens[b, prompt_of[b][i]] = tokens.get((b, prompt_of[b][i]), 0) + sizes[b][i]
        for (b, prompt), size in sorted(tokens.items(), key=lambda item: -item[1]):
            rank = load.index(min(load))
            load[rank] += size
            if rank == self.rank:
                mine[b] += [i for i in rows[b] if prompt_of[b][i] == prompt]
        return [sorted(chosen) for chosen in mine]

    def total(self, loss, parts, gradients, weights):
        """(loss, metrics of all passes, gradients) of all processes together. gradients None: there were no rows here;
        weights: a tree of the same shapes."""
        if self.size == 1:
            return loss, parts, gradients
        if gradients is None:
            gradients = tree_map(lambda a: mx.zeros(a.shape), weights)
        found = self.gather([loss, parts])
        return sum(loss for loss, _ in found), [part for _, parts in found for part in parts], self.sum(gradients)

    def rollouts(self, problems, sample):
        """[Rollout] of all problems: sample(problems, first) gives those of this process."""
        mine, first = self.share(problems)
        found = sample(mine, first) if mine else []
        return found if self.size == 1 else self.gather_rollouts(problems, found)[0]

    def gather_rollouts(self, problems, mine, more=None):
        """([Rollout] of all problems, [what each process adds])."""
        found = self.gather([[packed(r) for r in mine], more])
        everything = [r for rollouts, _ in found for r in rollouts]
        start, whole = sum(len(rollouts) for rollouts, _ in found[:self.rank]), []
        for i, (problem, fields) in enumerate(zip(problems, everything)):
            whole.append(mine[i - start] if start <= i < start + len(mine) else unpacked(problem, fields))
        return whole, [more for _, more in found]

    def scored(self, problems, scorer, errors, rollouts, scores, extras, metrics):
        """(rollouts, scores, extras, metrics) of all processes from those of this one; errors: the scorer's before."""
        if self.size == 1:
            return rollouts, scores, extras, metrics
        more = [scores.tolist(), extras, [[*key, values] for key, values in metrics.items()], scorer.errors - errors]
        rollouts, found = self.gather_rollouts(problems, rollouts, more)
        scores = np.concatenate([np.array(rows, dtype=np.float64).reshape(-1, len(scorer.functions)) for rows, *_ in found])
        columns = {column: None for _, logged, _, _ in found for column in logged}
        extras = {c: [v for rows, logged, _, _ in found for v in logged.get(c, [None] * len(rows))] for c in columns}
        metrics = {}
        for name, kind, values in (entry for _, _, numbers, _ in found for entry in numbers):
            metrics.setdefault((name, kind), []).extend(values)
        scorer.errors = errors + sum(count for *_, count in found)
        if scorer.errors > scorer.max_errors and scorer.on_error == "skip":
            raise RewardError(f"{scorer.errors} reward errors in all processes, more than max_reward_errors = "
                              f"{scorer.max_errors}")
        return rollouts, scores, extras, metrics

    # -- the run

    def start(self, config, resume, supervised=False):
        """(run directory, checkpoint or None, configuration, what is known of earlier deaths) as the first process finds
        them; where another one can't see the checkpoint, its files are sent. Raises ConfigError for what processes can't
        share."""
        from mlx_grpo.out_of_memory import after_death
        from mlx_grpo.run_dir import find_run_dir

        found = None
        if self.size > 1:
            self.check_config(config, supervised)
        if self.first:
            run_dir, checkpoint, config = find_run_dir(config, resume)
            config, memory = after_death(run_dir, config)
            found = [str(run_dir), str(checkpoint) if checkpoint else None, asdict(config), memory]
        if self.size == 1:
            return run_dir, checkpoint, config, memory
        run_dir, checkpoint, options, memory = self.gather(found)[0]
        return Path(run_dir), checkpoint and self.copy_of(Path(checkpoint)), MLXGRPOConfig(**options), memory

    def check_config(self, config, supervised):
        """Raises ConfigError for what can't be done by several processes."""
        prompts = config.prompts_per_step * config.minibatches
        if supervised:
            raise ConfigError(f"--supervise starts one process, and a launcher started {self.size}; leave it away")
        if config.watch:
            raise ConfigError("watch reads rows as they arrive, which several processes would see at different times; run "
                              "it in one")
        if prompts < self.size:
            raise ConfigError(f"batch_size * gradient_accumulation_steps * minibatches is {prompts} prompts, fewer than the "
                              f"{self.size} processes; raise one of them")

    def copy_of(self, checkpoint):
        """The directory of a checkpoint that the first process sees, here: itself, or a copy in a temporary directory."""
        manifest = checkpoint / "manifest.json"
        seen = self.gather(sha256(manifest.read_bytes()).hexdigest() if manifest.exists() else None)
        if len(set(seen)) == 1:
            return checkpoint
        names = sorted(str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()) if self.first else None
        lacking = seen[self.rank] != seen[0]
        target = Path(self.folders.enter_context(tempfile.TemporaryDirectory())) / checkpoint.name if lacking else checkpoint
        for name in self.gather(names)[0]:
            size = self.gather((checkpoint / name).stat().st_size if self.first else None)[0]
            if lacking:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
            with open(target / name, "wb") if lacking else open(os.devnull, "wb") as file, (
                    open(checkpoint / name, "rb") if self.first else contextlib.nullcontext()) as source:
                for start in range(0, size, PIECE):
                    data = source.read(PIECE) if self.first else b""
                    file.write(self.exchange(data, self.meet(len(data)))[0])
        return target

    def check_ready(self, trainer):
        """Raises UserError where the processes don't hold the same data and weights."""
        if self.size > 1:
            digest = lambda problems: sha256(repr([(p.prompt, p.answer) for p in problems]).encode()).hexdigest()
            self.check_same("their options", asdict(trainer.args))
            self.check_same("the data", [digest(trainer.train_dataset), digest(trainer.eval_dataset)])
            self.check_weights(trainer)

    def check_weights(self, trainer):
        """Raises UserError where the processes' weights differ: a sum and a greatest value of each array are compared."""
        if self.size > 1:
            sums = [mx.stack([a.astype(mx.float32).sum(), mx.abs(a).max().astype(mx.float32)])
                    for _, a in tree_flatten(trainer.model.parameters())]
            self.check_same("the model's weights", mx.stack(sums).tolist())

    def on_first(self, manager, *args):
        """manager(*args) in the first process, a context that does nothing in the others."""
        return manager(*args) if self.first else contextlib.nullcontext()

    def __enter__(self):
        if self.size > 1:
            self.alive = self.folders.enter_context(tempfile.NamedTemporaryFile(prefix="mlx_grpo_process_"))
            fcntl.flock(self.alive, fcntl.LOCK_EX)            # the kernel's: it ends with the process, however that ends
            files = self.gather(self.alive.name)
            peers = {rank: name for rank, name in enumerate(files) if rank != self.rank and os.path.exists(name)}
            threading.Thread(target=self.watch, args=(peers,), daemon=True).start()
            if not self.first:                                # one process talks
                silence = self.folders.enter_context(open(os.devnull, "w"))
                self.folders.enter_context(contextlib.redirect_stdout(silence))
        return self

    def __exit__(self, kind, error, traceback):
        """All processes leave together: after an error of one, by errors in all."""
        if self.size == 1:
            return
        with self.folders:
            try:
                if not isinstance(error, PeerFailed):
                    self.meet(error=error)
            finally:
                self.over.set()

    def watch(self, peers):
        """End this process, which may be waiting in MLX for ever, when a process of this machine has died without a word, or
        the wait is too long. What is on the disk stays whole."""
        gone = dict.fromkeys(peers, 0)
        while not self.over.wait(0.5):
            for rank, name in peers.items():
                gone[rank] += not held(name)
                if gone[rank] > 6:                            # three seconds: it may be leaving in peace, as we are
                    self.give_up(f"process {rank} has died")
            since = self.since
            if since is not None and time.monotonic() - since > PATIENCE_S:
                self.give_up(f"no word from the other processes in {PATIENCE_S // 60} minutes")

    def give_up(self, why):
        print(f"error: {why}, so process {self.rank} ends; go on with --resume", file=sys.stderr, flush=True)
        os._exit(1)


def held(name):
    """Whether a living process holds the lock of a file."""
    try:
        with open(name) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def packed(rollout):
    """A Rollout as JSON holds it, without its problem."""
    kept = None if rollout.kept is None else [
        [str(sets.dtype), sets.shape, base64.b64encode(sets.tobytes()).decode()] for sets in map(np.asarray, rollout.kept)]
    return {name: vars(rollout)[name] for name in SENT} | {"kept": kept}


def unpacked(problem, fields):
    read = lambda kind, shape, data: np.frombuffer(base64.b64decode(data), dtype=kind).reshape(shape)
    return Rollout(problem, **fields | {"kept": fields["kept"] and [read(*sets) for sets in fields["kept"]]})
