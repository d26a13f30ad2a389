"""
The demo with everything that can be trained, and with every optimizer: exact match, trained parameters, memory, time.

    python benchmarks/fine_tuning.py                          # all, a minute each; the tables of docs/fine_tuning.md
    python benchmarks/fine_tuning.py --only LoRA QLoRA lion   # these again, into their rows

Every run is configs/demo.toml with the options of its row, and nothing else, in a process of its own. The 4-bit base of
QLoRA is the demo's model with its matrices quantised in groups of 64.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))   # runs from a plain clone, from any directory

from benchmarks.demo_runs import ROOT, Variant, run_demo, shown, table_rows, where, write_table  # noqa: E402
from mlx_grpo import UserError, load_model, run_command  # noqa: E402
from mlx_grpo.run_files import save_arrays  # noqa: E402

import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

DOCUMENT = ROOT / "docs/fine_tuning.md"
ADAPTERS = {"lora_rank": 16, "lora_scale": 2.0, "learning_rate": 1e-3, "max_steps": 60}

KINDS = [
    Variant("full", {}),
    Variant("LoRA", {"fine_tune_type": "lora", **ADAPTERS}),
    Variant("DoRA", {"fine_tune_type": "dora", **ADAPTERS}),
    Variant("QLoRA", {"fine_tune_type": "lora", "model_name": "{quantised}", **ADAPTERS}),
]
OPTIMIZERS = [
    Variant("adam", {"optimizer": "adam"}),
    Variant("adamw", {}),
    Variant("adafactor", {"optimizer": "adafactor"}),
    Variant("lion", {"optimizer": "lion", "learning_rate": 3e-5}),
    Variant("muon", {"optimizer": "muon", "matrix_learning_rate": 2e-3}),
]
TABLES = {
    "kinds": (KINDS, "| | on top of configs/demo.toml | steps | exact match before | after | trained parameters | "
              "MLX peak memory, MB | seconds a step |", "|---|---|---|---|---|---|---|---|"),
    "optimizers": (OPTIMIZERS, "| | on top of configs/demo.toml | learning rate | steps | exact match before | after | "
                   "MLX peak memory, MB | seconds a step |", "|---|---|---|---|---|---|---|---|"),
}


def quantised_demo(path):
    """The demo's model with 4-bit matrices, as a directory; returns its path."""
    model, tokenizer = load_model("data/demo_model")
    nn.quantize(model, 64, 4)
    path.mkdir(parents=True)
    save_arrays(path / "model.safetensors", dict(tree_flatten(model.parameters())))
    config = json.loads((model.source_path / "config.json").read_text())
    config["quantization"] = {"group_size": 64, "bits": 4}
    (path / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(path)
    return path


def run_variant(variant, directory):
    """run_demo's figures."""
    models = {}
    if variant.options.get("model_name") == "{quantised}":
        models["quantised"] = quantised_demo(Path(directory) / "quantised")
    return run_demo(variant, directory, **models)


def table_row(marker, variant, found):
    options = {k: "demo_model at 4 bits" if v == "{quantised}" else v for k, v in variant.options.items()}
    scores = f"{found['steps']} | {found['before']:.3f} | {found['after']:.3f}"
    cost = f"{found['peak_mb']:.0f} | {found['step_s']:.2f}"
    if marker == "kinds":
        return f"| {variant.name} | {shown(options)} | {scores} | {found['trained']:,} | {cost} |"
    rate = f"{options.get('learning_rate', 1e-4):g}"
    if "matrix_learning_rate" in options:
        rate = f"{options['matrix_learning_rate']:g} matrices, {rate} others"
    return f"| {variant.name} | {shown(options)} | {rate} | {scores} | {cost} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these rows, and keep the others as they are")
    options = parser.parse_args()
    names = [v.name for v in KINDS + OPTIMIZERS]
    if unknown := [name for name in options.only or [] if name not in names]:
        raise UserError(f"--only {unknown[0]!r}: there are {', '.join(names)}")
    for marker, (variants, *head) in TABLES.items():
        rows = table_rows(DOCUMENT, marker) if options.only else {}
        for variant in variants:
            if options.only and variant.name not in options.only:
                continue
            with tempfile.TemporaryDirectory() as directory:
                rows[variant.name] = table_row(marker, variant, run_variant(variant, directory))
            print(rows[variant.name], flush=True)
        lines = [rows[v.name] for v in variants if v.name in rows]
        write_table(DOCUMENT, marker, [f"Measured on {where()}.", "", *head, *lines])


if __name__ == "__main__":
    run_command(main)
