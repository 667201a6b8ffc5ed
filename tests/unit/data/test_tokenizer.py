"""Tokenizers: round trips, vocabularies, what cannot be encoded, the files that hold them."""

import json
import os
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.data.samples import SHARED, load_file

from jaxgpt.data import readers, tokenizer
from jaxgpt.data.corpora import corpus_from_text
from jaxgpt.data.files import NotAvailable
from jaxgpt.data.tokenizer import ByteTokenizer, CharTokenizer, decode, make_tokenizer, sample_prompt
from jaxgpt.errors import UserError

needs_gpt2 = pytest.mark.skipif(not (SHARED / "tiktoken").is_dir(), reason="needs GPT-2's vocabulary")

# ------------------------------------------------------------------------------------------------ characters and bytes


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


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_a_lone_surrogate_cannot_be_encoded(bpe, kind):
    with pytest.raises(UserError, match="not valid UTF-8 at position 1; give UTF-8 text"):
        (bpe if kind == "bpe" else ByteTokenizer()).encode("a\udc80")


# ---------------------------------------------------------------------------------------------------------- byte pairs


@given(text=st.text())
def test_byte_pairs_round_trip(bpe, text):
    ids = bpe.encode(text)
    assert tokenizer.decode(bpe, ids) == text and bpe.n_bytes_V[ids].sum() == len(text.encode())
    assert not len(ids) or ids.max() < bpe.end_of_text


def test_byte_pairs_merge_what_is_frequent(bpe):
    """A corpus of eight words has not three hundred pairs to merge."""
    assert 256 < bpe.vocab_size <= 300 and bpe.end_of_text == bpe.vocab_size - 1
    assert len(bpe.encode("the cat")) == 2


def test_a_text_cannot_spell_the_end_of_text(bpe):
    assert bpe.end_of_text not in bpe.encode("<|endoftext|>")
    assert list(bpe.decode_stream([bpe.end_of_text]))[0] == "<|endoftext|>" and bpe.n_bytes_V[-1] == 0


def test_byte_pairs_are_saved(tmp_path, bpe):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(bpe.to_json()))
    assert tokenizer.load(path).encode("the other theory").tolist() == bpe.encode("the other theory").tolist()


def test_byte_pairs_are_trained_once(own_cache):
    corpus, said = corpus_from_text("x", "some words " * 100, ""), []
    first = make_tokenizer("bpe:280", corpus, None, said.append)
    assert tokenizer.same(first, make_tokenizer("bpe:280", corpus, None, said.append))
    assert [line.split()[0] for line in said] == ["training", "the"]  # once, and fewer entries than asked for
    (cached,) = (own_cache / "tokenizers").iterdir()
    whole = cached.read_text()
    for damage in (whole[:50], whole.replace('"some"', '"sxme"'), "null", "[]", '{"kind": "bpe"}', "[" * 10**5):
        assert damage != whole
        cached.write_text(damage)
        said.clear()
        assert tokenizer.same(first, make_tokenizer("bpe:280", corpus, None, said.append))
        assert "is damaged; training the vocabulary again" in said[0] and len(said) == 3
        assert cached.read_text() == whole
    cached.unlink()
    os.mkfifo(cached)
    assert tokenizer.same(first, make_tokenizer("bpe:280", corpus, None, said.append)) and cached.is_file()


@pytest.mark.parametrize(
    "values",
    [
        None,
        [],
        {},
        {"kind": None},
        {"kind": "char"},
        {"kind": "char", "chars": ""},
        {"kind": "char", "chars": ["a", "b"]},
        {"kind": "char", "chars": "ba"},
        {"kind": "gpt2", "folder": 3},
        {"kind": "bpe", "model": {}},
        {"kind": "bpe", "model": None},
        {"kind": "word"},
    ],
)
def test_json_of_no_tokenizer_is_a_value_error(values):
    with pytest.raises(ValueError):
        tokenizer.from_json(values)


def test_ids_with_gaps_are_no_tokenizer(bpe):
    values = bpe.to_json()
    values["model"]["model"]["vocab"]["\u0100\u0100"] = 10**6
    with pytest.raises(ValueError, match="ids of the tokens"):
        tokenizer.from_json(values)


def test_a_long_text_is_encoded_in_pieces_with_the_same_ids(bpe, monkeypatch):
    text = "some words, and others " * 300
    whole = bpe.encode(text).tolist()
    monkeypatch.setattr(readers, "PIECE_CHARS", 100)
    longest = []
    ordinary = bpe._encode_ordinary
    monkeypatch.setattr(bpe, "_encode_ordinary", lambda piece: longest.append(len(piece)) or ordinary(piece))
    assert bpe.encode(text).tolist() == whole
    assert max(longest) < 200 and bpe.encode("").tolist() == []


def test_a_cache_that_cannot_be_written_costs_only_time(own_cache):
    own_cache.parent.write_text("a file in the place of the folder")
    assert make_tokenizer("bpe:280", corpus_from_text("x", "some words " * 100, "")).vocab_size > 257


def test_blanks_without_end_cannot_be_encoded(bpe):
    with pytest.raises(UserError, match="100,000 blanks"):
        bpe.encode("a" + " " * 100_000)


@pytest.mark.parametrize("unit", ["ACGT", "7", "_", "-_", " ", "\n"])
def test_words_without_end_are_refused_where_learning_pairs_would_take_minutes(tmp_path, bpe, unit):
    endless = unit * (40_000 // len(unit))
    (tmp_path / "x.txt").write_text(f"a{endless}b")
    with pytest.raises(UserError, match="--dataset .*x.txt: the text holds 20,000 letters, digits, signs or blanks"):
        make_tokenizer("bpe:270", load_file(tmp_path / "x.txt"))
    assert decode(bpe, bpe.encode(endless)) == endless  # encoding takes no time
    (tmp_path / "x.txt").write_text("2024-11-05," * 5_000 + f"a{endless[:19_990]}b")  # no blank, but words that end
    assert make_tokenizer("bpe:270", load_file(tmp_path / "x.txt")).vocab_size > 257


# --------------------------------------------------------------------------------------------------------------- GPT-2


@needs_gpt2
def test_gpt2_is_that_of_tiktoken():
    t = make_tokenizer("gpt2", corpus_from_text("x", "x", ""), SHARED)
    assert (t.vocab_size, t.end_of_text) == (50257, 50256)
    assert t.encode("Hello world<|endoftext|>").tolist()[:2] == [15496, 995] and 50256 not in t.encode("<|endoftext|>")
    assert tokenizer.decode(t, [*t.encode("Grüße 🙂"), 50256]) == "Grüße 🙂<|endoftext|>"
    assert t.n_bytes_V[t.encode("Grüße 🙂")].sum() == len("Grüße 🙂".encode())


@pytest.fixture
def tiktoken_folder(nowhere, monkeypatch):
    """GPT-2's files in tiktoken's own cache, a folder of any name."""
    folder = nowhere / "mine"
    folder.mkdir()
    for remote in tokenizer.GPT2_FILES:
        name = remote.file.split("/")[1]
        shutil.copyfile(SHARED / "tiktoken" / name, folder / name)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    return folder


@needs_gpt2
def test_gpt2_is_found_where_tiktoken_keeps_it(tiktoken_folder):
    assert make_tokenizer("gpt2", corpus_from_text("x", "x", "")).folder == tiktoken_folder


@needs_gpt2
def test_a_damaged_file_of_tiktokens_is_refused_and_kept(tiktoken_folder):
    damaged = tiktoken_folder / tokenizer.GPT2_FILES[0].file.split("/")[1]
    damaged.write_text("damaged")
    with pytest.raises(UserError, match="another file"):
        make_tokenizer("gpt2", corpus_from_text("x", "x", ""))
    assert damaged.read_text() == "damaged"  # tiktoken would have removed it


@needs_gpt2
def test_half_of_gpt2_is_downloaded_whole(tiktoken_folder, monkeypatch):
    (tiktoken_folder / tokenizer.GPT2_FILES[0].file.split("/")[1]).unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(NotAvailable, match="--tokenizer gpt2: not on this machine and no network.*bpe:N"):
        make_tokenizer("gpt2", corpus_from_text("x", "x", ""))


# ------------------------------------------------------------------------------------------------------- sample prompt


@pytest.mark.parametrize("text, prompt", [("ROMEO: and more", "ROMEO:"), ("words", "w")])
def test_the_sample_continues_the_documented_prompt_if_the_vocabulary_has_it(text, prompt):
    assert sample_prompt(None, CharTokenizer.from_text(text), corpus_from_text("x", text, "")) == prompt


def test_a_prompt_outside_the_vocabulary_is_refused():
    corpus, t = corpus_from_text("x", "words", ""), CharTokenizer.from_text("words")
    assert sample_prompt("sword", t, corpus) == "sword"
    with pytest.raises(UserError, match="--prompt: the character 'x' "):
        sample_prompt("sx", t, corpus)
