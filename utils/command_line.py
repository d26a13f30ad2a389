"""The command line, whose mistakes are told in one line, as all mistakes of the user's are."""

import argparse
import importlib

from mlx_grpo import UserError


class Parser(argparse.ArgumentParser):
    """argparse's parser; a wrong command line is a UserError, without the usage in front of it."""

    def error(self, message):
        raise UserError(f"{self.prog}: {message}; see --help")


def make_parser(chosen=None):
    """The parser of the whole command line; only the chosen command's module is imported, and its options declared."""
    from mlx_grpo import COMMANDS, add_train_arguments, train_command      # made below this module's import
    from mlx_grpo.help_text import help_of

    parser = Parser(prog="mlx_grpo.py", **help_of("""GRPO fine-tuning of language models on MLX.

        examples:
        python mlx_grpo.py --config configs/prod.toml --set num_generations=16
        python mlx_grpo.py plan --help
        """))
    commands = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    for name, (module, help) in COMMANDS.items():
        if name != chosen:
            commands.add_parser(name, help=help)
            continue
        tool = importlib.import_module(f"mlx_grpo.{module}") if module else None
        add_arguments, function = (tool.add_arguments, tool.run) if tool else (add_train_arguments, train_command)
        sub = commands.add_parser(name, help=help, **help_of(function.__doc__))
        add_arguments(sub)
        sub.set_defaults(function=function)
    return parser
