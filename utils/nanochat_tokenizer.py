"""
nanochat's tokenizer and chat format: tokenizer.json and back, conversations to token ids, bytes to text as they stream.

A nanochat tokenizer is a tiktoken Encoding: byte-level BPE whose ids are the merge ranks, and nine special tokens
behind them. Hugging Face's tokenizer.json holds the same rules, with identical ids; `encoding_from_json` makes the
Encoding again.
"""

import codecs
import json
import pickle
from pathlib import Path

from mlx_grpo import UserError
from mlx_grpo.safe_pickle import build_encoding, read_tiktoken_pickle

SPECIAL_TOKENS = ("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
                  "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")
BOS, EOS = "<|bos|>", "<|assistant_end|>"      # nanochat's engine stops at either; EOS pads too, there is no pad token
PART_MARKERS = {"text": None, "python": ("<|python_start|>", "<|python_end|>"),
                "python_output": ("<|output_start|>", "<|output_end|>")}
MAX_CONVERSATION_TOKENS = 2048                 # nanochat cuts a training conversation here

CHAT_TEMPLATE = """\
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages | length < 2 or messages[1]['role'] != 'user' -%}
        {{- raise_exception('A system message must be followed by a user message') -}}
    {%- endif -%}
    {%- set prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set prefix = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{{- '<|bos|>' -}}
{%- for message in turns -%}
    {%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
        {{- raise_exception('Messages must alternate user/assistant, starting with user') -}}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {%- if message['content'] is not string -%}
            {{- raise_exception('User content must be a string') -}}
        {%- endif -%}
        {{- '<|user_start|>' + (prefix if loop.first else '') + message['content'] + '<|user_end|>' -}}
    {%- else -%}
        {{- '<|assistant_start|>' -}}
        {%- if message['content'] is string -%}
            {{- message['content'] -}}
        {%- else -%}
            {%- for part in message['content'] -%}
                {%- if part['type'] == 'text' -%}
                    {{- part['text'] -}}
                {%- elif part['type'] == 'python' -%}
                    {{- '<|python_start|>' + part['text'] + '<|python_end|>' -}}
                {%- elif part['type'] == 'python_output' -%}
                    {{- '<|output_start|>' + part['text'] + '<|output_end|>' -}}
                {%- else -%}
                    {{- raise_exception('Unknown part type: ' + part['type']) -}}
                {%- endif -%}
            {%- endfor -%}
        {%- endif -%}
        {{- '<|assistant_end|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant_start|>' -}}
{%- endif -%}
"""


def special_token_ids(encoding, source):
    """Token text -> id of nanochat's nine; UserError naming `source` where one is missing."""
    missing = [token for token in SPECIAL_TOKENS if token not in encoding.special_tokens_set]
    if missing:
        raise UserError(f"{source}: not a nanochat tokenizer, the special token {missing[0]} is missing "
                        f"(it has {', '.join(sorted(encoding.special_tokens_set)) or 'none'})")
    return {token: encoding.encode_single_token(token) for token in sorted(encoding.special_tokens_set)}


# ---- conversations --------------------------------------------------------------------------------------------------

def conversation_pieces(messages):
    """The conversation as (kind, text, learned) in order: kind "special" is a special token, "text" is ordinary text
    whatever it spells, learned is 1 where training counts the tokens. Raises UserError where nanochat's format has no
    place for the messages: turns that don't alternate user/assistant, a system message anywhere but first."""
    turns = [(message["role"], message["content"]) for message in messages]
    if turns and turns[0][0] == "system":
        if len(turns) < 2 or turns[1][0] != "user" or not isinstance(turns[1][1], str):
            raise UserError("a system message must be followed by a user message: nanochat merges the two")
        turns = [("user", turns[0][1] + "\n\n" + turns[1][1]), *turns[2:]]
    if not turns:
        raise UserError("a conversation needs at least one user message")
    pieces = [("special", BOS, 0)]
    for number, (role, content) in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            raise UserError(f"message {number} has the role {role!r}, expected {expected!r}: nanochat's turns "
                            "alternate user/assistant, starting with user")
        if role == "user":
            if not isinstance(content, str):
                raise UserError(f"message {number}: user content must be a string, got {type(content).__name__}")
            pieces += [("special", "<|user_start|>", 0), ("text", content, 0), ("special", "<|user_end|>", 0)]
            continue
        pieces.append(("special", "<|assistant_start|>", 0))
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] not in PART_MARKERS:
                raise UserError(f"message {number}: unknown part type {part['type']!r}; "
                                f"nanochat has {', '.join(PART_MARKERS)}")
            learned = int(part["type"] != "python_output")
            opening, closing = PART_MARKERS[part["type"]] or (None, None)
            pieces += [("special", opening, learned)] * (opening is not None)
            pieces.append(("text", part["text"], learned))
            pieces += [("special", closing, learned)] * (closing is not None)
        pieces.append(("special", EOS, 1))
    return pieces


def pieces_to_ids(pieces, encoding):
    """(ids, mask) of conversation_pieces: every content is encoded by itself, as ordinary text."""
    ids, mask = [], []
    for kind, text, learned in pieces:
        tokens = [encoding.encode_single_token(text)] if kind == "special" else encoding.encode_ordinary(text)
        ids += tokens
        mask += [learned] * len(tokens)
    return ids, mask


class RenderedChat(str):
    """A rendered conversation that remembers its token ids, which the text alone can't tell: a content that spells
    "<|bos|>" looks like the token. `TiktokenTokenizerWrapper.encode` gives `ids` back."""

    def __new__(cls, pieces, ids):
        rendered = super().__new__(cls, "".join(text for _, text, _ in pieces))
        rendered.ids = ids
        return rendered


# ---- streaming ------------------------------------------------------------------------------------------------------

class ByteDetokenizer:
    """mlx-lm's StreamingDetokenizer on token bytes; a character is held back until all its bytes are there, a leading
    space is kept. Not its subclass, because importing that costs two seconds.
    After `finalize` the text equals `decode` of all tokens. `tokenizer` needs `token_bytes`, id -> bytes."""

    def __init__(self, tokenizer):
        self.token_bytes = tokenizer.token_bytes
        self.reset()

    def reset(self):
        self.offset, self.tokens, self.text = 0, [], ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add_token(self, token):
        self.tokens.append(token)
        self.text += self._decoder.decode(self.token_bytes(token))

    def finalize(self):
        self.text += self._decoder.decode(b"", final=True)

    @property
    def last_segment(self):
        """The text that has come since this property was last read."""
        segment, self.offset = self.text[self.offset:], len(self.text)
        return segment


# ---- tokenizer.json and tokenizer.pkl --------------------------------------------------------------------------------

def byte_characters():
    """GPT-2's table, byte -> printable character; byte-level tokenizer.json files spell tokens with it."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + n) for n, byte in enumerate(others)}}


def token_spellings(encoding):
    """How tokenizer.json spells each token, in the order of the ids."""
    characters = byte_characters()
    spelt = {rank: "".join(characters[byte] for byte in token) for token, rank in encoding._mergeable_ranks.items()}
    spelt |= {number: token for token, number in encoding._special_tokens.items()}
    return [spelt[number] for number in range(encoding.n_vocab)]


def tokenizer_json(encoding):
    """The Hugging Face tokenizer.json, as a dict, that gives the same ids as `encoding`."""
    spellings, ranks = token_spellings(encoding), encoding._mergeable_ranks
    spell = {token: spellings[rank] for token, rank in ranks.items()}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        halves = [(left, right) for left, right in halves if left in ranks and right in ranks]
        halves.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [[spell[left], spell[right]] for left, right in halves]
    specials = sorted(encoding._special_tokens.items(), key=lambda item: item[1])
    bos = encoding.encode_single_token(BOS)
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for token, number in specials],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": encoding._pat_str}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}]},
        "post_processor": {   # plain text gets the <|bos|> that nanochat always trains with
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                     {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {BOS: {"id": BOS, "ids": [bos], "tokens": [BOS]}}},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                  "vocab": {spell[token]: ranks[token] for token in sorted(ranks, key=ranks.get)}, "merges": merges},
    }


def encoding_from_json(path):
    """The exact tiktoken.Encoding again from a tokenizer.json that `tokenizer_json` wrote.

    Raises UserError, naming the file, for a tokenizer.json of another kind."""
    import tiktoken  # noqa: F401  build_encoding needs it: a missing package is named here, not taken for a bad file
    bytes_of = {character: byte for byte, character in byte_characters().items()}
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        split = data["pre_tokenizer"]["pretokenizers"][0]
        vocab = data["model"]["vocab"]
        state = {"name": "rustbpe", "pat_str": split["pattern"]["Regex"],
                 "mergeable_ranks": {bytes(bytes_of[c] for c in token): rank for token, rank in vocab.items()},
                 "special_tokens": {token["content"]: token["id"] for token in data["added_tokens"]}}
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: not a nanochat tokenizer ({type(error).__name__}: {str(error)[:100]}); convert the "
                        "checkpoint with convert_nanochat.py, or open the model with its own tokenizer") from error
    return build_encoding(state, path)


def read_encoding(directory):
    """The Encoding in a model directory: from tokenizer.json where there is one, else from tokenizer.pkl."""
    directory = Path(directory)
    if (directory / "tokenizer.json").is_file():
        return encoding_from_json(directory / "tokenizer.json")
    return read_tiktoken_pickle(directory / "tokenizer.pkl")


def write_tokenizer(encoding, directory, max_length=MAX_CONVERSATION_TOKENS):
    """tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja and tokenizer.pkl."""
    directory = Path(directory)
    ids = special_token_ids(encoding, directory)
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
    others = [token for token in sorted(ids, key=ids.get) if token not in (BOS, EOS)]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "additional_special_tokens": others,
              "clean_up_tokenization_spaces": False, "model_max_length": max_length, "chat_template": CHAT_TEMPLATE}
    for name, value in [("tokenizer.json", tokenizer_json(encoding)), ("tokenizer_config.json", config),
                        ("special_tokens_map.json", {**names, "additional_special_tokens": others})]:
        (directory / name).write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    # Made anew from the checked Encoding, never copied; what nanochat's own pickle.load opens.
    (directory / "tokenizer.pkl").write_bytes(pickle.dumps(encoding, protocol=4))
