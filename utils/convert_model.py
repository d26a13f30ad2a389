"""
Convert a Hugging Face model to MLX, and prove that it still computes the same.

    python utils/convert_model.py --hf-path Qwen/Qwen3-0.6B --output-dir models/qwen3-0.6b --verify
    python utils/convert_model.py --hf-path Qwen/Qwen2.5-1.5B-Instruct -q --bits 4 --eos-token "<|im_end|>"
    python utils/convert_model.py --list

On mlx-lm, with its config normalised (utils/model_config.py) and its loading checked (utils/checked_load.py). The directory appears once it is whole: an interrupted or failed conversion leaves nothing. conversion.json in it tells
what was done.
"""

import json
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # runs from a plain clone, from any directory

from mlx_grpo import UserError, run_command  # noqa: E402
from mlx_grpo import nanochat_model  # noqa: E402
from mlx_grpo.checked_load import check_files, is_mlx, load_checked, read_json, register_nanochat  # noqa: E402
from mlx_grpo.command_line import Parser  # noqa: E402
from mlx_grpo.files import atomic_directory, check_free_space, human_bytes  # noqa: E402
from mlx_grpo.help_text import help_of  # noqa: E402
from mlx_grpo.hub_files import fetch_model  # noqa: E402
from mlx_grpo.model_config import config_notes, normalize_config, supported_architectures  # noqa: E402
from mlx_grpo.model_files import copy_tokenizer, open_tokenizer, set_eos_token, upload, write_card  # noqa: E402

import mlx.core as mx  # noqa: E402
from mlx.utils import tree_map_with_path  # noqa: E402

BITS, GROUP_SIZES = (2, 3, 4, 6, 8), (32, 64, 128)
RECIPES = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")      # mlx-lm's; low bits first
DTYPES = ("float16", "bfloat16", "float32")
TESTED = ["Llama 3", "Qwen2.5", "Qwen3", "Mistral", "Gemma 2", "Gemma 3", "Phi-3", "GPT-2", "GPT-NeoX", "StableLM",
          "Mixtral", "Qwen3-MoE"]


# ---- the conversion --------------------------------------------------------------------------------------------------

def convert(options, say=print):
    """Convert as `options` (see parse) tell. Returns the dictionary written to conversion.json. Raises UserError."""
    source = fetch_model(options.hf_path, options.revision, options.trust_remote_code)
    tensors = check_files(source)
    check_free_space(options.output_dir, written_bytes(tensors, options), "the converted model")
    model, config, keys = load_checked(source, lazy=True, trust_remote_code=options.trust_remote_code)
    tokenizer = open_tokenizer(source, config, options.eos_token, options.trust_remote_code)
    for line in keys.lines() + config_notes(config):
        say(f"note: {line}")
    if options.verbose:
        tell_config(source, config, say)
    model, config, quantized = change_weights(model, config, options, say)
    with atomic_directory(options.output_dir) as work:
        write_weights(model, config, work)
        copy_tokenizer(source, work, options.trust_remote_code)
        if register_nanochat(config):
            shutil.copyfile(nanochat_model.__file__, work / config["model_file"])
        if options.eos_token:
            set_eos_token(work, config, tokenizer, options.eos_token)
        write_card(source, work, options.upload_repo or Path(options.output_dir).name, options.hf_path)
        report = {"source": options.hf_path, "revision": options.revision, "model_type": config["model_type"],
                  "dtype": options.dtype, "quantization": quantized, "renamed": keys.renamed, "missing": keys.missing,
                  "unexpected": keys.unexpected, "eos_token": options.eos_token, "versions": versions()}
        (work / "conversion.json").write_text(json.dumps(report, indent=2) + "\n")
        check_finite(work, options.dtype)
    size = sum(file.stat().st_size for file in Path(options.output_dir).glob("*.safetensors"))
    what = f"{config['model_type']}, {options.dtype}{describe(quantized)}"
    say(f"wrote {options.output_dir}: {what}, {human_bytes(size)}")
    return report


def written_bytes(tensors, options):
    """About how many bytes of weights the output takes; `tensors` as check_files gives them."""
    packed = {name.removesuffix(".scales") + ".weight" for name in tensors if name.endswith(".scales")}
    total = 0
    for name, (_, shape) in tensors.items():
        elements = 1
        for n in shape:
            elements *= n
        if name in packed and options.dequantize:
            elements *= 16          # a packed word of 32 bits holds up to 16 numbers
        bits = 32 if options.dtype == "float32" else 16
        if options.quantize and len(shape) > 1:
            bits = (options.bits or 6) + 32 / (options.group_size or 64)
        total += elements * bits / 8
    return int(total * 1.02) + 20_000_000       # and the tokenizer


def change_weights(model, config, options, say):
    """(model, config, quantisation or None) after dequantising, casting and quantising as the options tell."""
    from mlx_lm.utils import dequantize_model
    is_quantized = "quantization" in config
    if options.quantize and is_quantized:
        raise UserError(f"{options.hf_path} is quantised already ({describe(config['quantization'])[2:]}); "
                        "quantise its original, or write a float copy with --dequantize first")
    if options.dequantize:
        if not is_quantized:
            raise UserError(f"{options.hf_path} isn't quantised, so --dequantize has nothing to do; leave it away")
        model = dequantize_model(model)
        config = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
    castable = getattr(model, "cast_predicate", lambda name: True)
    dtype = getattr(mx, options.dtype)
    cast = lambda name, a: a.astype(dtype) if castable(name) and mx.issubdtype(a.dtype, mx.floating) else a
    model.update(tree_map_with_path(cast, model.parameters()))
    config = config | {"dtype": options.dtype}
    config.pop("torch_dtype", None)
    if options.quantize:
        model, config = quantize(model, config, options, say)
    return model, config, config.get("quantization")


def quantize(model, config, options, say):
    """(quantised model, config). Raises UserError where no matrix has rows that the group size divides."""
    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.utils import quantize_model
    bits, group_size = options.bits or 4, options.group_size or 64
    predicate = None
    if options.quant_recipe:
        if not any("down_proj" in name for name, _ in model.named_modules()):
            raise UserError(f"--quant-recipe {options.quant_recipe} goes by the names of Llama-like layers, which "
                            f"{config['model_type']} doesn't have; use --bits")
        predicate = mixed_quant_predicate_builder(options.quant_recipe, model, group_size)
    matrices = [(name, module) for name, module in model.named_modules() if hasattr(module, "to_quantized")]
    kept = [name for name, module in matrices if module.weight.shape[-1] % group_size]
    if len(kept) == len(matrices):
        raise UserError(f"no matrix of {options.hf_path} has rows of a multiple of {group_size}; "
                        f"try --group-size {min(GROUP_SIZES)}")
    for name in kept:
        say(f"note: {name} stays in {options.dtype}: its rows aren't a multiple of {group_size}")
    return quantize_model(model, config, group_size, bits, quant_predicate=predicate)


def write_weights(model, config, work):
    from mlx_lm.utils import save_config, save_model
    save_model(work, model, donate_model=True)
    tower = "vision_tower" in getattr(model, "model", {})       # as mlx_lm.save: such a model needs its vision_config
    save_config(dict(config), work / "config.json", keep_vision_config=tower)


def check_finite(work, dtype):
    """Raises UserError where a written weight is not finite (bfloat16 reaches further than float16)."""
    for path in sorted(work.glob("*.safetensors")):
        weights = mx.load(str(path))
        for name in list(weights):
            weight = weights.pop(name)      # one at a time in memory
            if mx.issubdtype(weight.dtype, mx.floating) and not mx.isfinite(weight).all().item():
                raise UserError(f"{name} holds numbers that {dtype} can't (or NaN); "
                                + ("use --dtype bfloat16" if dtype == "float16" else "the source itself is damaged"))


# ---- proof and talk --------------------------------------------------------------------------------------------------

def verify(options, say=print):
    """Compare the written directory, opened as plain mlx-lm does, with its source, print the result and add it to
    conversion.json. The reference is transformers for a source in its format, else the source itself opened in MLX.
    Returns whether it passed."""
    from mlx_grpo import model_check
    source, target = fetch_model(options.hf_path, options.revision, options.trust_remote_code), Path(options.output_dir)
    config = read_json(target / "config.json")
    tokenizer = open_tokenizer(source, config, None, options.trust_remote_code)
    sequences = model_check.check_sequences(tokenizer, config.get("vocab_size") or config["text_config"]["vocab_size"])
    source_model, source_config, _ = load_checked(source, lazy=True, trust_remote_code=options.trust_remote_code)
    quantizing = "quantization" in config and "quantization" not in source_config
    if quantizing or is_mlx(source) or "quantization" in source_config:
        theirs = model_check.mlx_logits(model_check.in_float32(source_model), sequences)
        what = "its unquantised source" if quantizing else "its source in MLX"
    else:
        theirs = model_check.torch_logits(source, sequences, options.dtype, options.trust_remote_code)
        what = "transformers"
    del source_model        # its memory, before the next one is opened
    ours = model_check.mlx_logits(model_check.in_float32(open_plainly(target, config, options)), sequences)
    if quantizing:
        result = model_check.compare_distributions(ours, theirs, sequences)
        say(f"against {what}: KL {result['kl']:.4f} nats per token, perplexity {result['perplexity']:.2f} "
            f"(source {result['source_perplexity']:.2f}), same likeliest token {result['same_top_token']:.1%}")
    else:
        result = model_check.compare_logits(ours, theirs)
        say(f"logits against {what}: largest difference {result['max']:.2e}, mean {result['mean']:.2e} "
            f"(limit {result['limit']:.0e}): {'equal' if result['passed'] else 'NOT EQUAL'}")
    path = target / "conversion.json"
    path.write_text(json.dumps(read_json(path) | {"verified": result | {"against": what}}, indent=2) + "\n")
    return result["passed"]


def open_plainly(target, config, options):
    """The model of a written directory as mlx-lm alone opens it, without our mending; nanochat's by our own class."""
    from mlx_lm.utils import load_model
    changes = {"model_file": None} if register_nanochat(config) else {}
    return load_model(target, model_config=changes, trust_remote_code=options.trust_remote_code)[0]


def tell_config(source, config, say):
    """Print what normalising did to config.json."""
    before = read_json(source / "config.json")
    for key, value in normalize_config(before).items():
        if before.get(key) != value:
            say(f"config: {key} = {json.dumps(value)} (was {json.dumps(before.get(key))})")


def describe(quantization):
    """", 4 bits in groups of 64" for a quantisation as config.json has it, "" for none."""
    if not quantization:
        return ""
    own = {value["bits"] for value in quantization.values() if isinstance(value, dict) and "bits" in value}
    bits = " and ".join(str(n) for n in sorted(own or {quantization["bits"]}))
    return f", {bits} bits in groups of {quantization['group_size']}"


def versions():
    import mlx_lm
    import transformers
    return {"mlx": mx.__version__, "mlx_lm": mlx_lm.__version__, "transformers": transformers.__version__}


def list_architectures():
    names = supported_architectures()
    print(f"tested against transformers, as tiny random models: {', '.join(TESTED)}")
    print(f"{len(names)} architectures (model_type in config.json) by mlx-lm:")
    print("  " + ", ".join(names))


def parse(arguments=None):
    """The options; UserError for contradictory ones."""
    parser = Parser(**help_of(__doc__))
    parser.add_argument("--hf-path", help="hub id or directory of the model (required)")
    parser.add_argument("-q", "--quantize", action="store_true", help="quantise the matrices")
    parser.add_argument("--bits", type=int, choices=BITS, help="bits for each weight, with -q (default 4)")
    parser.add_argument("--group-size", type=int, choices=GROUP_SIZES,
                        help="weights that share a scale, with -q (default 64)")
    parser.add_argument("--quant-recipe", choices=RECIPES,
                        help="mlx-lm's mixed-bit recipe in place of --bits; implies -q")
    parser.add_argument("--dequantize", action="store_true", help="write a quantised MLX model as floats")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of what isn't quantised (default float16)")
    parser.add_argument("--output-dir", default="mlx_model", help="new or empty directory (default mlx_model)")
    parser.add_argument("--eos-token", help='the end token to write, such as "<|im_end|>" for Qwen chat models')
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--upload-repo", help="put the result on the hub under this name")
    parser.add_argument("--trust-remote-code", action="store_true",
                        help="let Python files of the model run on this machine")
    parser.add_argument("--verify", action="store_true",
                        help="compare with the source afterwards; exit code 1 if not equal")
    parser.add_argument("--verbose", action="store_true", help="print what was changed in config.json")
    parser.add_argument("--list", action="store_true", help="list the architectures and the tested models")
    options = parser.parse_args(arguments)
    if not options.list and not options.hf_path:
        parser.error("--hf-path is required")
    options.quantize = options.quantize or bool(options.quant_recipe)
    if options.quantize and options.dequantize:
        raise UserError("--quantize and --dequantize exclude each other; choose one")
    for name, value in (("--bits", options.bits), ("--group-size", options.group_size)):
        if value and not options.quantize:
            raise UserError(f"{name} {value} has an effect with -q only; add -q or leave it away")
    if options.bits and options.quant_recipe:
        raise UserError(f"--quant-recipe {options.quant_recipe} sets the bits itself; leave --bits away")
    return options


def check_ahead(options):
    """Raises UserError for what would only show after the long work: an output in use, no way to verify or upload."""
    target = Path(options.output_dir)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--output-dir {target} already exists and is not empty; choose another directory or remove it")
    if options.upload_repo:
        from huggingface_hub import get_token
        if not get_token():
            raise UserError("--upload-repo needs a login to the hub: run `hf auth login` first")
    if options.verify and not options.quantize and not options.dequantize:
        try:
            import torch  # noqa: F401
        except ImportError as error:
            raise UserError("--verify compares with transformers and needs torch: pip install torch") from error


def main():
    options = parse()
    if options.list:
        return list_architectures()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))     # so that the temporary directory is removed
    try:
        check_ahead(options)
        convert(options)
        passed = verify(options) if options.verify else True
        if options.upload_repo and passed:
            upload(options.output_dir, options.upload_repo)
    except KeyboardInterrupt:
        print("interrupted; no half-made directory is left", file=sys.stderr)
        return 130
    return 0 if passed else 1


if __name__ == "__main__":
    run_command(main)
