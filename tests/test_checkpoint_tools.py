"""utils/checkpoints.py: list, latest, backup, verify, prune, diff, on runs of ours, Hugging Face's and NeMo's formats."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, require
from mlx_grpo import UserError, checkpoint_backup, checkpoints
from mlx_grpo.manifest import write_manifest
from safetensors.numpy import load_file, save_file


def save_run(path, step, shift=0.0, adapters=False, time=None):
    """A checkpoint with the files that a run's have."""
    numbers = np.random.default_rng(0)
    weights = {f"layers.{i}.weight": numbers.normal(size=(6, 4)).astype("float32") for i in range(3)}
    weights["layers.1.weight"] = weights["layers.1.weight"] + np.float32(shift)
    path.mkdir(parents=True)
    save_file(weights, path / ("adapters.safetensors" if adapters else "model.safetensors"))
    save_file({"step": np.array([step], dtype="int64")}, path / "optimizer.safetensors")
    (path / "config.json").write_text('{"model_type": "qwen2"}\n')
    (path / "trainer_state.json").write_text(json.dumps({"step": step}) + "\n")
    write_manifest(path)
    if time:
        os.utime(path / "manifest.json", (time, time))
    return path


@pytest.fixture
def run(tmp_path):
    """The directory of a run with checkpoints of steps 10 to 40 and links to the last and the best one."""
    directory = tmp_path / "runs" / "a"
    for step in (10, 20, 30, 40):
        save_run(directory / f"checkpoint-{step}", step, shift=step / 100, time=1_000_000 + step)
    (directory / "checkpoint-last").symlink_to("checkpoint-40")
    (directory / "checkpoint-best").symlink_to("checkpoint-20")
    (directory / "config.json").write_text("{}")
    return directory


def call(capsys, *arguments):
    """(exit code, standard output, standard error) of a command in this process."""
    capsys.readouterr()
    code = checkpoints.main([str(a) for a in arguments]) or 0
    return code, *capsys.readouterr()


def flip(file, place=-1):
    data = bytearray(file.read_bytes())
    data[place] ^= 64
    file.write_bytes(data)


def contents(path):
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


# ---- list and latest ----

def test_list_tells_format_size_parameters_step_date_and_why_one_is_not_valid(run, capsys):
    (run / "checkpoint-30/model.safetensors").write_bytes((run / "checkpoint-30/model.safetensors").read_bytes()[:-1])
    (run / "checkpoint-20/manifest.json").unlink()
    save_run(run / ".checkpoint-50.0123abcd.tmp", 50)
    code, out, _ = call(capsys, "list", run.parent, "--json")
    infos = {Path(one["path"]).name: one for one in json.loads(out)}
    good = infos["checkpoint-40"]
    assert (good["format"], good["parameters"], good["step"], good["valid"], good["why"]) == ("mlx", 72, 40, True, None)
    assert good["bytes"] == sum(len(data) for data in contents(run / "checkpoint-40").values())
    assert time.mktime(time.strptime(good["date"], "%Y-%m-%dT%H:%M:%S")) == 1_000_040
    assert infos["checkpoint-last"]["link"] == "checkpoint-40" and infos["checkpoint-last"]["step"] == 40
    assert not infos["checkpoint-30"]["valid"] and "model.safetensors has" in infos["checkpoint-30"]["why"]
    assert not infos["checkpoint-20"]["valid"] and infos["checkpoint-20"]["why"] == "no manifest.json"
    assert "interrupted" in infos[".checkpoint-50.0123abcd.tmp"]["why"]
    assert code == 0 and set(infos) == {"checkpoint-10", "checkpoint-20", "checkpoint-30", "checkpoint-40",
                                        "checkpoint-last", "checkpoint-best", ".checkpoint-50.0123abcd.tmp"}
    _, out, _ = call(capsys, "list", run.parent)
    line = next(line for line in out.splitlines() if line.startswith("a/checkpoint-40"))
    assert line.split()[1:] == ["training", "run", *line.split()[3:5], "72", "40", "1970-01-12", line.split()[-2], "yes"]


def test_latest_takes_the_newest_valid_one_and_tells_what_it_passed_over(run, capsys):
    (run / "checkpoint-last").unlink()
    assert call(capsys, "latest", run)[1].strip() == str(run / "checkpoint-40")
    flip(run / "checkpoint-40/model.safetensors")                       # the size is right, the hash is not
    (run / "checkpoint-30/manifest.json").unlink()
    code, out, told = call(capsys, "latest", run)
    assert (code, out.strip()) == (0, str(run / "checkpoint-20"))
    assert "checkpoint-40: model.safetensors was changed" in told and "checkpoint-30: no manifest.json" in told
    assert json.loads(call(capsys, "latest", run, "--json")[1])["path"] == str(run / "checkpoint-20")


def test_whichever_file_of_a_run_is_lost_or_cut_it_is_never_found(run):
    for name in contents(run / "checkpoint-40"):
        file = run / "checkpoint-40" / name
        data = file.read_bytes()
        for damaged in (None, b"", data[:1], data[:len(data) // 2], data[:-1]):
            file.unlink(missing_ok=True) if damaged is None else file.write_bytes(damaged)
            assert checkpoints.checkpoint_at(run / "checkpoint-40") is None, (name, damaged)
            assert checkpoints.latest(run).path.name == "checkpoint-30"
        file.write_bytes(data)
    assert checkpoints.latest(run).path.resolve().name == "checkpoint-40"


def test_a_backup_below_the_directory_is_not_taken_for_the_newest(run, capsys):
    for link in ("checkpoint-last", "checkpoint-best"):
        (run / link).unlink()
    for copy in ("0/backups", "a/backups", "zz/backups"):
        checkpoint_backup.backup(run / "checkpoint-40", run.parent / copy)
    assert call(capsys, "latest", run.parent)[1].strip() == str(run / "checkpoint-40")


def test_a_checkpoint_that_the_trainer_saves_is_listed_verified_backed_up_and_compared(tmp_path, capsys):
    from test_trainer import CONFIG, make_trainer

    trainer = make_trainer(tmp_path, replace(CONFIG, max_steps=2, save_steps=1, learning_rate=1e-3))
    trainer.train()
    infos = json.loads(call(capsys, "list", tmp_path, "--json")[1])
    assert [(one["step"], one["valid"]) for one in infos if not one["link"]] == [(2, True), (1, True)]
    assert infos[0]["parameters"] == sum(a.size for a in load_file(tmp_path / "checkpoint-2/model.safetensors").values())
    assert call(capsys, "verify", tmp_path / "checkpoint-2")[0] == 0
    code, out, _ = call(capsys, "diff", tmp_path / "checkpoint-1", tmp_path / "checkpoint-2", "--json")
    assert code == 1 and len(json.loads(out)["changed"]) == len(load_file(tmp_path / "checkpoint-2/model.safetensors"))


# ---- Hugging Face and NeMo ----

@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A Hugging Face model in safetensors, in shards and as .bin, and its NeMo 1, NeMo 2 and Megatron-Bridge forms."""
    torch = require("torch")
    from mlx_grpo.nemo_convert import import_hf
    from nemo_fixtures import fixture

    path = tmp_path_factory.mktemp("mixed")
    shutil.copytree(fixture("llama3_gqa") / "hf", path / "hf")
    weights = load_bf16(path / "hf")
    (path / "bin").mkdir()
    shutil.copyfile(path / "hf/config.json", path / "bin/config.json")
    torch.save(weights, path / "bin/pytorch_model.bin")
    for form, name in (("nemo1", "m.nemo"), ("nemo2", "nemo2"), ("bridge", "bridge")):
        import_hf(path / "hf", path / name, form)
    save_sharded(path / "hf", path / "sharded", weights)
    return path


def load_bf16(path):
    from safetensors.torch import load_file as load
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load(file).items()}


def save_sharded(source, path, weights):
    from safetensors.torch import save_file as save
    path.mkdir()
    shutil.copyfile(source / "config.json", path / "config.json")
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in parts.items():
        save({name: weights[name].contiguous() for name in own}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps(
        {"metadata": {}, "weight_map": {name: file for file, own in parts.items() for name in own}}))


def test_every_format_is_listed_with_the_parameters_that_safetensors_counts(mixed, capsys):
    infos = {Path(one["path"]).relative_to(mixed).as_posix(): one
             for one in json.loads(call(capsys, "list", mixed, "--json")[1])}
    formats = {name: one["format"] for name, one in infos.items()}
    assert formats == {"hf": "hf", "sharded": "hf", "bin": "hf", "m.nemo": "nemo1", "nemo2": "nemo2",
                       "bridge/iter_0000000": "bridge"}
    assert all(one["valid"] for one in infos.values()), infos
    count = sum(tensor.numel() for tensor in load_bf16(mixed / "hf").values())
    assert {name: one["parameters"] for name, one in infos.items() if one["format"] != "nemo2"} == \
        {name: count for name in formats if name != "nemo2"}
    assert infos["nemo2"]["parameters"] >= count                                        # NeMo 2 pads the vocabulary
    assert infos["m.nemo"]["bytes"] == (mixed / "m.nemo").stat().st_size


def test_the_manager_lists_nemo_and_hugging_face_newest_first_and_backs_up(mixed, tmp_path):
    shutil.copytree(mixed, tmp_path / "base")
    os.utime(tmp_path / "base/m.nemo", (2_000_000_000, 2_000_000_000))
    save_run(tmp_path / "base/run/checkpoint-5", 5)
    save_run(tmp_path / "base/run/checkpoint-6", 6, adapters=True)
    manager = checkpoints.CheckpointManager(tmp_path / "base")
    nemo, hf = manager.list_nemo_checkpoints(), manager.list_hf_checkpoints()
    assert [one["name"] for one in nemo][0] == "m.nemo" and len(nemo) == 3 and nemo[0]["modified"].year == 2033
    assert {one["name"] for one in hf} == {"hf", "sharded", "bin", "checkpoint-5"}
    assert nemo[0]["size_gb"] == (tmp_path / "base/m.nemo").stat().st_size / 1e9
    made = manager.backup_checkpoint(tmp_path / "base/m.nemo")
    assert made.parent == tmp_path / "base/backups" and made.read_bytes() == (mixed / "m.nemo").read_bytes()
    assert manager.backup_checkpoint(tmp_path / "base/hf", "mine") == tmp_path / "base/backups/mine"
    with pytest.raises(UserError, match="no such directory"):
        checkpoints.CheckpointManager(tmp_path / "nowhere").list_hf_checkpoints()


@pytest.mark.parametrize("name", ["hf", "sharded", "bin", "m.nemo", "nemo2", "bridge/iter_0000000"])
def test_verify_reads_whole_checkpoints_and_tells_truncated_ones(mixed, tmp_path, capsys, name):
    assert call(capsys, "verify", mixed / name)[0] == 0
    copy = tmp_path / Path(name).name
    shutil.copytree(mixed / name, copy) if (mixed / name).is_dir() else shutil.copyfile(mixed / name, copy)
    files = [copy] if copy.is_file() else [p for p in copy.rglob("*") if p.suffix in (".safetensors", ".bin", ".distcp")]
    for file in files:
        data = file.read_bytes()
        for length in (0, 7, 100, len(data) // 2, len(data) - (20_000 if file == copy else 1)):
            file.write_bytes(data[:length])
            code, out, _ = call(capsys, "verify", copy)
            assert code == 1 and "wrong: " in out, (file, length)
        file.write_bytes(data)
    assert call(capsys, "verify", copy)[0] == 0


def test_a_lost_shard_a_lost_tensor_and_nan_are_told(mixed, tmp_path, capsys):
    torch = require("torch")
    weights = load_bf16(mixed / "hf")
    shutil.copytree(mixed / "sharded", tmp_path / "m")
    (tmp_path / "m/model-00002-of-00002.safetensors").rename(tmp_path / "away")
    assert "model-00002-of-00002.safetensors" in call(capsys, "list", tmp_path)[1]
    (tmp_path / "away").rename(tmp_path / "m/model-00002-of-00002.safetensors")
    index = tmp_path / "m/model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["lost.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(table))
    assert "lost.weight is listed" in call(capsys, "verify", tmp_path / "m")[1]
    name = sorted(weights)[3]
    weights[name] = weights[name].clone()
    weights[name].view(-1)[5] = torch.nan
    save_sharded(mixed / "hf", tmp_path / "nan", weights)
    code, out, _ = call(capsys, "verify", tmp_path / "nan")
    assert code == 1 and f"{name} {list(weights[name].shape)} has 1 values that are NaN" in out


def test_what_writing_left_unfinished_is_listed_with_its_reason_and_never_found(mixed, tmp_path, capsys):
    shutil.copytree(mixed / "nemo2", tmp_path / "marked")
    (tmp_path / "marked-unfinished").write_text("")
    shutil.copytree(mixed / "nemo2", tmp_path / "headless")
    (tmp_path / "headless/weights/metadata.json").unlink()
    shutil.copytree(mixed / "bridge/iter_0000000", tmp_path / "iter_0000007")
    (tmp_path / "iter_0000007/metadata.json").unlink()
    (tmp_path / "no_config").mkdir()
    shutil.copy(mixed / "sharded/model-00001-of-00002.safetensors", tmp_path / "no_config")
    infos = {one["name"]: one for one in json.loads(call(capsys, "list", tmp_path, "--json")[1])}
    assert {name: one["why"] for name, one in infos.items()} == {
        "marked": "marked unfinished: its saving was interrupted", "headless": "no weights/metadata.json",
        "iter_0000007": "no metadata.json", "no_config": "weights, but no config.json"}
    assert checkpoints.find_checkpoints(tmp_path) == []
    for name, info in infos.items():
        assert call(capsys, "verify", tmp_path / name)[:2] == (1, f"wrong: {info['why']}\n")
        with pytest.raises(UserError, match=f"{name} is no complete checkpoint: {info['why']}"):
            checkpoints.main(["backup", str(tmp_path / name)])


def test_a_quantised_model_counts_its_weights_not_its_words(tmp_path):
    """mlx_lm's own count of the same model."""
    from mlx_lm.convert import convert
    from mlx_lm.utils import get_total_parameters, load_model
    from tiny_hf import CHATML, save_tiny, save_tokenizer

    save_tiny(tmp_path / "hf", "qwen3", hidden_size=64, intermediate_size=128, vocab_size=300, eos_token_id=3)
    save_tokenizer(tmp_path / "hf", CHATML, every_byte=True)
    convert(str(tmp_path / "hf"), str(tmp_path / "q4"), quantize=True, q_bits=4, q_group_size=32)
    found = checkpoints.describe(checkpoints.checkpoint_at(tmp_path / "q4"))
    assert found.valid and found.parameters == get_total_parameters(load_model(tmp_path / "q4")[0])


def test_an_early_mlx_model_is_read_and_one_that_lies_about_its_size_is_not(tmp_path, capsys):
    for name, change in (("a", 0), ("b", 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        np.savez(tmp_path / name / "weights.npz", x=np.arange(12.0).reshape(3, 4) + change, y=np.ones(5, "float16"))
    infos = json.loads(call(capsys, "list", tmp_path, "--json")[1])
    assert [(one["parameters"], one["valid"]) for one in infos] == [(17, True)] * 2
    changed = json.loads(call(capsys, "diff", tmp_path / "a", tmp_path / "b", "--json")[1])["changed"]
    assert [(one["name"], one["largest"]) for one in changed] == [("x", 3)]
    data = (tmp_path / "a/weights.npz").read_bytes()
    (tmp_path / "a/weights.npz").write_bytes(data.replace(b"(3, 4)", b"(3, 9)"))
    assert "x.npy" in call(capsys, "verify", tmp_path / "a")[1]
    (tmp_path / "a/weights.npz").write_bytes(data.replace(np.arange(12.0).tobytes(), np.arange(1.0, 13.0).tobytes()))
    assert "Bad CRC-32" in call(capsys, "verify", tmp_path / "a")[1]
    np.savez(tmp_path / "a/weights.npz", x=np.array([print], dtype=object))
    assert "of Python objects" in call(capsys, "verify", tmp_path / "a")[1]


@pytest.mark.parametrize("flips", [20, pytest.param(200, marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", ["hf", "sharded", "bin", "m.nemo", "nemo2", "bridge/iter_0000000"])
def test_flipped_bytes_in_headers_and_indexes_end_in_one_line_never_in_a_traceback(mixed, tmp_path, capsys, name, flips):
    chance, copy = random.Random(name), tmp_path / Path(name).name
    shutil.copytree(mixed / name, copy) if (mixed / name).is_dir() else shutil.copyfile(mixed / name, copy)
    files = [copy] if copy.is_file() else sorted(p for p in copy.rglob("*") if p.is_file() and "tokenizer" not in p.name)
    noticed = 0
    for _ in range(flips):
        file = chance.choice(files)
        data = file.read_bytes()
        if data:
            flip(file, chance.randrange(min(len(data), 2000)))
        assert "Traceback" not in call(capsys, "list", tmp_path, "--json")[2]
        found = checkpoints.checkpoint_at(copy)
        noticed += not found or bool(checkpoints.verify(found)[0])
        file.write_bytes(data)
    assert noticed


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}',
                                  '{"weight_map": {"a": "../a"}}'])
def test_an_index_that_is_none_is_told(mixed, tmp_path, capsys, text):
    shutil.copytree(mixed / "sharded", tmp_path / "m")
    (tmp_path / "m/model.safetensors.index.json").write_text(text)
    assert "index.json" in json.loads(call(capsys, "list", tmp_path, "--json")[1])[0]["why"]


def test_without_torch_nemo_is_listed_as_not_looked_into_and_the_rest_as_ever(mixed, capsys, monkeypatch):
    import importlib.util
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torch" else real(name, *a))
    infos = {one["name"]: one for one in json.loads(call(capsys, "list", mixed, "--json")[1])}
    assert {name: one["valid"] for name, one in infos.items()} == {
        "hf": True, "sharded": True, "bin": None, "m.nemo": None, "nemo2": None, "iter_0000000": None}
    assert "needs torch" in infos["m.nemo"]["why"] and infos["m.nemo"]["bytes"] > 0
    with pytest.raises(UserError, match="needs torch"):
        checkpoints.main(["verify", str(mixed / "m.nemo")])


# ---- backup ----

def test_a_backup_of_a_run_links_its_weights_and_copies_what_people_edit(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, told = call(capsys, "backup", run / "checkpoint-40")
    made = tmp_path / out.strip()
    assert code == 0 and made.parent == tmp_path / "backups"
    assert time.strptime(made.name, "checkpoint-40_backup_%Y%m%d_%H%M%S")
    assert contents(made) == contents(run / "checkpoint-40")
    same = {name: os.path.samefile(made / name, run / "checkpoint-40" / name) for name in contents(made)}
    assert same == {name: name.endswith(".safetensors") for name in same}
    assert "3 files copied" in told and "2 linked" in told
    assert (made / "manifest.json").stat().st_mtime == 1_000_040
    shutil.rmtree(run)
    assert call(capsys, "verify", made)[0] == 0


def test_copy_and_other_formats_and_disks_without_links_get_bytes_of_their_own(run, mixed, tmp_path, monkeypatch):
    copied = checkpoint_backup.backup(run / "checkpoint-40", tmp_path / "b", "one", links=False)
    assert (copied.linked, copied.copied) == (0, 5)
    model = checkpoint_backup.backup(mixed / "hf", tmp_path / "b", "two")
    assert model.linked == 0 and contents(model.path) == contents(mixed / "hf")

    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    far = checkpoint_backup.backup(run / "checkpoint-40", tmp_path / "b", "three")
    assert (far.linked, far.copied) == (0, 5) and contents(far.path) == contents(run / "checkpoint-40")
    assert far.bytes == sum(len(data) for data in contents(far.path).values())


def test_a_snapshot_of_the_hub_is_backed_up_with_what_its_links_lead_to(mixed, tmp_path):
    (tmp_path / "snapshot").mkdir()
    for file in (mixed / "hf").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    made = checkpoint_backup.backup(tmp_path / "snapshot", tmp_path / "b")
    assert contents(made.path) == contents(mixed / "hf") and not any(p.is_symlink() for p in made.path.iterdir())


def test_a_backup_that_fails_leaves_nothing(run, mixed, tmp_path, monkeypatch):
    dest = tmp_path / "b"
    flip(run / "checkpoint-30/optimizer.safetensors")
    with pytest.raises(UserError, match="damaged, and so would be its backup: optimizer.safetensors was changed"):
        checkpoint_backup.backup(run / "checkpoint-30", dest)
    with pytest.raises(UserError, match="is no complete checkpoint"):
        checkpoint_backup.backup(run, dest)
    with pytest.raises(UserError, match="doesn't exist"):
        checkpoint_backup.backup(run / "checkpoint-99", dest)
    for name in ("../up", "a/b", ".hidden", ".."):
        with pytest.raises(UserError, match="must be a bare name"):
            checkpoint_backup.backup(run / "checkpoint-40", dest, name)
    with pytest.raises(UserError, match="lies inside"):
        checkpoint_backup.backup(run / "checkpoint-40", run / "checkpoint-40/backups")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't write|choose another"):
        checkpoint_backup.backup(run / "checkpoint-40", tmp_path / "file" / "b")
    assert not dest.exists() and not (run / "checkpoint-40/backups").exists()
    checkpoint_backup.backup(run / "checkpoint-40", dest, "x")
    for source, name in ((run / "checkpoint-40", "x"), (mixed / "m.nemo", "y")):
        if name == "y":
            checkpoint_backup.backup(source, dest, name)
        with pytest.raises(UserError, match="already exists"):
            checkpoint_backup.backup(source, dest, name)
    before = contents(dest)

    def failing(path):                       # a disk that gives back something else
        return "0" * 64

    monkeypatch.setattr(checkpoint_backup, "sha256", failing)
    for source in (mixed / "m.nemo", mixed / "hf"):
        with pytest.raises(UserError, match="differs from the original"):
            checkpoint_backup.backup(source, dest, "z")
    assert contents(dest) == before


def test_a_full_disk_is_told_and_nothing_is_left(mixed, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_backup.shutil, "copystat", full)
    for source in (mixed / "m.nemo", mixed / "hf"):
        with pytest.raises(UserError, match="No space left on device; nothing was left"):
            checkpoint_backup.backup(source, tmp_path / "b", "z")
    assert contents(tmp_path / "b") == {}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(UserError, match="needs about"):
        checkpoint_backup.backup(mixed / "hf", tmp_path / "b", "z")


def test_a_file_that_changes_while_it_is_copied_is_refused(mixed, tmp_path, monkeypatch):
    shutil.copyfile(mixed / "m.nemo", tmp_path / "m.nemo")
    copystat = shutil.copystat

    def and_write(source, target):
        copystat(source, target)
        os.utime(tmp_path / "m.nemo")

    monkeypatch.setattr(checkpoint_backup.shutil, "copystat", and_write)
    with pytest.raises(UserError, match="changed while it was copied"):
        checkpoint_backup.backup(tmp_path / "m.nemo", tmp_path / "b")
    assert names(tmp_path / "b") == []


def test_a_backup_that_is_killed_is_listed_as_left_over_and_never_found(mixed, tmp_path, capsys):
    program = ("import os, sys; from mlx_grpo import checkpoint_backup as b; b.sha256 = lambda _: os.kill(os.getpid(), 9); "
               "b.backup(sys.argv[1], sys.argv[2], 'x')")
    for source in ("hf", "m.nemo"):
        died = subprocess.run([sys.executable, "-c", program, mixed / source, tmp_path / "b"], cwd=ROOT, timeout=60)
        assert died.returncode == -9
    assert len(names(tmp_path / "b")) == 2 and checkpoints.find_checkpoints(tmp_path) == []
    why = [one["why"] for one in json.loads(call(capsys, "list", tmp_path, "--json")[1])]
    assert why == ["left over from a save, copy or conversion that was interrupted"] * 2


# ---- prune ----

def names(directory):
    return sorted(p.name for p in directory.iterdir() if p.name != "config.json")


def test_prune_shows_and_removes_nothing_without_yes(run, capsys):
    before = contents(run)
    code, out, _ = call(capsys, "prune", run, "--keep", 2)
    assert code == 0 and contents(run) == before
    assert [line.split() for line in out.splitlines()[:5]] == [
        ["keep", "checkpoint-40"], ["keep", "checkpoint-30"], ["remove", "checkpoint-20"], ["remove", "checkpoint-10"],
        ["remove", "checkpoint-best"]]
    assert "nothing was removed; add --yes" in out


def test_prune_promises_only_the_bytes_that_come_free(run, tmp_path, capsys):
    from mlx_grpo.checkpoint_prune import plan
    alone = plan(run, 3).bytes
    assert alone == sum(len(data) for data in contents(run / "checkpoint-10").values())
    checkpoint_backup.backup(run / "checkpoint-10", tmp_path / "b")              # shares the weights
    linked = sum(len(data) for name, data in contents(run / "checkpoint-10").items() if name.endswith(".safetensors"))
    assert plan(run, 3).bytes == alone - linked


def test_prune_keeps_the_newest_and_with_keep_best_the_best(run, capsys):
    call(capsys, "prune", run, "--keep", 1, "--keep-best", "--yes")
    assert names(run) == ["checkpoint-20", "checkpoint-40", "checkpoint-best", "checkpoint-last"]
    call(capsys, "prune", run, "--keep", 1, "--yes")
    assert names(run) == ["checkpoint-40", "checkpoint-last"]
    assert "nothing to remove" in call(capsys, "prune", run, "--keep", 1, "--yes")[1]
    with pytest.raises(UserError, match="nothing in .* tells the best checkpoint"):
        checkpoints.main(["prune", str(run), "--keep", "1", "--keep-best"])
    with pytest.raises(UserError, match="--keep is 0"):
        checkpoints.main(["prune", str(run), "--keep", "0"])


def test_prune_never_counts_nor_removes_what_is_not_valid(run, capsys):
    flip(run / "checkpoint-40/model.safetensors")            # only its hash tells
    (run / "checkpoint-10/manifest.json").unlink()
    shutil.copytree(run / "checkpoint-20", run / ".checkpoint-50.0123abcd.tmp")
    _, out, _ = call(capsys, "prune", run, "--keep", 1, "--yes")
    assert names(run) == [".checkpoint-50.0123abcd.tmp", "checkpoint-10", "checkpoint-30", "checkpoint-40",
                          "checkpoint-last"]
    assert "leave   checkpoint-40: not valid (model.safetensors was changed" in out and "checkpoint-10: not valid" in out


def test_prune_keeps_what_the_last_link_leads_to_and_leaves_other_models_alone(run, mixed, capsys):
    (run / "checkpoint-last").unlink()
    (run / "checkpoint-last").symlink_to("checkpoint-10")
    shutil.copytree(mixed / "hf", run / "base_model")
    call(capsys, "prune", run, "--keep", 1, "--yes")
    assert names(run) == ["base_model", "checkpoint-10", "checkpoint-40", "checkpoint-last"]
    with pytest.raises(UserError, match="no checkpoints with a step in their name directly in"):
        checkpoints.main(["prune", str(run.parent), "--keep", "1"])


@pytest.mark.parametrize("answer, left", [("y", 2), ("", 6), ("n", 6), (None, 6)])
def test_prune_asks_on_a_terminal_and_only_yes_removes(run, capsys, monkeypatch, answer, left):
    def ask(question):
        assert "3 checkpoints" in question
        if answer is None:
            raise EOFError
        return answer

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    call(capsys, "prune", run, "--keep", 1)
    assert len(names(run)) == left


def test_prune_knows_nemo_archives_and_transformers_best_checkpoint(mixed, tmp_path, capsys):
    for step in (1, 2, 3):
        shutil.copyfile(mixed / "m.nemo", tmp_path / f"m-step={step}.nemo")
        shutil.copytree(mixed / "hf", tmp_path / "hf" / f"checkpoint-{step}")
        (tmp_path / f"hf/checkpoint-{step}/trainer_state.json").write_text(
            json.dumps({"global_step": step, "best_model_checkpoint": "out/checkpoint-1"}))
    call(capsys, "prune", tmp_path, "--keep", 2, "--yes")
    assert sorted(p.name for p in tmp_path.glob("*.nemo")) == ["m-step=2.nemo", "m-step=3.nemo"]
    call(capsys, "prune", tmp_path / "hf", "--keep", 1, "--keep-best", "--yes")
    assert names(tmp_path / "hf") == ["checkpoint-1", "checkpoint-3"]


# ---- diff ----

def test_diff_gives_the_tensors_that_changed_and_by_how_much(run, capsys):
    code, out, _ = call(capsys, "diff", run / "checkpoint-10", run / "checkpoint-30", "--json")
    found = json.loads(out)
    a, b = (load_file(run / f"checkpoint-{n}/model.safetensors")["layers.1.weight"].astype("float64") for n in (10, 30))
    assert code == 1 and found["equal"] == 2 and [one["name"] for one in found["changed"]] == ["layers.1.weight"]
    change = found["changed"][0]
    assert (change["changed"], change["elements"], change["shape"]) == (24, 24, [6, 4])
    assert change["largest"] == np.abs(a - b).max() == pytest.approx(0.2, abs=1e-6)
    assert change["relative"] == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-12)
    assert call(capsys, "diff", run / "checkpoint-10", run / "checkpoint-10")[:2] == (0, "3 tensors equal, 0 changed\n")
    assert "layers.1.weight" in call(capsys, "diff", run / "checkpoint-10", run / "checkpoint-30")[1]


def test_diff_tells_lost_tensors_other_shapes_types_and_nan(tmp_path, capsys):
    for name, weights in (("a", {"x": np.ones((2, 3), "float32"), "y": np.ones(4, "float32"), "z": np.zeros(3, "float32"),
                                 "only_a": np.ones(1, "float32")}),
                          ("b", {"x": np.ones((3, 2), "float32"), "y": np.ones(4, "float16"),
                                 "z": np.array([0, np.nan, 2], "float32"), "w": np.ones(1, "float32")})):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    found = json.loads(call(capsys, "diff", tmp_path / "a", tmp_path / "b", "--json")[1])
    assert (found["only_in_a"], found["only_in_b"], found["reshaped"]) == (["only_a"], ["w"], [["x", [2, 3], [3, 2]]])
    z, y = found["changed"]
    assert (z["name"], z["changed"], z["largest"], z["relative"], z["not_finite"]) == ("z", 2, 2.0, None, 1)
    assert (y["name"], y["types"], y["changed"], y["largest"]) == ("y", ["F32", "F16"], 0, 0.0)


@pytest.mark.parametrize("name", ["bin", "sharded", "m.nemo", "nemo2", "bridge/iter_0000000"])
def test_diff_reads_every_format_in_pieces_and_finds_none_where_there_is_none(mixed, capsys, name, monkeypatch):
    from mlx_grpo import checkpoint_weights
    monkeypatch.setattr(checkpoint_weights, "PIECE", 1000)
    other = mixed / ("hf" if name in ("bin", "sharded") else name)
    assert call(capsys, "diff", other, mixed / name)[0] == 0
    if other != mixed / "hf":
        with pytest.raises(UserError, match="no tensor name in common"):
            checkpoints.main(["diff", str(mixed / "hf"), str(mixed / name)])


def test_random_flips_in_weights_are_all_found_by_diff_even_across_piece_boundaries(run, tmp_path, monkeypatch):
    from mlx_grpo import checkpoint_diff, checkpoint_weights
    monkeypatch.setattr(checkpoint_weights, "PIECE", 7)
    weights, chance = load_file(run / "checkpoint-10/model.safetensors"), random.Random(1)
    for _ in range(30):
        name, place = chance.choice(sorted(weights)), chance.randrange(24)
        changed = {key: value.copy() for key, value in weights.items()}
        changed[name].reshape(-1).view("uint32")[place] ^= np.uint32(1 << chance.randrange(32))
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        (tmp_path / "b").mkdir()
        save_file(changed, tmp_path / "b/model.safetensors")
        (tmp_path / "b/config.json").write_text("{}")
        found = checkpoint_diff.diff(*(checkpoints.checkpoint_at(p) for p in (run / "checkpoint-10", tmp_path / "b")))
        assert [(one.name, one.changed) for one in found.changed] == [(name, 1)] and found.equal == 2


# ---- the script ----

def test_the_script_runs_from_any_directory_with_one_line_for_the_user_and_exit_codes(run, tmp_path):
    def script(*arguments):
        return subprocess.run([sys.executable, ROOT / "utils/checkpoints.py", *arguments], cwd=tmp_path, text=True,
                              capture_output=True, timeout=60, stdin=subprocess.DEVNULL)

    assert script("latest", "runs").stdout.strip() == "runs/a/checkpoint-last"
    (tmp_path / "empty").mkdir()
    for arguments in (["latest", "empty"], ["list", "empty"], ["list", "nowhere"], ["verify", "runs"],
                      ["diff", "runs", "runs"]):
        result = script(*arguments)
        assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result
    flip(run / "checkpoint-10/model.safetensors")
    assert script("verify", "runs/a/checkpoint-10").returncode == 1
