"""A conversation about images in the terminal."""

import sys
from pathlib import Path

from mlx_grpo import UserError
from mlx_grpo.inference_chat import Chat
from mlx_grpo.vision_engine import open_image, user_message

HELP = ("image FILE: an image for the next message   clear: forget the conversation   /save FILE: write it   "
        "quit, exit or q (or Ctrl-D, Ctrl-C): leave")


class VisionChat(Chat):
    """Messages, the images that they name, and the images that wait for the next message."""

    def __init__(self, session, system=None, image_names=()):
        super().__init__(session, system)
        self.images, self.waiting = [], []
        for name in image_names:
            self.add_image(name)

    def clear(self):
        VisionChat.__init__(self, self.session, self.system)

    def add_image(self, name):
        """Keep an image for the next message. Raises UserError where it can't be read."""
        if not name:
            raise UserError("image needs a file: image photo.png")
        self.waiting.append((name, open_image(name)))

    def say(self, text):
        """Add the user's message with the images that wait; yields the reply piece by piece and adds it. A message that
        fails is taken back, and its images wait again."""
        message = user_message(text, [name for name, _ in self.waiting])
        images = self.images + [image for _, image in self.waiting]
        reply = []
        for piece in self.session.stream([*self.messages, message], images):
            reply.append(piece)
            yield piece
        answer = {"role": "assistant", "content": [{"type": "text", "text": "".join(reply)}]}
        self.messages, self.images, self.waiting = [*self.messages, message, answer], images, []

    def obey(self, line):
        """Do what a line asks for: a command, or a message to the model."""
        word, rest = (line.split(maxsplit=1) + [""])[:2]
        if line == "clear":
            self.clear()
            print("(cleared)")
        elif word == "/save":
            self.save(rest.strip())
            print(f"(saved {len(self.messages)} messages)")
        elif word == "image" and (not rest or is_file_like(rest)):
            self.add_image(rest.strip())
            print(f"({len(self.waiting)} image{'s' if len(self.waiting) > 1 else ''} for the next message)")
        else:
            for piece in self.say(line):
                print(piece, end="", flush=True)
            print(flush=True)


def is_file_like(text):
    """Whether `text` names a file rather than going on with a sentence: one word, or a file that exists."""
    return len(text.split()) == 1 or Path(text.strip()).expanduser().is_file()


def vision_chat_loop(chat, verbose=False):
    """Talk until the user leaves. Errors of the user's are told and the talk goes on."""
    print(HELP)
    while True:
        try:
            line = input("> ").encode("utf-8", "surrogateescape").decode("utf-8", "replace").strip()
            if line in ("quit", "exit", "q"):
                return
            if line:
                before = len(chat.messages)
                chat.obey(line)
                if verbose and len(chat.messages) > before:
                    print(chat.session.stats.line(), file=sys.stderr)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except (EOFError, KeyboardInterrupt):
            print()
            return
