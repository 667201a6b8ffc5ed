"""The stand-in corpus, and what is measured on it."""

import pytest
from pyarrow import parquet

from benchmarks import tokenise
from jaxgpt.data.files import NotAvailable
from jaxgpt.data.tokenizer import gpt2_folder


def test_the_corpus_has_the_size_that_was_asked_for(tmp_path):
    tokenise.write_corpus(tmp_path / "x.parquet", 2_000_000)
    texts = parquet.read_table(tmp_path / "x.parquet")["text"].to_pylist()
    assert 0 <= sum(len(text.encode()) for text in texts) - 2_000_000 < 20_000_000  # a row group more
    assert len(set(texts)) == len(texts)


@pytest.mark.slow
def test_both_sides_make_the_same_tokens():
    """`measure` compares their numbers."""
    try:
        gpt2_folder(None, print)
    except NotAvailable as e:
        pytest.skip(f"GPT-2's vocabulary: {e}")
    row = tokenise.measure(40, 1)
    assert row["tokens"] > 5_000_000
    assert 0.2 < row["ratio"] < 5 and row["epoch"]["million_tokens_per_s"] > 0
    assert 50 < row["shard"]["peak_mb"] < 2000 and 50 < row["epoch"]["peak_mb"] < 2000
