"""manifest.json: whatever is cut off, flipped, lost or put beside a checkpoint's files is told."""

import hashlib
import json
import random
import shutil

import numpy as np
import pytest
from mlx_grpo.manifest import check_manifest, write_manifest
from safetensors.numpy import save_file


@pytest.fixture
def checkpoint(tmp_path):
    """A directory with the files of a run's checkpoint, and a manifest."""
    path, numbers = tmp_path / "checkpoint-20", np.random.default_rng(0)
    path.mkdir()
    for name in ("model", "optimizer"):
        save_file({f"{name}.{i}": numbers.normal(size=(8, 16)).astype("float32") for i in range(3)},
                  path / f"{name}.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "qwen2", "hidden_size": 16}) + "\n")
    (path / "trainer_state.json").write_text(json.dumps({"step": 20, "seed": 0}) + "\n")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates/tools.jinja").write_text("{{ messages }}\n")
    (path / "empty.txt").write_bytes(b"")
    write_manifest(path)
    return path


def names(path):
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())


def test_the_manifest_lists_every_other_file_as_sha256sum_would(checkpoint):
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert manifest["format"] == 1 and set(manifest) == {"format", "files"}
    assert sorted([*manifest["files"], "manifest.json"]) == names(checkpoint)
    for name, entry in manifest["files"].items():
        data = (checkpoint / name).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert check_manifest(checkpoint) is None and check_manifest(checkpoint, quick=True) is None


def test_a_file_cut_to_any_length_is_told_by_its_size_alone(checkpoint):
    tried = 0
    for name in names(checkpoint):
        data = (checkpoint / name).read_bytes()
        cuts = sorted({*range(16), *range(16, len(data), 11), len(data) - 1} & set(range(len(data))))
        for length in cuts:
            (checkpoint / name).write_bytes(data[:length])
            assert check_manifest(checkpoint, quick=True) is not None, (name, length)
            tried += 1
        (checkpoint / name).write_bytes(data + b"\0")
        assert check_manifest(checkpoint, quick=True) is not None, name
        (checkpoint / name).write_bytes(data)
    assert tried > 200 and check_manifest(checkpoint) is None


@pytest.mark.parametrize("flips", [100, pytest.param(10_000, marks=pytest.mark.soak)])
def test_random_byte_flips_of_each_file_are_told(checkpoint, flips):
    chance = random.Random(0)
    for name in names(checkpoint):
        data = (checkpoint / name).read_bytes()
        for _ in range(flips if data else 0):
            place, mask = chance.randrange(len(data)), chance.randrange(1, 256)
            flipped = bytearray(data)
            flipped[place] ^= mask
            (checkpoint / name).write_bytes(flipped)
            fault = check_manifest(checkpoint)
            assert fault and "\n" not in fault, (name, place, mask)
        (checkpoint / name).write_bytes(data)
    assert check_manifest(checkpoint) is None


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.soak)])
def test_every_single_bit_of_the_manifest_itself_counts(checkpoint, every):
    path = checkpoint / "manifest.json"
    data = path.read_bytes()
    for n in range(0, 8 * len(data), every):           # 5 and 8 have no common factor: every bit of some byte
        place, bit = divmod(n, 8)
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1:])
        assert check_manifest(checkpoint), (place, bit)


def test_lost_and_added_files_are_told_and_notes_and_hidden_files_are_not(checkpoint):
    for name in names(checkpoint):
        (checkpoint / name).rename(checkpoint.parent / "away")
        assert check_manifest(checkpoint) == ("no manifest.json" if name == "manifest.json" else f"{name} is missing")
        (checkpoint.parent / "away").rename(checkpoint / name)
    for name in ("model-00002-of-00002.safetensors", "generation_config.json", "modeling.py"):
        (checkpoint / name).write_text("x")
        assert check_manifest(checkpoint).startswith(f"{name} is not in manifest.json")
        (checkpoint / name).unlink()
    (checkpoint / "README.md").write_text("the good one")
    (checkpoint / ".DS_Store").write_bytes(b"\0")
    assert check_manifest(checkpoint) is None


@pytest.mark.parametrize("text, told", [
    ("", "cut short"), ("[]", "lists no files"), ("{}", "lists no files"), ('{"format": 1, "files": {}}', "lists no files"),
    ('{"format": 2, "files": {"a": {"size": 0, "sha256": ""}}}', "format 2"), ("[" * 100_000, "cut short"),
    ('{"format": 1, "files": {"../a": {"size": 0, "sha256": ""}}}', "'../a'"),
    ('{"format": 1, "files": {"/etc/passwd": {"size": 0, "sha256": ""}}}', "'/etc/passwd'"),
    ('{"format": 1, "files": {"a": {"size": true, "sha256": ""}}}', "'a'"), ('{"format": 1, "files": {"a": 3}}', "'a'"),
    ("\xff", "cut short"), (" " * (17 << 20), "too many"),
], ids=range(12))
def test_a_malformed_manifest_is_told_in_one_line(checkpoint, text, told):
    (checkpoint / "manifest.json").write_bytes(text.encode("latin-1"))
    fault = check_manifest(checkpoint)
    assert told in fault and "\n" not in fault


def test_a_missing_or_empty_directory_has_no_manifest(tmp_path):
    assert check_manifest(tmp_path) == check_manifest(tmp_path / "nowhere") == "no manifest.json"


def test_writing_again_after_a_change_makes_it_valid_and_leaves_no_temporary_file(checkpoint):
    (checkpoint / "config.json").write_text("{}")
    assert "config.json has 2 bytes" in check_manifest(checkpoint)
    shutil.rmtree(checkpoint / "additional_chat_templates")
    write_manifest(checkpoint)
    assert check_manifest(checkpoint) is None
    assert not [name for name in names(checkpoint) if name.startswith(".")]


def test_the_manifest_is_written_after_the_files_have_reached_the_disk(checkpoint, monkeypatch):
    import os

    events = []
    fsync, swap = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), swap(a, b)))
    write_manifest(checkpoint)
    files = len(names(checkpoint)) - 1
    assert events.count("rename") == 1 and events.index("rename") >= files + 1 and events[-1] == "fsync"
