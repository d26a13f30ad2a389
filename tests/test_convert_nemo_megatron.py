"""Our checkpoints in Megatron's own hands, where megatron-core is installed (an extra; it has no place on a Mac): its
loader reads them, its GPTModel takes them without a missing key and gives the stored logits.

    pip install megatron-core && python -m pytest tests/test_convert_nemo_megatron.py
"""

import subprocess
import sys

import pytest
from conftest import ROOT, require
from nemo_fixtures import fixture

from mlx_grpo.nemo_convert import import_hf

torch = require("torch")
pytest.importorskip("megatron.core", reason="megatron-core is an optional extra", exc_type=ImportError)

PROGRAM = '''
import contextlib, os, sys, types, warnings
warnings.simplefilter("ignore")
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[1], "RANK": "0", "WORLD_SIZE": "1"}
import numpy, torch, yaml
torch.cuda.current_device = lambda: torch.device("cpu")            # the loader asks for it even without CUDA
torch.distributed.init_process_group("gloo")
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.serialization import load_content_metadata
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_config import TransformerConfig
parallel_state.initialize_model_parallel()
tensor_parallel.get_cuda_rng_tracker = lambda: types.SimpleNamespace(fork=contextlib.nullcontext)

weights, config_file, section, prefix, reference = sys.argv[2:]
c = yaml.safe_load(open(config_file))[section]
plain = dist_checkpointing.load_plain_tensors(weights)
assert any(key.endswith("linear_qkv.weight") for key in plain)
same = {k: c[k] for k in (
    "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size",
    "gated_linear_unit", "add_bias_linear", "add_qkv_bias", "qk_layernorm", "normalization", "layernorm_epsilon")}
act = getattr(torch.nn.functional, c["activation_func"]["_target_"].split(".")[-1])
config = TransformerConfig(**same, activation_func=act, hidden_dropout=0, attention_dropout=0,
                           use_cpu_initialization=True, params_dtype=torch.float32, apply_rope_fusion=False,
                           bias_activation_fusion=False, bias_dropout_fusion=False,
                           persist_layer_norm=False, masked_softmax_fusion=False, gradient_accumulation_fusion=False)
spec = get_gpt_layer_local_spec(qk_layernorm=c["qk_layernorm"], normalization=c["normalization"])
rows = plain[prefix + "embedding.word_embeddings.weight"].shape[0]
model = GPTModel(config, spec, vocab_size=c["vocab_size"] or rows,
                 max_sequence_length=c["seq_length"], position_embedding_type="rope", rotary_base=c["rotary_base"],
                 rotary_percent=c["rotary_percent"],
                 share_embeddings_and_output_weights=c["share_embeddings_and_output_weights"],
                 rope_scaling=bool("scale_factor" in c or c.get("rope_scaling")),
                 rope_scaling_factor=c.get("scale_factor", c.get("rope_scaling_factor", 8.0)))
state = model.sharded_state_dict(prefix=prefix, metadata=load_content_metadata(weights))
loaded = dist_checkpointing.load(state, weights)
result = model.load_state_dict({k[len(prefix):]: v for k, v in loaded.items() if k.startswith(prefix)}, strict=False)
assert not result.missing_keys, result
stored = numpy.load(reference)
ids = torch.tensor(stored["input_ids"])
T = ids.shape[1]
with torch.no_grad():
    logits = model.eval()(ids, torch.arange(T)[None].expand_as(ids), torch.ones(1, 1, T, T).tril() < 0.5)
print("largest difference", float((logits - torch.tensor(stored["hf_logits"])).abs().max()))
'''


# The local (CPU) layer has no zero-centred norm (Gemma) and no sliding window (Mistral), and is run in float32.
@pytest.mark.parametrize("folder,container", [
    ("llama3_gqa", "nemo2"), ("llama3_gqa", "bridge"), ("llama_hf5_bridge060", "bridge"), ("qwen2_bias", "nemo2"),
    ("qwen2_bias", "bridge"),
    ("qwen3_qknorm", "nemo2"), ("phi3_fused", "nemo2"), ("gptneox_sequential", "bridge")])
def test_megatrons_model_loads_ours_and_gives_the_stored_logits(folder, container, tmp_path):
    import socket
    target = tmp_path / "m"
    import_hf(fixture(folder) / "hf", target, container)
    if container == "nemo2":
        arguments = [target / "weights", target / "context" / "model.yaml", "config", "module."]
    else:
        arguments = [target / "iter_0000000", target / "iter_0000000" / "run_config.yaml", "model", ""]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(port), *map(str, arguments),
                           str(fixture(folder) / "reference_logits.npz")],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout.split()[-1]) < 1e-4
