"""The way back: a converted, and perhaps trained, nanochat as the checkpoint that nanochat's own loader opens."""

import json
import pickle
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_grpo import UserError
from mlx_grpo import nanochat_checkpoint as checkpoint
from mlx_grpo.files import atomic_directory, check_free_space, human_bytes
from mlx_grpo.nanochat_tokenizer import read_encoding
from mlx_grpo.nanochat_torch import as_torch, import_torch, save_checkpoint
from mlx_grpo.safe_pickle import read_torch_checkpoint


def read_converted(directory):
    """(config, record of the conversion or {}) of a directory that came from nanochat; or a UserError."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--to-pytorch {directory}: no readable config.json there ({error})") from error
    if "nanochat" not in config:
        raise UserError(f"--to-pytorch {directory}: convert_nanochat.py did not make this model (its config.json has "
                        'no entry "nanochat")')
    if "quantization" in config:
        raise UserError(f"--to-pytorch {directory}: quantised weights can't go back unchanged; convert and train "
                        "without -q")
    conversion = directory / "conversion.json"
    return config, json.loads(conversion.read_text(encoding="utf-8")) if conversion.is_file() else {}


def read_weights(directory, expected):
    """nanochat's name -> mx.array, not yet read into memory, of exactly the `expected` shapes. Raises UserError."""
    files = sorted(directory.glob("model*.safetensors"))
    stored = {name: value for file in files for name, value in mx.load(str(file)).items()}
    weights = {checkpoint.nanochat_name(name): value for name, value in stored.items()}
    odd = sorted(weights.keys() ^ expected.keys()) or [n for n, value in weights.items() if value.shape != expected[n]]
    if odd:
        raise UserError(f"--to-pytorch {directory}: its weights are not nanochat's ({odd[0]} for one); merge an "
                        "adapter into the model first")
    return weights


def to_pytorch(directory, output_dir, step=None):
    """Write model_<step>.pt, meta_<step>.json and tokenizer.pkl as nanochat keeps them, from a converted model.

    The renaming is undone, embeddings and head get their padding rows again (zeros), and what was stored as bfloat16
    is bfloat16 again. Weights that were not trained come back to the bit."""
    import_torch()
    directory, output_dir = Path(directory), Path(output_dir)
    config, record = read_converted(directory)
    origin = config["nanochat"]
    generation, sizes = checkpoint.GENERATIONS[origin["generation"]], origin["model_config"]
    rows, step = origin["padded_vocab_size"], origin["step"] if step is None else step
    weights = read_weights(directory, checkpoint.expected_shapes(generation, sizes, sizes["vocab_size"]))
    encoding = read_encoding(directory)
    check_free_space(output_dir, 1.01 * 4 * sum(value.size for value in weights.values()), "the checkpoint")

    def tensors():
        for name in list(weights):
            value = np.array(weights.pop(name).astype(mx.float32))
            if checkpoint.has_vocabulary_rows(name):
                value = np.pad(value, [(0, rows - len(value)), (0, 0)])
            yield name, as_torch(value, "bfloat16" if name in origin["bfloat16"] else "float32")

    with atomic_directory(output_dir) as work:
        model = work / f"model_{step:06d}.pt"
        save_checkpoint(model, tensors())
        checkpoint.write_json(work / f"meta_{step:06d}.json",
                              {**record.get("meta", {}), "step": step, "model_config": sizes})
        (work / "tokenizer.pkl").write_bytes(pickle.dumps(encoding, protocol=4))
        checkpoint.check_parameters(read_torch_checkpoint(model), generation, sizes, model)    # nanochat loads strictly
    print(f"{output_dir / model.name}: {human_bytes((output_dir / model.name).stat().st_size)}, nanochat generation "
          f"{generation.number}; nanochat finds it in <its base folder>/chatrl_checkpoints/<tag>")
