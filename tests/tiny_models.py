"""Tiny random models made on the spot with mlx-lm alone (no torch), and the options of a run of seconds."""

import json
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_map_with_path
from tiny_hf import CHATML, save_tokenizer

QWEN2 = dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"], hidden_size=32, intermediate_size=64,
             num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=10000.0,
             max_position_embeddings=1024,
             vocab_size=264, tie_word_embeddings=True, bos_token_id=1, eos_token_id=3)     # ends at <|im_end|>

EVEN_SHARE = f"{Path(__file__).with_name('user_reward.py')}:even_share"

QUICK = dict(  # a run of a second, whose rewards differ and whose weights move
    rewards=["correctness", EVEN_SHARE], dataset="data/word_problems.jsonl", system_prompt="", max_train_samples=12,
    eval_samples=4, num_generations=4,
    batch_size=1, gradient_accumulation_steps=2, max_steps=2, max_new_tokens=6, max_completion_length=8,
    eval_max_new_tokens=6,
    eval_every_updates=0, learning_rate=1e-3, max_grad_norm=1.0, lr_scheduler_type="constant", update_every=1)


def tiny_qwen2(directory, seed=0, chat_template=CHATML, **changes):
    """Write a random float32 Qwen2-shaped model of 30 thousand parameters with a tokenizer of bytes; returns the
    directory as text."""
    from mlx_lm.models.qwen2 import Model, ModelArgs
    from mlx_lm.utils import save_model

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = QWEN2 | changes
    model = Model(ModelArgs.from_dict(config))
    keys = iter(mx.random.split(mx.random.key(seed), 200))
    model.update(tree_map_with_path(lambda name, a: mx.random.normal(a.shape, key=next(keys)) * 0.2
                                    if a.ndim > 1 or name.endswith("bias") else a,      # mlx draws biases by the clock
                                    model.parameters()))
    save_model(directory, model)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    save_tokenizer(directory, chat_template, every_byte=True)
    return str(directory)


def sets(**options):
    """--set arguments of a command line."""
    written = lambda value: value if isinstance(value, str) else json.dumps(value)
    return [part for name, value in options.items() for part in ("--set", f"{name}={written(value)}")]
