"""Files of tokens in llm.c's format, lists of Parquet files, and records: sound ones, and all that may be wrong."""

import dataclasses
import os

import numpy as np
import pytest
from unit.data.samples import config_of

from jaxgpt.data import shards
from jaxgpt.data.corpora import load_corpus
from jaxgpt.data.shards import ParquetFiles, SourceFile, TokenFileShards, digest_of, read_record, write_record
from jaxgpt.data.token_cache import tokenize_corpus
from jaxgpt.data.tokenizer import ByteTokenizer, make_tokenizer
from jaxgpt.errors import UserError


def write_tokens(path, tokens, magic=20240520, version=1, n_tokens=None):
    """A file as llm.c's dev/data writes it."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if n_tokens is None else n_tokens
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())


@pytest.fixture
def folder(tmp_path):
    """modded-nanogpt's names, and tokens below 200."""
    folder = tmp_path / "fineweb10B"
    folder.mkdir()
    for number in range(3):
        write_tokens(folder / f"fineweb_train_{number + 1:06}.bin", np.arange(100 + number) + number)
    write_tokens(folder / "fineweb_val_000000.bin", np.arange(50))
    return folder


def load(folder, **values):
    corpus = load_corpus(f"bin:{folder}", None, print)
    return corpus, tokenize_corpus(config_of(packing="chunks", **values), corpus, tokenizer=ByteTokenizer())[1]


def test_the_shards_of_others_are_read_as_they_are(folder):
    corpus, data = load(folder)
    assert corpus.name == f"bin:{folder}" and data.train_N.n_files == 3
    assert data.val_N.tolist() == list(range(50))
    read = data.train_N.read(iter([(0, 2), (0, 0), (1, 1)]), 0)
    for epoch, number in ((0, 2), (0, 0), (1, 1)):
        shard = next(read)
        assert (shard.epoch, shard.file_number, shard.number) == (epoch, number, 0)
        assert isinstance(shard.tokens_N, np.memmap) and shard.tokens_N.dtype == data.train_N.dtype
        assert shard.tokens_N.tolist() == list(range(number, 100 + 2 * number))
    assert data.train_N.known_counts(1) == ([101], True)
    assert len(load(folder, max_val_tokens=20)[1].val_N) == 20


def test_llm_cs_single_files_are_shards_too(folder):
    for name in ("train", "val"):
        (source,) = sorted(folder.glob(f"*_{name}*"))[:1]
        os.rename(source, folder / f"tiny_shakespeare_{name}.bin")
    for path in folder.glob("fineweb*"):
        path.unlink()
    assert load(folder)[1].train_N.n_files == 1


def test_the_identity_is_of_all_tokens_and_their_order(folder):
    names, found = sorted(folder.iterdir()), {load(folder)[0].sha256}
    write_tokens(names[-1], [1] * 50)
    found.add(load(folder)[0].sha256)
    write_tokens(names[1], [1] * 101)
    found.add(load(folder)[0].sha256)
    os.rename(names[0], folder / "fineweb_train_000009.bin")
    found.add(load(folder)[0].sha256)
    assert len(found) == 4


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(magic=7), "has no header of llm.c .begins with 7, 1 in place of 20240520, 1"),
        (dict(version=2), "has no header of llm.c .begins with 20240520, 2"),
        (dict(magic=20240801, version=7), "holds uint32 tokens, of Llama 3"),
        (dict(n_tokens=51), "has 1,124 bytes, and its header says 51 tokens, which are 1,126"),
        (dict(n_tokens=49), ".*header says 49 tokens"),
        (dict(n_tokens=-5), ".*header says -5 tokens"),
    ],
)
def test_a_wrong_header_is_refused(folder, values, message):
    path = folder / "fineweb_val_000000.bin"
    write_tokens(path, np.arange(50), **values)
    with pytest.raises(UserError, match=f"--dataset bin:.*: {path.name} {message}"):
        load(folder)


def test_a_cut_or_missing_file_is_refused(folder):
    path = folder / "fineweb_train_000002.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="000002.bin has 1,225 bytes, and its header says 101 tokens"):
        load(folder)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="has no header"):
        load(folder)
    for train in folder.glob("*_train_*"):
        train.unlink()
    with pytest.raises(UserError, match=r"no \*_train\*.bin beside the others"):
        load(folder)
    os.mkfifo(folder / "fineweb_train_000001.bin")
    with pytest.raises(UserError, match="a pipe or a device"):
        load(folder)


def test_a_file_without_tokens_is_an_empty_shard(folder):
    write_tokens(folder / "fineweb_train_000002.bin", [])
    assert len(next(load(folder)[1].train_N.read(iter([(0, 1)]), 0)).tokens_N) == 0
    write_tokens(folder / "fineweb_val_000000.bin", [])
    with pytest.raises(UserError, match="too short"):
        load(folder)


def test_a_file_that_changes_while_it_trains_is_told(folder):
    _, data = load(folder)
    write_tokens(folder / "fineweb_train_000002.bin", np.zeros(101))
    read = data.train_N.read(iter([(0, 0), (0, 1)]), 0)
    next(read)
    with pytest.raises(UserError, match="fineweb_train_000002.bin has changed since the start"):
        next(read)


def test_tokens_outside_the_vocabulary_are_refused(folder):
    write_tokens(folder / "fineweb_train_000002.bin", [256] * 20)
    read = load(folder)[1].train_N.read(iter([(0, 1)]), 0)
    with pytest.raises(UserError, match="000002.bin holds token 256, outside the vocabulary of 256"):
        next(read)


@pytest.mark.parametrize(
    "values",
    [dict(packing="windows"), dict(epochs=1), dict(eval_every=0), dict(max_train_texts=3), dict(min_chars=3)],
)
def test_flags_that_need_the_whole_corpus_are_refused(folder, values):
    corpus = load_corpus(f"bin:{folder}", None, print)
    config = config_of(**{"packing": "chunks", **values})
    with pytest.raises(UserError, match=f"--{next(iter(values)).replace('_', '-')}"):
        tokenize_corpus(config, corpus, tokenizer=ByteTokenizer())
    with pytest.raises(UserError, match="--tokenizer char: .* holds tokens, not texts"):
        make_tokenizer("char", corpus)


def test_the_tokens_of_validation_must_hold_a_block(folder):
    with pytest.raises(UserError, match="too short"):
        load(folder, block_size=50)


def test_llm_cs_files_under_nanogpts_names_are_refused(tmp_path):
    for name in ("train", "val"):
        write_tokens(tmp_path / f"{name}.bin", np.arange(50))
    with pytest.raises(UserError, match=r"train.bin has a header of llm.c; name it as llm.c does, \*_train_000000"):
        load_corpus(f"bin:{tmp_path}", None, print)


# ------------------------------------------------------------------------------------------- lists and records

FILES = ParquetFiles("a/b", "0" * 40, "text", (SourceFile("x", 3, "sha256:1"), SourceFile("y", 4, "git:2")))


def test_the_identity_of_a_list_is_of_its_files_and_not_of_where_they_lie():
    assert dataclasses.replace(FILES, repo="", revision="/tmp").sha256 == FILES.sha256
    others = [
        dataclasses.replace(FILES, column="body"),
        dataclasses.replace(FILES, train=FILES.train[::-1]),
        dataclasses.replace(FILES, train=FILES.train[:1], validation=FILES.train[1]),
        dataclasses.replace(FILES, train=(FILES.train[0], SourceFile("y", 4, "git:3"))),
    ]
    assert len({FILES.sha256, *(other.sha256 for other in others)}) == 5
    assert FILES.n_bytes == 7


@pytest.mark.parametrize("files", [FILES, dataclasses.replace(FILES, train=FILES.train[:1], validation=FILES.train[1])])
def test_a_list_is_kept(files):
    assert shards.kept_list("a/b@0", "text") is None
    shards.keep_list("a/b@0", files)
    assert shards.kept_list("a/b@0", "text") == files
    assert shards.kept_list("a/b@0", "body") is None


def test_a_damaged_record_is_none(tmp_path):
    write_record(tmp_path / "x.json", {"n_tokens": 123})
    assert read_record(tmp_path / "x.json") == {"n_tokens": 123}
    (tmp_path / "x.json").write_text((tmp_path / "x.json").read_text().replace("123", "124"))
    assert read_record(tmp_path / "x.json") is None
    for text in ("", "[]", "{", "null", '{"sha256": 1}'):
        (tmp_path / "x.json").write_text(text)
        assert read_record(tmp_path / "x.json") is None


def test_the_digest_of_a_small_file_is_gits(tmp_path):
    (tmp_path / "x").write_bytes(b"hello\n")  # git hash-object
    assert digest_of(tmp_path / "x", "git") == "git:ce013625030ba8dba906f756967f9e9ca394464a"


def test_shards_of_tokens_hold_a_file_each(folder):
    corpus, _ = load(folder)
    assert [file.path.name for file in corpus.shards.train] == [f"fineweb_train_{n:06}.bin" for n in (1, 2, 3)]
    assert TokenFileShards(corpus.shards, 256).validation().tolist() == list(range(50))
