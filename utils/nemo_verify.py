"""
Proof that a Hugging Face model and a NeMo checkpoint are the same: every tensor bit for bit, the values of the
configuration, and, where transformers can run both, logits and a generation on prompts.

    validate_conversion(hf_path, nemo_path, test_prompt)     true if they are; prints the report
"""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from mlx_grpo import UserError
from mlx_grpo.files import human_bytes
from mlx_grpo.nemo_config import spec_from_hf
from mlx_grpo.nemo_convert import export_hf
from mlx_grpo.nemo_files import read_json
from mlx_grpo.nemo_hf import HFSource, HubFolder, fetch
from mlx_grpo.nemo_read import open_checkpoint
from mlx_grpo.nemo_layout import BUFFERS, same_bits
from mlx_grpo.nemo_resolve import resolve

PROMPTS = ("Hello, how are you?", "請問什麼是人工智慧？")
TOLERANCE = 1e-4           # largest logit difference in float32, relative to the largest logit (at least 1)
NEW_TOKENS = 16


@dataclass
class Verification:
    """True as a condition if nothing differs. `lines`: the report."""
    passed: bool = True
    converted: int = 0         # tensors whose dtype differs, compared after conversion
    lines: list = field(default_factory=list)

    def __bool__(self):
        return self.passed

    def say(self, text, fine=True):
        self.passed = self.passed and fine
        self.lines.append(text if fine else f"DIFFERENT  {text}")


def validate_conversion(hf_path, nemo_path, test_prompt=PROMPTS, say=print):
    """Compare a Hugging Face model (directory or Hub id) with a NeMo checkpoint of any format. Returns a Verification.

    test_prompt: one prompt or several. Raises UserError where one of the two can't be read."""
    prompts = (test_prompt,) if isinstance(test_prompt, str) else tuple(test_prompt)
    path, result = fetch(hf_path), Verification()
    source, checkpoint = HFSource(path), open_checkpoint(nemo_path)
    _, spec, _, steps = resolve(checkpoint)
    compare_tensors(source, steps, spec["share_embeddings_and_output_weights"], result)
    family, expected = spec_from_hf(read_json(HubFolder(path), "config.json"))
    if family.name != checkpoint.family.name:
        result.say(f"architecture: {family.name} and {checkpoint.family.name}", False)
    for name in sorted(expected):
        if name != "params_dtype" and expected[name] != spec.get(name):
            result.lines.append(f"configuration: {name} is {expected[name]!r} in the Hugging Face model, "
                                f"{spec.get(name)!r} in the checkpoint")
    checkpoint.close()
    source.close()
    compare_logits(path, checkpoint, prompts, result)
    result.lines.append("the same model" if result.passed else "not the same model")
    for line in result.lines:
        say(line)
    return result


def compare_tensors(source, steps, tied, result):
    """Every tensor of the export against the source's: names, shapes, dtypes, bits."""
    import torch
    ours, different, seen = 0, [], set()
    for step in steps:
        for name, shape, made in zip(step.names, step.shapes, step.make()):
            seen.add(name)
            ours += made.numel()
            if name not in source.tensors:
                different.append(f"{name} is only in the checkpoint")
                continue
            kind, expected = source.tensors[name]
            if tuple(expected) != tuple(shape):
                different.append(f"{name} has shape {list(expected)} in the source, {list(shape)} in the checkpoint")
                continue
            result.converted += kind != step.dtype
            read = lambda a, b, name=name: source.read(name, (a, b)).to(step.dtype)      # noqa: B023, E731
            if not same_bits(read, lambda a, b, made=made: made[a:b], shape[0], made[0].numel() * made.element_size()):
                worst = (source.read(name).to(torch.float32) - made.to(torch.float32)).abs().max()
                different.append(f"{name} differs by up to {float(worst):.3g}")
    head = {"lm_head.weight", "embed_out.weight"} if tied else set()     # a tied model's file may hold it as well
    different += [f"{name} is only in the source" for name in sorted(set(source.tensors) - seen - head)
                  if not BUFFERS.search(name)]
    theirs = sum(torch.Size(shape).numel() for name, (_, shape) in source.tensors.items() if name in seen)
    for line in different[:10]:
        result.say(line, False)
    if len(different) > 10:
        result.say(f"and {len(different) - 10} more", False)
    note = f" ({result.converted} after conversion to the checkpoint's dtype)" if result.converted else ""
    result.lines.append(f"tensors: {len(seen) - len(different)} of {len(seen)} equal bit for bit{note}")
    result.say(f"parameters: {theirs:,} in the Hugging Face model, {ours:,} in the checkpoint", theirs == ours)


def why_not_run(path, checkpoint):
    """Why logits can't be compared here; None if they can."""
    import importlib.util
    import os
    import shutil
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return f"{path} has no tokenizer"
    files = list(path.glob("*.safetensors")) or list(path.glob("*.bin"))
    weights = sum(file.stat().st_size for file in files)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 3 * weights > memory:
        return f"float32 weights of {human_bytes(weights)} stored need more than the {human_bytes(memory)} of memory"
    if shutil.disk_usage(tempfile.gettempdir()).free < 2 * weights:
        return f"{tempfile.gettempdir()} has no room for the checkpoint as a Hugging Face directory"
    return None


def compare_logits(path, checkpoint, prompts, result):
    """Logits of both in float32 on each prompt, and a greedy generation from each side."""
    reason = why_not_run(path, checkpoint)
    if reason:
        result.lines.append(f"logits: not compared, {reason}")
        return
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "hf"
        export_hf(checkpoint.path, exported)
        try:
            theirs, ours = run_model(path, path, prompts), run_model(exported, path, prompts)
        except (ValueError, KeyError, ImportError, OSError) as error:
            result.lines.append("logits: not compared, transformers can't run the model "
                                f"({str(error).splitlines()[0]})")
            return
    for prompt, (logits_a, text_a), (logits_b, text_b) in zip(prompts, theirs, ours):
        if logits_a.shape != logits_b.shape:
            result.say(f"logits on {prompt!r}: {tuple(logits_a.shape)} and {tuple(logits_b.shape)}", False)
            continue
        worst, limit = float((logits_a - logits_b).abs().max()), TOLERANCE * max(1.0, float(logits_a.abs().max()))
        judged = f"(limit {limit:.3g})" if not result.converted else "(not judged, the dtypes differ)"
        result.say(f"logits on {prompt!r}: largest difference {worst:.3g} {judged}", worst <= limit
                   or result.converted > 0)
        result.lines.append(f"  Hugging Face goes on: {text_a!r}")
        result.lines.append(f"  the checkpoint:       {text_b!r}")


def run_model(path, tokenizer_path, prompts):
    """[(logits (T, V) in float32, greedy continuation)] of a Hugging Face directory on the prompts."""
    import torch
    import transformers
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    model.eval()
    results = []
    with torch.no_grad():
        for prompt in prompts:
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            if ids.shape[1] == 0:
                raise UserError(f"the tokenizer makes no token of the prompt {prompt!r}")
            logits = model(ids).logits[0].float()
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False,
                                 pad_token_id=tokenizer.pad_token_id or 0)
            results.append((logits, tokenizer.decode(out[0, ids.shape[1]:])))
    return results
