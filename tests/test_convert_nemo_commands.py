"""The commands: NVIDIA's form, progress, interruption and --resume, inspect, verify, latest, and the Hub's refusals."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, require
from fake_hub import fake_hub
from nemo_fixtures import fixture, read_json, same_tensors, tensors_of

from mlx_grpo import UserError, checkpoints, convert_nemo
from mlx_grpo.convert_nemo import validate_conversion
from mlx_grpo.nemo_convert import export_hf, import_hf
from mlx_grpo.nemo_job import Job

torch = require("torch")
require("yaml")


def run(*tokens, **options):
    return subprocess.run([sys.executable, str(ROOT / "utils" / "convert_nemo.py"), *map(str, tokens)],
                          capture_output=True, text=True, **options)


def files(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*")
            if p.is_file()} if directory.is_dir() else directory.read_bytes()


def test_nvidias_own_command_lines_work_as_they_are_from_any_directory(tmp_path):
    hf = fixture("llama3_gqa") / "hf"
    there = run("import", "model=llama3_8b", f"source=hf://{hf}", "output_path=nemo", "model_config.num_layers=2",
                "trainer.devices=0", "-y", cwd=tmp_path)
    assert there.returncode == 0, there.stderr
    assert "trainer.devices=0 has no effect" in there.stderr
    back = run("export", "path=nemo", "target=hf", "output_path=hf", cwd=tmp_path)
    assert back.returncode == 0, back.stderr
    assert same_tensors(tmp_path / "hf", hf)
    again = run("export", "path=nemo", "target=hf", "output_path=hf", cwd=tmp_path)
    assert again.returncode == 2 and again.stderr.count("\n") == 1 and "already exists" in again.stderr
    assert run("export", "path=nemo", "output_path=hf", "overwrite=true", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("tokens,message", [
    (["import", "model=qwen2_7b"], "is a qwen2 recipe, but the source is a llama model"),
    (["import", "model=gpt5"], "no architecture known"),
    (["import", "sources=x"], "did you mean source"), (["import", "nodes=4"], "unknown option"),
    (["import", "overwrite=perhaps"], "true or false"),
    (["import", "model_config.num_layer=2"], "did you mean 'num_layers'"), (["import", "--format", "nemo3"],
                                                                            "invalid choice"),
    (["import", "--model-config", "num_layers"], "KEY=VALUE"), (["export", "target=onnx"], "invalid choice"),
    (["frobnicate"], "invalid choice"), ([], "required")])
def test_a_wrong_word_is_named_in_one_line(tokens, message, tmp_path):
    command = tokens[:1]
    if command == ["import"]:
        tokens = [*command, "--source", str(fixture("llama3_gqa") / "hf"), "--output", str(tmp_path / "x"), *tokens[1:]]
    elif command == ["export"]:
        tokens = [*command, "--path", str(tmp_path), "--output", str(tmp_path / "x"), *tokens[1:]]
    with pytest.raises(UserError, match=message):
        convert_nemo.main(tokens)
    assert not list(tmp_path.iterdir())


def test_the_bar_shows_bytes_and_the_time_left(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    with convert_nemo.progress_bar("import") as progress:
        progress(500_000, 2_000_000)
        progress(2_000_000, 2_000_000)
    text = screen.getvalue()
    assert "import" in text and "2.0/2.0 MB" in text and "0:00:00" in text


def test_at_a_terminal_it_asks_and_y_answers_ahead(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True
    command = ["import", "--source", str(fixture("llama3_gqa") / "hf"), "--output", str(tmp_path / "m")]
    for answer in ("n\n", ""):
        screen = Terminal()
        monkeypatch.setattr(sys, "stderr", screen)
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        with pytest.raises(UserError, match="nothing was written"):
            convert_nemo.main(command)
        assert "Continue? [y/N]" in screen.getvalue() and not list(tmp_path.iterdir())
    monkeypatch.setattr(sys, "stdin", Terminal(""))
    assert convert_nemo.main([*command, "-y"]) == 0 and (tmp_path / "m").is_dir()


def test_progress_counts_up_to_the_whole(tmp_path):
    seen = []
    import_hf(fixture("llama3_gqa") / "hf", tmp_path / "m.nemo", "nemo1", progress=lambda done,
              total: seen.append((done, total)))
    assert len(seen) > 30 and [d for d, _ in seen] == sorted(d for d, _ in seen) and seen[-1][0] == seen[-1][1]


# ---- interruption ----

def convert(direction, source, target, **options):
    return import_hf(source, target, "nemo1" if target.suffix == ".nemo" else "nemo2",
                     **options) if direction == "import" else \
        export_hf(source, target, **options)


@pytest.mark.parametrize("direction,name", [("import", "model"), ("import", "model.nemo"), ("export", "model")])
@pytest.mark.parametrize("items", [0, 1, 7, 15])
def test_an_interrupted_conversion_looks_unfinished_and_resumes_to_the_same_bytes(direction, name, items, tmp_path,
                                                                                  monkeypatch):
    source = fixture("llama3_gqa") / ("hf" if direction == "import" else "nemo2")
    convert(direction, source, tmp_path / "unbroken" / name)
    target = tmp_path / name
    append, calls = Job.append, []

    def counted(job, path, save):
        def noted(file):
            calls.append(path)
            save(file)
        if len(calls) == items and not resuming:
            job.open(path)[1].write(b"half an item")           # what a kill in the middle of a write leaves
            raise KeyboardInterrupt
        return append(job, path, noted)
    resuming = False
    monkeypatch.setattr(Job, "append", counted)
    with pytest.raises(KeyboardInterrupt):
        convert(direction, source, target)
    assert not target.exists() and [p.name for p in tmp_path.glob(".*")] == [f".{name}.partial"]
    with pytest.raises(UserError):
        checkpoints.latest(tmp_path / f".{name}.partial" / "nothing")
    assert not [f for f in checkpoints.find_checkpoints(tmp_path) if "unbroken" not in str(f.path)]
    resuming, first = True, len(calls)
    convert(direction, source, target, resume=True)
    total = len(calls) - first + items
    assert files(target) == files(tmp_path / "unbroken" / name)
    assert not list(tmp_path.glob(".*"))
    calls.clear()
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    convert(direction, source, target)
    assert len(calls) == total                                 # no item was written twice


def test_a_killed_process_resumes(tmp_path):
    """SIGKILL in the middle: no handler runs, as with a dead battery."""
    target, hf = tmp_path / "model", fixture("llama3_gqa") / "hf"
    program = f"""
import os, signal
from mlx_grpo.nemo_job import Job
from mlx_grpo.nemo_convert import import_hf
append, Job.n = Job.append, 0
import mlx_grpo.nemo_job as jobs
jobs.SYNC_BYTES = 20000
def counted(job, path, save):
    Job.n += 1
    if Job.n == 24: os.kill(os.getpid(), signal.SIGKILL)
    return append(job, path, save)
Job.append = counted
import_hf({str(hf)!r}, {str(target)!r})
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == -signal.SIGKILL
    journal = (tmp_path / ".model.partial" / ".journal").read_text().splitlines()
    assert not target.exists() and len(journal) > 5
    done = run("import", "--source", hf, "--output", target, "--resume")
    assert done.returncode == 0, done.stderr
    export_hf(target, tmp_path / "back")
    assert same_tensors(tmp_path / "back", hf)


def test_resume_refuses_another_conversion_and_a_fresh_run_starts_again(tmp_path, monkeypatch):
    hf = tmp_path / "hf"
    shutil.copytree(fixture("llama3_gqa") / "hf", hf)
    append = Job.append
    count = []

    def broken(job, path, save):
        count.append(1)
        if len(count) == 5:
            raise KeyboardInterrupt
        return append(job, path, save)
    monkeypatch.setattr(Job, "append", broken)
    with pytest.raises(KeyboardInterrupt):
        import_hf(hf, tmp_path / "m")
    with pytest.raises(UserError, match="another source or with other options"):
        import_hf(hf, tmp_path / "m", dtype="bfloat16", resume=True)
    assert not (tmp_path / "m").exists()


def test_a_full_disk_keeps_what_is_done_for_resume(tmp_path, monkeypatch):
    import errno
    append, count = Job.append, []

    def full(job, path, save):
        count.append(1)
        if len(count) == 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        return append(job, path, save)
    monkeypatch.setattr(Job, "append", full)
    with pytest.raises(UserError, match="--resume goes on"):
        import_hf(fixture("llama3_gqa") / "hf", tmp_path / "m")
    monkeypatch.setattr(Job, "append", append)
    import_hf(fixture("llama3_gqa") / "hf", tmp_path / "m", resume=True)
    export_hf(tmp_path / "m", tmp_path / "back")
    assert same_tensors(tmp_path / "back", fixture("llama3_gqa") / "hf")


def test_two_conversions_to_one_place_dont_mix(tmp_path):
    import fcntl
    (tmp_path / ".m.partial").mkdir()
    with open(tmp_path / ".m.partial" / ".journal", "a+") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another conversion is writing"):
            import_hf(fixture("llama3_gqa") / "hf", tmp_path / "m")
        assert (tmp_path / ".m.partial").exists()


def test_a_failed_overwrite_keeps_the_old_checkpoint(tmp_path):
    import_hf(fixture("llama3_gqa") / "hf", tmp_path / "m")
    before = files(tmp_path / "m")
    with pytest.raises(UserError):
        import_hf(fixture("llama3_gqa") / "hf", tmp_path / "m", overrides={"num_layers": 3}, overwrite=True)
    assert files(tmp_path / "m") == before
    import_hf(fixture("qwen2_bias") / "hf", tmp_path / "m", overwrite=True)
    assert files(tmp_path / "m") != before


# ---- looking and comparing ----

def test_inspect_says_what_a_checkpoint_is_without_reading_weights(tmp_path, capsys):
    path = tmp_path / "nemo2"
    shutil.copytree(fixture("llama_sharded") / "nemo2_with_optimizer", path)
    for file in (path / "weights").glob("*.distcp"):               # the same sizes, without the numbers
        size = file.stat().st_size
        file.write_bytes(b"")
        os.truncate(file, size)
    convert_nemo.main(["inspect", str(path), "--json"])
    found = json.loads(capsys.readouterr().out)
    expected = {"format": "nemo2", "architecture": "llama", "layers": 2, "hidden_size": 32, "ffn_hidden_size": 64,
                "attention_heads": 4,
                "query_groups": 2, "dtype": "float32", "training_step": 1, "vocabulary": 272, "left_out_on_export": 18}
    assert expected.items() <= found.items()
    assert found["parameters"] == sum(t.numel() for t in tensors_of(fixture("llama_sharded") / "hf").values())
    assert found["tokenizer"]["length"] == 272
    for source, words in (
            (fixture("falcon_new_arch") / "nemo1_dist.nemo", ["NeMo 1 archive", "falcon", "tokenizer none"]),
            (fixture("gptneox_sequential") / "mbridge", ["Megatron-Bridge", "gpt_neox", "training step 0"]),
            (fixture("mixtral_moe4") / "nemo2", ["vocabulary 320", "embedding rows 384"]),
            (fixture("llama3_gqa") / "hf", ["Hugging Face", "theta 500000.0"])):
        convert_nemo.main(["inspect", str(source)])
        text = " ".join(capsys.readouterr().out.split())
        assert all(word in text for word in words), text


def test_verify_proves_sameness_and_finds_a_changed_bit(tmp_path, capsys):
    hf, checkpoint = fixture("llama32_rope_tied_bf16") / "hf", fixture("llama32_rope_tied_bf16") / "nemo2"
    assert convert_nemo.main(["verify", str(hf), str(checkpoint)]) == 0
    text = capsys.readouterr().out
    for words in ("tensors: 20 of 20 equal bit for bit", "'Hello, how are you?'", "'請問什麼是人工智慧？'", "the same model",
                  "parameters: 67,824 in the Hugging Face model, 67,824"):
        assert words in text
    assert text.count("goes on:") == 2
    from safetensors.torch import save_file
    changed = tmp_path / "hf"
    shutil.copytree(hf, changed)
    tensors = tensors_of(hf)
    tensors["model.layers.1.self_attn.k_proj.weight"].view(torch.int16)[3, 5] ^= 1
    save_file(tensors, changed / "model.safetensors")
    assert convert_nemo.main(["verify", str(changed), str(checkpoint), "--prompt", "Hi"]) == 1
    text = capsys.readouterr().out
    assert "DIFFERENT  model.layers.1.self_attn.k_proj.weight differs by up to" in text and "not the same model" in text
    assert "19 of 20" in text


def test_verify_finds_a_changed_configuration_by_the_logits(tmp_path):
    hf = tmp_path / "hf"
    shutil.copytree(fixture("llama3_gqa") / "hf", hf)
    (hf / "config.json").write_text(json.dumps(read_json(hf / "config.json") | {"rope_theta": 100.0}))
    lines = []
    assert not validate_conversion(hf, fixture("llama3_gqa") / "mbridge", "Hello, how are you?", say=lines.append)
    assert any("rotary_base is 100.0" in line for line in lines) and any(line.startswith("DIFFERENT  logits on 'Hello")
                                                                         for line in lines)


def test_validate_conversion_from_python_is_true_for_a_conversion(tmp_path):
    import_hf(fixture("qwen3_qknorm") / "hf", tmp_path / "m", "bridge")
    lines = []
    result = validate_conversion(fixture("qwen3_qknorm") / "hf", tmp_path / "m", "Hello", say=lines.append)
    assert result and any(line.startswith("logits on 'Hello': largest difference 0 ") for line in lines)


def checkpoint_in(directory, time):
    for name in ("weights/metadata.json", "context/model.yaml"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("{}")
    os.utime(directory / "weights" / "metadata.json", (time, time))
    return directory


def test_latest_prefers_last_and_skips_what_is_unfinished(tmp_path, capsys):
    """The layout of NeMo's logger: experiment/date/checkpoints/<name>[-last]."""
    old, new = tmp_path / "exp" / "2026-01-01" / "checkpoints", tmp_path / "exp" / "2026-02-01" / "checkpoints"
    checkpoint_in(old / "model--val_loss=1.00-step=99", 400)
    found = lambda: checkpoints.latest(tmp_path).path              # noqa: E731
    assert found() == old / "model--val_loss=1.00-step=99"
    checkpoint_in(old / "model--val_loss=2.00-step=199", 300)       # the higher step of one folder, whatever its time
    assert found() == old / "model--val_loss=2.00-step=199"
    last = checkpoint_in(old / "model--val_loss=2.00-step=199-last", 200)
    assert found() == last
    newer = checkpoint_in(new / "model--val_loss=3.00-step=49-last", 250)
    assert found() == newer
    broken = checkpoint_in(new / "model--val_loss=3.00-step=59-last", 500)
    (new / f"{broken.name}-unfinished").write_text("")
    assert found() == newer
    checkpoint_in(new / ".hidden-step=900-last", 900)
    checkpoint_in(new / "without-metadata-last", 900).joinpath("weights", "metadata.json").unlink()
    assert found() == newer
    convert_nemo.main(["latest", str(tmp_path)])
    assert capsys.readouterr().out.strip() == str(newer)
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoints.latest(fixture("llama3_gqa").parent / "llama3_gqa" / "nemo2" / "context")


def test_latest_knows_every_format(tmp_path):
    import_hf(fixture("llama3_gqa") / "hf", tmp_path / "b", "bridge")
    assert checkpoints.latest(tmp_path).path == tmp_path / "b" / "iter_0000000"
    shutil.copytree(tmp_path / "b" / "iter_0000000", tmp_path / "b" / "iter_0000010")
    assert checkpoints.latest(tmp_path).path == tmp_path / "b" / "iter_0000010"
    shutil.rmtree(tmp_path / "b")
    import_hf(fixture("llama3_gqa") / "hf", tmp_path / "m-last.nemo", "nemo1")
    assert checkpoints.latest(tmp_path) == checkpoints.Found(tmp_path / "m-last.nemo", "nemo1", -1,
                                                             (tmp_path / "m-last.nemo").stat().st_mtime)
    for step in (9, 10):
        shutil.copytree(fixture("llama3_gqa") / "hf", tmp_path / "run" / f"checkpoint-{step}")
        (tmp_path / "run" / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert checkpoints.latest(tmp_path / "run").path.name == "checkpoint-10"
    (tmp_path / "run" / "checkpoint-last").symlink_to(tmp_path / "run" / "checkpoint-9")
    assert checkpoints.latest(tmp_path / "run").path.name == "checkpoint-last"


# ---- the Hub ----

def test_a_model_comes_from_the_hub_and_a_gated_one_names_the_login(tmp_path):
    with fake_hub({"org/tiny": fixture("llama3_gqa") / "hf"}, tmp_path / "cache") as (_, environment):
        done = run("import", "model=llama3_8b", "source=hf://org/tiny", f"output_path={tmp_path / 'm'}",
                   env=environment)
        assert done.returncode == 0, done.stderr
        gated = run("import", "--source", "gated/model", "--output", tmp_path / "g", env=environment)
        absent = run("import", "--source", "org/nothing", "--output", tmp_path / "g", env=environment)
    export_hf(tmp_path / "m", tmp_path / "back")
    assert same_tensors(tmp_path / "back", fixture("llama3_gqa") / "hf")
    assert (gated.returncode, absent.returncode) == (2, 2) and not (tmp_path / "g").exists()
    assert gated.stderr.count("\n") == 1 and "hf auth login" in gated.stderr
    assert "no such model" in absent.stderr
