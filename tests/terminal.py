"""A terminal for tests: runs a command on a pseudo-terminal and keeps what a person would have seen."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios


class Screen:
    """Lines without a lower end, as scrollback and screen together. Knows what rich's live displays send, and fails on
    anything else: cursor up, erase line, carriage return, colours, cursor shown or hidden."""

    def __init__(self):
        self.lines, self.row, self.column, self.cursor, self.colours = [""], 0, 0, True, 0

    def feed(self, text):
        for piece in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
            if piece == "\r":
                self.column = 0
            elif piece == "\n":
                self.row, self.column = self.row + 1, 0
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif piece.startswith("\x1b"):
                self.control(piece[2:-1], piece[-1])
            else:
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[:self.column] + piece + line[self.column + len(piece):]
                self.column += len(piece)

    def control(self, value, kind):
        if kind == "A":
            self.row = max(self.row - int(value or 1), 0)
        elif kind == "K" and value == "2":
            self.lines[self.row] = ""
        elif kind in "hl" and value == "?25":
            self.cursor = kind == "h"
        elif kind == "m":
            self.colours += 1
        else:
            raise AssertionError(f"control sequence {value}{kind}")


def run_on_terminal(command, *, columns=400, rows=40, env=None, stderr=None, cwd=None):
    """(exit code, everything that was sent, the Screen at the end). stderr: a file, or None for the terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    unwanted = {"COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"}
    env = {k: v for k, v in os.environ.items() if k not in unwanted} | {"TERM": "xterm-256color"} | (env or {})
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=stderr or theirs, env=env, cwd=cwd)
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:              # Linux's way to say that the other side is closed
            break
        if not part:
            break
        parts.append(part)
    os.close(ours)
    sent, screen = b"".join(parts).decode("utf-8"), Screen()
    screen.feed(sent)
    return process.wait(), sent, screen
