"""A NeMo checkpoint trained here by GRPO and sent back."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import require
from mlx.utils import tree_flatten
from nemo_fixtures import fixture, tensors_of, transformers_logits
from tiny_models import QUICK

from mlx_grpo import MLXGRPOConfig, MLXGRPOTrainer, load_model, load_problems
from mlx_grpo.nemo_convert import export_hf, import_hf
from mlx_grpo.nemo_dist import DistStore
from mlx_grpo.nemo_files import Folder

torch = require("torch")
require("yaml")


@pytest.mark.parametrize("folder,checkpoint,container,weights", [
    ("llama3_gqa", "nemo2", "nemo2", "weights"), ("qwen2_bias", "mbridge", "bridge", "iter_0000000")])
def test_nemo_to_hugging_face_to_grpo_steps_to_nemo(folder, checkpoint, container, weights, tmp_path):
    """Exported, trained for two steps, imported: NVIDIA's keys and shapes, the trainer's numbers bit for bit."""
    theirs = fixture(folder) / checkpoint
    export_hf(theirs, tmp_path / "hf")
    config = MLXGRPOConfig(model_name=str(tmp_path / "hf"), save_steps=0, logging_steps=0, log_jsonl=False,
                           **QUICK | {"max_new_tokens": 4, "eval_samples": 0})
    model, tokenizer = load_model(config.model_name)
    problems, held_out = load_problems(config)
    trainer = MLXGRPOTrainer(model, tokenizer, config.rewards, config, problems, held_out, run_dir=tmp_path / "run")
    for first in (0, 2):
        trainer.step(trainer.train_dataset[first:first + 2])
    trainer.save_checkpoint(tmp_path / "trained")
    trained = {name: np.array(value) for name, value in tree_flatten(trainer.learner.master)}

    import_hf(tmp_path / "trained", tmp_path / "back", container)
    ours, original = DistStore(Folder(tmp_path / "back" / weights)), DistStore(Folder(theirs / weights))
    assert ours.tensors == original.tensors and ours.objects == original.objects      # NeMo finds every key it had
    moved = [key for key in ours.tensors if not torch.equal(ours.read(key), original.read(key))]
    assert len(moved) > len(ours.tensors) // 2

    export_hf(tmp_path / "back", tmp_path / "again")
    again = tensors_of(tmp_path / "again")
    assert again.keys() == trained.keys() and all(np.array_equal(again[name].numpy(), trained[name]) for name in again)
    ids = [[5, 9, 200, 31, 77, 140, 6, 18]]
    logits = np.array(trainer.model(mx.array(ids)).astype(mx.float32))
    assert np.abs(transformers_logits(tmp_path / "again", ids) - logits).max() < 1e-3
