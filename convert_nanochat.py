"""
Converts a nanochat checkpoint for MLX, and a model trained here back for nanochat.

    python convert_nanochat.py --repo sdobson/nanochat                       # download and convert
    python convert_nanochat.py --cache-dir ~/.cache/nanochat                 # or a folder with model_*.pt
    python convert_nanochat.py --to-pytorch runs/a/final --output-dir back   # home again

Every generation of nanochat from October 2025 on is known (docs/nanochat.md). A downloaded file never runs code: both
pickles pass through allow-listed readers, and torch isn't needed. Weights pass through memory a band at a time. Where
torch is installed, the result is compared with a plain torch rendering; a difference of 1e-3 or more exits 1.
"""

import argparse
import json
import math
import shutil
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))   # runs from a plain clone, from any directory

import mlx_grpo  # noqa: E402, F401  before mlx.core: finds the fast BLAS on Linux
import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from mlx_grpo import UserError, nanochat_folders, nanochat_model, nanochat_verify, run_command  # noqa: E402
from mlx_grpo import nanochat_checkpoint as checkpoint  # noqa: E402
from mlx_grpo.command_line import Parser  # noqa: E402
from mlx_grpo.help_text import help_of  # noqa: E402
from mlx_grpo.hub_files import hub_trouble  # noqa: E402
from mlx_grpo.nanochat_checkpoint import write_json  # noqa: E402
from mlx_grpo.files import atomic_directory, check_free_space, human_bytes, sha256  # noqa: E402
from mlx_grpo.nanochat_tokenizer import BOS, EOS, special_token_ids, write_tokenizer  # noqa: E402
from mlx_grpo.safe_pickle import read_tiktoken_pickle, read_torch_checkpoint  # noqa: E402
from mlx_grpo.tensor_file import TensorFile  # noqa: E402

DTYPES = {"float32": (mx.float32, "F32"), "float16": (mx.float16, "F16"), "bfloat16": (mx.bfloat16, "BF16")}
MODEL_FILE = f"{nanochat_model.MODEL_TYPE}.py"
BAND_BYTES = 16 << 20
BUILT_IN_SOFTCAP = 15.0          # mlx-lm's own nanochat model, the first generation, has it in its code


# ---- reading --------------------------------------------------------------------------------------------------------

def download(repo, step, cache_dir):
    """The local snapshot of a hub repository with its newest (or the given) checkpoint, downloaded where it is missing
    and the disk has room. Where the hub can't be reached, the copy in the cache does, and it is said."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import DryRunError, HFValidationError, HTTPError

    try:
        try:
            listed = snapshot_download(repo, cache_dir=cache_dir, dry_run=True,
                                       allow_patterns=["model_*.pt", "meta_*.json", "tokenizer.pkl"])
        except DryRunError:
            local = Path(snapshot_download(repo, cache_dir=cache_dir, allow_patterns="tokenizer.pkl"))
            print(f"{repo}: the hub can't be reached, using the copy in the cache")
            return local
        steps = {nanochat_folders.step_of(Path(file.filename)): file.filename for file in listed}
        steps.pop(None, None)                                            # files of another kind
        if not steps or (step is not None and step not in steps):
            raise UserError(f"--repo {repo}: no model_<step>.pt" + (f" of step {step}" if step is not None else "") +
                            f" there (it has {', '.join(sorted(steps.values())) or 'none'})")
        model = steps[max(steps) if step is None else step]
        wanted = [model, model.replace("model_", "meta_").replace(".pt", ".json"), "tokenizer.pkl"]
        missing = sum(file.file_size or 0 for file in listed if file.filename in wanted and file.will_download)
        check_free_space(cache_dir or constants.HF_HUB_CACHE, missing, f"downloading {repo}")
        return Path(snapshot_download(repo, cache_dir=cache_dir, allow_patterns=wanted))
    except (HFValidationError, HTTPError, OSError) as error:
        raise UserError(f"--repo {repo}: {hub_trouble(error)}") from error


def read_source(files, logit_softcap):
    """Everything about a checkpoint that can be wrong, read and checked before anything is written.

    Returns (encoding, meta, tensors, generation, padded rows, architecture)."""
    encoding = read_tiktoken_pickle(files.tokenizer)
    special_token_ids(encoding, files.tokenizer)
    meta = checkpoint.read_meta(files.meta)
    sizes = meta["model_config"]
    if encoding.n_vocab != sizes["vocab_size"]:
        raise UserError(f"{files.tokenizer} has {encoding.n_vocab} tokens, {files.meta.name} says "
                        f"{sizes['vocab_size']}: name the tokenizer this model was trained with by --tokenizer")
    tensors = checkpoint.strip_prefix(read_torch_checkpoint(files.model), files.model)
    generation = checkpoint.classify(tensors, files.model)
    rows = checkpoint.check_parameters(tensors, generation, sizes, files.model)
    return encoding, meta, tensors, generation, rows, checkpoint.architecture(generation, sizes, logit_softcap)


# ---- writing --------------------------------------------------------------------------------------------------------

def is_quantised(name, shape, group_size):
    """Whether -q packs a parameter: matrices whose rows divide into groups, but not the few numbers of the gates."""
    return len(shape) == 2 and shape[-1] % group_size == 0 and not name.endswith("_gate.weight")


def output_layout(tensors, vocab_size, kind, quantization):
    """(layout for TensorFile, mapping for conversion.json) of the converted weights, in the checkpoint's order."""
    layout, mapping = {}, {}
    for name, tensor in tensors.items():
        new = checkpoint.mlx_name(name)
        shape = (vocab_size, *tensor.shape[1:]) if checkpoint.has_vocabulary_rows(name) else tensor.shape
        packed = bool(quantization) and is_quantised(name, shape, quantization["group_size"])
        mapping[name] = {"to": new, "shape": list(shape), "stored_shape": list(tensor.shape),
                         "stored_dtype": tensor.dtype, "quantized": packed}
        if not mapping[name]["quantized"]:
            layout[new] = (kind, shape)
            continue
        groups = shape[1] // quantization["group_size"]
        layout[new] = ("U32", (shape[0], shape[1] * quantization["bits"] // 32))
        for part in ("scales", "biases"):
            layout[new.replace(".weight", f".{part}")] = (kind, (shape[0], groups))
    return layout, mapping


def to_numpy(array):
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def write_weights(path, tensors, layout, mapping, dtype, quantization):
    """model.safetensors, a band of rows at a time: reading, converting and writing never hold more than a few bands."""
    with TensorFile(path, layout) as file:
        for name, tensor in tensors.items():
            new, rows = mapping[name]["to"], mapping[name]["shape"][0]
            band = max(1, BAND_BYTES // (4 * math.prod(tensor.shape[1:])))
            for first in range(0, rows, band):
                data = mx.array(tensor.numpy(first, min(first + band, rows)))
                values = (data.view(mx.bfloat16) if tensor.dtype == "bfloat16" else data).astype(dtype)
                if not mx.isfinite(values).all().item():
                    kind = str(dtype).split(".")[-1]
                    raise UserError(f"{tensor.path}: {name} has numbers that are not finite as {kind}: a diverged run, "
                                    "or too large for that --dtype")
                if not mapping[name]["quantized"]:
                    file.write(new, first, to_numpy(values))
                    continue
                parts = mx.quantize(values, quantization["group_size"], quantization["bits"])
                for part, array in zip(("weight", "scales", "biases"), parts, strict=True):
                    file.write(new.replace(".weight", f".{part}"), first, to_numpy(array))


def output_config(arch, generation, sizes, rows, step, tensors, ids, dtype, quantization):
    """config.json: what mlx-lm's own nanochat model or ours reads, and under "nanochat" what the way back needs."""
    if generation.number == 1 and arch["logit_softcap"] == BUILT_IN_SOFTCAP:
        built_in = ("hidden_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size "
                    "max_position_embeddings intermediate_size rope_theta").split()
        config = {"model_type": "nanochat", **{name: arch[name] for name in built_in}}
    else:
        config = {**arch, "model_file": MODEL_FILE}
    config |= {"architectures": ["NanoChatForCausalLM"], "tie_word_embeddings": False, "dtype": dtype,
               "bos_token_id": ids[BOS], "eos_token_id": [ids[EOS], ids[BOS]], "pad_token_id": ids[EOS],
               "nanochat": {"generation": generation.number, "model_config": sizes, "padded_vocab_size": rows,
                            "step": step, "bfloat16": [n for n, t in tensors.items() if t.dtype == "bfloat16"]}}
    if quantization:
        config |= {"quantization": quantization, "quantization_config": quantization}
    return config


def convert(files, output_dir, dtype="float32", quantization=None, logit_softcap=None, repo=None, verify=False):
    """Convert one checkpoint into `output_dir`, which appears whole or not at all; the record of conversion.json.

    quantization: None or {"group_size", "bits", "mode": "affine"}. With `verify`, record["verification"]["passed"]
    tells whether the logits agree; a failure leaves the directory in place."""
    encoding, meta, tensors, generation, rows, arch = read_source(files, logit_softcap)
    sizes, (mlx_dtype, kind) = meta["model_config"], DTYPES[dtype]
    print(f"{files.model}: nanochat generation {generation.number}, {sizes['n_layer']} layers of {sizes['n_embd']}, "
          f"{sum(math.prod(t.shape) for t in tensors.values()) / 1e6:.1f} M parameters")
    if generation.number == 3 and logit_softcap is None:
        print("softcap 15, as before 2026-03-02; --logit-softcap 20 is for models trained after (the files don't tell)")
    ids = special_token_ids(encoding, files.tokenizer)
    layout, mapping = output_layout(tensors, sizes["vocab_size"], kind, quantization)
    config = output_config(arch, generation, sizes, rows, files.step, tensors, ids, dtype, quantization)
    record = {
        "converter": "convert_nanochat.py", "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {package: version(package) for package in ("mlx", "mlx-lm", "tiktoken")},
        "source": {"repo": repo, "step": files.step, "generation": generation.number, "files": {
            path.name: {"sha256": sha256(path), "bytes": path.stat().st_size}
            for path in (files.model, files.meta, files.tokenizer)}},
        "meta": meta, "dtype": dtype, "quantization": quantization, "logit_softcap": arch["logit_softcap"],
        "mapping": mapping, "verification": None}
    bytes_out = sum(math.prod(shape) * {"F32": 4, "U32": 4}.get(kind, 2) for kind, shape in layout.values())
    check_free_space(output_dir, bytes_out * 1.01, "the converted model")
    with atomic_directory(output_dir) as work:
        write_weights(work / "model.safetensors", tensors, layout, mapping, mlx_dtype, quantization)
        write_json(work / "config.json", config)
        write_json(work / "generation_config.json", {name: config[name] for name in
                                                     ("bos_token_id", "eos_token_id", "pad_token_id")})
        write_tokenizer(encoding, work, sizes["sequence_len"])
        if "model_file" in config:
            shutil.copyfile(nanochat_model.__file__, work / MODEL_FILE)
        write_json(work / "conversion.json", record)
    print(f"{output_dir}: {human_bytes(bytes_out)} of weights in {dtype}"
          + (f", {quantization['bits']} bits in groups of {quantization['group_size']}" if quantization else ""))
    if verify:
        packed = lambda name, shape: is_quantised(name, shape, quantization["group_size"])
        record["verification"] = nanochat_verify.verify(Path(output_dir), config, arch, tensors, encoding,
                                                        files.model.parent, mlx_dtype, packed)
        write_json(Path(output_dir) / "conversion.json", record)
        print(describe(record["verification"]))
    return record


def describe(verification):
    """The lines that --verify prints."""
    lines = []
    for name, what in [("nanochat", "nanochat's own stored logits"), ("torch", "torch, on the same weights")]:
        if name in verification:
            gap = verification[name]
            lines.append(f"against {what}: logits differ by at most {gap['max']:.1e}, on average {gap['mean']:.1e} "
                         f"({gap['positions']} positions, limit {verification['limit']:.0e})")
    if "rounding" in verification:
        gap = verification["rounding"]
        lines.append(f"as stored, against float32: at most {gap['max']:.1e}, on average {gap['mean']:.1e}, "
                     f"the same best token at {gap['same_best_token']:.1%} of positions")
    return "\n".join([*lines, "verified" if verification["passed"] else
                      "NOT verified: the converted model computes something else; the directory is kept for a look"])


# ---- command ---------------------------------------------------------------------------------------------------------

def parser():
    p = Parser(**help_of(__doc__))
    p.add_argument("--cache-dir", help="where the checkpoint is: its folder, nanochat's base folder, a hub cache "
                                       "(default: the standard hub cache)")
    p.add_argument("--output-dir", help="default models/nanochat-mlx, with --to-pytorch models/nanochat-pytorch")
    p.add_argument("--repo", help="hub repository, downloaded where it is missing, like sdobson/nanochat or "
                                  "karpathy/nanochat-d32")
    p.add_argument("--step", type=int, help="which checkpoint (default: the newest); with --to-pytorch, to write")
    p.add_argument("--tokenizer", metavar="FILE", help="tokenizer.pkl (default: beside the model or ../../tokenizer)")
    p.add_argument("--logit-softcap", type=float, metavar="X", help="20 for generation 3 trained after 2026-03-02")
    p.add_argument("--dtype", choices=DTYPES, help="of the weights (default float32, nanochat's master weights)")
    p.add_argument("-q", "--quantize", action="store_true", help="pack the matrices")
    p.add_argument("--bits", type=int, choices=(2, 3, 4, 5, 6, 8), help="with -q (default 4)")
    p.add_argument("--group-size", type=int, choices=(32, 64, 128), help="with -q (default 64)")
    p.add_argument("--verify", action=argparse.BooleanOptionalAction, default=None,
                   help="compare logits with torch and with stored ones (default: where torch is installed)")
    p.add_argument("--to-pytorch", metavar="MODEL", help="write the converted, and trained, MODEL for nanochat")
    return p


def check_options(args):
    """Options that contradict each other or would be ignored. Raises UserError."""
    if args.to_pytorch:
        odd = [name for name in ("cache_dir", "repo", "tokenizer", "logit_softcap", "dtype", "bits", "group_size")
               if getattr(args, name) is not None]
        odd += ["quantize"] * args.quantize + ["verify"] * (args.verify is not None)
        if odd:
            raise UserError(f"--{odd[0].replace('_', '-')} has no meaning with --to-pytorch")
    if not args.quantize and (args.bits or args.group_size):
        raise UserError("--bits and --group-size need -q")
    if args.logit_softcap is not None and not (math.isfinite(args.logit_softcap) and args.logit_softcap > 0):
        raise UserError(f"--logit-softcap {args.logit_softcap}: expected a positive number, 15 or 20 in nanochat")
    if args.step is not None and args.step < 0:
        raise UserError(f"--step {args.step}: expected 0 or more")


def main(argv=None):
    args = parser().parse_args(argv)
    check_options(args)
    if args.to_pytorch:
        from mlx_grpo.nanochat_export import to_pytorch
        to_pytorch(args.to_pytorch, args.output_dir or "models/nanochat-pytorch", args.step)
        return 0
    from huggingface_hub.constants import HF_HUB_CACHE
    root = download(args.repo, args.step, args.cache_dir) if args.repo else args.cache_dir or HF_HUB_CACHE
    if not args.cache_dir and not Path(root).is_dir():
        raise UserError(f"no hub cache at {root} yet: name the checkpoint's folder with --cache-dir, or download one "
                        "with --repo sdobson/nanochat")
    files = nanochat_folders.find_checkpoint(root, args.step, args.tokenizer)
    dtype, quantization = args.dtype or "float32", None
    if args.quantize:
        quantization = {"group_size": args.group_size or 64, "bits": args.bits or 4, "mode": "affine"}
    possible = nanochat_verify.can_verify(files.model.parent, reduced=dtype != "float32" or args.quantize)
    if args.verify and not possible:
        raise UserError("--verify needs torch (pip install torch); without it only float32 outputs are compared, with "
                        "nanochat's stored logits, where these lie beside the checkpoint")
    if args.verify is None and not possible:
        print("not verified: torch isn't installed")
    record = convert(files, args.output_dir or "models/nanochat-mlx", dtype, quantization, args.logit_softcap,
                     args.repo, possible and args.verify is not False)
    return 0 if record["verification"] is None or record["verification"]["passed"] else 1


if __name__ == "__main__":
    run_command(main)
