"""A conversation in the terminal. The KV cache keeps what has been said: a turn costs its own tokens only."""

import json
import sys
from pathlib import Path

from mlx_grpo import UserError
from mlx_grpo.chat_template import rendered
from mlx_grpo.inference_engine import Session

HELP = "clear: forget the conversation   /save FILE: write it   quit, exit or q (or Ctrl-D, Ctrl-C): leave"


def template_ids(tokenizer, messages, add_generation_prompt=True):
    """The token ids of chat messages. Raises UserError where the model has no chat template or it refuses them."""
    return render(tokenizer, messages, add_generation_prompt, tokenize=True)


def render(tokenizer, messages, add_generation_prompt, tokenize):
    if not tokenizer.has_chat_template:
        raise UserError("this model has no chat template (a base model, most likely), so there is no --chat or "
                        "--system with it; use --prompt")
    return rendered(tokenizer, messages, tokenize, add_generation_prompt)


class Chat:
    """Messages, and the ids that the model really saw and said. What was sampled is never encoded again, so the cache
    holds even where the tokenizer would split a reply otherwise."""

    def __init__(self, session, system=None):
        self.session, self.system = session, system
        self.messages = [{"role": "system", "content": system}] if system else []
        self.ids = []           # of the conversation so far, the last reply's end token left out

    def clear(self):
        self.session.reset()
        Chat.__init__(self, self.session, self.system)

    def prompt_ids(self):
        """Ids of the conversation up to the reply that is now due."""
        tail = self.ids and self.tail_ids()
        return self.ids + tail if tail else template_ids(self.session.tokenizer, self.messages)

    def tail_ids(self):
        """Ids of what the template puts between the last reply and the one due: what an empty reply leaves of it.
        None where the template changes earlier replies (drops their reasoning, say) or takes no empty ones."""
        tokenizer, last = self.session.tokenizer, len(self.messages) - 2        # where the last reply is
        before, reply = self.messages[:last], self.messages[last]
        emptied = [*before, {"role": "assistant", "content": ""}, self.messages[-1]]
        try:
            told, empty, full = (str(render(tokenizer, messages, True, tokenize=False))
                                 for messages in (before, emptied, self.messages))
            told_ids, empty_ids = template_ids(tokenizer, before), template_ids(tokenizer, emptied)
        except UserError:       # the template's own refusal; rendering the whole conversation tells whether it stands
            return None
        kept = empty.startswith(told) and full == told + reply["content"] + empty[len(told):]
        return empty_ids[len(told_ids):] if kept and empty_ids[:len(told_ids)] == told_ids else None

    def say(self, text):
        """Add the user's message; yields the reply piece by piece and adds it. A message that fails is taken back."""
        self.messages.append({"role": "user", "content": text})
        reply = []
        try:
            prompt = self.prompt_ids()
            for piece in self.session.stream(prompt):
                reply.append(piece)
                yield piece
        except UserError:
            self.messages.pop()
            raise
        sampled = self.session.sampled
        ended = bool(sampled) and sampled[-1] in self.session.tokenizer.eos_token_ids
        self.ids = prompt + (sampled[:-1] if ended else sampled)
        self.messages.append({"role": "assistant", "content": "".join(reply)})

    def save(self, path):
        """Write the messages as one JSON line, as chat datasets have them. Raises UserError."""
        if not path:
            raise UserError("/save needs a file: /save talk.jsonl")
        try:
            line = json.dumps({"messages": self.messages}, ensure_ascii=False)
            Path(path).expanduser().write_text(line + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"/save {path}: {error.strerror}") from error


def chat_loop(model, tokenizer, sampling, system=None, verbose=False, session=None):
    """Talk until the user leaves. Errors of the user's are told and the talk goes on."""
    chat = Chat(session or Session(model, tokenizer, sampling), system)
    if system or not tokenizer.has_chat_template:
        template_ids(tokenizer, [*chat.messages, {"role": "user", "content": "hello"}])    # refuses before a question
    print(HELP)
    while True:
        try:
            line = input("> ").encode("utf-8", "surrogateescape").decode("utf-8", "replace").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line in ("quit", "exit", "q"):
            return
        if not line:
            continue
        try:
            if line == "clear":
                chat.clear()
                print("(cleared)")
            elif line.split()[0] == "/save":
                chat.save(line[len("/save"):].strip())
                print(f"(saved {len(chat.messages)} messages)")
            else:
                for piece in chat.say(line):
                    print(piece, end="", flush=True)
                print(flush=True)
                if verbose:
                    print(chat.session.stats.line(), file=sys.stderr)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print()
            return
