"""Text of tokens as they come: stop strings, the end of text, bytes of a character; and batches of prompts."""

import itertools

import jax
import pytest

from jaxgpt.config import ModelConfig, SamplingConfig
from jaxgpt.data.tokenizer import ByteTokenizer, CharTokenizer
from jaxgpt.errors import UserError
from jaxgpt.model import gpt
from jaxgpt.model.gpt import Numerics
from jaxgpt.tasks import text_generation
from jaxgpt.tasks.text_generation import TextModel, TextStream, continuations, stream


class Words:
    """A tokenizer whose tokens are any strings; the last one is the end of text."""

    def __init__(self, *words: str):
        self.words, self.end_of_text = words, len(words)

    def decode_stream(self, ids):
        for i in ids:
            yield self.words[i] if i < len(self.words) else "<|endoftext|>"
        yield ""


def pieces(tokenizer, ids, **flags):
    """What the stream gives out for each token, the rest, and why it ended."""
    text, out = TextStream(tokenizer, SamplingConfig(**flags)), []
    for i in ids:
        out.append(text.push(i))
        if text.finish_reason:
            return out, text.finish_reason
    return [*out, text.finish("length")], text.finish_reason


def test_an_end_that_may_begin_a_stop_string_is_held_back():
    assert pieces(CharTokenizer("abc"), [0, 1, 0, 1, 2], stop=("abc",)) == (["", "", "ab", "", ""], "stop")
    assert pieces(CharTokenizer("abc"), [0, 1, 0, 1], stop=("abc",)) == (["", "", "ab", "", "ab"], "length")
    assert pieces(CharTokenizer("abc"), [0, 1, 2]) == (["a", "b", "c", ""], "length")


def test_the_text_ends_before_the_stop_string_that_is_complete_first():
    """However the text is cut into tokens."""
    text, stops = "xabcdxy", ("abcd", "bc", "y")
    for cuts in itertools.product([False, True], repeat=len(text) - 1):
        ends = [i + 1 for i, cut in enumerate(cuts) if cut] + [len(text)]
        words = [text[a:b] for a, b in itertools.pairwise([0, *ends])]
        given, reason = pieces(Words(*words), range(len(words)), stop=stops)
        assert ("".join(given), reason) == ("xa", "stop"), words


def test_the_end_of_text_ends_a_text_unless_told_otherwise():
    tokenizer = Words("one ", "two")
    assert pieces(tokenizer, [0, 2, 1]) == (["one ", ""], "end_of_text")
    assert pieces(tokenizer, [0, 2, 1], ignore_end_of_text=True) == (["one ", "<|endoftext|>", "two", ""], "length")
    assert pieces(tokenizer, [0, 2], stop=("one two",)) == (["", "one "], "end_of_text")


def test_bytes_come_out_as_whole_characters():
    ids = list("né".encode())
    assert pieces(ByteTokenizer(), ids) == (["n", "", "é", ""], "length")
    assert pieces(ByteTokenizer(), ids[:2]) == (["n", "", "�"], "length")
    assert pieces(ByteTokenizer(), ids[:2], stop=("�",)) == (["n", "", ""], "stop")


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(n_layer=1, n_head=2, n_embd=8, block_size=16)
    params = gpt.init_params(jax.random.key(0), config, 5, Numerics())
    params = {name: p * 30 if p.ndim == 2 else p for name, p in params.items()}
    return TextModel(gpt.bind(config, 5, Numerics()), params, config, CharTokenizer("abcde"))


@pytest.mark.slow
def test_batches_of_prompts_and_samples(model, monkeypatch):
    """Two continuations of each prompt, in batches of three; each is what the stream of its prompt and seed gives."""
    monkeypatch.setattr(text_generation, "BATCH_SIZE", 3)
    sampling = SamplingConfig(max_new_tokens=6, seed=5, samples=2, stop=("c",))
    found = list(continuations(model, ["a", "bdb", "ee"], sampling))
    assert [(one.prompt, one.seed) for one in found] == [(p, s) for p in ("a", "bdb", "ee") for s in (5, 6)]
    assert {one.finish_reason for one in found} == {"stop", "length"}
    for one in found:
        streamed = stream(model, one.prompt, SamplingConfig(max_new_tokens=6, seed=one.seed, stop=("c",)))
        assert "".join(streamed) == one.text and "c" not in one.text
        assert one.tokens == (6 if one.finish_reason == "length" else len(one.text) + 1)


@pytest.mark.parametrize("prompt, message", [("", "--prompt '': empty"), ("az", "--prompt: the character 'z'")])
def test_a_prompt_that_cannot_be_continued_is_refused_before_anything_is_computed(model, prompt, message):
    for call in (
        lambda: stream(model, prompt, SamplingConfig()),
        lambda: continuations(model, ["a", prompt], SamplingConfig()),
    ):
        with pytest.raises(UserError, match=message):
            call()
