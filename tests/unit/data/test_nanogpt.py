"""nanoGPT's folders of tokens: read as what they are, or refused."""

import os
import pickle

import numpy as np
import pytest

from jaxgpt.config import ModelConfig, TrainConfig
from jaxgpt.data.corpora import load_corpus
from jaxgpt.data.token_cache import split_tokens, tokenize_corpus
from jaxgpt.data.tokenizer import ByteTokenizer, make_tokenizer
from jaxgpt.errors import UserError

TEXT = "Two late goals, né, and then a third.\n" * 60
CHARS = "".join(sorted(set(TEXT)))


def config_of(**values):
    return TrainConfig(batch_size=2, model=ModelConfig(n_layer=1, n_head=1, n_embd=4, block_size=8), **values)


def load(folder):
    return load_corpus(f"bin:{folder}", None, print)


def write(folder, train, val, dtype="<u2", chars=None):
    for name, ids in (("train", train), ("val", val)):
        np.asarray(ids).astype(dtype).tofile(folder / f"{name}.bin")
    if chars is not None:
        meta = {"vocab_size": len(chars), "stoi": {c: i for i, c in enumerate(chars)}, "itos": dict(enumerate(chars))}
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


def char_ids(text):
    return [CHARS.index(c) for c in text]


def byte_ids(text):
    return np.frombuffer(text.encode(), np.uint8)


@pytest.fixture
def characters(tmp_path):
    """As nanoGPT's data/shakespeare_char has them."""
    return write(tmp_path, char_ids(TEXT[:1500]), char_ids(TEXT[1500:]), chars=CHARS)


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_characters_are_those_of_meta_pkl(tmp_path, dtype):
    folder = write(tmp_path, char_ids(TEXT[:1500]), char_ids(TEXT[1500:]), dtype, CHARS)
    corpus, told = load(folder), "auto" if dtype == "<u2" else "uint32"
    config, data = tokenize_corpus(config_of(token_dtype=told), corpus)
    assert data.tokenizer.chars == CHARS and isinstance(data.val_N, np.memmap)
    text = TEXT[:1500] + TEXT[1500:]
    assert data.train_N.tolist() + data.val_N.tolist() == data.tokenizer.encode(text).tolist()


@pytest.mark.parametrize("kind", ["byte", "gpt2", "bpe:300"])
def test_another_tokenizer_than_that_of_meta_pkl_is_refused(characters, kind):
    with pytest.raises(UserError, match=f"--tokenizer {kind}: .* are {len(CHARS)} characters.*give --tokenizer char"):
        make_tokenizer(kind, load(characters))


def test_characters_without_their_meta_pkl_are_refused(characters, gpt2):
    """As bytes they would train, on nonsense."""
    (characters / "meta.pkl").unlink()
    corpus = load(characters)
    with pytest.raises(UserError, match="--tokenizer char: .* no meta.pkl says which characters"):
        make_tokenizer("char", corpus)
    with pytest.raises(UserError, match="does not hold the bytes of a text"):
        split_tokens(corpus, ByteTokenizer(), config_of())
    with pytest.raises(UserError, match="not of GPT-2's byte pairs"):
        split_tokens(corpus, gpt2, config_of())


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_bytes_and_byte_pairs_of_either_type_are_read_alike(tmp_path, dtype, gpt2):
    for number, tokenizer in enumerate((ByteTokenizer(), gpt2)):
        ids = tokenizer.encode(TEXT)
        folder = write(tmp_path, ids[:400], ids[400:], dtype)
        found = split_tokens(load(folder), tokenizer, config_of())
        for part, expected in zip(found, (ids[:400], ids[400:]), strict=True):
            assert isinstance(part, np.memmap) and part.dtype.str == dtype, number
            assert part.tolist() == expected.tolist()


@pytest.mark.parametrize(
    "train, dtype, kind, told, message",
    [
        (
            np.arange(3000) % 200 * 3,
            "<u2",
            "byte",
            "auto",
            "train.bin holds token 597 as uint16, outside the",
        ),
        (np.linspace(0, 60_000, 500), "<u4", "gpt2", "auto", "uint32 tokens up to 60000, outside the vocabulary"),
        (np.linspace(0, 200_000, 500), "<u4", "gpt2", "uint32", "holds token 200000 as uint32, outside the vocabulary"),
        (np.arange(500) + 50, "<u8", "gpt2", "auto", "64-bit integers"),
        (byte_ids(TEXT), "|u1", "byte", "auto", "holds the bytes of a text, not uint16 tokens; train on it with file:"),
        (byte_ids(TEXT)[:601], "|u1", "byte", "auto", "has 601 bytes, no whole number of uint16"),
        (np.random.default_rng(0).integers(0, 50_000, 3000), "<u2", "gpt2", "auto", "no UTF-8 text in GPT-2's byte"),
        ([300, 5, 9] * 4, "<u4", "gpt2", "auto", "too short to tell uint16 tokens from uint32; give --token-dtype"),
    ],
)
def test_content_that_contradicts_is_refused(tmp_path, train, dtype, kind, told, message, gpt2):
    tokenizer = ByteTokenizer() if kind == "byte" else gpt2
    write(tmp_path, train, train, dtype)
    with pytest.raises(UserError, match=message):
        split_tokens(load(tmp_path), tokenizer, config_of(token_dtype=told))


def test_uint32_told_wrong_is_refused(characters):
    with pytest.raises(UserError, match="outside the vocabulary"):
        tokenize_corpus(config_of(token_dtype="uint32"), load(characters))


def test_the_type_of_tokens_is_for_these_files_alone(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    with pytest.raises(UserError, match=r"--token-dtype uint32: .* \(texts have none\); leave it out"):
        tokenize_corpus(config_of(token_dtype="uint32"), load_corpus(f"file:{tmp_path / 'a.txt'}", None, print))


class Executed:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize(
    "meta, message",
    [
        (pickle.dumps({"vocab_size": 1, "stoi": Executed(), "itos": {}}), "no pickle of plain values"),
        (pickle.dumps(Executed(), protocol=0), "no pickle of plain values"),
        (b"", "not of nanoGPT"),
        (b"not a pickle", "not of nanoGPT"),
        (pickle.dumps([1, 2]), "no dictionary"),
        (pickle.dumps({"vocab_size": 2}), "not of nanoGPT"),
        (pickle.dumps({"vocab_size": 2, "stoi": {"a": 0}, "itos": {0: "a"}}), "contradicts itself"),
        (pickle.dumps({"vocab_size": 2, "stoi": {"b": 0, "a": 1}, "itos": {0: "b", 1: "a"}}), "sorted order"),
        (pickle.dumps({"vocab_size": 1, "stoi": {"ab": 0}, "itos": {0: "ab"}}), "no single characters"),
        (b"\x80\x02r\xff\xff\xff\x7f.", "not of nanoGPT"),
    ],
)
def test_a_hostile_or_damaged_meta_pkl_is_refused_and_not_executed(characters, meta, message, monkeypatch):
    monkeypatch.chdir(characters)
    (characters / "meta.pkl").write_bytes(meta)
    with pytest.raises(UserError, match=f"meta.pkl.*{message}"):
        load(characters)
    assert not (characters / "executed").exists()


def test_files_that_are_missing_or_of_another_format(characters):
    (characters / "val.bin").write_bytes(b"")
    with pytest.raises(UserError, match="val.bin is empty"):
        load(characters)
    np.save(characters / "val.npy", np.arange(9))
    (characters / "val.npy").rename(characters / "val.bin")
    with pytest.raises(UserError, match="val.bin is an array of numpy.save"):
        load(characters)
    (characters / "val.bin").unlink()
    with pytest.raises(UserError, match="no val.bin there"):
        load(characters)


def test_they_hold_no_texts(characters):
    with pytest.raises(UserError, match="--min-chars 9.*tokens, not texts"):
        split_tokens(load(characters), make_tokenizer("char", load(characters)), config_of(min_chars=9))
