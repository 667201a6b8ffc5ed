"""Tokenising: byte pairs, many texts, the cache, packed chunks, and every kind of file that can be trained on."""

import csv
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt import data_files, datasets, tokenizer, tokens
from jaxgpt.config import ModelConfig, TrainConfig
from jaxgpt.data_files import NotAvailable
from jaxgpt.errors import UserError
from jaxgpt.texts import lines, text_pieces
from jaxgpt.tokenizer import BpeTokenizer, ByteTokenizer, decode, make_tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared/data"
DOCUMENTS = ["The first text, long enough.", "", "Second: x", "Ein dritter Text mit Umlaut: ä.", "The fourth one."] * 8
needs_gpt2 = pytest.mark.skipif(not (SHARED / "tiktoken").is_dir(), reason="needs GPT-2's vocabulary")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def config_of(block_size=4, **values):
    return TrainConfig(model=ModelConfig(block_size=block_size), batch_size=2, **values)


def load(path, column=None, said=None):
    return datasets.load_corpus(f"file:{path}", None, (said or []).append, column)


def written(folder, kind, values, column="text"):
    path = folder / f"texts.{kind}"
    rows = [{column: value, "other": at} for at, value in enumerate(values)]
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, [column, "other"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


# ---------------------------------------------------------------------------------------------------------- byte pairs


@pytest.fixture(scope="module")
def bpe():
    return BpeTokenizer.train(["the cat and the other cat then thought of another theory " * 20], 300)


@given(text=st.text())
def test_byte_pairs_round_trip(bpe, text):
    ids = bpe.encode(text)
    assert tokenizer.decode(bpe, ids) == text and bpe.n_bytes_V[ids].sum() == len(text.encode())
    assert not len(ids) or ids.max() < bpe.end_of_text


def test_byte_pairs_merge_what_is_frequent(bpe):
    """A corpus of eight words has not three hundred pairs to merge."""
    assert 256 < bpe.vocab_size <= 300 and bpe.end_of_text == bpe.vocab_size - 1
    assert len(bpe.encode("the cat")) == 2
    ids = bpe.encode("<|endoftext|>")
    assert bpe.end_of_text not in ids  # a text cannot write the token itself
    assert list(bpe.decode_stream([bpe.end_of_text]))[0] == "<|endoftext|>" and bpe.n_bytes_V[-1] == 0


def test_byte_pairs_are_saved_and_trained_once(tmp_path, bpe):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(bpe.to_json()))
    assert tokenizer.load(path).encode("the other theory").tolist() == bpe.encode("the other theory").tolist()
    corpus, said = datasets.of_text("x", "some words " * 100, ""), []
    first = make_tokenizer("bpe:280", corpus, None, said.append)
    assert tokenizer.same(first, make_tokenizer("bpe:280", corpus, None, said.append))
    assert [line.split()[0] for line in said] == ["training", "the"]  # once, and fewer entries than asked for
    (cached,) = (tmp_path / "cache/jaxgpt/tokenizers").iterdir()
    cached.write_text(cached.read_text()[:50])
    assert tokenizer.same(first, make_tokenizer("bpe:280", corpus, None, said.append)) and len(said) == 4


@needs_gpt2
def test_gpt2_is_that_of_tiktoken():
    t = make_tokenizer("gpt2", datasets.of_text("x", "x", ""), SHARED)
    assert (t.vocab_size, t.end_of_text) == (50257, 50256)
    assert t.encode("Hello world<|endoftext|>").tolist()[:2] == [15496, 995] and 50256 not in t.encode("<|endoftext|>")
    assert tokenizer.decode(t, [*t.encode("Grüße 🙂"), 50256]) == "Grüße 🙂<|endoftext|>"
    assert t.n_bytes_V[t.encode("Grüße 🙂")].sum() == len("Grüße 🙂".encode())


@needs_gpt2
def test_gpt2_is_found_where_tiktoken_keeps_it_and_downloaded_whole(monkeypatch, tmp_path):
    monkeypatch.setattr(data_files, "CHECKOUT", tmp_path / "checkout")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "mine"  # by any name
    folder.mkdir()
    files = [remote.file.split("/")[1] for remote in tokenizer.GPT2_FILES]
    for name in files:
        shutil.copyfile(SHARED / "tiktoken" / name, folder / name)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    corpus = datasets.of_text("x", "x", "")
    assert make_tokenizer("gpt2", corpus).folder == folder
    (folder / files[0]).write_text("damaged")
    with pytest.raises(UserError, match="another file"):
        make_tokenizer("gpt2", corpus)
    assert (folder / files[0]).read_text() == "damaged"  # tiktoken would have removed it
    (folder / files[0]).unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(NotAvailable, match="--tokenizer gpt2: not on this machine and no network.*bpe:N"):
        make_tokenizer("gpt2", corpus)


# ------------------------------------------------------------------------------------------------------ files and texts


@settings(max_examples=30, deadline=None)
@given(text=st.text(st.sampled_from("ab .\n\r\t 1'é"), max_size=300))
def test_a_text_in_pieces_gives_the_tokens_of_the_whole(tmp_path_factory, bpe, text):
    """Pieces of seven bytes here, through characters and white space, where GPT-2's pattern looks ahead."""
    path = tmp_path_factory.mktemp("t") / "x.txt"
    path.write_text(text, encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_files, "PIECE_BYTES", 7)
        pieces, found = list(text_pieces(path, "x")), list(lines(path, "x"))
    assert "".join(pieces) == text
    assert [i for piece in pieces for i in bpe.encode(piece).tolist()] == bpe.encode(text).tolist()
    *whole, rest = text.split("\n")
    assert found == [line + "\n" for line in whole] + [rest] * bool(rest)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_rows_are_texts_each_with_its_end(tmp_path, kind):
    path = written(tmp_path, kind, DOCUMENTS)
    corpus = load(path)
    t = BpeTokenizer.train(DOCUMENTS, 260)
    train, val = tokens.split_tokens(corpus, t, config_of())
    expected = [[*t.encode(text).tolist(), t.end_of_text] for text in DOCUMENTS if text]
    assert [*train.tolist(), *val.tolist()] == sum(expected, [])
    assert train[-1] == t.end_of_text  # cut between texts, about nine tenths in
    assert 0.88 < len(train) / (len(train) + len(val)) < 0.97
    assert corpus == load(path)
    with pytest.raises(UserError, match="--text-column txet.*: no column 'txet'; it has 'text', 'other'; did you mean"):
        load(path, "txet")
    if kind != "csv":  # where all is text
        with pytest.raises(UserError, match="--text-column other: row 1 holds"):
            load(path, "other")


def test_texts_are_left_out_and_limited_as_documented(tmp_path):
    corpus, t = load(written(tmp_path, "jsonl", DOCUMENTS)), ByteTokenizer()
    train, _ = tokens.split_tokens(corpus, t, config_of(min_chars=15))
    kept = [text for text in DOCUMENTS if len(text.strip()) > 15]  # "The fourth one." has 15
    assert set(kept) == {DOCUMENTS[0], DOCUMENTS[3]}
    assert bytes(train).decode() == "".join(kept)[: len(bytes(train).decode())]
    train, val = tokens.split_tokens(corpus, t, config_of(min_chars=15, max_train_texts=3, max_val_texts=1))
    assert bytes(train).decode() == "".join(kept[:3]) and bytes(val).decode() in kept
    with pytest.raises(UserError, match="no text has more than --min-chars 1000"):
        tokens.split_tokens(corpus, t, config_of(min_chars=1000))


def test_validation_is_limited_in_tokens_too(text_file):
    whole, part = (tokens.split_tokens(load(text_file), ByteTokenizer(), config_of(max_val_tokens=n)) for n in (0, 50))
    assert part[0].tolist() == whole[0].tolist() and part[1].tolist() == whole[1][:50].tolist()
    with pytest.raises(UserError, match="--max-val-tokens 4: less than a window of 5"):
        config_of(max_val_tokens=4)


def test_a_single_text_knows_no_limits(text_file):
    corpus = load(text_file)
    for name in ("min_chars", "max_train_texts", "max_val_texts"):
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} 3.*single text"):
            tokens.split_tokens(corpus, ByteTokenizer(), config_of(**{name: 3}))


@pytest.mark.parametrize(
    "kind, data, part",
    [
        ("jsonl", b'{"text": "a"}\n[1]\n', "line 2 is no object"),
        ("jsonl", b'{"text": "a"}\n{"text"\n', "line 2 is not JSON"),
        ("jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "line 2.*no column 'text'.*did you mean txt"),
        ("jsonl", b'{"text": "\xff"}\n', "not UTF-8"),
        ("jsonl", b'{"text": "a \\ud800"}\n', "line 1 holds half of a surrogate pair"),
        ("jsonl", b"[" * 200_000, "line 1 is not JSON"),
        ("csv", b"", "no column 'text'; it has none"),
        ("csv", b"text,other\na,b\na, cut here,b\n", "line 3 has more fields than the header"),
        ("csv", b"other,text\na,b\ncut here\n", "line 3 has fewer fields than the header"),
        ("csv", b"text,text\na,b\n", "several columns are called 'text'"),
        ("parquet", b"PAR1 but no more", "cannot be read as parquet"),
    ],
)
def test_files_of_rows_that_are_wrong(tmp_path, kind, data, part):
    path = tmp_path / f"x.{kind}"
    path.write_bytes(data)
    with pytest.raises(UserError, match=part):
        load(path)


def test_long_texts_are_taken(tmp_path, bpe):
    """Beyond the csv module's own limit; without a line's end; and blanks without end are refused, not fatal."""
    long = "many words " * 20000
    corpus = load(written(tmp_path, "csv", [long, "short"]))
    assert next(corpus.splits["all"]()) == long
    (tmp_path / "x.txt").write_text(long * 10)
    pieces = list(text_pieces(tmp_path / "x.txt", "x"))
    assert "".join(pieces) == long * 10 and max(map(len, pieces)) < 1.1 * 2**20 < len(long * 10)
    with pytest.raises(UserError, match="100,000 blanks"):
        bpe.encode("a" + " " * 100_000)
    (tmp_path / "x.jsonl").write_text('\ufeff{"text": "a"}\n{"text": "\\ud83d\\ude00"}\n', encoding="utf-8")
    assert list(load(tmp_path / "x.jsonl").splits["all"]()) == ["a", "\U0001f600"]  # a mark at the start; a whole pair
    (tmp_path / "x.csv").write_text("text,other\na,b,\nc\n")  # a comma at the end; a field left out that is not read
    assert list(load(tmp_path / "x.csv").splits["all"]()) == ["a", "c"]


@pytest.mark.parametrize("unit", ["ACGT", "7", "_", "-_", " ", "\n"])
def test_words_without_end_are_refused_where_learning_pairs_would_take_minutes(tmp_path, bpe, unit):
    endless = unit * (40_000 // len(unit))
    (tmp_path / "x.txt").write_text(f"a{endless}b")
    with pytest.raises(UserError, match="--dataset .*x.txt: the text holds 20,000 letters, digits, signs or blanks"):
        make_tokenizer("bpe:270", load(tmp_path / "x.txt"))
    assert decode(bpe, bpe.encode(endless)) == endless  # with the pairs there are it takes no time
    (tmp_path / "x.txt").write_text("2024-11-05," * 5_000 + f"a{endless[:19_990]}b")  # no blank, but words that end
    assert make_tokenizer("bpe:270", load(tmp_path / "x.txt")).vocab_size > 257


def test_a_text_that_cannot_be_tokenised_is_told_of_its_dataset(tmp_path, bpe):
    corpus = load(written(tmp_path, "jsonl", ["a", "b" + " " * 100_000]))
    with pytest.raises(UserError, match="--dataset .*jsonl: the text holds a run of 100,000 blanks"):
        tokens.split_tokens(corpus, bpe, config_of())


def test_rows_of_empty_texts_only(tmp_path):
    corpus = load(written(tmp_path, "jsonl", ["", None, ""]))
    with pytest.raises(UserError, match="no text"):
        tokens.split_tokens(corpus, ByteTokenizer(), config_of())


def test_a_corpus_of_one_chunk(tmp_path):
    line_set(tmp_path / "one", train="abcdef", valid="abcdef")
    corpus = datasets.load_corpus("wikitext-2", tmp_path / "one", print)
    with pytest.raises(UserError, match="1 chunks of --model.block-size 4 .*--batch-size 2"):
        tokens.split_tokens(corpus, ByteTokenizer(), config_of(packing="chunks"))
    assert len(tokens.split_tokens(corpus, ByteTokenizer(), config_of())[0]) == 6


# ---------------------------------------------------------------------------------------------- sets of lines, hub, bin


def line_set(folder, **files):
    (folder / "wikitext-2").mkdir(parents=True)
    for name, text in files.items():
        (folder / "wikitext-2" / f"{name}.txt").write_text(text)


def test_wikitext_from_a_folder(tmp_path):
    said = []
    line_set(tmp_path / "whole", train="a b\n \nc\n", valid="v\n", test="t\n")
    corpus = datasets.load_corpus("wikitext-2", tmp_path / "whole", said.append)
    assert [list(corpus.splits[s]()) for s in ("train", "validation")] == [["a b\n", " \n", "c\n"], ["v\n"]]
    assert not said and corpus.documents
    line_set(tmp_path / "part", valid="v\n", test="t\n")
    corpus = datasets.load_corpus("wikitext-2", tmp_path / "part", said.append)
    assert [list(corpus.splits[s]()) for s in ("train", "validation")] == [["v\n"], ["t\n"]]
    assert said == [f"{tmp_path}/part/wikitext-2: no train split; valid.txt trains, test.txt validates"]


def hub_folder(folder, train, validation=None):
    import pyarrow
    from pyarrow import parquet

    folder.mkdir()
    for split, values in {"train": train, "validation": validation}.items():
        if values is not None:
            parquet.write_table(pyarrow.table({"text": values}), folder / f"{split}-00000-of-00001.parquet")
    return folder


def test_hub_datasets_through_a_folder_laid_out_as_there(tmp_path, monkeypatch):
    folder = hub_folder(tmp_path / "data_set", ["one", "two"], ["three"])
    corpus = datasets.load_corpus(f"hf:{folder}", None, print)
    assert {s: list(texts()) for s, texts in corpus.splits.items()} == {
        "train": ["one", "two"],
        "validation": ["three"],
    }
    assert corpus == datasets.load_corpus(f"hf:{folder}", None, print, "text")
    with pytest.raises(UserError, match="no column 'body'; it has 'text'"):
        datasets.load_corpus(f"hf:{folder}", None, print, "body")
    code = tmp_path / "code"
    code.mkdir()
    (code / "x.csv").write_text("text\na\n")
    with pytest.raises(UserError, match="not of parquet files"):
        datasets.load_corpus(f"hf:{code}", None, print)


@pytest.mark.parametrize("name", ["hf:some/thing", "wikitext-103"])
def test_a_hub_without_a_network_is_told_within_seconds(command, tmp_path, name):
    begun = time.monotonic()
    done = command("train.py", "--dataset", name, cwd=tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert time.monotonic() - begun < 15  # 4 s on a quiet machine
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"error: --dataset {name}: cannot be had from http://127.0.0.1:9: no network (")


def test_nanogpts_files_are_taken_as_they_are(tmp_path):
    data = {"train": np.arange(300, dtype="<u2") % 256, "val": np.arange(50, dtype="<u2")}
    for name, values in data.items():
        values.tofile(tmp_path / f"{name}.bin")
    corpus = datasets.load_corpus(f"bin:{tmp_path}", None, print)
    for split, values in zip(tokens.split_tokens(corpus, ByteTokenizer(), config_of()), data.values(), strict=True):
        assert isinstance(split, np.memmap) and split.tolist() == values.tolist()
    with pytest.raises(UserError, match="holds tokens, not texts"):
        make_tokenizer("char", corpus)
    with pytest.raises(UserError, match="--min-chars 9.*tokens, not texts"):
        tokens.split_tokens(corpus, ByteTokenizer(), config_of(min_chars=9))
    np.full(50, 300, "<u2").tofile(tmp_path / "val.bin")
    with pytest.raises(UserError, match="val.bin holds token 300, outside the vocabulary of 256"):
        tokens.split_tokens(corpus, ByteTokenizer(), config_of())
    (tmp_path / "val.bin").write_bytes(b"abc")
    with pytest.raises(UserError, match="val.bin has 3 bytes"):
        datasets.load_corpus(f"bin:{tmp_path}", None, print)
    (tmp_path / "val.bin").unlink()
    with pytest.raises(UserError, match="no val.bin there"):
        datasets.load_corpus(f"bin:{tmp_path}", None, print)


# ------------------------------------------------------------------------------------------------------------ the cache


@pytest.fixture
def cached(tmp_path):
    """A corpus, its tokenizer, and the folder of its tokens."""
    corpus, t = load(written(tmp_path, "jsonl", DOCUMENTS)), BpeTokenizer.train(DOCUMENTS, 260)
    first = tokens.split_tokens(corpus, t, config_of())
    (folder,) = (tmp_path / "cache/jaxgpt/tokens").iterdir()
    return corpus, t, folder, [split.tolist() for split in first]


def test_tokens_are_made_once_and_memory_mapped(cached, monkeypatch):
    corpus, t, folder, first = cached
    monkeypatch.setattr(BpeTokenizer, "encode", lambda *_: pytest.fail("tokenised again"))
    again = tokens.split_tokens(corpus, t, config_of())
    assert [split.tolist() for split in again] == first and all(isinstance(split, np.memmap) for split in again)
    tokens.split_tokens(corpus, t, config_of(max_train_texts=2))  # a part of the same
    assert {p.name for p in folder.iterdir()} == {"all.bin", "all.ends.npy", "index.json"}


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
    assert [s.tolist() for s in tokens.split_tokens(corpus, t, config_of(), said.append)] == first
    assert len(said) == 1 and "damaged; tokenising again" in said[0]
    assert path.read_bytes() == data


def test_other_data_or_another_tokenizer_has_a_cache_of_its_own(cached, tmp_path):
    corpus, t, folder, _ = cached
    tokens.split_tokens(corpus, BpeTokenizer.train(DOCUMENTS, 262), config_of())
    tokens.split_tokens(corpus, t, config_of(min_chars=3))
    tokens.split_tokens(load(written(tmp_path, "jsonl", DOCUMENTS[1:])), t, config_of())
    assert len(list(folder.parent.iterdir())) == 4


def test_an_interrupted_tokenising_leaves_nothing(tmp_path, monkeypatch):
    corpus, t = load(written(tmp_path, "jsonl", DOCUMENTS)), BpeTokenizer.train(DOCUMENTS, 260)
    monkeypatch.setattr(tokens.np, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tokens.split_tokens(corpus, t, config_of())
    assert not list((tmp_path / "cache/jaxgpt/tokens").iterdir())


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    corpus, t, said = load(written(tmp_path, "jsonl", DOCUMENTS)), BpeTokenizer.train(DOCUMENTS, 260), []
    assert len(tokens.split_tokens(corpus, t, config_of(), said.append)[0]) > 100
    assert len(said) == 1 and "cannot be written" in said[0]


def test_few_characters_need_no_file(tmp_path, text_file):
    tokens.split_tokens(load(text_file), ByteTokenizer(), config_of())
    assert not (tmp_path / "cache").exists()
