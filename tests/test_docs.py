"""What the documents say exists: linked files and headings, option names and values, commands and their flags."""

import argparse
import re
import shlex

import pytest
from conftest import ROOT
from mlx_grpo import COMMANDS, OPTIONS, ConfigError, load_config, make_parser

PAGES = [ROOT / "README.md", ROOT / "utils/README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_OPTIONS = ("patient", "partial", "allow_unsandboxed", "levels")       # of convert_nemo.py, rewards, curriculum
PARAMS = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def headings(page):
    """The anchors that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(page):
    """The shell lines of a page, continued lines joined, without comments."""
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            yield shlex.split(line.replace("<(", "("), comments=True)


@PARAMS
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in headings(file), f"{page.name}: {target} has no such heading"


@PARAMS
def test_settings_are_options_with_values_that_they_take(page):
    """`name = value` in backticks, and each --set name=value."""
    for name, value in re.findall(r"`([a-z][a-z0-9_]*) = ([^`]+)`", page.read_text()):
        assert name in OPTIONS or name in NOT_OPTIONS, f"{page.name}: `{name} = {value}`"
        if name in OPTIONS and not value.isupper():
            try:
                load_config(sets=[f"{name}={value}"])
            except ConfigError as error:        # one that asks for another option beside it is right about that
                assert any(option in str(error) for option in OPTIONS if option != name), f"{page.name}: {error}"
    for words in commands(page):
        for setting in (b for a, b in zip(words, words[1:]) if a == "--set"):
            assert setting.split("=")[0] in OPTIONS, f"{page.name}: --set {setting}"


@PARAMS
def test_commands_name_programs_and_flags_that_exist(page):
    for words in commands(page):
        while words and re.match(r"[A-Z_]+=|echo|\|", words[0]):
            words = words[words.index("python"):] if "python" in words else words[1:]
        script = next((w for w in words if w.endswith(".py") and "=" not in w), None)
        if not words or not script or words[0] not in ("python", "uv"):
            continue
        assert (ROOT / script).exists(), " ".join(words)
        rest = words[words.index(script) + 1:]
        flags = [w.split("=")[0] for w in rest if re.match(r"--?[a-zA-Z]", w)]
        if script == "mlx_grpo.py":
            command = rest[0] if rest and rest[0] in COMMANDS else "train"
            subparsers = next(a for a in make_parser(command)._actions if isinstance(a, argparse._SubParsersAction))
            known = {name for action in subparsers.choices[command]._actions for name in action.option_strings}
        else:
            text = (ROOT / script).read_text() + "".join(p.read_text() for p in (ROOT / "benchmarks").glob("common.py"))
            known = {flag for flag in flags if f'"{flag}"' in text or flag == "--help"}
        assert set(flags) <= known, f"{page.name}: {' '.join(words)}: {set(flags) - known}"
