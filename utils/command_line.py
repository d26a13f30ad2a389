"""Command lines whose mistakes are told in one line, as all mistakes of the user's are."""

import argparse

from mlx_grpo import UserError


class Parser(argparse.ArgumentParser):
    """argparse's parser; a wrong command line is a UserError, without the usage in front of it."""

    def error(self, message):
        raise UserError(f"{self.prog}: {message}; see --help")
