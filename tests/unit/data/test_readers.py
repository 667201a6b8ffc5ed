"""Reading text files and tables as streams."""

import os
import subprocess
import sys

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from unit.data.samples import load_file, write_table

from jaxgpt.data import files, readers
from jaxgpt.data.files import NotAvailable
from jaxgpt.data.readers import (
    hub_splits,
    join_columns,
    read_lines,
    read_rows,
    row_group_bytes,
    split_spec,
    text_pieces,
)
from jaxgpt.errors import UserError


@settings(max_examples=30, deadline=None)
@given(text=st.text(st.sampled_from("ab .\n\r\t 1'é"), max_size=300))
def test_a_text_in_pieces_gives_the_tokens_of_the_whole(tmp_path_factory, bpe, text):
    """Pieces of seven bytes here, through characters and white space, where GPT-2's pattern looks ahead."""
    path = tmp_path_factory.mktemp("t") / "x.txt"
    path.write_text(text, encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "PIECE_BYTES", 7)
        pieces, lines = list(text_pieces(path, "x")), list(read_lines(path, "x"))
    assert "".join(pieces) == text
    assert [i for piece in pieces for i in bpe.encode(piece).tolist()] == bpe.encode(text).tolist()
    *whole, rest = text.split("\n")
    assert lines == [line + "\n" for line in whole] + [rest] * bool(rest)


def test_a_long_text_without_line_ends_is_cut(tmp_path):
    long = "many words " * 200_000
    (tmp_path / "x.txt").write_text(long)
    pieces = list(text_pieces(tmp_path / "x.txt", "x"))
    assert "".join(pieces) == long
    assert max(map(len, pieces)) < 1.1 * 2**20 < len(long)


@pytest.mark.parametrize("char", ["\0", "a", "\u4e2d"])
def test_a_text_without_white_space_is_not_in_memory_whole(tmp_path, monkeypatch, char):
    monkeypatch.setattr(files, "PIECE_BYTES", 100)
    monkeypatch.setattr(readers, "LONGEST_PIECE", 1000)
    (tmp_path / "x.txt").write_text(char * 5000, encoding="utf-8")
    pieces = list(text_pieces(tmp_path / "x.txt", "x"))
    assert "".join(pieces) == char * 5000 and max(map(len, pieces)) <= 1000


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_LINE", 1000)
    monkeypatch.setattr(files, "PIECE_BYTES", 100)
    (tmp_path / "x.txt").write_text("a\n" + "b" * 2000)
    with pytest.raises(UserError, match="--flag x: line 2 has more than 1,000 characters"):
        list(read_lines(tmp_path / "x.txt", "--flag x"))
    for suffix in ("jsonl", "csv"):
        path = write_table(tmp_path, suffix, ["a", "b" * 2000])
        with pytest.raises(UserError, match="--flag x: line [23] has more than 1,000 characters"):
            list(read_rows(path, ["text"], "--flag x"))
        assert len(list(read_rows(write_table(tmp_path, suffix, ["a" * 900] * 9), ["text"], "x"))) == 9


def test_a_character_cut_short_at_the_end_is_reported(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"abc" + "é".encode()[:1])
    with pytest.raises(UserError, match="--flag x: not UTF-8 text .byte 3.; convert it"):
        list(text_pieces(tmp_path / "x.txt", "--flag x"))


@pytest.mark.parametrize(
    "suffix, data, part",
    [
        ("jsonl", b'{"text": "a"}\n[1]\n', "line 2 is no object"),
        ("jsonl", b'{"text": "a"}\n{"text"\n', "line 2 is not JSON"),
        ("jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "line 2.*no column 'text'.*did you mean txt"),
        ("jsonl", b'{"text": "\xff"}\n', "not UTF-8"),
        ("jsonl", b'{"text": "a \\ud800"}\n', "line 1 holds half of a surrogate pair"),
        ("jsonl", b"[" * 200_000, "line 1 is not JSON"),
        ("jsonl", b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "line 1 is not JSON"),
        ("csv", b"", "no column 'text'; it has none"),
        ("csv", b"text,other\na,b\na, cut here,b\n", "line 3 has more fields than the header"),
        ("csv", b"other,text\na,b\ncut here\n", "line 3 has fewer fields than the header"),
        ("csv", b"text,text\na,b\n", "several columns are called 'text'"),
        ("parquet", b"PAR1 but no more", "cannot be read as parquet"),
    ],
)
def test_tables_that_are_wrong(tmp_path, suffix, data, part):
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(data)
    with pytest.raises(UserError, match=part):
        load_file(path)


@pytest.mark.parametrize(
    "suffix, data, texts",
    [
        # a byte order mark at the start; a surrogate pair
        ("jsonl", '\ufeff{"text": "a"}\n{"text": "\\ud83d\\ude00"}\n', ["a", "\U0001f600"]),
        # a comma at the end; a missing field of a column that is not read
        ("csv", "text,other\na,b,\nc\n", ["a", "c"]),
    ],
)
def test_tables_with_harmless_oddities(tmp_path, suffix, data, texts):
    (tmp_path / f"x.{suffix}").write_text(data, encoding="utf-8")
    assert list(load_file(tmp_path / f"x.{suffix}").splits["all"]()) == texts


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_columns_come_in_the_order_asked_for(tmp_path, suffix):
    path = write_table(tmp_path, suffix, ["a", "b"])
    rows = [tuple(map(str, row)) for row in read_rows(path, ["other", "text"], "x")]
    assert rows == [("0", "a"), ("1", "b")]


def parquet_file(tmp_path, texts, **options):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "x.parquet", **options)
    return tmp_path / "x.parquet"


@pytest.mark.parametrize(
    "texts, options",
    [
        (["x" * 100_000] * 700, {}),  # a dictionary of one text
        (["x" * 70_000_000], {"compression": "zstd", "use_dictionary": False}),  # one page
        ([None] * 18_000_000, {}),
    ],
    ids=["dictionary", "compressed", "empty rows"],
)
def test_a_parquet_file_of_far_more_text_than_its_size_is_refused(tmp_path, texts, options):
    import pyarrow

    path = parquet_file(tmp_path, pyarrow.array(texts, pyarrow.string()), **options)
    del texts
    assert path.stat().st_size < 400_000
    before = pyarrow.total_allocated_bytes()
    with pytest.raises(UserError, match="--flag x: more than 67,108,864 bytes of text, 200 times the file"):
        list(read_rows(path, ["text"], "--flag x"))
    assert pyarrow.total_allocated_bytes() - before < 2**20


def test_no_damaged_bit_of_a_parquet_footer_ends_the_process(tmp_path):
    """In a process of its own: pyarrow aborts on some of them, if it is asked for the sizes of columns."""
    path = parquet_file(tmp_path, ["la ti", "mo"])
    content = path.read_bytes()
    length = int.from_bytes(content[-8:-4], "little")
    places = range(len(content) - 8 - length, len(content) - 8, 3)  # a third of them
    script = f"""
from pathlib import Path
from jaxgpt.data.readers import read_rows
from jaxgpt.errors import UserError
path = Path({str(path)!r})
content = path.read_bytes()
for at in {places}:
    for bit in range(8):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1:])
        try:
            list(read_rows(path, ["text"], "x"))
        except UserError:
            pass
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_parquet_file_that_compresses_well_is_read(tmp_path):
    texts = [f"2024-11-05 12:00:0{i % 10} INFO worker finished its job\n" * 20 for i in range(10_000)]
    path = parquet_file(tmp_path, texts, compression="zstd")
    assert sum(map(len, texts)) > 200 * path.stat().st_size
    assert [text for (text,) in read_rows(path, ["text"], "x")] == texts


@pytest.mark.parametrize("in_memory", [0, 2**26])
def test_parquet_texts_are_read_as_they_are_stored(tmp_path, monkeypatch, in_memory):
    """Plain pages, dictionaries and missing values, kept as stored or not."""
    monkeypatch.setattr(readers, "PARQUET_FLOOR", in_memory)
    monkeypatch.setattr(readers, "PARQUET_FACTOR", 10**6)
    import pyarrow

    texts = ["a", None, "", "b \u00e9", "a"] * 700
    plain = pyarrow.array(texts)
    for column in (plain, plain.dictionary_encode(), plain.cast("large_string")):
        for use_dictionary in (True, False):
            path = parquet_file(tmp_path, column, use_dictionary=use_dictionary)
            assert [text for (text,) in read_rows(path, ["text"], "x")] == texts


@pytest.mark.parametrize("texts", [[["a"]], [{"a": "b"}]])
def test_a_parquet_column_of_lists_holds_no_texts(tmp_path, texts):
    with pytest.raises(UserError, match="--flag x: the column 'text' holds .*not text; choose a column of texts"):
        list(read_rows(parquet_file(tmp_path, texts), ["text"], "--flag x"))


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_pipe_is_no_table(tmp_path, suffix):
    os.mkfifo(tmp_path / f"x.{suffix}")
    (tmp_path / f"zero.{suffix}").symlink_to("/dev/zero")
    for name in ("x", "zero"):
        with pytest.raises(UserError, match="--flag x: a pipe or a device; give a regular file"):
            list(read_rows(tmp_path / f"{name}.{suffix}", ["text"], "--flag x"))


def test_a_missing_table_is_not_available(tmp_path):
    with pytest.raises(NotAvailable, match="--flag x: no such file; check the path"):
        list(read_rows(tmp_path / "x.csv", ["text"], "--flag x"))


def test_columns_are_joined_by_blanks():
    assert list(join_columns([("a", "b"), (None, "c")], "x")) == ["a b", " c"]


def test_an_unreachable_hub_leaves_the_process_online(tmp_path, monkeypatch):
    """The hub's libraries are told to stay offline for one call, not for the rest of the process."""
    import datasets.config
    import huggingface_hub.constants

    flags = (datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(NotAvailable, match="--flag x: cannot be had from http://127.0.0.1:9: no network .*file:PATH"):
        hub_splits("some/thing", "--flag x")
    assert "HF_HUB_OFFLINE" not in os.environ
    assert (datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE) == flags


def test_a_hub_datasets_name_has_a_configuration_and_a_revision(tmp_path):
    assert split_spec("a/b") == ("a/b", "", "")
    assert split_spec("a/b:c") == ("a/b", "c", "")
    assert split_spec("a/b@main") == ("a/b", "", "main")
    assert split_spec("a/b:c@0123") == ("a/b", "c", "0123")
    (tmp_path / "x@y:z").mkdir()
    assert split_spec(str(tmp_path / "x@y:z")) == (str(tmp_path / "x@y:z"), "", "")


def test_row_groups_are_read_by_their_numbers(tmp_path):
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"text": [str(n) * 99 for n in range(10)]}), path, row_group_size=4)
    rows = [list(read_rows(path, ["text"], "--flag x", groups)) for groups in ([0], [1, 2], [2], None)]
    assert rows[0] + rows[1] == rows[3] and rows[2] == rows[3][8:] and len(rows[0]) == 4
    sizes = row_group_bytes(path, ["text"], "--flag x")
    assert len(sizes) == 3 and sizes[0] > sizes[2] > 2 * 99
    with pytest.raises(UserError, match="--flag x: no column 'body'; it has 'text'"):
        row_group_bytes(path, ["body"], "--flag x")
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="--flag x: cannot be read as parquet"):
        row_group_bytes(path, ["text"], "--flag x")
