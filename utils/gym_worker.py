"""
The other end of gym_tasks.py: a process that makes reasoning_gym's rows and scores answers to them.

It is a process of its own because some of the library's scorers hand the model's text to `eval` or to sympy's parser, and
others can take for ever on it, and because some tasks depend on the order of sets, which PYTHONHASHSEED fixes at the start
of a process. Requests and replies are lines of JSON on its standard input and output.
"""

import ast
import dataclasses
import io
import json
import os
import sys
import warnings

FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.kill", "subprocess.Popen",
             "socket.connect", "socket.bind", "socket.sendto", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link",
             "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.putenv", "shutil.", "ctypes.")


def serve():
    """Answer requests until standard input ends."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stdout = io.StringIO()                    # some tasks print
    warnings.simplefilter("ignore")
    import reasoning_gym
    from reasoning_gym.algorithmic import binary_matrix, spiral_matrix, string_insertion

    for module in (binary_matrix, spiral_matrix, string_insertion):
        module.eval = ast.literal_eval            # they evaluate the model's answer, which should be a list
    made, guarded = {}, []
    out.write("ready\n")
    out.flush()
    for line in sys.stdin:
        request = json.loads(line)
        if "answer" in request and not guarded:
            sys.addaudithook(refuse)              # from the first answer on: model text is never to reach the system
            guarded.append(True)
        sys.stdout.truncate(0)
        out.write(json.dumps(reply(reasoning_gym, request, made), default=str) + "\n")
        out.flush()


def refuse(event, args):
    """An audit hook: no programs, no network, no writing. A hurdle for text that is evaluated, not a sandbox."""
    if event == "open":
        writes = set(args[1] or "") & set("wax+") or args[2] & (os.O_WRONLY | os.O_RDWR)
    else:
        writes = False
    if writes or event.startswith(FORBIDDEN):
        raise PermissionError(f"{event} while scoring an answer")


def reply(gym, request, made):
    """What a request is answered: {"rows": [entry]}, {"score": number}, or {"error": text}. made: datasets and entries
    by what describes them."""
    key = json.dumps([request["task"], request["options"], request["seed"], request["size"]])
    try:
        if key not in made:
            made[key] = create(gym, request), {}
        dataset, entries = made[key]
        for index in request["rows"]:
            if index not in entries:
                entries[index] = dataset[index]
    except (AssertionError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:     # a refusal
        named = isinstance(error, (AssertionError, ValueError)) and str(error)
        return {"error": named or f"{type(error).__name__}: {error}"}
    if "answer" not in request:
        return {"rows": [entries[index] for index in request["rows"]]}
    try:
        return {"score": float(dataset.score_answer(request["answer"], entries[request["rows"][0]]))}
    except Exception as error:                    # a scorer stumbles over the text: prime_factorization over any word
        return {"score": 0.0, "stumbled": f"{type(error).__name__}: {error}"}


def create(gym, request):
    """The dataset of a request. Its option `level` is that of the task's own curriculum. Raises ValueError."""
    from reasoning_gym.factory import CURRICULA, DATASETS, create_curriculum

    task, options = request["task"], dict(request["options"])
    if task not in DATASETS or task == "composite":
        raise ValueError(f"there is no task {task!r}; there are {', '.join(sorted(set(DATASETS) - {'composite'}))}")
    declared = {f.name for f in dataclasses.fields(DATASETS[task][1])} - {"seed", "size"}
    if "level" in options and "level" not in declared:
        if task not in CURRICULA:
            raise ValueError(f"{task} has no curriculum, so no level; its options are {', '.join(sorted(declared))}")
        level, curriculum = options.pop("level"), create_curriculum(task)
        if type(level) is not int or level < 0:
            raise ValueError(f"level must be a whole number from 0, got {level!r}")
        curriculum.set_global_level(level)
        made = dataclasses.asdict(curriculum.generate_configuration())
        options = {name: made[name] for name in declared} | options
    if unknown := sorted(set(options) - declared):
        raise ValueError(f"{task} has no option {unknown[0]!r}; it has {', '.join(sorted(declared))}, level")
    defaults = {f.name: f.default for f in dataclasses.fields(DATASETS[task][1])}
    options = {k: tuple(v) if isinstance(v, list) and isinstance(defaults[k], tuple) else v for k, v in options.items()}
    return gym.create_dataset(task, **options | {"seed": request["seed"], "size": request["size"]})
