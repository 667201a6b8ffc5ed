"""The reference's data on small examples worked out by hand. The parity suite compares it with `jaxgpt.data`."""

import hashlib

import pytest

torch = pytest.importorskip("torch")

from torch_ref import data  # noqa: E402


def test_characters_are_numbered_in_sorted_order_over_the_whole_text():
    vocabulary, train_N, val_N = data.char_tokens("banananan!")
    assert vocabulary == ["!", "a", "b", "n"]
    assert train_N.tolist() == [2, 1, 3, 1, 3, 1, 3, 1, 3] and val_N.tolist() == [0]
    assert train_N.dtype == val_N.dtype == torch.int64


def test_documents_are_followed_by_the_end_of_text_token():
    texts = ["ab\n", "", "  c  \n", "abcd"]
    encode = lambda text: [ord(char) for char in text.strip()]  # noqa: E731
    all_N = data.document_tokens(texts, encode, 7)
    assert all_N.tolist() == [97, 98, 7, 99, 7, 97, 98, 99, 100, 7] and all_N.dtype == torch.int64
    assert data.document_tokens(texts, encode, 7, min_chars=1).tolist() == [97, 98, 7, 97, 98, 99, 100, 7]
    assert data.document_tokens(texts, encode, 7, min_chars=1, max_texts=1).tolist() == [97, 98, 7]
    assert data.document_tokens(texts, encode, None, min_chars=2).tolist() == [97, 98, 99, 100]


def test_lines_keep_their_ends(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes("é\r\n\n a \nlast".encode())
    assert data.read_lines(path) == ["é\r\n", "\n", " a \n", "last"]


def test_released_rows_of_ag_news(tmp_path):
    path = tmp_path / "test.csv"
    path.write_text('"3","Oil, up","A ""rise"""\n"1","Talks","Go on"\n')
    assert data.ag_news(path) == [('Oil, up A "rise"', 2), ("Talks Go on", 0)]


def test_rows_of_the_hub_and_of_tables(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"text": "Talks", "label": 0}, {"text": "Oil", "label": 2}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")
    assert data.ag_news(tmp_path / "test.parquet") == [("Talks", 0), ("Oil", 2)]
    (tmp_path / "rows.jsonl").write_text('{"text": "Talks", "label": 0}\n\n{"text": "Oil", "label": 2}\n')
    assert data.read_rows(tmp_path / "rows.jsonl") == rows
    (tmp_path / "rows.csv").write_text("text,label\nTalks,0\nOil,2\n")
    assert data.read_rows(tmp_path / "rows.csv") == [{k: str(v) for k, v in row.items()} for row in rows]


def test_a_fifth_of_the_rows_tests():
    examples = [(f"text {i}", i) for i in range(14)]
    train, test = data.holdout_split(examples)
    assert len(test) == 2 and sorted(train + test, key=lambda row: row[1]) == examples
    assert train == sorted(train, key=lambda row: row[1]) and test == sorted(test, key=lambda row: row[1])
    digest = {i: hashlib.sha256(f"0 {i}".encode()).digest() for _, i in examples}
    assert max(digest[i] for _, i in test) < min(digest[i] for _, i in train)
