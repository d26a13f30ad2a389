"""
Peak memory of a nanochat conversion, measured on a synthetic checkpoint in processes of their own.

    python benchmarks/nanochat_memory.py --gigabytes 1

Writes a random checkpoint of about that size into a temporary folder (it needs about three times that on the disk and
torch to write it), converts it, then converts it with --verify, and prints the peaks as multiples of the checkpoint.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections import OrderedDict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))   # runs from a plain clone, from any directory

WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import mlx_grpo
from benchmarks.nanochat_memory import write_checkpoint
write_checkpoint(Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
"""
CHILD = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
import convert_nanochat
from benchmarks.nanochat_memory import peak_bytes
before, start = peak_bytes(), time.time()
code = convert_nanochat.main(sys.argv[1:])
print("\\npeaks", before, peak_bytes(), time.time() - start, code)
"""


def peak_bytes():
    """Largest resident memory of this process so far. On Linux from VmHWM: ru_maxrss starts at the parent's size."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss      # bytes on macOS


def write_checkpoint(folder, gigabytes, generation, tokenizer):
    """A checkpoint of `generation` with random weights and 1024-wide layers."""
    import torch

    from mlx_grpo import nanochat_checkpoint as checkpoint
    from mlx_grpo.safe_pickle import read_tiktoken_pickle
    vocab = read_tiktoken_pickle(tokenizer).n_vocab
    layers = max(2, round(gigabytes * 1e9 / (12 * 1024 * 1024 * 4)))
    sizes = {"sequence_len": 256, "vocab_size": vocab, "n_layer": layers, "n_head": 8, "n_kv_head": 8, "n_embd": 1024}
    shapes = checkpoint.expected_shapes(checkpoint.GENERATIONS[generation], sizes, -(-vocab // 64) * 64)
    tensors = OrderedDict((name, torch.randn(shape) * 0.02) for name, shape in shapes.items())
    torch.save(tensors, folder / "model_000001.pt")
    (folder / "meta_000001.json").write_text(json.dumps({"model_config": sizes}))
    (folder / "tokenizer.pkl").write_bytes(tokenizer.read_bytes())


def convert(folder, output, *options):
    """(peak before, peak after, seconds) of one conversion in a process of its own."""
    done = subprocess.run([sys.executable, "-c", CHILD, str(ROOT), "--cache-dir", str(folder),
                           "--output-dir", str(output), *options], capture_output=True, text=True)
    if done.returncode or "peaks" not in done.stdout:
        raise SystemExit(f"conversion failed: {done.stdout}{done.stderr}")
    before, after, seconds, code = done.stdout.split("peaks")[1].split()
    if code != "0":
        raise SystemExit(f"not verified:\n{done.stdout}")
    return int(before), int(after), float(seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the checkpoint (default 1)")
    parser.add_argument("--generation", type=int, choices=range(1, 6), default=5)
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "tests/fixtures/nanochat/gen5/tokenizer.pkl")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work, "in")
        folder.mkdir()
        subprocess.run([sys.executable, "-c", WRITER, str(ROOT), str(folder), str(args.gigabytes),
                        str(args.generation), str(args.tokenizer)], check=True)
        size = (folder / "model_000001.pt").stat().st_size
        print(f"checkpoint {size / 1e9:.2f} GB, generation {args.generation}")
        for what, options in [("convert", ["--no-verify"]), ("convert -q", ["--no-verify", "-q"]),
                              ("convert --verify", ["--verify"])]:
            before, after, seconds = convert(folder, Path(work, what.replace(" ", "")), *options)
            print(f"{what:17} peak {after / 1e9:.2f} GB = {after / size:.2f} x checkpoint, of it {before / 1e9:.2f} GB "
                  f"before the start; {seconds:.1f} s")


if __name__ == "__main__":
    main()
