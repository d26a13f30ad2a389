"""utils/inference.py and its modules: what is generated, streamed, cached and batched, in a real terminal too."""

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, require
from mlx_lm.utils import load_tokenizer
from nanochat_fixtures import STORED, converted, folder
from tiny_hf import CHATML, edit_json, random_tokens, save_adapter, save_tiny, save_tokenizer

from mlx_grpo import UserError
from mlx_grpo import inference as program
from mlx_grpo.checked_load import load_checked
from mlx_grpo.inference import encoder, open_model, parse
from mlx_grpo.inference_batch import continuous, generate_batch, lockstep, read_items, run_batch
from mlx_grpo.inference_chat import Chat, template_ids
from mlx_grpo.inference_engine import Float32Logits, Sampling, Session, TextStream, model_identity

SCRIPT = str(ROOT / "utils" / "inference.py")
COUNT = 16
GREEDY = Sampling(temperature=0, max_tokens=COUNT)


def save_model(path, family="qwen3", template=CHATML, **changes):
    """A tiny model as transformers saves it, with a tokenizer that ends at <|im_end|>."""
    torch_model = save_tiny(path, family, **({"eos_token_id": 3} | changes))
    save_tokenizer(path, template)
    edit_json(path / "tokenizer_config.json", eos_token="<|im_end|>")
    return torch_model


@pytest.fixture(scope="module")
def qwen_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "qwen3"
    save_model(path)
    return path


@pytest.fixture(scope="module")
def qwen(qwen_path):
    return open_model(str(qwen_path))


class Counting:
    """A model that counts its calls and the tokens given to it."""

    def __init__(self, model):
        self.model, self.calls, self.tokens = model, 0, 0
        self.layers, self.source_path = model.layers, getattr(model, "source_path", "")
        if hasattr(model, "make_cache"):
            self.make_cache = model.make_cache

    def __call__(self, tokens, cache=None):
        self.calls, self.tokens = self.calls + 1, self.tokens + tokens.size
        return self.model(tokens, cache=cache)

    def leaf_modules(self):
        return self.model.leaf_modules()


def answer(session, ids):
    text = "".join(session.stream(list(ids)))
    return text, session.sampled


def greedy_by_hand(model, prompt, count, ends=()):
    """Greedy tokens from full forward passes, without any cache."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(mx.argmax(model(mx.array([ids]))[0, -1]).item())
        if ids[-1] in ends:
            break
    return ids[len(prompt):]


# ---- generation ----

@pytest.mark.parametrize("family", ["qwen3", "llama3", "gemma2", "gemma3", "gpt2", "mixtral", "phi3"])
def test_greedy_text_is_that_of_transformers(family, tmp_path):
    torch = require("torch")
    torch_model = save_model(tmp_path, family)
    model, tokenizer = load_checked(tmp_path)[0], load_tokenizer(tmp_path)
    prompt = random_tokens(1, 12)[0]
    theirs = torch_model.generate(torch.tensor([prompt]), max_new_tokens=COUNT, do_sample=False, eos_token_id=3)
    assert answer(Session(model, tokenizer, GREEDY), prompt)[1] == theirs[0, 12:].tolist()


def test_repetition_penalty_is_that_of_transformers(qwen, qwen_path):
    torch, transformers = require("torch"), require("transformers")
    torch_model = transformers.AutoModelForCausalLM.from_pretrained(qwen_path)
    prompt = random_tokens(1, 12)[0]
    theirs = torch_model.generate(torch.tensor([prompt]), max_new_tokens=COUNT, do_sample=False, repetition_penalty=1.4,
                                  eos_token_id=3)[0, 12:].tolist()
    sampling = Sampling(temperature=0, max_tokens=COUNT, repetition_penalty=1.4)
    assert theirs != answer(Session(*qwen, GREEDY), prompt)[1]
    session = Session(*qwen, sampling)
    assert answer(session, prompt)[1] == theirs
    list(session.stream(prompt[:6] + [9, 9]))
    assert answer(session, prompt)[1] == theirs and session.stats.reused_tokens == 6      # what is cached counts too
    [(_, batched)] = generate_batch(*qwen, [prompt], sampling)
    assert batched.ids == theirs


def test_a_seed_gives_the_same_sample_again_and_another_seed_another(qwen):
    def sample(seed):
        mx.random.seed(seed)
        return answer(Session(*qwen, Sampling(temperature=1.0, top_p=1.0, max_tokens=30)), [5, 6, 7])[1]
    assert sample(1) == sample(1) != sample(2)


def test_an_end_token_ends_and_is_not_printed(qwen):
    model, tokenizer = qwen
    prompt = [5, 6, 7]
    tokens = greedy_by_hand(model, prompt, COUNT)
    end = next(t for i, t in enumerate(tokens) if i > 3 and t not in tokens[:i])

    class Ending:
        eos_token_ids = {end}
        decode = staticmethod(tokenizer.decode)

    session = Session(model, Ending, GREEDY)
    text, sampled = answer(session, prompt)
    assert sampled == tokens[:tokens.index(end) + 1] and session.stats.ended == "stop"
    assert text == tokenizer.decode(sampled[:-1], skip_special_tokens=True)


@pytest.mark.parametrize("changes, says", [
    ({"temperature": -1}, "--temperature -1"), ({"temperature": float("nan")}, "--temperature nan"),
    ({"top_p": 0}, "--top-p 0"), ({"top_p": 1.5}, "--top-p 1.5"), ({"max_tokens": 0}, "--max-tokens 0"),
    ({"repetition_penalty": 0}, "--repetition-penalty 0"),
])
def test_sampling_options_out_of_range_are_refused(changes, says):
    with pytest.raises(UserError, match=says):
        Sampling(**changes)


def test_a_prompt_longer_than_the_context_is_refused_and_generation_stops_at_its_end(qwen):
    session = Session(*qwen, Sampling(temperature=0, max_tokens=500))
    assert session.context == 256
    with pytest.raises(UserError, match="300 tokens and the model's context is 256"):
        list(session.stream([5] * 300))
    assert len(answer(session, [5] * 250)[1]) <= 6


# ---- streaming ----

def test_streamed_pieces_are_whole_characters_and_together_the_decoded_text(tmp_path):
    tokenizer = save_tokenizer(tmp_path, every_byte=True)
    text = "Grüße 東京 🙂👩‍👩‍👧 é – done"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text.encode())            # a token is a byte: every character of several is split
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in ids] + [stream.finish()]
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    assert sum(bool(piece) for piece in pieces) == len(text)     # and each comes as soon as it is whole


def test_a_character_that_never_completes_comes_out_once_at_the_end(tmp_path):
    tokenizer = save_tokenizer(tmp_path, every_byte=True)
    ids = tokenizer.encode("a🙂", add_special_tokens=False)[:-1]
    stream = TextStream(tokenizer)
    assert [stream.add(token) for token in ids] == ["a", "", "", ""]
    assert set(stream.finish()) == {"\ufffd"} and stream.finish() == ""


def test_streaming_keeps_the_spaces_of_a_sentencepiece_like_tokenizer(tmp_path):
    tokenizers, transformers = require("tokenizers"), require("transformers")
    vocabulary = {"<unk>": 0, "▁Hello": 1, "▁world": 2, "s": 3, "▁": 4, "!": 5}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    core.decoder = tokenizers.decoders.Metaspace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in (1, 2, 3, 5, 4, 1)] + [stream.finish()]
    assert "".join(pieces) == tokenizer.decode([1, 2, 3, 5, 4, 1]) == "Hello worlds!  Hello"


# ---- the KV cache ----

def test_a_prompt_that_continues_the_last_one_is_prefilled_from_there_only(qwen):
    model, tokenizer = qwen
    counting = Counting(model)
    session = Session(counting, tokenizer, GREEDY)
    first = random_tokens(1, 40)[0]
    _, sampled = answer(session, first)
    longer = first + sampled + [7, 8, 9]
    counting.tokens = 0
    _, again = answer(session, longer)
    assert session.stats.reused_tokens == len(first) + len(sampled)
    assert counting.tokens == 3 + len(again)
    assert again == greedy_by_hand(model, longer, COUNT, {3})


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_a_prompt_that_differs_is_answered_as_by_a_fresh_session(family, tmp_path):
    """Gemma 3's window of 16 fills a rotating cache, which can't be cut back."""
    save_model(tmp_path, family)
    model, tokenizer = open_model(str(tmp_path))
    session = Session(model, tokenizer, GREEDY)
    start = random_tokens(1, 30)[0]
    for prompt in (start, start[:20] + [9, 9, 9], start[:5], start + [8]):
        assert answer(session, prompt)[1] == greedy_by_hand(model, prompt, COUNT, {3}), len(prompt)


def test_a_generation_broken_off_leaves_a_session_that_still_answers_right(qwen):
    model, tokenizer = qwen
    session = Session(model, tokenizer, GREEDY)
    prompt = random_tokens(1, 20)[0]
    stream = session.stream(prompt)
    next(stream)
    stream.close()
    assert session.cached == []
    assert answer(session, prompt)[1] == greedy_by_hand(model, prompt, COUNT, {3})


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_a_cache_on_disk_is_taken_up_by_another_process(family, tmp_path):
    save_model(tmp_path / "m", family)
    model, tokenizer = open_model(str(tmp_path / "m"))
    file, identity = tmp_path / "cache.safetensors", model_identity(tmp_path / "m", bits=None)
    session = Session(model, tokenizer, GREEDY)
    prompt = random_tokens(1, 40)[0]
    _, sampled = answer(session, prompt)
    session.save(file, identity)
    other = Session(model, tokenizer, GREEDY)
    other.load(file, identity)
    longer = prompt + sampled + [7, 8]
    assert answer(other, longer)[1] == greedy_by_hand(model, longer, COUNT, {3})
    assert other.stats.reused_tokens == len(prompt) + len(sampled)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache.safetensors", "m"]


def test_a_cache_of_another_model_or_program_is_refused(qwen, qwen_path, tmp_path):
    session = Session(*qwen, GREEDY)
    list(session.stream([5, 6, 7]))
    file, identity = tmp_path / "cache.safetensors", model_identity(qwen_path, bits=None)
    assert identity != model_identity(qwen_path, bits=4)
    session.save(file, identity)
    with pytest.raises(UserError, match="belongs to another model"):
        session.load(file, model_identity(qwen_path, bits=4))
    mx.save_safetensors(str(file), {"a": mx.zeros(3)}, {"x": "y"})
    with pytest.raises(UserError, match="wasn't written by this program"):
        session.load(file, identity)
    file.write_bytes(b"\xff" * 64)
    with pytest.raises(UserError, match="header"):
        session.load(file, identity)


# ---- chat ----

def test_a_turn_of_a_chat_costs_its_own_tokens_only_and_is_answered_as_if_prefilled_whole(qwen):
    """The tiny model says what no tokenizer would write that way: its ids are kept, not encoded again."""
    model, tokenizer = qwen
    counting = Counting(model)
    chat = Chat(Session(counting, tokenizer, GREEDY), system="Be brief.")
    for turn, question in enumerate(["What is 2 + 2?", "And doubled?", "Why?"]):
        counting.tokens, known = 0, len(chat.session.cached)
        reply = "".join(chat.say(question))
        prompt = chat.session.cached[:chat.session.stats.prompt_tokens]
        assert chat.session.sampled == greedy_by_hand(model, prompt, COUNT, {3})
        assert chat.messages[-1] == {"role": "assistant", "content": reply}
        if turn:
            assert chat.session.stats.reused_tokens in (known, known - 1)
            assert counting.tokens <= len(question) + 40 + len(chat.session.sampled)
    assert tokenizer.decode(chat.ids).count("<|im_start|>") == 7
    chat.clear()
    assert chat.messages == [{"role": "system", "content": "Be brief."}] and chat.session.cached == []


def test_a_template_that_drops_reasoning_from_earlier_turns_is_followed(tmp_path):
    template = CHATML.replace("m.content", "(m.content[1:] if m.role == 'assistant' else m.content)")
    save_model(tmp_path, template=template)
    model, tokenizer = open_model(str(tmp_path))
    chat = Chat(Session(model, tokenizer, GREEDY))
    list(chat.say("one"))
    list(chat.say("two"))
    assert chat.session.cached[:chat.session.stats.prompt_tokens] == template_ids(tokenizer, chat.messages[:-1])


def test_a_message_that_does_not_fit_is_taken_back(qwen):
    chat = Chat(Session(*qwen, GREEDY))
    list(chat.say("one"))
    before = list(chat.messages)
    with pytest.raises(UserError, match="context is 256"):
        list(chat.say("x" * 300))
    assert chat.messages == before


def test_a_model_without_a_chat_template_refuses_chat_and_system_and_takes_prompts(tmp_path):
    save_model(tmp_path, template=None)
    model, tokenizer = open_model(str(tmp_path))
    assert encoder(tokenizer, None)("abc") == tokenizer.encode("abc")
    with pytest.raises(UserError, match="no chat template"):
        encoder(tokenizer, "Be brief.")("abc")
    with pytest.raises(UserError, match="no chat template"):
        program.chat_loop(model, tokenizer, GREEDY)


def test_a_template_that_knows_no_system_role_says_so(tmp_path):
    refusal = "{{ raise_exception('System role not supported') if messages[0].role == 'system' }}"
    save_model(tmp_path, template=refusal + CHATML)
    tokenizer = open_model(str(tmp_path))[1]
    with pytest.raises(UserError, match="refuses this conversation: System role not supported"):
        encoder(tokenizer, "Be brief.")("abc")


# ---- batches ----

def prompts_of_many_lengths(count=9):
    generator = np.random.default_rng(3)
    return [generator.integers(5, 100, int(length)).tolist() for length in generator.integers(1, 40, count)]


@pytest.mark.parametrize("family, batch_size", [("qwen3", 16), ("qwen3", 4), ("gemma3", 4), ("gpt2", 4),
                                                ("mixtral", 16), ("phi3", 4)])
def test_batched_greedy_answers_are_the_single_ones(family, batch_size, tmp_path):
    save_model(tmp_path, family)
    model, tokenizer = load_checked(tmp_path)[0], load_tokenizer(tmp_path)
    prompts = prompts_of_many_lengths()
    alone = [answer(Session(model, tokenizer, GREEDY), prompt)[1] for prompt in prompts]
    for run in (continuous, lockstep):
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        together = dict(run(Float32Logits(model), {3}, prompts, [COUNT] * len(prompts), order, GREEDY, batch_size))
        assert [together[i].ids for i in range(len(prompts))] == alone, run.__name__
        assert all(r.ended == ("stop" if r.ids[-1] == 3 else "length") for r in together.values())


def test_sixteen_prompts_take_about_the_model_calls_of_one(qwen):
    model, tokenizer = qwen
    counting = Counting(model)
    prompts = random_tokens(16, 10, 100)
    list(generate_batch(counting, tokenizer, prompts, GREEDY))
    assert counting.calls < 2 * COUNT


def test_results_come_in_the_order_of_the_file_with_their_own_keys(qwen, tmp_path):
    model, tokenizer = qwen
    rows = [{"id": f"q{i}", "prompt": "x" * (1 + 7 * i % 5), "level": i} for i in range(6)]
    rows[2] = {"messages": [{"role": "user", "content": "hello"}]}
    rows[4] = {"question": "why?", "answer": "42", "id": "q4", "level": 4}
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    lines = []
    items, encode = read_items(tmp_path / "q.jsonl"), encoder(tokenizer, None)
    told = run_batch(model, tokenizer, items, encode, GREEDY, 4, lines.append)
    results = [json.loads(line) for line in lines]
    assert [r["index"] for r in results] == list(range(6))
    assert [r.get("id") for r in results] == ["q0", "q1", None, "q3", "q4", "q5"] and results[5]["level"] == 5
    assert results[2]["messages"] == rows[2]["messages"]
    assert (results[4]["question"], results[4]["answer"]) == ("why?", "42")
    session = Session(model, tokenizer, GREEDY)
    for item, result in zip(items, results, strict=True):
        assert result["completion"] == "".join(session.stream(encode(item.prompt)))
    assert re.match(r"6 prompts, \d+ prompt tokens, \d+ generated in .* tokens/s \| latency p50 .* p90 .* p99 .*", told)


@pytest.mark.parametrize("name, content, says", [
    ("a.jsonl", '{"prompt": "x"}\n{"prompt": ', "a.jsonl:2: not JSON"),
    ("a.jsonl", '{"prompt": "x"}\n\n{"text": "x"}', 'a.jsonl:3: needs one of "prompt"'),
    ("a.jsonl", '{"prompt": 7}', '"prompt" and "question" must be text'),
    ("a.jsonl", '{"messages": [{"role": "user"}]}', '"messages" a list of'),
    ("a.jsonl", '[1]', 'needs one of'),
    ("a.txt", "\n \n", "holds no prompts"),
    ("a.txt", None, "can't be read"),
])
def test_a_prompt_file_that_cannot_be_used_names_its_line(name, content, says, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=says):
        read_items(tmp_path / name)


def test_a_text_file_is_one_prompt_a_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "two\u2028lines"}\n', encoding="utf-8")
    assert read_items(tmp_path / "a.jsonl")[0].prompt == "two\u2028lines"
    (tmp_path / "a.txt").write_text("What is 2+2?\n\n  {not json}\n")
    assert [item.prompt for item in read_items(tmp_path / "a.txt")] == ["What is 2+2?", "  {not json}"]


# ---- adapters and quantisation ----

@pytest.mark.parametrize("kind", ["lora", "full"])
def test_an_adapter_gives_the_model_that_it_was_saved_from(kind, qwen_path, tmp_path):
    trained, _ = open_model(str(qwen_path))
    tokens = mx.array(random_tokens(1, 20))
    before = trained(tokens)
    save_adapter(tmp_path / "a", trained, kind, base=str(qwen_path))
    loaded, _ = open_model(str(qwen_path), adapter=tmp_path / "a")
    by_itself, _ = open_model(str(tmp_path / "a"))
    assert mx.array_equal(by_itself(tokens), loaded(tokens))
    assert mx.abs(loaded(tokens) - trained(tokens)).max().item() < 1e-5 < mx.abs(before - trained(tokens)).max().item()
    quantized, _ = open_model(str(qwen_path), adapter=tmp_path / "a", quantize=8)
    near = mx.abs(quantized(tokens) - trained(tokens)).max().item()
    assert 1e-4 < near < 0.3


def test_an_adapter_of_another_model_is_refused(qwen_path, tmp_path):
    save_model(tmp_path / "wide", hidden_size=64)
    trained, _ = open_model(str(qwen_path))
    save_adapter(tmp_path / "a", trained)
    with pytest.raises(UserError, match="doesn't fit this base model"):
        open_model(str(tmp_path / "wide"), adapter=tmp_path / "a")
    with pytest.raises(UserError, match="has no adapter_config.json"):
        open_model(str(qwen_path), adapter=tmp_path / "wide")


def test_quantising_at_load_is_near_and_told_where_it_cannot_be(qwen, qwen_path):
    tokens = mx.array(random_tokens(1, 20))
    exact = qwen[0](tokens)
    errors = [mx.abs(open_model(str(qwen_path), quantize=bits)[0](tokens) - exact).mean().item() for bits in (3, 4, 8)]
    assert errors[0] > errors[1] > errors[2] > 0
    model = open_model(str(qwen_path), quantize=4)[0]
    with pytest.raises(UserError, match="quantised already"):
        program.quantize_matrices(model, 4)


# ---- the program ----

def run_program(*arguments, **options):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=120,
                          **options)


@pytest.mark.parametrize("arguments, says", [
    (["--batch", "x", "--stream"], "--stream is for --prompt"),
    (["--batch", "x", "--prompt-cache", "c.safetensors"], "--prompt-cache is for --prompt"),
    (["--batch", "x", "--batch-size", "0"], "--batch-size 0"),
    (["--chat", "--prompt-cache", "c.bin"], "must end in .safetensors"),
    (["--chat", "--seed", "-1"], "--seed -1"),
])
def test_options_that_cannot_be_honoured_are_refused(arguments, says):
    with pytest.raises(UserError, match=says):
        parse(arguments)


def test_the_program_answers_a_prompt_a_pipe_and_a_file_alike(qwen_path, tmp_path):
    common = ["--model", qwen_path, "--temperature", "0", "--max-tokens", "12", "--verbose"]
    cache = tmp_path / "c.safetensors"
    one = run_program(*common, "--prompt", "What is 2+2?", "--prompt-cache", cache, cwd=tmp_path)
    two = run_program(*common, "--prompt", "-", "--prompt-cache", cache, "--stream", input="What is 2+2?")
    (tmp_path / "p.txt").write_text("What is 2+2?\n")
    three = run_program(*common, "--batch", tmp_path / "p.txt")
    assert (one.returncode, two.returncode, three.returncode) == (0, 0, 0), one.stderr + two.stderr + three.stderr
    assert one.stdout == two.stdout and json.loads(three.stdout)["completion"] == one.stdout[:-1]
    assert "first token after" in one.stderr and "from the cache" in two.stderr and "latency p50" in three.stderr
    assert "from the cache" not in one.stderr


def test_importing_it_brings_no_heavy_library():
    code = ("import sys; sys.path.insert(0, %r); import mlx_grpo.inference; "
            "print([m for m in ('torch', 'transformers', 'datasets', 'trl') if m in sys.modules])" % str(ROOT))
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


class Terminal:
    """A program in a real pseudo-terminal."""

    def __init__(self, *arguments, directory=None):
        self.process_id, self.handle = pty.fork()
        if self.process_id == 0:
            os.chdir(directory or "/")
            os.execv(sys.executable, [sys.executable, SCRIPT, *map(str, arguments)])
        self.seen = ""
        self.place = 0      # what `until` has consumed

    def until(self, text, timeout=60):
        """Read until `text` comes after what was last waited for; returns what came before it."""
        end, raw = time.time() + timeout, b""
        while text not in self.seen[self.place:]:
            ready, _, _ = select.select([self.handle], [], [], max(0.0, end - time.time()))
            assert ready, f"no {text!r} in {self.seen[self.place:]!r}"
            try:
                raw += os.read(self.handle, 4096)
            except OSError as error:        # the other side has closed
                raise AssertionError(f"no {text!r} in {self.seen[self.place:]!r}") from error
            self.seen += raw.decode()       # every write is whole characters, so every read of ours has been
            raw = b""
        before, self.place = self.seen[self.place:].split(text)[0], self.seen.index(text, self.place) + len(text)
        return before.replace("\r\n", "\n")

    def type(self, text):
        os.write(self.handle, text.encode())

    def exit_code(self, timeout=60):
        """Wait for the end; the rest of the output goes to `seen`."""
        while True:
            if not select.select([self.handle], [], [], timeout)[0]:
                os.kill(self.process_id, signal.SIGKILL)
                raise AssertionError(f"didn't end; it said {self.seen!r}")
            try:
                piece = os.read(self.handle, 4096)
            except OSError:
                piece = b""
            if not piece:
                break
            self.seen += piece.decode()
        return os.waitstatus_to_exitcode(os.waitpid(self.process_id, 0)[1])


def test_a_conversation_in_a_terminal(qwen, qwen_path, tmp_path):
    """Two turns with history, /save, an unsavable file, clear, the first turn again, quit."""
    terminal = Terminal("--model", qwen_path, "--chat", "--temperature", "0", "--max-tokens", "12", "--verbose",
                        directory=tmp_path)
    terminal.until("> ")
    terminal.type("What is 2+2?\n")
    terminal.until("What is 2+2?\r\n")
    first = terminal.until("prompt ").rstrip("\n")
    assert "first token after" in terminal.until("\r\n> ")
    terminal.type("And doubled?\n")
    terminal.until("And doubled?\r\n")
    terminal.until("from the cache")
    terminal.until("> ")
    terminal.type("/save talk.jsonl\n")
    terminal.until("(saved 4 messages)")
    terminal.type("/save /nowhere/talk.jsonl\n")
    terminal.until("error: /save /nowhere/talk.jsonl")
    terminal.type("clear\n")
    terminal.until("(cleared)")
    terminal.until("> ")
    terminal.type("What is 2+2?\n")
    terminal.until("What is 2+2?\r\n")
    assert terminal.until("prompt ").rstrip("\n") == first
    terminal.until("> ")
    terminal.type("q\n")
    assert terminal.exit_code() == 0 and "Traceback" not in terminal.seen
    talk = json.loads((tmp_path / "talk.jsonl").read_text())["messages"]
    assert [m["role"] for m in talk] == ["user", "assistant"] * 2 and talk[1]["content"] == first
    expected = "".join(Chat(Session(*qwen, Sampling(temperature=0, max_tokens=12))).say("What is 2+2?"))
    assert first == expected


@pytest.mark.parametrize("how", ["ctrl-d", "ctrl-c at the question", "ctrl-c in the answer"])
def test_leaving_a_conversation_is_clean(how, qwen_path, tmp_path):
    shutil.copytree(qwen_path, tmp_path / "m")
    edit_json(tmp_path / "m" / "config.json", max_position_embeddings=100000)
    terminal = Terminal("--model", tmp_path / "m", "--chat", "--temperature", "0", "--max-tokens", "90000")
    terminal.until("> ")
    if how == "ctrl-c in the answer":
        terminal.type("go\n")
        terminal.until("go\r\n")
        time.sleep(0.5)
        terminal.type("\x03")
    else:
        time.sleep(0.3)     # a signal between the prompt and its read waits for the next key, as in any Python program
        terminal.type("\x04" if how == "ctrl-d" else "\x03")
    assert terminal.exit_code() == 0
    assert "Traceback" not in terminal.seen and terminal.seen.endswith("\n")


def test_text_streamed_to_a_terminal_is_the_text(qwen, qwen_path):
    terminal = Terminal("--model", qwen_path, "--prompt", "What is 2+2?", "--temperature", "0",
                        "--max-tokens", str(COUNT), "--stream")
    assert terminal.exit_code() == 0
    text, _ = answer(Session(*qwen, GREEDY), encoder(qwen[1], None)("What is 2+2?"))
    assert terminal.seen.replace("\r\n", "\n") == text + "\n"


def test_ctrl_c_while_a_prompt_is_answered_ends_with_130(qwen_path, tmp_path):
    shutil.copytree(qwen_path, tmp_path / "m")
    edit_json(tmp_path / "m" / "config.json", max_position_embeddings=100000)
    command = [sys.executable, SCRIPT, "--model", str(tmp_path / "m"), "--prompt", "go", "--temperature", "0",
               "--max-tokens", "90000", "--stream"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and b"Traceback" not in errors


# ---- nanochat ----

@pytest.fixture(scope="module")
def nanochats(tmp_path_factory):
    """Generation -> a directory converted from nanochat's own checkpoint."""
    root = tmp_path_factory.mktemp("nanochat")
    for generation in STORED:
        converted(folder(generation), root / generation)
    return {generation: root / generation for generation in STORED}


@pytest.mark.parametrize("generation", STORED)
def test_every_nanochat_generation_answers_chats_and_batches_alike(generation, nanochats):
    """Greedy against full forward passes; the smear's cache can't be cut back, and yet no turn is prefilled again."""
    model, tokenizer = open_model(str(nanochats[generation]))
    ends = set(tokenizer.eos_token_ids)
    chat = Chat(Session(model, tokenizer, GREEDY))
    for question in ["What is 2+2?", "Grüße 東京?"]:
        known = len(chat.session.cached)
        list(chat.say(question))
        prompt = chat.session.cached[:chat.session.stats.prompt_tokens]
        assert chat.session.sampled == greedy_by_hand(model, prompt, COUNT, ends)
        assert chat.session.stats.reused_tokens in (known, max(known - 1, 0))       # all but another kind of end token
    prompts = [template_ids(tokenizer, [{"role": "user", "content": "x" * n}]) for n in (1, 30, 7, 12)]
    together = dict(generate_batch(model, tokenizer, prompts, GREEDY))
    for i, prompt in enumerate(prompts):
        assert together[i].ids == greedy_by_hand(model, prompt, COUNT, ends)
    quantized = open_model(str(nanochats[generation]), quantize=4)[0]
    assert any(hasattr(module, "bits") for _, module in quantized.named_modules())


def test_a_converted_nanochat_generates_without_torch_and_the_trainers_libraries(nanochats):
    code = f"""
import sys
sys.modules.update(dict.fromkeys(["torch", "datasets", "trl", "reasoning_gym", "rich"]))      # not to be imported
sys.path.insert(0, {str(ROOT)!r})
from mlx_grpo import inference, run_command
sys.argv = ["inference.py", "--model", {str(nanochats["gen5"])!r}, "--prompt", "What is 2+2?", "--max-tokens", "8",
            "--temperature", "0"]
run_command(inference.main)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stdout.strip(), result.stderr


def test_the_batch_benchmark_gives_a_ratio_on_the_same_tokens():
    command = [sys.executable, str(ROOT / "benchmarks" / "inference_batch.py"), "--layers", "2", "--width", "128",
               "--vocab", "500", "--max-tokens", "8", "--dtype", "float32"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["prompts"] == figures["equal_rows"] == 16 and figures["ratio"] > 0
