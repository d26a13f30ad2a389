"""
Lists, backs up, checks, thins out and compares checkpoints: our own training runs', Hugging Face's, NeMo's.

    python utils/checkpoints.py list DIR             # everything below DIR, newest first
    python utils/checkpoints.py latest DIR           # the newest valid one's path, `*-last` before others
    python utils/checkpoints.py backup PATH          # to backups/, compared by hash
    python utils/checkpoints.py verify PATH          # reads every byte
    python utils/checkpoints.py prune DIR --keep 3   # what could go; asks, or goes ahead with --yes
    python utils/checkpoints.py diff A B             # which tensors differ and by how much

From Python: CheckpointManager(base_dir). docs/checkpoints.md tells more.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))   # runs from a plain clone, from any directory

import json                                                    # noqa: E402
from datetime import datetime                                  # noqa: E402

from mlx_grpo import UserError, run_command                    # noqa: E402
from mlx_grpo import checkpoint_diff, checkpoint_prune         # noqa: E402
from mlx_grpo.checkpoint_backup import backup, found_at        # noqa: E402
from mlx_grpo.checkpoint_find import (                         # noqa: E402, F401
    Found, checkpoint_at, entries, find_checkpoints, latest, why_incomplete)
from mlx_grpo.checkpoint_info import as_json, describe, fault, list_all, table, verify   # noqa: E402
from mlx_grpo.command_line import Parser                       # noqa: E402
from mlx_grpo.files import human_bytes                         # noqa: E402
from mlx_grpo.help_text import help_of                      # noqa: E402


class CheckpointManager:
    """The checkpoints in `base_dir` and below, for scripts. Raises UserError where the directory doesn't exist."""

    def __init__(self, base_dir="checkpoints"):
        self.base_dir = Path(base_dir)

    def list_nemo_checkpoints(self):
        """Those of NeMo 1, NeMo 2 and Megatron-Bridge, newest first: dicts with what `list --json` has and `size_gb`
        (1e9 bytes) and `modified` (a datetime)."""
        return self.of_formats("nemo1", "nemo2", "bridge")

    def list_hf_checkpoints(self):
        """Those that transformers opens, our own full-parameter runs' among them; as list_nemo_checkpoints."""
        models = self.of_formats("hf", "mlx")
        return [one for one in models if not (Path(one["path"]) / "adapters.safetensors").exists()]

    def of_formats(self, *formats):
        return [as_json(info) | {"size_gb": info.bytes / 1e9, "modified": datetime.fromisoformat(info.date)}
                for info in list_all(self.base_dir) if info.format in formats]

    def backup_checkpoint(self, source_path, backup_name=None):
        """Back up to base_dir/backups/backup_name ({name}_backup_{YYYYmmdd_HHMMSS} without one); returns its Path.
        Its files were compared with the original by hash."""
        return backup(source_path, self.base_dir / "backups", backup_name).path


def list_command(arguments):
    infos = list_all(arguments.directory)
    if arguments.json:
        print(json.dumps([as_json(info) for info in infos], indent=2))
    elif infos:
        print("\n".join(table(infos, Path(arguments.directory))))
    else:
        raise UserError(f"no checkpoint in {arguments.directory} or below (looked for NeMo, Megatron-Bridge, Hugging "
                        "Face and our own)")


def latest_command(arguments):
    """The path on standard output; on standard error what was passed over, and why."""
    def why_not(found):
        if why := fault(found, hashes=True):
            print(f"passed over {found.path}: {why}", file=sys.stderr)
        return why

    for path, found in entries(arguments.directory):
        if not found and (why := why_incomplete(path)):
            print(f"passed over {path}: {why}", file=sys.stderr)
    found = latest(arguments.directory, why_not)
    print(json.dumps(as_json(describe(found)), indent=2) if arguments.json else found.path)


def backup_command(arguments):
    made = backup(arguments.path, arguments.dest, arguments.name, links=not arguments.copy)
    print(made.path)
    note = f", {made.linked} linked: they share their bytes with the original, so that only deletion is survived " \
           "(--copy gives them their own)" if made.linked else ""
    print(f"{made.copied} files copied and compared by hash ({human_bytes(made.bytes)}){note}", file=sys.stderr)


def verify_command(arguments):
    path = Path(arguments.path)
    if path.exists() and not checkpoint_at(path) and (why := why_incomplete(path)):
        print(f"wrong: {why}")
        return 1
    found = found_at(path)
    faults, looked = verify(found)
    print("\n".join(f"looked at {line}" for line in looked))
    print("\n".join(f"wrong: {line}" for line in faults) or f"{found.path} is whole")
    return 1 if faults else 0


def confirmed(question):
    """Whether the user answers y on the terminal; the end of the input is a no."""
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def prune_command(arguments):
    """Shows the plan; removes after --yes, or a y on the terminal."""
    result = checkpoint_prune.plan(arguments.directory, arguments.keep, arguments.keep_best)
    for path, why in result.untouched.items():
        print(f"leave   {path.name}: not valid ({why}); not counted, remove it yourself")
    print("\n".join([f"keep    {path.name}" for path in result.kept]
                    + [f"remove  {path.name}" for path in [*result.removed, *result.links]]))
    if not result.removed:
        print("nothing to remove")
        return
    count = len(result.removed)
    what = f"{count} checkpoint{'s' if count > 1 else ''}, {human_bytes(result.bytes)}"
    if not arguments.yes:
        if not sys.stdin.isatty():
            print(f"{what}: nothing was removed; add --yes to remove them")
            return
        if not confirmed(f"remove {what}?"):
            print("nothing was removed")
            return
    checkpoint_prune.remove(result)
    print(f"removed {what}")


def diff_command(arguments):
    difference = checkpoint_diff.diff(found_at(arguments.a), found_at(arguments.b))
    print(json.dumps(checkpoint_diff.as_json(difference), indent=2) if arguments.json
          else "\n".join(checkpoint_diff.lines(difference)))
    return 0 if difference.none else 1


def parse(argv=None):
    parser = Parser(prog="checkpoints.py", **help_of(__doc__))
    commands = parser.add_subparsers(dest="command", required=True, metavar="list|latest|backup|verify|prune|diff")

    def command(name, function, help):
        one = commands.add_parser(name, help=help, description=help)
        one.set_defaults(run=function)
        return one

    for name, function, help in (("list", list_command, "everything below DIR, newest first, valid or why not"),
                                 ("latest", latest_command, "print the path of the newest valid checkpoint below DIR")):
        one = command(name, function, help)
        one.add_argument("directory", metavar="DIR")
        one.add_argument("--json", action="store_true", help="all that is known, for programs")
    one = command("backup", backup_command, "copy a checkpoint and compare the copy by hash")
    one.add_argument("path", metavar="PATH")
    one.add_argument("--name", help="name of the backup (default: {name}_backup_{YYYYmmdd_HHMMSS})")
    one.add_argument("--dest", default="backups", metavar="DIR", help="directory that takes it (default: backups)")
    one.add_argument("--copy", action="store_true", help="no hard links: every file gets bytes of its own")
    one = command("verify", verify_command, "read every byte of a checkpoint; exit code 1 where something is wrong")
    one.add_argument("path", metavar="PATH")
    one = command("prune", prune_command, "show which checkpoints of a run are older than the newest N; remove them")
    one.add_argument("directory", metavar="DIR")
    one.add_argument("--keep", type=int, required=True, metavar="N", help="how many valid ones stay, the newest")
    one.add_argument("--keep-best", action="store_true", help="the best one stays as well")
    one.add_argument("--yes", action="store_true", help="remove without asking")
    one = command("diff", diff_command, "which tensors differ and by how much; exit code 1 where some do")
    one.add_argument("a", metavar="A")
    one.add_argument("b", metavar="B")
    one.add_argument("--json", action="store_true", help="every changed tensor, for programs")
    return parser.parse_args(argv)


def main(argv=None):
    arguments = parse(argv)
    return arguments.run(arguments)


if __name__ == "__main__":
    run_command(main)
