"""What --help prints of a docstring: its prose first, its commands last, so that it ends with examples and fits a screen."""

import argparse
import inspect
import re
import shutil
import textwrap

WIDTH = 98          # at most; a narrower terminal is honoured
EXAMPLES = "examples:"


def width():
    return min(WIDTH, shutil.get_terminal_size().columns - 2)


class Help(argparse.RawDescriptionHelpFormatter):
    """Options beside their names, on lines of at most WIDTH."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=30, width=width())


def example(line):
    """A command as lines of at most WIDTH: the room before its comment goes first, then it is continued at an option."""
    line = f"  {line}"
    if len(line) > WIDTH:
        line = re.sub(r" {2,}# ", "  # ", line)
    cut = line.rfind(" -", 0, WIDTH - 1)
    return [line] if len(line) <= WIDTH or cut < 20 else [f"{line[:cut]} \\", f"     {line[cut:]}"]


def help_of(doc):
    """The arguments of an ArgumentParser that a docstring gives: prose as its description, wrapped; the commands in it
    (paragraphs that are indented, or that a line "examples:" begins) as its epilog, each on a line of its own."""
    prose, commands = [], []
    for paragraph in inspect.cleandoc(doc).split("\n\n"):
        lines = [line for line in paragraph.splitlines() if line.strip()]
        head = lines[0].strip() == EXAMPLES
        if head or lines[0].startswith(" "):
            commands += textwrap.dedent("\n".join(lines[head:])).splitlines()
        else:
            prose.append(textwrap.fill(" ".join(lines), width()))
    return {"description": "\n\n".join(prose), "formatter_class": Help,
            "epilog": "\n".join([EXAMPLES, *(part for line in commands for part in example(line))]) if commands else None}
