"""Every command in the documents runs in a test, or says that it downloads, takes minutes or needs other machines."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT
from mlx_grpo import MLXGRPOConfig
from tiny_hf import CHATML, save_tiny, save_tokenizer

ELSEWHERE = {  # page: the tests that run its commands
    "docs/data.md": "test_docs_data", "docs/evaluation.md": "test_eval", "docs/incremental.md": "test_eval",
    "docs/rewards.md": "test_reward_check", "docs/sharing.md": "test_sweep", "docs/trackers.md": "test_trackers",
    "docs/vision.md": "test_vision", "utils/README.md": "test_utils_readme"}
PAGES = [str(p.relative_to(ROOT)) for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "utils/README.md")
         if "```sh" in p.read_text()]
INSTALLERS = ("make", "pip", "uv", "python3", ".venv-bench/bin/python")
SHORT = [word for option in ("max_steps=2", "eval_samples=4", "num_generations=2") for word in ("--set", option)]


def commands(page):
    """(words, comment) of each line of a page's sh blocks, continued lines joined."""
    for block in re.findall(r"^```sh\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S):
        for line in filter(str.strip, block.replace("\\\n", " ").splitlines()):
            command, _, comment = line.partition(" #")
            yield shlex.split(command.replace("<(", "(")), comment


def excused(words, comment):
    return words[0] in INSTALLERS or re.search(r"download|minutes|other machines", comment)


def needs_download(words):
    """Whether a command names a model on the hub, by itself or by its configuration."""
    config = next((b for a, b in zip(words, words[1:]) if a == "--config"), None)
    model = tomllib.loads((ROOT / config).read_text()).get("model_name", MLXGRPOConfig.model_name) if config else ""
    given = [w.partition("=")[2] for w in words if w.startswith("model_name=")]
    return any("hf://" in name or re.fullmatch(r"[\w-]+/[\w.-]*[A-Z][\w.-]*", name) for name in [*words, *(given or [model])])


@pytest.mark.parametrize("page", PAGES)
def test_a_command_that_needs_the_network_says_so(page):
    for words, comment in commands(page):
        if words[0] not in INSTALLERS:
            assert not needs_download(words) or excused(words, comment), f"{page}: {' '.join(words)}"


def test_pages_whose_commands_run_in_other_tests_are_read_there():
    for page, test in ELSEWHERE.items():
        assert page in PAGES and Path(page).stem in (ROOT / "tests" / f"{test}.py").read_text(), page


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A directory like a clone after the demo, with the files that the pages name."""
    path = tmp_path_factory.mktemp("clone")
    for name in ("configs", "data", "examples", "utils", "benchmarks", "mlx_grpo.py", "pyproject.toml"):
        (path / name).symlink_to(ROOT / name)
    (path / "my_rewards.py").write_text((ROOT / "README.md").read_text().partition("# my_rewards.py\n")[2].partition("```")[0])
    save_tiny(path / "hf_model", "qwen3", hidden_size=64, intermediate_size=128, vocab_size=300, eos_token_id=3)
    save_tokenizer(path / "hf_model", CHATML, every_byte=True)
    demo = ["python", "mlx_grpo.py", "--config", "configs/demo.toml", "--set", "eval_samples=4", "--set", "num_generations=2"]
    run([*demo, "--set", "save_steps=10", "--set", "save_total_limit=9"], path)
    run([*demo, "--set", "model_name=hf_model", "--set", "fine_tune_type=lora", "--set", "max_steps=1", "--set", "output_dir=.",
         "--set", "run_name=RUN"], path)
    (path / "RUN/checkpoint-1").rename(path / "RUN/checkpoint-100")
    return path


def run(words, cwd):
    programs = {"python": sys.executable, "mlx.launch": str(Path(sys.executable).with_name("mlx.launch"))}
    done = subprocess.run([programs.get(w, w) for w in words], cwd=cwd, capture_output=True, text=True, timeout=500,
                          stdin=subprocess.DEVNULL)
    assert done.returncode == ("checkpoints.py diff" in " ".join(words)), f"{' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.soak
@pytest.mark.parametrize("page", [page for page in PAGES if page not in ELSEWHERE])
def test_the_commands_of_a_page_run_in_their_order(page, clone):
    ran = 0
    for words, comment in commands(page):
        if excused(words, comment):
            continue
        trains = "mlx_grpo.py" in words and "--config" == words[words.index("mlx_grpo.py") + 1]
        if "experiments" in words:
            shutil.copytree(clone / "nemo_model", clone / "experiments/nemo_model")
        run([w.replace("=DIR", "=data/demo_model") for w in words] + SHORT * trains, clone)
        ran += 1
    assert ran
