"""
Takes LoRA and DoRA adapters between mlx-lm and PEFT, and fuses them into their base model.

    python utils/adapters.py to-peft   --adapter outputs/run/checkpoint-100 --output adapters/peft
    python utils/adapters.py from-peft --adapter adapters/peft --output adapters/mlx --model BASE
    python utils/adapters.py fuse      --adapter outputs/run/checkpoint-100 --output models/fused --dequantize
    python utils/adapters.py inspect   adapters/peft

mlx-lm's side is adapters.safetensors with adapter_config.json (what mlx_grpo.py and mlx_lm.lora write, and
mlx_lm.generate --adapter-path reads), PEFT's is adapter_model.safetensors with adapter_config.json (vLLM, TRL,
transformers). What one side can't hold is refused by name; nothing is dropped. The base model is needed for its names
and shapes; without --model it's the one that the adapter names. The output appears once it is whole. docs/adapters.md
tells more.
"""

import json
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # runs from a plain clone, from any directory

from mlx_grpo import UserError, run_command, shipped_path  # noqa: E402
from mlx_grpo import peft_files, peft_verify  # noqa: E402
from mlx_grpo.adapter_files import WEIGHTS, load_onto, read_mlx, read_mlx_config, write_mlx  # noqa: E402
from mlx_grpo.adapter_fuse import NotEqual, fuse  # noqa: E402
from mlx_grpo.checked_load import check_safetensors, load_checked, read_json  # noqa: E402
from mlx_grpo.command_line import Parser  # noqa: E402
from mlx_grpo.files import atomic_directory  # noqa: E402
from mlx_grpo.help_text import help_of  # noqa: E402
from mlx_grpo.hub_files import fetch_model  # noqa: E402
from mlx_grpo.peft_config import read_peft_config  # noqa: E402

import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

MLX_NAME, PEFT_NAME = "model", "base_model_name_or_path"     # where each adapter_config.json names its base


# ---- commands --------------------------------------------------------------------------------------------------------

def to_peft(options, say=print):
    """Write the mlx-lm adapter as a PEFT directory. Raises NotEqual where --verify finds different logits."""
    directory = Path(options.adapter)
    name = base_name(options.model, read_mlx_config(directory), MLX_NAME)
    path, model, config = open_base(name, options)
    linears = linear_shapes(model)
    adapter, bare = read_mlx(model, directory)
    tell_bare(bare, say)
    theirs = options.base_name or original_of(path, name)
    if "quantization" in config:
        say(f"note: trained on {bits(config)}-bit weights; on the float ones of {theirs} its logits differ by what "
            "quantising changed")
    with atomic_directory(options.output) as work:
        peft_files.write_peft(adapter, work, theirs, config["model_type"], linears)
        if options.verify:
            verify(path, model, config, work, say)
    alpha = adapter.scale * adapter.rank
    say(f"wrote {options.output}: {describe(adapter)}, lora_alpha {alpha:g}, base {theirs}")


def from_peft(options, say=print):
    """Write the PEFT adapter as an mlx-lm directory. Raises NotEqual where --verify finds different logits."""
    directory = Path(options.adapter)
    name = base_name(options.model, read_peft_config(directory), PEFT_NAME)
    path, model, config = open_base(name, options)
    parameters = dict(tree_flatten(model.parameters()))
    adapter, notes = peft_files.read_peft(directory, config["model_type"], linear_shapes(model), parameters)
    for note in notes:
        say(f"note: {note}")
    if "quantization" in config:
        say(f"note: {name} has {bits(config)}-bit weights; on them the adapter's logits differ from those on the float "
            "ones by what quantising changed")
    with atomic_directory(options.output) as work:
        write_mlx(adapter, work, options.base_name or name, len(model.layers))
        _, adapted, bare = load_onto(model, work)
        assert set(adapted) == set(adapter.modules) and not bare, (sorted(adapted), sorted(adapter.modules), bare)
        if options.verify:
            verify(path, model, config, directory, say)
    say(f"wrote {options.output}: {describe(adapter)}, base {options.base_name or name}")


def fuse_command(options, say=print):
    """Write the base with the adapter in its weights. Raises NotEqual where the logits of a float result differ."""
    directory = Path(options.adapter)
    name = base_name(options.model, read_mlx_config(directory), MLX_NAME)
    path = fetch_model(str(shipped_path(name)), None, options.trust_remote_code)
    if options.dequantize and not {"quantization", "quantization_config"} & set(read_json(path / "config.json")):
        raise UserError(f"{name} isn't quantised, so --dequantize has nothing to do; leave it away")
    fusion, bare = fuse(path, directory, options.output, base_name=name, dequantize=options.dequantize,
                        trust_remote_code=options.trust_remote_code)
    tell_bare(bare, say)
    for line in fusion.lines():
        say(line)
    if fusion.kl > max(1e-6, fusion.adapter_kl / 4):
        remedy = "; fuse with --dequantize, or serve base and adapter side by side" if fusion.limit is None else ""
        print(f"warning: rounding to the base's type undoes much of what the adapter does{remedy}", file=sys.stderr)
    say(f"wrote {options.output}")


def inspect(options, say=print):
    """Print what an adapter directory of either kind holds, and why it can't be used where that is so."""
    directory = Path(options.directory)
    if not (directory / "adapter_config.json").is_file():
        raise UserError(f"{directory} has no adapter_config.json; it isn't an adapter directory")
    config = read_json(directory / "adapter_config.json")
    is_peft = "peft_type" in config
    file = directory / (peft_files.WEIGHTS if is_peft else WEIGHTS)
    if not file.is_file():
        raise UserError(f"{directory} has no {file.name}")
    tensors = check_safetensors(file)
    say(f"{directory}: {'PEFT' if is_peft else 'mlx-lm'}, base {config.get(PEFT_NAME if is_peft else MLX_NAME)}")
    shown = config if is_peft else {key: config.get(key) for key in ("fine_tune_type", "num_layers")} \
        | (config.get("lora_parameters") or {})
    for key, value in sorted(shown.items()):
        if value not in (None, False, [], {}):
            say(f"  {key} {json.dumps(value)}")
    for name, (dtype, shape) in sorted(tensors.items()):
        say(f"  {name}  {dtype} {list(shape)}")
    check = read_peft_config if is_peft else read_mlx_config
    check(directory)


# ---- the base model --------------------------------------------------------------------------------------------------

def base_name(given, config, key):
    """The base model as --model or the adapter's own configuration names it."""
    if given:
        return given
    if not isinstance(config.get(key), str) or not config[key]:
        raise UserError(f"the adapter's configuration names no base model ({key}); give it with --model")
    return config[key]


def open_base(name, options):
    """(directory, model, config) of the base; its weights stay on the disk. Raises UserError for an architecture whose
    names in transformers aren't known to be mlx-lm's."""
    path = fetch_model(str(shipped_path(name)), None, options.trust_remote_code)
    model, config, _ = load_checked(path, lazy=True, trust_remote_code=options.trust_remote_code)
    if config["model_type"] not in peft_files.SAME_NAMES:
        raise UserError(f"{name}: model_type {config['model_type']!r}; adapters are brought over for "
                        f"{', '.join(sorted(peft_files.SAME_NAMES))}, whose modules are proved to be the same in "
                        "mlx-lm and transformers; for others, fuse")
    if options.verify:
        peft_verify.check_ahead(config, name)
    return path, model, config


def verify(base, model, config, peft_directory, say):
    """Compare `model`, the base with the adapter on, with PEFT in torch. Raises NotEqual."""
    equal, line = peft_verify.compare_with_peft(base, model, config, peft_directory)
    if not equal:
        raise NotEqual(line)
    say(line)


def original_of(path, name):
    """The model that transformers can open: the source, where utils/convert_model.py wrote the base, else the base."""
    conversion = path / "conversion.json"
    return str(read_json(conversion).get("source", name)) if conversion.is_file() else name


def linear_shapes(model):
    """{module name: (out, in)} of the linear layers, quantised ones included."""
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.QuantizedLinear):
            shapes[name] = module.weight.shape[0], module.weight.shape[1] * 32 // module.bits
        elif isinstance(module, nn.Linear):
            shapes[name] = module.weight.shape
    return shapes


# ---- talk ------------------------------------------------------------------------------------------------------------

def describe(adapter):
    count = sum(array.size for leaves in adapter.modules.values() for array in leaves.values())
    return (f"{adapter.kind}, rank {adapter.rank}, scale {adapter.scale:g}, {len(adapter.modules)} modules, "
            f"{count:,} parameters")


def tell_bare(bare, say):
    if bare:
        say(f"note: {len(bare)} modules that adapter_config.json selects have no weights ({', '.join(bare[:3])}"
            f"{' ...' if len(bare) > 3 else ''}); they act as without an adapter")


def bits(config):
    return config["quantization"].get("bits", "few")


def parse(arguments=None):
    parser = Parser(**help_of(__doc__))
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function, about in (("to-peft", to_peft, "mlx-lm to PEFT"),
                                  ("from-peft", from_peft, "PEFT to mlx-lm"),
                                  ("fuse", fuse_command, "into the base model's weights")):
        command = commands.add_parser(name, help=about, description=function.__doc__)
        command.add_argument("--adapter", required=True, help="directory of the adapter")
        command.add_argument("--output", required=True, help="new or empty directory")
        command.add_argument("--model", help="directory or hub id of the base (default: the one the adapter names)")
        command.add_argument("--trust-remote-code", action="store_true",
                             help="let Python files of the model run on this machine")
        command.set_defaults(run=function)
        if name == "fuse":
            command.add_argument("--dequantize", action="store_true",
                                 help="write floats in place of a quantised base's weights")
        else:
            command.add_argument("--verify", action="store_true", help="compare the logits with PEFT's in torch; where "
                                 "they differ nothing is written and the exit code is 1")
            command.add_argument("--base-name", help="base to name in the written configuration (default: the base, or "
                                 "for PEFT the original that utils/convert_model.py made it from)")
    command = commands.add_parser("inspect", help="what an adapter holds", description=inspect.__doc__)
    command.add_argument("directory")
    command.set_defaults(run=inspect)
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))     # so that the temporary directory is removed
    try:
        options.run(options)
    except NotEqual as error:
        for line in (*error.args, f"the result computes something else, so {options.output} was not written"):
            print(line, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run_command(main)
