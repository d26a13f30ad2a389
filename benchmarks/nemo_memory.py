"""
Peak anonymous memory of converting a synthetic model to NeMo and back (mapped pages of files don't count).

    python benchmarks/nemo_memory.py [--gb 2.0] [--format nemo2|bridge|nemo1] [--directory DIR]

Writes a Llama of about --gb gigabytes (bfloat16, random bits), converts it both ways, each in a process of its own that
samples RssAnon every 2 ms, and compares the result with the source bit for bit. Needs about four times --gb of disk.
Where there is no /proc (macOS), the peak resident size stands in, which is larger.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlx_grpo import run_command                                    # noqa: E402
from mlx_grpo.nemo_convert import export_hf, import_hf              # noqa: E402
from mlx_grpo.nemo_families import FAMILIES, dims_of                 # noqa: E402
from mlx_grpo.nemo_hf import HFSource, HFWriter                     # noqa: E402
from mlx_grpo.nemo_job import resumable                             # noqa: E402
from mlx_grpo.nemo_layout import hf_names, instances, part_rows, same_bits, shape_of    # noqa: E402

SIZES = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 8,
         "head_dim": 64,
         "vocab_size": 64000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}


def write_model(directory, gigabytes):
    """A Llama of random bfloat16 bits in shards of at most 1 GB; returns its bytes."""
    import torch
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
              "torch_dtype": "bfloat16",
              "tie_word_embeddings": False, **SIZES}
    from mlx_grpo.nemo_config import spec_from_hf
    spec = spec_from_hf(config | {"num_hidden_layers": 1})[1]
    family, dims = FAMILIES["llama"], dims_of(spec) | {"V": spec["vocab_size"]}

    def shapes(layers):
        tensors = {row[1]: shape_of(row, dims) for row in family.outer}
        for row, i, _ in instances(family.layer, spec | {"num_layers": layers, "num_moe_experts": None}):
            shape, parts = shape_of(row, dims), part_rows(row[2], dims)
            tensors |= {name: (n, *shape[1:]) for name, n in zip(hf_names(row, i), parts or shape[:1])}
        return tensors
    size = lambda tensors: sum(2 * torch.Size(shape).numel() for shape in tensors.values())       # noqa: E731
    layers = max(1, round((gigabytes * 1e9 - size(shapes(0))) / (size(shapes(2)) - size(shapes(1)))))
    tensors = {name: (torch.bfloat16, shape) for name, shape in shapes(layers).items()}
    with resumable(directory, "benchmark") as job:
        writer = HFWriter(job, tensors, shard_bytes=10**9)
        generator = torch.Generator().manual_seed(0)
        for name, (_, shape) in tensors.items():
            writer.put([name], lambda shape=shape: [torch.randint(-2**15, 2**15, shape, dtype=torch.int16,
                                                                  generator=generator).view(torch.bfloat16)])
        writer.finish()
        (job.directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}, indent=2))
    return size(shapes(layers))


class PeakMemory(threading.Thread):
    """Samples this process's anonymous memory; `peak` in bytes."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.running = 0, True

    def now(self):
        status = Path("/proc/self/status")
        if not status.exists():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss       # bytes on macOS
        return int(next(line.split()[1] for line in status.read_text().splitlines()
                        if line.startswith("RssAnon"))) * 1024

    def run(self):
        while self.running:
            self.peak = max(self.peak, self.now())
            time.sleep(0.002)


def child(arguments):
    """One conversion in this process; prints {"peak", "seconds"} as JSON."""
    import torch                                                            # noqa: F401  counted before and during
    memory = PeakMemory()
    start = memory.now()
    memory.start()
    begin = time.perf_counter()
    if arguments.child == "import":
        import_hf(arguments.source, arguments.target, arguments.format)
    else:
        export_hf(arguments.source, arguments.target)
    memory.running = False
    memory.join()
    print(json.dumps({"start": start, "peak": max(memory.peak, memory.now()), "seconds": time.perf_counter() - begin}))


def measure(direction, source, target, container):
    """The child's measurements of one conversion."""
    command = [sys.executable, __file__, "--child", direction, "--source", source, "--target", target, "--format",
               container]
    return json.loads(subprocess.run(list(map(str, command)), check=True, capture_output=True,
                                     text=True).stdout.splitlines()[-1])


def same_model(a, b):
    """True where two Hugging Face directories hold the same tensors bit for bit."""
    a, b = HFSource(a), HFSource(b)
    return a.tensors == b.tensors and all(
        same_bits(lambda s, e, n=name: a.read(n, (s, e)), lambda s, e, n=name: b.read(n, (s, e)), shape[0],
                  kind.itemsize * (shape[1] if len(shape) > 1 else 1)) for name, (kind, shape) in a.tensors.items())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0, help="size of the synthetic model")
    parser.add_argument("--format", default="nemo2", choices=("nemo2", "bridge", "nemo1"))
    parser.add_argument("--directory", help="where to work; default a temporary directory")
    parser.add_argument("--child", choices=("import", "export"), help=argparse.SUPPRESS)
    parser.add_argument("--source", help=argparse.SUPPRESS)
    parser.add_argument("--target", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        folder = Path(folder)
        nbytes = write_model(folder / "hf", arguments.gb)
        target = folder / ("model.nemo" if arguments.format == "nemo1" else "nemo")
        print(f"synthetic Llama, bfloat16, {nbytes / 1e9:.2f} GB of weights, largest tensor "
              f"{2 * SIZES['vocab_size'] * SIZES['hidden_size'] / 1e6:.0f} MB; {arguments.format}")
        for direction, source, output in (("import", folder / "hf", target), ("export", target, folder / "back")):
            result = measure(direction, source, output, arguments.format)
            print(f"{direction}: peak anonymous memory {result['peak'] / 1e9:.3f} GB ({result['start'] / 1e9:.3f} "
                  "before it began), "
                  f"{result['seconds']:.1f} s")
        print("round trip:", "bit-identical" if same_model(folder / "hf", folder / "back") else "DIFFERENT")


if __name__ == "__main__":
    run_command(main)
