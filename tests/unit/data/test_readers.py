"""Reading text files and tables as streams."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.data.samples import load_file, write_table

from jaxgpt.data import files
from jaxgpt.data.files import NotAvailable
from jaxgpt.data.readers import hub_splits, join_columns, read_lines, read_rows, text_pieces
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
