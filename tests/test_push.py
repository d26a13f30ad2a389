"""push: what goes to the hub and what doesn't, the card, and an upload whose connection breaks, against a server on
localhost that speaks the hub client's own requests."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT
from fake_hub_upload import CHUNK, TOKEN, Hub
from tiny_models import sets

from mlx_grpo import UserError, load_model, main
from mlx_grpo.manifest import check_manifest, write_manifest
from mlx_grpo.push_card import base_of, without_paths

QUICK = ["--config", str(ROOT / "configs/demo.toml"), *sets(max_steps=2, batch_size=2, num_generations=4, eval_samples=4,
                                                            eval_steps=1, run_name="a", save_steps=1)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of a run with two checkpoints and evaluations."""
    directory = tmp_path_factory.mktemp("trained")
    (directory / "mine.py").write_text("def mine(completions, **_):\n    return [float(len(c)) for c in completions]\n")
    rewards = ["correctness", f"{directory}/mine.py:mine"]
    assert main([*QUICK, *sets(output_dir=str(directory), rewards=rewards)]) == 0
    return directory / "a"


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "a", symlinks=True)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The server, as the hub for this process; pauses between tries are left out, but counted."""
    from huggingface_hub import constants, utils

    with Hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", 
                            server.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        server.pauses = []
        monkeypatch.setattr(time, "sleep", server.pauses.append)
        yield server
        utils.close_session()


def push(run, *more, repo="me/demo"):
    return main(["push", str(run), "--repo", repo, *more])


def files_of(hub, repo="me/demo"):
    return hub.repos[repo]["files"]


def refusal(*args, **options):
    with pytest.raises(UserError) as caught:
        push(*args, **options)
    assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)
    return str(caught.value)


def download(hub, directory, repo="me/demo"):
    directory.mkdir()
    for name, content in files_of(hub, repo).items():
        (directory / name).write_bytes(content)
    return directory


# ---- what is pushed

def test_a_push_is_one_commit_of_a_model_that_loads_and_verifies(run, hub, tmp_path, capsys):
    assert push(run) == 0
    assert hub.repos["me/demo"]["commits"] == ["Step 2"] and hub.repos["me/demo"]["visibility"] == "public"
    copy = download(hub, tmp_path / "copy")
    assert check_manifest(copy) is None and {p.name for p in copy.iterdir()} == {
        "README.md", "curves.svg", "manifest.json", "config.json", "model.safetensors", "model.safetensors.index.json",
        "tokenizer.json", "tokenizer_config.json", "tokenizer.pkl", "special_tokens_map.json", "chat_template.jinja"}
    assert (copy / "model.safetensors").read_bytes() == (run / "checkpoint-2/model.safetensors").read_bytes()
    assert (copy / "model.safetensors").stat().st_size > 2 * CHUNK       # in parts
    assert sum("/complete/" in path for _, path in hub.requests) == 1
    load_model(str(copy))
    out, err = capsys.readouterr()
    assert "/me/demo/commit/" in out and TOKEN not in out + err


def test_the_card_says_what_changed_by_what_on_what_and_no_path_of_this_machine(run, hub, tmp_path):
    push(run, "--license", "apache-2.0", "--base-model", "someone/base")
    text = files_of(hub)["README.md"].decode()
    data, body = yaml.safe_load(text.split("---\n")[1]), text.split("---\n", 2)[2]
    assert data["license"] == "apache-2.0" and data["base_model"] == "someone/base"
    assert data["base_model_relation"] == "finetune"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    value = data["model-index"][0]["results"][0]["metrics"][0]["value"]
    assert value == pytest.approx(rows[-1]["eval/exact_match"], abs=1e-4)
    line = f"| exact match, held-out problems (4) | {rows[0]['eval/exact_match']:.3f} | {rows[-1]['eval/exact_match']:.3f} |"
    assert line in body and "`learning_rate` | `0.0001`" in body and "mine.py:mine (weight 1)" in body
    assert "![Curves of the run](curves.svg)" in body and b"<svg" in files_of(hub)["curves.svg"]
    assert "synthetic:chain" in body and "mlx_lm.generate --model me/demo" in body
    for name, content in files_of(hub).items():
        assert str(tmp_path).encode() not in content and str(ROOT).encode() not in content, name


def test_an_earlier_checkpoint_has_the_results_of_its_own_step(run, hub):
    push(run, "--checkpoint", "1")
    text = files_of(hub)["README.md"].decode()
    assert "at step 1 |" in text and hub.repos["me/demo"]["commits"] == ["Step 1"]


def test_the_best_checkpoint_is_taken_where_there_is_one(run, hub):
    (run / "checkpoint-best").symlink_to("checkpoint-1")
    push(run)
    push(run, "--checkpoint", "last")
    push(run / "checkpoint-1", repo="me/other")
    assert hub.repos["me/demo"]["commits"] == ["Step 1", "Step 2"] and hub.repos["me/other"]["commits"] == ["Step 1"]


def test_optimizer_state_goes_only_where_it_is_asked_for(run, hub, tmp_path):
    push(run, "--with-optimizer", "--private")
    assert {"optimizer.safetensors", "trainer_state.json"} <= files_of(hub).keys()
    assert hub.repos["me/demo"]["visibility"] == "private" and check_manifest(download(hub, tmp_path / "copy")) is None
    push(run)                                      # and is taken away again by a push without it
    assert "optimizer.safetensors" not in files_of(hub) and check_manifest(download(hub, tmp_path / "second")) is None


def test_a_second_push_of_the_same_sends_nothing_and_makes_no_commit(run, hub):
    push(run)
    before = len(hub.requests)
    push(run)
    assert len(hub.repos["me/demo"]["commits"]) == 1
    assert not [path for method, path in hub.requests[before:] if method == "PUT" or "commit" in path]


def test_a_dry_run_shows_card_and_files_and_sends_nothing(run, hub, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert push(run, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "# demo" in out and "model.safetensors" in out and "nothing was sent" in out and hub.requests == []


def test_adapters_name_their_base_and_not_a_directory_here(tmp_path, hub):
    main([*QUICK, "--set", f"output_dir={tmp_path}", "--set", "fine_tune_type=lora", "--set", "lora_rank=2"])
    assert "name it with --base-model" in refusal(tmp_path / "a")
    push(tmp_path / "a", "--base-model", "someone/base")
    assert json.loads(files_of(hub)["adapter_config.json"])["model"] == "someone/base"
    assert "model.safetensors" not in files_of(hub)
    text = files_of(hub)["README.md"].decode()
    assert "--adapter-path adapters" in text and yaml.safe_load(text.split("---\n")[1])["base_model_relation"] == "adapter"
    assert check_manifest(download(hub, tmp_path / "copy")) is None


def test_a_card_of_ones_own_is_used_as_it_is(run, hub, tmp_path):
    (tmp_path / "mine.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    push(run, "--card", str(tmp_path / "mine.md"))
    assert files_of(hub)["README.md"].decode() == "---\nlicense: mit\n---\n# Mine\n"


def test_the_base_is_found_through_runs_and_conversions(tmp_path):
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx/conversion.json").write_text('{"source": "Qwen/Qwen2.5-0.5B"}')
    (tmp_path / "sft/checkpoint-9").mkdir(parents=True)
    (tmp_path / "sft/config.json").write_text(json.dumps({"config": {"model_name": str(tmp_path / "mlx")}}))
    assert base_of(str(tmp_path / "sft/checkpoint-9")) == "Qwen/Qwen2.5-0.5B" == base_of("Qwen/Qwen2.5-0.5B")
    assert base_of("data/demo_model") is None


def test_local_paths_are_shortened():
    assert without_paths(["/home/me/r.py:f", "~/x.jsonl", "data/demo_model", {"a": "./b/c"}]) == [
        "r.py:f", "x.jsonl", "demo_model", {"a": "c"}]
    assert without_paths(["openai/gsm8k", "synthetic:chain", 1.5]) == ["openai/gsm8k", "synthetic:chain", 1.5]


# ---- what is refused

def test_a_checkpoint_that_isnt_whole_is_never_pushed(run, hub):
    file = run / "checkpoint-2/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "was changed" in refusal(run) and "--checkpoint 1" in refusal(run) and hub.requests == []
    (run / "checkpoint-1/manifest.json").unlink()
    assert "no manifest.json" in refusal(run, "--checkpoint", "1") and "no checkpoint of the run is whole" in refusal(run)


@pytest.mark.parametrize("more, reason", [
    (["--checkpoint", "7"], r"no checkpoint '7' \(there are: 1, 2\)"), (["--checkpoint", "best"], "no checkpoint 'best'"),
    (["--license-name", "mine"], "belong to --license other"), (["--card", "nowhere.md"], "No such file"),
    (["--license", "nonsense"], "license.* must be one of")])
def test_what_cant_be_pushed_is_told_in_one_line(run, hub, more, reason):
    assert re.search(reason, refusal(run, *more)) and not hub.repos.get("me/demo", {"commits": []})["commits"]


def test_names_tokens_and_rights_are_told(run, hub, monkeypatch):
    assert "expected USER/NAME" in refusal(run, repo="demo")
    assert "may not write there" in refusal(run, repo="other/demo")
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrong")
    assert "answered 401" in refusal(run)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "hf auth login" in refusal(run) and hub.pauses == []              # none of them is tried again


def test_other_weights_in_the_repository_are_neither_joined_nor_deleted(run, hub):
    files = {"model-00001-of-00002.safetensors": b"x", "notes.md": b"n"}
    hub.repos["me/demo"] = {"visibility": "public", "files": files, "commits": []}
    assert "model-00001-of-00002.safetensors" in refusal(run)
    del files_of(hub)["model-00001-of-00002.safetensors"]
    push(run)
    assert files_of(hub)["notes.md"] == b"n"


# ---- connections that break

@pytest.mark.parametrize("method, path, what", [
    ("PUT", "/upload/.*/2$", "reset"), ("PUT", "/upload/.*/1$", 503), ("POST", "/complete/", "reset"),
    ("POST", "/batch", 500), ("POST", "/preupload/", "reset"), ("POST", "/verify/", "reset"),
    ("POST", "/api/repos/create", "reset"), ("POST", "/api/repos/create", "late"), ("POST", "/validate-yaml", "reset"),
    ("POST", "/commit/", "reset"), ("POST", "/commit/", 502), ("POST", "/commit/", "late"), ("GET", "/tree/", "reset")])
def test_a_connection_that_breaks_twice_is_taken_up_again(run, hub, tmp_path, method, path, what):
    hub.faults = [(method, path, 1 if (path, what) == ("/commit/", "late") else 2, what)]     # that one is done at once
    assert push(run) == 0
    assert hub.faults[0][2] == 0 and hub.pauses and len(hub.repos["me/demo"]["commits"]) == 1
    assert check_manifest(download(hub, tmp_path / "copy")) is None


def test_an_upload_that_never_succeeds_says_how_to_go_on_and_goes_on(run, hub, tmp_path, capsys):
    hub.faults = [("PUT", "/upload/.*/3$", 10_000, "reset")]
    text = refusal(run)
    assert "broke off 5 times" in text and "the same command goes on" in text and hub.repos["me/demo"]["commits"] == []
    assert check_manifest(run / "checkpoint-2") is None and "again in 2 s (1 of 4)" in capsys.readouterr().err
    before, hub.faults = len(hub.requests), []
    assert push(run) == 0 and check_manifest(download(hub, tmp_path / "copy")) is None
    sent = {path for method, path in hub.requests[before:] if method == "PUT"}
    assert sent and all("/upload/" in path for path in sent)


def test_what_has_arrived_is_not_sent_again(run, hub):
    hub.faults = [("POST", "/commit/", 10_000, "reset")]
    refusal(run)
    before, hub.faults = len(hub.requests), []
    push(run)
    assert "PUT" not in [method for method, _ in hub.requests[before:]]
    assert len(hub.repos["me/demo"]["commits"]) == 1


def test_the_command_as_users_start_it(run, hub, tmp_path):
    """In a process of its own, with the environment's variables alone."""
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1",
                                "HF_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1"}
    environment.pop("HF_HUB_OFFLINE", None)
    hub.faults = [("PUT", "/upload/.*/2$", 1, "reset")]
    result = subprocess.run([sys.executable, str(ROOT / "mlx_grpo.py"), "push", str(run), "--repo", "me/demo"],
                            env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "/me/demo/commit/" in result.stdout and TOKEN not in result.stdout + result.stderr
    assert hub.faults[0][2] == 0 and "model.safetensors" in files_of(hub)


def test_the_guide_shows_commands_that_run_and_every_option(run, tmp_path, monkeypatch, capsys):
    doc = (ROOT / "docs" / "sharing.md").read_text().split("## Pushing a result")[1]
    (tmp_path / "outputs").mkdir()
    run.rename(tmp_path / "outputs/demo-1")
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^python mlx_grpo.py (push .*)$", re.search(r"```sh\n(.*?)```", doc, re.S)[1], re.M)
    assert commands and all(main(shlex.split(command.partition(" #")[0])) == 0 for command in commands)
    with pytest.raises(SystemExit):
        main(["push", "--help"])
    options = set(re.findall(r"^ +(--[a-z-]+)", capsys.readouterr().out, re.M))
    told = "".join(re.findall(r"^\| (`--.*?) \|", doc, re.M))
    assert options == set(re.findall(r"`(--[a-z-]+)", told))
