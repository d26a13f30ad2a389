"""
Convert a Hugging Face vision-language model to MLX, and prove that it still computes the same.

    python utils/convert_vision_model.py --hf-path Qwen/Qwen2.5-VL-3B-Instruct --output-dir models/qwen2.5-vl --verify
    python utils/convert_vision_model.py --hf-path Qwen/Qwen3-VL-2B-Instruct -q --bits 4
    python utils/convert_vision_model.py --list

Qwen2-VL, Qwen2.5-VL, Qwen3-VL and DeepSeek-OCR, on mlx-vlm (pip install -e '.[vision]'), which opens the result too.
Quantising is for the language model; the vision tower and its projector stay as they are unless --quantize-vision asks.
The directory appears once it is whole; conversion.json in it tells what was done.
"""

import json
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # runs from a plain clone, from any directory

from mlx_grpo import UserError, run_command  # noqa: E402
from mlx_grpo import vision_check  # noqa: E402
from mlx_grpo.checked_load import check_files, is_mlx, read_json  # noqa: E402
from mlx_grpo.convert_model import BITS, DTYPES, GROUP_SIZES, check_ahead, check_finite, describe  # noqa: E402
from mlx_grpo.convert_model import versions, written_bytes  # noqa: E402
from mlx_grpo.command_line import Parser  # noqa: E402
from mlx_grpo.files import atomic_directory, check_free_space, human_bytes  # noqa: E402
from mlx_grpo.help_text import help_of  # noqa: E402
from mlx_grpo.model_check import in_float32  # noqa: E402
from mlx_grpo.model_files import copy_tokenizer, open_tokenizer, upload, write_card  # noqa: E402
from mlx_grpo.vision_config import NAMES, import_mlx_vlm, normalize_vision_config, vision_notes  # noqa: E402
from mlx_grpo.vision_model import fetch_vision_model, load_processor, load_vision_model  # noqa: E402

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_map  # noqa: E402

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


# ---- the conversion --------------------------------------------------------------------------------------------------

def convert(options, say=print):
    """Convert as `options` (see parse) tell. Returns the dictionary written to conversion.json. Raises UserError."""
    source = fetch_vision_model(options.hf_path, options.revision)
    check_free_space(options.output_dir, written_bytes(check_files(source), options), "the converted model")
    model, config, keys = load_vision_model(source, lazy=True)
    tokenizer = open_tokenizer(source, config, None, options.trust_remote_code)
    load_processor(source, config["model_type"], tokenizer)         # its trouble is told before the long work
    for line in keys.lines() + vision_notes(config):
        say(f"note: {line}")
    if options.verbose:
        tell_config(source, say)
    model, config = change_weights(model, config, options, say)
    with atomic_directory(options.output_dir) as work:
        write_model(model, config, work)
        copy_tokenizer(source, work, options.trust_remote_code)
        for name in PROCESSOR_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, work / name)
        name = options.upload_repo or Path(options.output_dir).name
        write_card(source, work, name, options.hf_path)
        mend_card(work / "README.md", name)
        report = {"source": options.hf_path, "revision": options.revision, "model_type": config["model_type"],
                  "dtype": options.dtype, "quantization": config.get("quantization"), "unexpected": keys.unexpected,
                  "quantized_vision": options.quantize_vision, "versions": versions() | {"mlx_vlm": vlm_version()}}
        (work / "conversion.json").write_text(json.dumps(report, indent=2) + "\n")
        check_finite(work, options.dtype)
    size = sum(file.stat().st_size for file in Path(options.output_dir).glob("*.safetensors"))
    what = f"{config['model_type']}, {options.dtype}{describe(config.get('quantization'))}"
    say(f"wrote {options.output_dir}: {what}, {human_bytes(size)}")
    return report


def change_weights(model, config, options, say):
    """(model, config) after dequantising, casting and quantising as the options tell."""
    from mlx_lm.utils import dequantize_model
    stored = config.get("quantization")
    if options.quantize and stored:
        raise UserError(f"{options.hf_path} is quantised already ({describe(stored)[2:]}); quantise its original, or "
                        "write a float copy with --dequantize first")
    if options.dequantize:
        if not stored:
            raise UserError(f"{options.hf_path} isn't quantised, so --dequantize has nothing to do; leave it away")
        model = dequantize_model(model)
        config = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
    dtype = getattr(mx, options.dtype)
    model.update(tree_map(lambda a: a.astype(dtype) if mx.issubdtype(a.dtype, mx.floating) else a, model.parameters()))
    config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": options.dtype}
    if options.quantize:
        quantization = quantize(model, options, say)
        config |= {"quantization": quantization, "quantization_config": quantization}
    return model, config


def quantize(model, options, say):
    """Quantise the language model in place, with --quantize-vision the tower's linear layers too. Returns what
    config.json says of it. Raises UserError where the group size divides no row."""
    bits, group_size = options.bits or 4, options.group_size or 64
    chosen, kept = set(), []
    for name, module in model.named_modules():
        asked = name.startswith("language_model.") or (options.quantize_vision and isinstance(module, nn.Linear))
        if asked and hasattr(module, "to_quantized"):
            fits = module.weight.shape[-1] % group_size == 0 and module.weight.size % 64 == 0    # mlx-vlm's own rule
            chosen.add(name) if fits else kept.append(name)
    if not chosen:
        raise UserError(f"no matrix of {options.hf_path} has rows of a multiple of {group_size}; "
                        f"try --group-size {min(GROUP_SIZES)}")
    for name in kept:
        say(f"note: {name} stays in {options.dtype}: its rows aren't a multiple of {group_size}")
    nn.quantize(model, group_size, bits, class_predicate=lambda name, module: name in chosen)
    return {"group_size": group_size, "bits": bits, "mode": "affine"}


def write_model(model, config, work):
    from mlx_lm.utils import save_model
    save_model(work, model, donate_model=True)
    (work / "config.json").write_text(json.dumps(dict(sorted(config.items())), indent=4) + "\n")


def mend_card(path, name):
    """The card's example and task for a model that reads images."""
    text = path.read_text(encoding="utf-8").replace("pipeline_tag: text-generation", "pipeline_tag: image-text-to-text")
    start = text.rindex("```python")
    command = f'python -m mlx_vlm generate --model {name} --image photo.jpg --prompt "Describe this image."'
    example = f"```sh\n{command}\n```\n"
    path.write_text(text[:start].replace("on mlx-lm.", "on mlx-vlm.") + example, encoding="utf-8")


# ---- proof and talk --------------------------------------------------------------------------------------------------

def verify(options, say=print):
    """Compare the written directory with its source on texts and an image, print the result and add it to
    conversion.json. The measure is transformers for a float model in its format, else the source itself in MLX.
    Returns whether it passed."""
    source, target = fetch_vision_model(options.hf_path, options.revision), Path(options.output_dir)
    model, config, _ = load_vision_model(target)
    stored = normalize_vision_config(read_json(source / "config.json"))
    tokenizer = open_tokenizer(target, config, None, options.trust_remote_code)
    inputs = vision_check.check_inputs(config, tokenizer, load_processor(target, config["model_type"], tokenizer))
    ours = vision_check.mlx_logits(in_float32(model), inputs)
    del model       # its memory, before the next one is opened
    quantizing = "quantization" in config and "quantization" not in stored
    if not quantizing and not is_mlx(source) and config["model_type"] != "deepseekocr":
        theirs, what = vision_check.torch_logits(source, config, inputs, options.dtype), "transformers"
    else:
        theirs = vision_check.mlx_logits(in_float32(load_vision_model(source)[0]), inputs)
        what = "its unquantised source" if quantizing else "its source in MLX"
    result = vision_check.compare(ours, theirs, inputs, quantizing)
    if quantizing:
        say(f"against {what}: KL {result['kl']:.4f} nats per token, perplexity {result['perplexity']:.2f} "
            f"(source {result['source_perplexity']:.2f}), same likeliest token {result['same_top_token']:.1%}")
    else:
        say(f"logits with and without an image against {what}: largest difference {result['max']:.2e}, mean "
            f"{result['mean']:.2e} (limit {result['limit']:.0e}): {'equal' if result['passed'] else 'NOT EQUAL'}")
    path = target / "conversion.json"
    path.write_text(json.dumps(read_json(path) | {"verified": result | {"against": what}}, indent=2) + "\n")
    return result["passed"]


def tell_config(source, say):
    """Print what normalising did to config.json."""
    before = read_json(source / "config.json")
    after = normalize_vision_config(before)
    for key in sorted(set(before) | set(after)):
        if before.get(key) != after.get(key):
            say(f"config: {key} = {json.dumps(after.get(key))} (was {json.dumps(before.get(key))})")


def vlm_version():
    from mlx_vlm.version import __version__
    return __version__


def parse(arguments=None):
    """The options; UserError for contradictory ones."""
    parser = Parser(**help_of(__doc__))
    parser.add_argument("--hf-path", help="hub id or directory of the model (required)")
    parser.add_argument("-q", "--quantize", action="store_true", help="quantise the language model's matrices")
    parser.add_argument("--bits", type=int, choices=BITS, help="bits for each weight, with -q (default 4)")
    parser.add_argument("--group-size", type=int, choices=GROUP_SIZES,
                        help="weights that share a scale, with -q (default 64)")
    parser.add_argument("--quantize-vision", action="store_true",
                        help="quantise the vision tower's linear layers too, with -q")
    parser.add_argument("--dequantize", action="store_true", help="write a quantised MLX model as floats")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16",
                        help="of what isn't quantised (default bfloat16)")
    parser.add_argument("--output-dir", default="mlx_vision_model",
                        help="new or empty directory (default mlx_vision_model)")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--upload-repo", help="put the result on the hub under this name")
    parser.add_argument("--trust-remote-code", action="store_true",
                        help="let Python files of the model's tokenizer run on this machine")
    parser.add_argument("--verify", action="store_true",
                        help="compare with the source afterwards; exit code 1 if not equal")
    parser.add_argument("--verbose", action="store_true", help="print what was changed in config.json")
    parser.add_argument("--list", action="store_true", help="list the architectures")
    options = parser.parse_args(arguments)
    if not options.list and not options.hf_path:
        parser.error("--hf-path is required")
    if options.quantize and options.dequantize:
        raise UserError("--quantize and --dequantize exclude each other; choose one")
    for name, value in (("--bits", options.bits), ("--group-size", options.group_size),
                        ("--quantize-vision", options.quantize_vision)):
        if value and not options.quantize:
            what = name if value is True else f"{name} {value}"
            raise UserError(f"{what} has an effect with -q only; add -q or leave it away")
    return options


def main():
    options = parse()
    if options.list:
        print("\n".join(f"{kind}: {name}" for kind, name in NAMES.items()))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))     # so that the temporary directory is removed
    try:
        check_ahead(options)
        import_mlx_vlm()
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
