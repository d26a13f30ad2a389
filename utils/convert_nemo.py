"""
Hugging Face models to NeMo and back, on any CPU, without NeMo, Megatron or CUDA.

    python utils/convert_nemo.py import --source HF_DIR_OR_ID --output DIR --dtype bfloat16
    python utils/convert_nemo.py export --path CHECKPOINT --output DIR
    python utils/convert_nemo.py inspect PATH
    python utils/convert_nemo.py verify HF_DIR_OR_ID CHECKPOINT
    python utils/convert_nemo.py latest EXPERIMENT_DIR

NVIDIA's own form (model=..., source=...) works as it is, with `nemo llm` replaced:

    python utils/convert_nemo.py import model=llama3_8b source=hf://org/name output_path=DIR
    python utils/convert_nemo.py export path=DIR target=hf output_path=DIR

Needs torch and pyyaml (pip install 'mlx-grpo[convert]'). Every tensor arrives bit for bit; see docs/nemo.md.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))   # runs from a plain clone, from any directory

import argparse                                                # noqa: E402
import contextlib                                              # noqa: E402
import importlib.util                                          # noqa: E402
import json                                                    # noqa: E402
from difflib import get_close_matches                          # noqa: E402

from mlx_grpo import UserError, run_command                    # noqa: E402
from mlx_grpo.checkpoints import latest                        # noqa: E402
from mlx_grpo.command_line import Parser                       # noqa: E402
from mlx_grpo.files import human_bytes                         # noqa: E402
from mlx_grpo.help_text import help_of                      # noqa: E402
from mlx_grpo.nemo_convert import export_hf, import_hf         # noqa: E402
from mlx_grpo.nemo_families import FAMILIES, FORMATS           # noqa: E402
from mlx_grpo.nemo_inspect import inspect, lines               # noqa: E402
from mlx_grpo.nemo_verify import PROMPTS, validate_conversion  # noqa: E402

DTYPES = ("auto", "float32", "bfloat16", "float16")
NVIDIA_KEYS = {   # `nemo llm` key -> our flag
    "import": {"source": "--source", "output_path": "--output", "model": "--model", "overwrite": "--overwrite"},
    "export": {"path": "--path", "output_path": "--output", "target": "--target", "overwrite": "--overwrite"},
}
FLAGS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def from_nvidia(tokens, say):
    """Our command line for NVIDIA's: key=value tokens become flags; trainer.* has no effect, and that is said."""
    command = tokens[0] if tokens else None
    if command not in NVIDIA_KEYS:
        return tokens
    keys, out, after_flag = NVIDIA_KEYS[command], [command], False
    for token in tokens[1:]:
        key, equals, value = token.partition("=")
        if token.startswith("-") or not equals or after_flag:
            after_flag = token in ("--model-config", "--source", "--output", "--path", "--tokenizer")
            out.append(token)
        elif key.startswith("trainer."):
            say(f"{token} has no effect here: nothing is run on devices")
        elif key.startswith(("model_config.", "model.config.")):
            out += ["--model-config", f"{key.split('config.', 1)[1]}={value}"]
        elif keys.get(key) == "--overwrite":
            if value.lower() not in FLAGS:
                raise UserError(f"{token}: overwrite is true or false")
            out += ["--overwrite"] * FLAGS[value.lower()]
        elif key in keys:
            out.append(f"{keys[key]}={value}")
        else:
            near = get_close_matches(key, [*keys, "model_config.", "trainer."], n=1)
            raise UserError(f"{command}: unknown option {token!r}" + (f"; did you mean {near[0]}=...?" if near else
                            f"; known: {', '.join(f'{k}=' for k in keys)}, model_config.NAME=, trainer.NAME="))
    return out


def make_parser():
    parser = Parser(prog="convert_nemo.py", **help_of(__doc__))
    commands = parser.add_subparsers(dest="command", required=True, metavar="import|export|inspect|verify|latest")
    one = commands.add_parser("import", help="a Hugging Face model to a NeMo checkpoint")
    one.add_argument("--source", required=True, help="a model directory, org/name or hf://org/name")
    one.add_argument("--output", required=True, help="the directory to write, or the .nemo file for nemo1")
    one.add_argument("--format", choices=FORMATS, default="nemo2", help="nemo2 (default), bridge (Megatron-Bridge) or "
                                                                        "nemo1 (.nemo)")
    one.add_argument("--model", help="NVIDIA's name of the recipe, such as llama3_8b; only checked against the source")
    back = commands.add_parser("export", help="a NeMo checkpoint to a Hugging Face directory")
    back.add_argument("--path", required=True, help="a NeMo 2 or Megatron-Bridge directory, or a .nemo file")
    back.add_argument("--output", required=True, help="the directory to write")
    back.add_argument("--target", choices=("hf",), default="hf", help="hf, the only one")
    back.add_argument("--tokenizer", metavar="DIR", help="take the tokenizer from here (NeMo 1 archives keep only its "
                                                         "name)")
    for parser_ in (one, back):
        parser_.add_argument("--dtype", choices=DTYPES, default="auto", help="convert the weights; auto keeps each "
                                                                             "tensor's own")
        parser_.add_argument("--model-config", metavar="KEY=VALUE", action="append", default=[],
                             help="replace a value of the configuration: num_layers, hidden_size, ffn_hidden_size, ...")
        parser_.add_argument("--resume", action="store_true", help="go on where an interrupted run of the same command "
                                                                   "stopped")
        parser_.add_argument("--overwrite", action="store_true", help="replace what is at --output")
        parser_.add_argument("-y", "--yes", action="store_true", help="don't ask before a conversion at a terminal")
    look = commands.add_parser("inspect", help="what a checkpoint or model directory holds, without loading weights")
    look.add_argument("path")
    look.add_argument("--json", action="store_true", help="for machines")
    check = commands.add_parser("verify", help="compare a Hugging Face model with a checkpoint, tensor by tensor and "
                                               "by logits")
    check.add_argument("hf", metavar="HF_DIR_OR_ID")
    check.add_argument("checkpoint", metavar="CHECKPOINT")
    check.add_argument("--prompt", action="append", help=f"instead of {' and '.join(PROMPTS)}")
    newest = commands.add_parser("latest", help="print the newest checkpoint below a directory")
    newest.add_argument("directory", metavar="DIR")
    return parser


def model_config(pairs):
    """{"num_layers": 4} from ["num_layers=4"]; values as JSON where they are, else text."""
    overrides = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"--model-config {pair!r}: write KEY=VALUE, such as num_layers=32")
        try:
            overrides[key] = json.loads(value)
        except json.JSONDecodeError:
            overrides[key] = value
    return overrides


def check_recipe(name, report_family):
    """Raises UserError where NVIDIA's recipe name (llama3_8b) belongs to another architecture than the source has."""
    names = {"codellama": "llama", "qwen25": "qwen2", "codegemma": "gemma", **{f: f for f in FAMILIES}}
    family = next((names[n] for n in sorted(names, key=len, reverse=True) if name.lower().startswith(n)), None)
    if family is None or family != report_family:
        raise UserError(f"model={name} " + ("is no architecture known here" if family is None else f"is a {family} "
                                                                                                   "recipe")
                        + f", but the source is a {report_family} model; the source decides, so leave model= out or "
                          "correct it")


@contextlib.contextmanager
def progress_bar(title):
    """Yields progress(done, total) in bytes, drawn on standard error with the speed and the time left; silent in a
    pipe."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    columns = TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def confirm(arguments, text):
    """Ask before a conversion where someone sits at a terminal and -y wasn't given, as `nemo llm` does."""
    if arguments.yes or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return
    print(f"{text}. Continue? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UserError("stopped; nothing was written")


def tell(report):
    """The report of a conversion, for people."""
    print(f"{report['output']}: {report['architecture']} as {report['format']}, {report['tensors']} tensors, "
          f"{report['parameters']:,} parameters, "
          f"{human_bytes(report['bytes'])}, {report['dtype']}, tokenizer: {', '.join(report['tokenizer']) or 'none'}")
    for name in report["left_out"]:
        print(f"left out: {name}")
    for note in report["notes"]:
        print(f"note: {note}")


def run_conversion(arguments):
    common = dict(dtype=None if arguments.dtype == "auto" else arguments.dtype,
                  overrides=model_config(arguments.model_config),
                  resume=arguments.resume, overwrite=arguments.overwrite)
    if arguments.command == "import":
        if arguments.model:
            check_source_family(arguments)
        confirm(arguments, f"import {arguments.source} to {arguments.output} as {arguments.format}")
        with progress_bar("import") as progress:
            report = import_hf(arguments.source, arguments.output, arguments.format, progress=progress, **common)
    else:
        confirm(arguments, f"export {arguments.path} to {arguments.output}")
        with progress_bar("export") as progress:
            report = export_hf(arguments.path, arguments.output, tokenizer=arguments.tokenizer, progress=progress,
                               **common)
    tell(report)


def check_source_family(arguments):
    from mlx_grpo.nemo_config import spec_from_hf
    from mlx_grpo.nemo_files import read_json
    from mlx_grpo.nemo_hf import HubFolder, fetch
    folder = HubFolder(fetch(arguments.source))
    check_recipe(arguments.model, spec_from_hf(read_json(folder, "config.json"))[0].name)


def main(tokens=None):
    tokens = from_nvidia(list(sys.argv[1:] if tokens is None else tokens), lambda text: print(text, file=sys.stderr))
    arguments = make_parser().parse_args(tokens)
    if arguments.command == "latest":
        print(latest(arguments.directory).path)
        return 0
    for module, package in (("torch", "torch"), ("yaml", "pyyaml")):
        if importlib.util.find_spec(module) is None:
            raise UserError(f"convert_nemo reads PyTorch and YAML files and needs {package}: pip install {package}")
    if arguments.command == "inspect":
        found = inspect(arguments.path)
        print(json.dumps(found, indent=2, ensure_ascii=False) if arguments.json else "\n".join(lines(found)))
    elif arguments.command == "verify":
        return 0 if validate_conversion(arguments.hf, arguments.checkpoint, arguments.prompt or PROMPTS) else 1
    else:
        try:
            run_conversion(arguments)
        except KeyboardInterrupt:
            return 130
    return 0


if __name__ == "__main__":
    run_command(main)
