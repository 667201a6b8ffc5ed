"""Characters and bytes: round trips, sorted vocabulary, errors that name the character, streaming."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt import tokenizer
from jaxgpt.errors import UserError
from jaxgpt.tokenizer import ByteTokenizer, CharTokenizer


@given(st.text(min_size=1))
def test_char_round_trip(text):
    t = CharTokenizer.from_text(text)
    ids = t.encode(text)
    assert t.vocab_size == len(set(text)) and ids.max() < t.vocab_size
    assert tokenizer.decode(t, ids) == text


@given(st.text())
def test_byte_round_trip(text):
    t = ByteTokenizer()
    assert tokenizer.decode(t, t.encode(text)) == text


def test_char_ids_follow_the_sorted_characters():
    assert CharTokenizer.from_text("cab").encode("abc").tolist() == [0, 1, 2]


@pytest.mark.parametrize("char", ["z", "A", "\u00e9", "\U0001f600", "\n"])
def test_unseen_character_is_named(char):
    with pytest.raises(UserError) as e:
        CharTokenizer.from_text("abc").encode("ab" + char)
    assert repr(char) in str(e.value) and "position 2" in str(e.value)


def test_bytes_stream_whole_characters_only():
    pieces = list(ByteTokenizer().decode_stream("é".encode() + b"\xff"))
    assert pieces == ["", "é", "\ufffd", ""]


@given(st.text(min_size=1))
def test_saved_as_json(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("t") / "tokenizer.json"
    for t in (CharTokenizer.from_text(text), ByteTokenizer()):
        path.write_text(json.dumps(t.to_json()), encoding="utf-8")
        assert tokenizer.load(path).encode(text).tolist() == t.encode(text).tolist()
