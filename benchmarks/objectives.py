"""
The demo with every objective: exact match and completion lengths before and after the same number of steps.

    python benchmarks/objectives.py                           # all, a minute each; the table of docs/algorithms.md
    python benchmarks/objectives.py --only "RLOO" "GSPO"      # these again, into their rows

Every run is configs/demo.toml with the options of its row, and nothing else: same model, seed, problems and steps. The
teacher of the distillation is the checkpoint of the first run.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))   # runs from a plain clone, from any directory

from benchmarks.demo_runs import ROOT, Variant, run_demo, shown, table_rows, where, write_table  # noqa: E402
from mlx_grpo import UserError, run_command  # noqa: E402

DOCUMENT, MARKER = ROOT / "docs/algorithms.md", "objectives"
QUANTISED = {"quantize_for_rollouts": True, "update_every": 10}

VARIANTS = [
    Variant("GRPO, the demo itself", {}),
    Variant("dynamic sampling", {"dynamic_sampling": True}),
    Variant("DAPO", {"recipe": "dapo"}),
    Variant("Dr. GRPO", {"recipe": "dr_grpo"}),
    Variant("GSPO", {"recipe": "gspo"}),
    Variant("CISPO", {"recipe": "cispo"}),
    Variant("RLOO", {"recipe": "rloo"}),
    Variant("two passes over each rollout batch", {"num_iterations": 2}),
    Variant("rollouts at 8 bits, copied every 10 steps", {**QUANTISED, "rollout_bits": 8}),
    Variant("rollouts at 4 bits, copied every 10 steps", {**QUANTISED, "rollout_bits": 4}),
    Variant("distillation from the trained demo", {"objective": "distill", "teacher_model": "{teacher}"}),
]


def run_variant(variant, directory, teacher=None):
    """run_demo's figures. teacher: a checkpoint to distil from; made here where it is needed and None."""
    if "teacher_model" in variant.options and teacher is None:
        teacher = run_demo(VARIANTS[0], Path(directory) / "teacher")["checkpoint"]
    return run_demo(variant, directory, teacher=teacher)


def table_row(variant, found):
    options = {k: "outputs/demo-1/checkpoint-30" if v == "{teacher}" else v for k, v in variant.options.items()}
    return (f"| {variant.name} | {shown(options)} | {found['steps']} | {found['before']:.3f} | {found['at_10']:.3f} | "
            f"{found['after']:.3f} | {found['length_before']:.1f} | {found['length_after']:.1f} | "
            f"{found['seconds']:.0f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these rows, and keep the others as they are")
    options = parser.parse_args()
    names = [v.name for v in VARIANTS]
    if unknown := [name for name in options.only or [] if name not in names]:
        raise UserError(f"--only {unknown[0]!r}: there are " + ", ".join(map(repr, names)))
    rows = table_rows(DOCUMENT, MARKER) if options.only else {}
    with tempfile.TemporaryDirectory() as directory:
        teacher = None
        for variant in VARIANTS:
            if options.only and variant.name not in options.only:
                continue
            found = run_variant(variant, Path(directory) / variant.name.replace(" ", "-"), teacher)
            teacher = teacher or (found["checkpoint"] if variant is VARIANTS[0] else None)
            rows[variant.name] = table_row(variant, found)
            print(rows[variant.name], flush=True)
    write_table(DOCUMENT, MARKER, [
        f"Measured on {where()}.", "",
        "| | on top of configs/demo.toml | steps | exact match before | at step 10 | after | tokens before | "
        "after | seconds |", "|---|---|---|---|---|---|---|---|---|", *[rows[name] for name in names if name in rows]])


if __name__ == "__main__":
    run_command(main)
