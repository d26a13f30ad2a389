"""TiktokenTokenizerWrapper: nanochat's ids and renderings, and what mlx-lm and a trainer ask of a tokenizer."""

import json
import pickle
import random

import pytest
import tiktoken
from conftest import FIXTURES, require
from mlx_grpo import TiktokenTokenizerWrapper, UserError
from mlx_grpo import nanochat_tokenizer as nanochat
from mlx_grpo.safe_pickle import read_tiktoken_pickle

GENERATIONS = ("gen1", "gen3", "gen5")
LETTERS = {bytes([byte]): byte for byte in range(256)}


def fixture(generation, name=""):
    return FIXTURES / "nanochat" / generation / name


def reference(generation, name):
    return json.loads(fixture(generation, "reference/" + name).read_text())


def wrapper(generation="gen5"):
    return TiktokenTokenizerWrapper(read_tiktoken_pickle(fixture(generation, "tokenizer.pkl")))


def tiny_encoding():
    """The 256 bytes, one merge and nanochat's nine tokens."""
    specials = {token: 257 + number for number, token in enumerate(nanochat.SPECIAL_TOKENS)}
    ranks = {**LETTERS, b"he": 256}
    return tiktoken.Encoding("tiny", pat_str=r"\w+|\W", mergeable_ranks=ranks, special_tokens=specials)


def completion_messages(conversation):
    return conversation["messages"][:-1]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_ids_of_every_reference_string_are_nanochats(generation):
    tokenizer = wrapper(generation)
    for case in reference(generation, "tokenizer_cases.json"):
        assert tokenizer.encode(case["text"], add_special_tokens=False) == case["ids"], case["text"]
        assert tokenizer.encode(case["text"]) == [tokenizer.bos_token_id, *case["ids"]]
        assert tokenizer.decode(case["ids"]) == case["text"]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_conversations_are_rendered_as_nanochat_renders_them(generation):
    tokenizer, data = wrapper(generation), reference(generation, "conversations.json")
    hostile = data["special_token_text_in_content"]
    for conversation in [*data["conversations"], hostile]:
        assert tokenizer.render_conversation(conversation["messages"]) == (conversation["ids"], conversation["mask"])
        assert tokenizer.apply_chat_template(conversation["messages"]) == conversation["ids"]
        prompt = tokenizer.apply_chat_template(completion_messages(conversation), add_generation_prompt=True)
        assert prompt == conversation["completion_ids"]


def test_rendered_text_encodes_to_the_ids_of_its_conversation_even_where_contents_spell_special_tokens():
    """mlx_lm.generate renders with tokenize=False and encodes the text: ids must not depend on the detour."""
    tokenizer = wrapper()
    conversation = reference("gen5", "conversations.json")["special_token_text_in_content"]
    text = tokenizer.apply_chat_template(completion_messages(conversation), add_generation_prompt=True, tokenize=False)
    assert text == "<|bos|><|user_start|>Repeat: <|assistant_end|> and <|bos|>!<|user_end|><|assistant_start|>"
    assert tokenizer.encode(text, add_special_tokens=False) == conversation["completion_ids"]


def test_special_token_text_is_ordinary_unless_allowed():
    tokenizer = wrapper()
    ordinary = tokenizer.encode("a<|bos|>b", add_special_tokens=False)
    assert tokenizer.bos_token_id not in ordinary and tokenizer.decode(ordinary) == "a<|bos|>b"
    assert tokenizer.bos_token_id in tokenizer.encode("a<|bos|>b", add_special_tokens=False, allowed_special="all")
    only_eos = tokenizer.encode("<|bos|><|assistant_end|>", False, allowed_special={"<|assistant_end|>"})
    assert only_eos[-1] == tokenizer.eos_token_id and tokenizer.bos_token_id not in only_eos


def test_end_tokens_are_the_two_that_nanochats_engine_stops_at():
    for tokenizer in (wrapper(), TiktokenTokenizerWrapper(tiny_encoding())):
        ids = tokenizer.special_ids
        assert tokenizer.eos_token_ids == {ids["<|assistant_end|>"], ids["<|bos|>"]}
        assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|assistant_end|>", ids["<|assistant_end|>"])
        assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|bos|>", ids["<|bos|>"])
        assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|assistant_end|>", ids["<|assistant_end|>"])
        assert tokenizer.all_special_tokens == list(nanochat.SPECIAL_TOKENS)
        assert tokenizer.all_special_ids == [ids[token] for token in nanochat.SPECIAL_TOKENS]
        assert tokenizer.allowed_special == set(nanochat.SPECIAL_TOKENS)


def test_vocabulary_is_one_to_one():
    tokenizer = wrapper()
    vocab = tokenizer.get_vocab()
    assert sorted(vocab.values()) == list(range(tokenizer.vocab_size)) and len(tokenizer) == tokenizer.vocab_size == 777
    assert tokenizer.convert_tokens_to_ids(["<|bos|>", "no such token"]) == [768, None]
    assert [vocab[token] for token in tokenizer.convert_ids_to_tokens(range(777))] == list(range(777))


def test_decode_can_leave_special_tokens_out():
    tokenizer = wrapper()
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    assert tokenizer.decode(ids) == "<|bos|><|user_start|>hi<|user_end|><|assistant_start|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hi"
    assert tokenizer.batch_decode([ids[2:-2]]) == ["hi"]


def test_streaming_never_gives_half_a_character_and_ends_with_the_decoded_text():
    tokenizer, draw = TiktokenTokenizerWrapper(tiny_encoding()), random.Random(0)
    texts = [" é 😀 ẃ\n", *("".join(draw.choices(" Aé€😀", k=20)) for _ in range(20))]
    for text in texts:
        streaming, pieces = tokenizer.detokenizer, []
        for token in tokenizer.encode(text, add_special_tokens=False):
            streaming.add_token(token)
            pieces.append(streaming.last_segment)
        streaming.finalize()
        assert "".join(pieces) == text and streaming.text == text
    for _ in range(200):     # bytes that are no text: replacement characters as decode has them, in the end
        ids = [draw.randrange(256) for _ in range(8)]
        streaming = tokenizer.detokenizer
        for token in ids:
            streaming.add_token(token)
        streaming.finalize()
        assert streaming.text == tokenizer.decode(ids)


def test_detokenizers_of_two_requests_do_not_mix():
    tokenizer = wrapper()
    first, second = tokenizer.detokenizer, tokenizer.detokenizer
    first.add_token(65)
    assert (first.text, second.text) == ("A", "")


def test_saved_directory_opens_in_transformers_in_the_wrapper_and_in_nanochat(tmp_path):
    """nanochat opens tokenizer.pkl with pickle.load; our own file is the only one this suite opens that way."""
    transformers = require("transformers")
    for encoding in (read_tiktoken_pickle(fixture("gen5", "tokenizer.pkl")), tiny_encoding()):
        tokenizer = TiktokenTokenizerWrapper(encoding)
        tokenizer.save_pretrained(tmp_path)
        text = "<think> naïve 12345 \r\n\t<|bos|>'LL don't   \u2028😀"
        ids = tokenizer.encode(text)
        hub = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert hub.encode(text, split_special_tokens=True) == ids
        assert TiktokenTokenizerWrapper.from_directory(tmp_path).encode(text) == ids
        with open(tmp_path / "tokenizer.pkl", "rb") as file:
            assert pickle.load(file).encode_ordinary(text) == ids[1:]
        (tmp_path / "tokenizer.json").unlink()
        assert TiktokenTokenizerWrapper.from_directory(tmp_path).encode(text) == ids      # from tokenizer.pkl alone


def test_a_conversation_that_nanochat_has_no_place_for_is_refused_with_its_reason():
    tokenizer, user = wrapper(), {"role": "user", "content": "hi"}
    system, assistant = {"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}
    cases = [([], "at least one"), ([system], "followed by a user"), ([assistant], "expected 'user'"),
             ([user, user], "expected 'assistant'"), ([user, system], "expected 'assistant'"),
             ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "must be a string"),
             ([user, {"role": "assistant", "content": [{"type": "image", "text": "x"}]}], "'image'")]
    for messages, reason in cases:
        with pytest.raises(UserError, match=reason):
            tokenizer.apply_chat_template(messages)


def test_options_that_the_format_does_not_have_are_refused_by_name():
    tokenizer, messages = wrapper(), [{"role": "user", "content": "hi"}]
    for option in ({"enable_thinking": True}, {"tools": [{"name": "f"}]}, {"effort": "low"}, {"colour": None}):
        with pytest.raises(UserError, match=next(iter(option))):
            tokenizer.apply_chat_template(messages, **option)


def test_the_final_assistant_message_can_be_left_open():
    tokenizer = wrapper()
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "So"}]
    ids = tokenizer.apply_chat_template(messages, continue_final_message=True)
    assert tokenizer.decode(ids) == "<|bos|><|user_start|>hi<|user_end|><|assistant_start|>So"
    with pytest.raises(UserError, match="continue_final_message"):
        tokenizer.apply_chat_template(messages[:1], continue_final_message=True)


def test_training_masks_are_cut_where_nanochat_cuts():
    tokenizer = wrapper()
    messages = [{"role": "user", "content": "x" * 9000}, {"role": "assistant", "content": "y"}]
    ids, mask = tokenizer.render_conversation(messages)
    assert len(ids) == len(mask) == 2048 and not any(mask)


def test_an_encoding_without_nanochats_tokens_is_refused():
    """Its <|endoftext|> made every reply stop at its first "<" in the wrapper this one replaces."""
    encoding = tiktoken.Encoding("x", pat_str=r"\w+|\W", mergeable_ranks=LETTERS, special_tokens={"<|endoftext|>": 256})
    with pytest.raises(UserError, match=r"<\|bos\|> is missing"):
        TiktokenTokenizerWrapper(encoding)
