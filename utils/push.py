"""
A run's checkpoint to the Hugging Face hub, with a model card made from the run's files.

    python mlx_grpo.py push outputs/demo-1 --repo me/demo --dry-run     the card and the files; nothing is sent
    python mlx_grpo.py push outputs/demo-1 --repo me/demo --private --license apache-2.0

The checkpoint is checked against its manifest first. Optimizer state and logs stay here. A push is one commit: it is there
as a whole or not at all (docs/sharing.md).
"""

import fnmatch
import hashlib
import json
import re
import sys
import tempfile
import time
from pathlib import Path

from mlx_grpo import OLD_POLICY, REFERENCE, WINDOW, UserError, checkpoints_of, newest_valid
from mlx_grpo.files import human_bytes
from mlx_grpo.manifest import NAME as MANIFEST
from mlx_grpo.manifest import READ_BY_LOADERS, check_manifest, manifest_text, read_manifest
from mlx_grpo.push_card import HUB_ID, base_of, card, read_object
from mlx_grpo.report import open_runs
from mlx_grpo.report_curves import README, charts_for, curves_png, curves_svg

TRAINING_STATE = ("optimizer.safetensors", "trainer_state.json", OLD_POLICY, REFERENCE, WINDOW)
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.npz", "*.bin")
TRIES, LONGEST_WAIT = 5, 30          # of an upload; seconds


def add_arguments(parser):
    parser.add_argument("run", help="a run's directory, or one of its checkpoints")
    parser.add_argument("--repo", metavar="USER/NAME", required=True, help="the repository, made where there is none")
    parser.add_argument("--checkpoint", metavar="N", help="best, last or a step (default: best if there is one, else last)")
    parser.add_argument("--private", action="store_true", help="where the repository is made now: only you see it")
    parser.add_argument("--license", metavar="ID", help="licence for the card: apache-2.0, mit, other, ...")
    parser.add_argument("--license-name", metavar="NAME", help="with --license other: its name")
    parser.add_argument("--license-link", metavar="URL", help="with --license other: where it stands")
    parser.add_argument("--base-model", metavar="ID", help="hub id of the base model, where the run's files don't tell")
    parser.add_argument("--card", metavar="FILE", help="a card of your own instead of the generated one")
    parser.add_argument("--png", action="store_true", help="the curves as PNG (needs matplotlib) instead of SVG")
    parser.add_argument("--with-optimizer", action="store_true", help="optimizer and trainer state too, to resume elsewhere")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")
    parser.add_argument("--dry-run", action="store_true", help="print the card and the files; nothing is sent")


# ---- what is pushed

def find_checkpoint(path, wanted):
    """(run directory, checkpoint), its manifest checked byte for byte. Raises UserError where there is none, or it is not
    whole."""
    path = Path(path)
    if (path / MANIFEST).is_file() or (path / "trainer_state.json").is_file():
        if wanted:
            raise UserError(f"{path} is a checkpoint itself; leave --checkpoint away, or name the run")
        run_dir, found = path.resolve().parent, path.resolve()
    else:
        run_dir, there = path, checkpoints_of(path)
        if wanted in (None, "best", "last"):
            link = path / f"checkpoint-{wanted or 'best'}"
            found = link.resolve() if link.exists() else there[-1] if there and wanted != "best" else None
        else:
            found = path / f"checkpoint-{wanted}"
        if found is None or not found.is_dir():
            steps = ", ".join(p.name.removeprefix("checkpoint-") for p in there) or "none"
            raise UserError(f"{path} has no checkpoint{f' {wanted!r}' if wanted else ''} (there are: {steps})")
    if trouble := check_manifest(found):
        valid = newest_valid(run_dir)[0]
        raise UserError(f"{found} is not pushed: {trouble}; " + (f"the newest whole one is --checkpoint "
                        f"{valid.name.removeprefix('checkpoint-')}" if valid else "no checkpoint of the run is whole"))
    return run_dir, found


def cleaned(file, base):
    """The bytes of a JSON file without the name of a directory here as the model's (`base` in its place, or nothing); None
    where it names none."""
    found = read_object(file)
    named = [key for key in ("model", "_name_or_path", "name_or_path") if isinstance(found.get(key), str) and found[key]
             and not (found[key] == base or re.fullmatch(HUB_ID, found[key]) and not Path(found[key]).exists())]
    if not named:
        return None
    for key in named:
        found[key] = base or ""
    return (json.dumps(found, indent=2, ensure_ascii=False) + "\n").encode()


def contents(args):
    """({path in the repository: Path, or bytes}, the checkpoint's step) of a push. Raises UserError."""
    run_dir, checkpoint = find_checkpoint(args.run, args.checkpoint)
    step = json.loads((checkpoint / "trainer_state.json").read_text())["step"]
    record = read_object(run_dir / "config.json")
    if not isinstance(record.get("config"), dict) or not isinstance(record["config"].get("model_name"), str):
        raise UserError(f"{run_dir / 'config.json'} is missing or damaged, so no card can be made; a run "
                        "of `train` or `sft` has one")
    entries = read_manifest(checkpoint / MANIFEST)
    names = [name for name in entries if args.with_optimizer or name not in TRAINING_STATE]
    adapters = "adapter_config.json" in names
    base = args.base_model or base_of(record["config"]["model_name"])
    if adapters and not base:
        raise UserError(f"{checkpoint} holds adapters, which need their base, and "
                        f"{Path(record['config']['model_name']).name} is no hub id; name it with --base-model")
    files = {name: checkpoint / name for name in names}
    for name in {"config.json", "tokenizer_config.json", "adapter_config.json"} & files.keys():
        if (content := cleaned(files[name], base)) is not None:
            files[name] = content
    listed = {name: entries[name] if isinstance(files[name], Path) else entry_of(files[name]) for name in names}
    files[MANIFEST] = manifest_text(listed).encode()
    plot, picture = draw(run_dir, args.png)
    if plot:
        files[plot] = picture
    files["README.md"] = own_card(args.card) if args.card else card(
        record, rows_of(run_dir), repo=args.repo, step=step, problems=held_out(run_dir), base=base, adapters=adapters,
        plot=plot, license=args.license, license_name=args.license_name, license_link=args.license_link).encode()
    return files, step


def entry_of(content):
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def rows_of(run_dir):
    return open_runs([run_dir])[0].metrics() if (run_dir / "metrics.jsonl").is_file() else []


def held_out(run_dir):
    """How many held-out problems an evaluation of the run had."""
    file = run_dir / "eval_completions.jsonl"
    if not file.is_file():
        return 0
    with open(file, encoding="utf-8") as lines:
        first = json.loads(next(lines))["step"]
        return 1 + sum(json.loads(line)["step"] == first for line in lines)


def draw(run_dir, png):
    """(name, bytes) of the run's curves; (None, None) where it logged nothing that can be drawn."""
    summaries = [run.summary() for run in open_runs([run_dir])] if (run_dir / "metrics.jsonl").is_file() else []
    if not any(drawable(run) for run in summaries):
        return None, None
    return ("curves.png", curves_png(summaries)) if png else ("curves.svg", curves_svg(summaries).encode())


def drawable(run):
    """Whether one of the charts that curves_svg draws has a value above 0."""
    charts = [chart for chart in charts_for(run["metrics"])[0] if chart["title"] in README]
    return any(any(run["metrics"].get(key, ())) for chart in charts for key in chart["series"].values())


def own_card(file):
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise UserError(f"--card {file}: {error.strerror}") from error


# ---- sending it

def leftovers(api, repo, files):
    """Files of an earlier push that are no part of this one, to be removed in the same commit. Raises UserError where the
    repository holds other weights, which whoever loads it would get as well."""
    all_there, earlier = set(api.list_repo_files(repo)), set()
    there = all_there - files.keys()
    if there and MANIFEST in all_there:
        with tempfile.TemporaryDirectory() as directory:
            listed = read_manifest(Path(api.hf_hub_download(repo, MANIFEST, local_dir=directory)))
        earlier = set() if isinstance(listed, str) else set(listed)
    foreign = [name for name in sorted(there - earlier) if any(fnmatch.fnmatch(name, pattern) for pattern in WEIGHTS)]
    if foreign:
        raise UserError(f"{repo} holds {foreign[0]}, which would be loaded beside the new weights; push to another "
                        "repository, or delete it there first")
    return sorted(name for name in there & earlier if name.endswith(READ_BY_LOADERS))


def send(api, repo, files, private, message):
    """Make the repository where there is none, and one commit of the files. Returns the hub's CommitInfo."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api.create_repo(repo, private=private, exist_ok=True)
    operations = [CommitOperationDelete(name) for name in leftovers(api, repo, files)]
    operations += [CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
                   for name, content in sorted(files.items())]
    return api.create_commit(repo, operations, commit_message=message)


def causes(error):
    while error:
        yield error
        error = error.__cause__ or error.__context__


def refusal(error):
    """Why trying again can't help, or None where it may: a broken connection, a busy server."""
    from huggingface_hub import errors

    for cause in causes(error):
        status = cause.response.status_code if isinstance(cause, errors.HfHubHTTPError) else None
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return "offline mode is on (HF_HUB_OFFLINE); unset it"
        if status in (401, 403):
            return f"the hub answered {status}: the token may not write there; `hf auth login`, or check the name"
        if status and status < 500 and status not in (408, 429):
            return f"the hub answered {status}: {one_line(cause)}"
        if isinstance(cause, FileNotFoundError) and cause.filename:
            return f"{Path(cause.filename).name} is gone: the checkpoint was removed meanwhile"
    if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
        return one_line(error)
    return None


def one_line(error):
    return " ".join(str(error).split())[:400] or type(error).__name__


def push(api, repo, files, private, message):
    """`send`, again after what may pass, with growing pauses. Raises UserError that says how to go on."""
    from huggingface_hub.errors import HTTPError

    for attempt in range(1, TRIES + 1):
        try:
            return send(api, repo, files, private, message)
        except (HTTPError, OSError, RuntimeError, ValueError) as error:    # RuntimeError: the client's, around an upload's
            if reason := refusal(error):
                raise UserError(f"{repo}: {reason}") from error
            last = list(causes(error))[-1]
            if attempt == TRIES:
                raise UserError(f"{repo}: the upload broke off {TRIES} times, at last by {type(last).__name__} "
                                f"({one_line(last)}). Nothing there has changed and nothing here is lost; the same command "
                                "goes on, and files that have arrived aren't sent again") from error
            wait = min(2 ** attempt, LONGEST_WAIT)
            print(f"{type(last).__name__}: {one_line(last)}; again in {wait} s ({attempt} of {TRIES - 1})",
                  file=sys.stderr, flush=True)
            time.sleep(wait)


def run(args):
    """Put a run's checkpoint on the Hugging Face hub, with a model card made from the run's files: results before and
    after, curves, options, data, base model. One commit, whole or not at all; optimizer state stays here.

    examples:
      python mlx_grpo.py push outputs/demo-1 --repo me/demo --dry-run
      python mlx_grpo.py push outputs/demo-1 --repo me/demo --private --license apache-2.0
    """
    if not re.fullmatch(HUB_ID, args.repo):
        raise UserError(f"--repo {args.repo}: expected USER/NAME")
    if (args.license_name or args.license_link) and args.license != "other":
        raise UserError("--license-name and --license-link belong to --license other")
    if args.card and args.license:
        raise UserError("--card is used as it is: write the licence into it, and leave --license away")
    files, step = contents(args)
    size = lambda content: len(content) if isinstance(content, bytes) else content.stat().st_size
    if args.dry_run:
        print(files["README.md"].decode("utf-8", "replace"))
        print(f"\n{len(files)} files for {args.repo}" + (" (private)" if args.private else "") + ":")
    for name, content in sorted(files.items()):
        print(f"{human_bytes(size(content)):>10}  {name}")
    if args.dry_run:
        print("dry run: nothing was sent")
        return 0
    from huggingface_hub import HfApi, get_token

    if not get_token():
        raise UserError("no token for the hub: run `hf auth login`, or set HF_TOKEN")
    info = push(HfApi(), args.repo, files, args.private, args.message or f"Step {step}")
    print(info.commit_url)
    return 0
