"""Tokenizing a corpus: its documents, its splits, its limits, and the cache."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from unit.data.samples import DOCUMENTS, config_of, load_file, write_line_dataset, write_table

from jaxgpt.data import token_cache
from jaxgpt.data.corpora import corpus_from_text, load_corpus
from jaxgpt.data.token_cache import split_tokens, token_dtype, tokenize_corpus
from jaxgpt.data.tokenizer import BpeTokenizer, ByteTokenizer, make_tokenizer
from jaxgpt.errors import UserError


@pytest.fixture(scope="module")
def documents_bpe() -> BpeTokenizer:
    return BpeTokenizer.train(DOCUMENTS, 260)


@pytest.fixture
def documents(tmp_path):
    """A corpus of DOCUMENTS."""
    return load_file(write_table(tmp_path, "jsonl", DOCUMENTS))


# -------------------------------------------------------------------------------------------------------------- splits


def test_split_is_the_documented_one(text):
    corpus = corpus_from_text("x", text, "")
    tokenizer = make_tokenizer("char", corpus)
    train, val = split_tokens(corpus, tokenizer, config_of(16))
    assert len(train) == int(0.9 * len(text))
    assert np.concatenate([train, val]).tolist() == tokenizer.encode(text).tolist()


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_rows_are_documents_each_with_its_end(tmp_path, documents_bpe, suffix):
    t = documents_bpe
    train, val = split_tokens(load_file(write_table(tmp_path, suffix, DOCUMENTS)), t, config_of())
    expected = [[*t.encode(text).tolist(), t.end_of_text] for text in DOCUMENTS if text]
    assert [*train.tolist(), *val.tolist()] == sum(expected, [])
    assert train[-1] == t.end_of_text  # cut between texts, about nine tenths in
    assert 0.88 < len(train) / (len(train) + len(val)) < 0.97


def test_short_documents_are_left_out(documents):
    train, _ = split_tokens(documents, ByteTokenizer(), config_of(min_chars=15))
    kept = [text for text in DOCUMENTS if len(text.strip()) > 15]  # "The fourth one." has 15
    assert set(kept) == {DOCUMENTS[0], DOCUMENTS[3]}
    assert bytes(train).decode() == "".join(kept)[: len(bytes(train).decode())]
    with pytest.raises(UserError, match="no text has more than --min-chars 1000"):
        split_tokens(documents, ByteTokenizer(), config_of(min_chars=1000))


def test_documents_are_limited_in_number(documents):
    kept = [text for text in DOCUMENTS if len(text.strip()) > 15]
    limits = dict(min_chars=15, max_train_texts=3, max_val_texts=1)
    train, val = split_tokens(documents, ByteTokenizer(), config_of(**limits))
    assert bytes(train).decode() == "".join(kept[:3])
    assert bytes(val).decode() in kept


def test_validation_is_limited_in_tokens_too(text_file):
    whole, part = (split_tokens(load_file(text_file), ByteTokenizer(), config_of(max_val_tokens=n)) for n in (0, 50))
    assert part[0].tolist() == whole[0].tolist() and part[1].tolist() == whole[1][:50].tolist()
    with pytest.raises(UserError, match="--max-val-tokens 4: less than a window of 5"):
        config_of(max_val_tokens=4)


@pytest.mark.parametrize("name", ["min_chars", "max_train_texts", "max_val_texts"])
def test_a_single_text_has_no_limits(text_file, name):
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} 3.*single text"):
        split_tokens(load_file(text_file), ByteTokenizer(), config_of(**{name: 3}))


@pytest.mark.parametrize("n_bytes, fits", [(160, False), (161, True)])
def test_a_text_must_hold_a_block_plus_one(n_bytes, fits):
    """161 bytes: 144 train and 17 validate, a block of 16 plus one."""
    corpus = corpus_from_text("x", "a" * n_bytes, "")
    if fits:
        assert len(split_tokens(corpus, ByteTokenizer(), config_of(16))[1]) == 17
    else:
        with pytest.raises(UserError, match="--model.block-size"):
            split_tokens(corpus, ByteTokenizer(), config_of(16))


def test_a_text_that_cannot_be_tokenized_is_reported_with_its_dataset(tmp_path, documents_bpe):
    corpus = load_file(write_table(tmp_path, "jsonl", ["a", "b" + " " * 100_000]))
    with pytest.raises(UserError, match="--dataset .*jsonl: the text holds a run of 100,000 blanks"):
        split_tokens(corpus, documents_bpe, config_of())


def test_rows_of_empty_texts_only(tmp_path):
    corpus = load_file(write_table(tmp_path, "jsonl", ["", None, ""]))
    with pytest.raises(UserError, match="no text"):
        split_tokens(corpus, ByteTokenizer(), config_of())


def test_a_single_document_cannot_be_split(tmp_path):
    with pytest.raises(UserError, match="a single text of its own; give two or more"):
        split_tokens(load_file(write_table(tmp_path, "jsonl", ["long enough"])), ByteTokenizer(), config_of())


def test_a_corpus_of_one_chunk(tmp_path):
    write_line_dataset(tmp_path, train="abcdef", valid="abcdef")
    corpus = load_corpus("wikitext-2", tmp_path, print)
    with pytest.raises(UserError, match="1 chunks of --model.block-size 4 .*--batch-size 2"):
        split_tokens(corpus, ByteTokenizer(), config_of(packing="chunks"))
    assert len(split_tokens(corpus, ByteTokenizer(), config_of())[0]) == 6


@pytest.mark.parametrize(
    "vocab_size, dtype", [(256, np.uint8), (257, np.uint16), (2**16, np.uint16), (2**17, np.int32)]
)
def test_tokens_have_the_smallest_type(vocab_size, dtype):
    assert token_dtype(vocab_size) is dtype


def test_epochs_become_steps():
    """361 bytes: 324 train, 80 chunks of a block of 4 plus one, 40 batches of two."""
    corpus = corpus_from_text("x", "a" * 361, "")
    config, data = tokenize_corpus(config_of(packing="chunks", epochs=3, steps=1000), corpus, tokenizer=ByteTokenizer())
    assert (len(data.train_N), config.steps) == (324, 3 * 40)
    config, _ = tokenize_corpus(config_of(packing="chunks", epochs=3, steps=50), corpus, tokenizer=ByteTokenizer())
    assert config.steps == 50  # --steps ends it earlier


# ----------------------------------------------------------------------------------------------------------- the cache


@pytest.fixture
def cached(documents, documents_bpe, own_cache):
    """A corpus, its tokenizer, the folder of its tokens, and the tokens."""
    first = split_tokens(documents, documents_bpe, config_of())
    (folder,) = (own_cache / "tokens").iterdir()
    return documents, documents_bpe, folder, [split.tolist() for split in first]


def test_tokens_are_made_once_and_memory_mapped(cached, monkeypatch):
    corpus, t, folder, first = cached
    monkeypatch.setattr(BpeTokenizer, "encode", lambda *_: pytest.fail("tokenized again"))
    again = split_tokens(corpus, t, config_of())
    assert [split.tolist() for split in again] == first and all(isinstance(split, np.memmap) for split in again)
    split_tokens(corpus, t, config_of(max_train_texts=2))  # a part of the same
    assert {p.name for p in folder.iterdir()} == {"all.bin", "all.ends.npy", "index.json"}


def test_the_format_does_not_change(own_cache, monkeypatch):
    """A cache made by an earlier version is read by this one: its name and its bytes are part of the format."""
    write_line_dataset(own_cache.parent, train="abc\ndefgh\n", valid="abc\n")
    monkeypatch.setattr(token_cache, "MAX_UNCACHED_TOKENS", 0)
    split_tokens(load_corpus("wikitext-2", own_cache.parent, print), ByteTokenizer(), config_of(block_size=2))
    (folder,) = (own_cache / "tokens").iterdir()
    assert folder.name == PINNED_NAME
    assert (folder / "train.bin").read_bytes() == b"abc\ndefgh\n"
    assert np.load(folder / "train.ends.npy").tolist() == [4, 10]
    assert json.loads((folder / "index.json").read_text()) == PINNED_INDEX


PINNED_NAME = "8d41d19d69de47b7da26e17bc895e987"
PINNED_INDEX = {
    "train": {"dtype": "|u1", "n_tokens": 10, "n_texts": 2, "crc32": 2310905526, "ends_crc32": 1084242607},
    "validation": {"dtype": "|u1", "n_tokens": 4, "n_texts": 1, "crc32": 1200128334, "ends_crc32": 385127514},
}


@pytest.mark.parametrize("damage", ["short", "long", "changed", "index", "ends", "no ends", "no splits"])
def test_a_damaged_cache_is_made_again_with_one_line(cached, damage):
    corpus, t, folder, first = cached
    files = {"index": "index.json", "no splits": "index.json", "ends": "all.ends.npy", "no ends": "all.ends.npy"}
    path = folder / files.get(damage, "all.bin")
    data = path.read_bytes()
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    changed = {"long": data + b"\0\0", "changed": flipped, "no ends": b"", "no splits": b"{}"}
    changed = changed.get(damage, data[: len(data) // 2])
    path.write_bytes(changed)
    said = []
    assert [s.tolist() for s in split_tokens(corpus, t, config_of(), said.append)] == first
    assert len(said) == 1 and "damaged; tokenising again" in said[0]
    assert path.read_bytes() == data


@pytest.mark.parametrize(
    "index",
    ["null", "[]", '["all"]', "3", '{"all": null}', '{"all": {"dtype": "|O"}}', "[" * 10**5, "\xff", "{}" * 2**20],
)
def test_a_damaged_index_is_made_again_with_one_line(cached, index):
    corpus, t, folder, first = cached
    (folder / "index.json").write_text(index, encoding="latin-1")
    said = []
    assert [s.tolist() for s in split_tokens(corpus, t, config_of(), said.append)] == first
    assert len(said) == 1 and "damaged; tokenising again" in said[0]


@pytest.mark.parametrize("name", ["index.json", "all.bin", "all.ends.npy"])
@pytest.mark.parametrize("what", ["fifo", "zero", "folder", "unreadable"])
def test_what_is_no_file_in_the_cache_is_replaced(cached, name, what):
    """Opening a FIFO would wait for its other end, reading /dev/zero would never end."""
    corpus, t, folder, first = cached
    path = folder / name
    path.unlink()
    make = {"fifo": os.mkfifo, "zero": lambda path: path.symlink_to("/dev/zero"), "folder": Path.mkdir}
    make.get(what, lambda path: path.symlink_to(path))(path)
    said = []
    assert [s.tolist() for s in split_tokens(corpus, t, config_of(), said.append)] == first
    assert all("damaged; tokenising again" in line for line in said) and path.is_file()


def test_neither_a_cache_nor_a_temporary_folder_is_one_line(documents, documents_bpe, own_cache, monkeypatch):
    own_cache.parent.write_text("a file in the place of the folder")

    def fail(**_):
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(token_cache.tempfile, "mkdtemp", fail)
    with pytest.raises(UserError, match="--dataset .*: no room for its tokens.*set XDG_CACHE_HOME"):
        split_tokens(documents, documents_bpe, config_of())


def test_other_data_or_another_tokenizer_has_a_cache_of_its_own(cached, tmp_path):
    corpus, t, folder, _ = cached
    split_tokens(corpus, BpeTokenizer.train(DOCUMENTS, 262), config_of())
    split_tokens(corpus, t, config_of(min_chars=3))
    split_tokens(load_file(write_table(tmp_path, "jsonl", DOCUMENTS[1:])), t, config_of())
    assert len(list(folder.parent.iterdir())) == 4


def test_an_interrupted_tokenizing_leaves_nothing(documents, documents_bpe, own_cache, monkeypatch):
    monkeypatch.setattr(token_cache.np, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        split_tokens(documents, documents_bpe, config_of())
    assert not list((own_cache / "tokens").iterdir())


def test_a_cache_that_cannot_be_written_costs_only_time(documents, documents_bpe, own_cache):
    own_cache.parent.write_text("a file in the place of the folder")
    said = []
    assert len(split_tokens(documents, documents_bpe, config_of(), said.append)[0]) > 100
    assert len(said) == 1 and "cannot be written" in said[0]


def test_few_characters_need_no_file(own_cache, text_file):
    split_tokens(load_file(text_file), ByteTokenizer(), config_of())
    assert not own_cache.parent.exists()


def test_many_characters_are_cached(own_cache, text_file, monkeypatch):
    in_memory = split_tokens(load_file(text_file), ByteTokenizer(), config_of())
    monkeypatch.setattr(token_cache, "MAX_UNCACHED_TOKENS", 100)
    mapped = split_tokens(load_file(text_file), ByteTokenizer(), config_of())
    assert [split.tolist() for split in mapped] == [split.tolist() for split in in_memory]
    assert len(list((own_cache / "tokens").iterdir())) == 1
