"""The tutorials' data: files to texts, texts to tensors of tokens.

Every file is read whole. `jaxgpt.data`, which streams and caches, reads the same files; neither uses the other, and the
parity suite compares their tokens.

Axes: N tokens.
"""

import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Example = tuple[str, int]  # a text and its class, counted from 0


def char_tokens(text: str) -> tuple[list[str], Tensor, Tensor]:
    """Character tokens of a text, as for TinyShakespeare.

    Returns:
        The vocabulary (the distinct characters of the whole text, sorted; a character's index is its token), and the
        tokens of train and validation, int64 [N] each.
    """
    vocabulary = sorted(set(text))
    index = {char: i for i, char in enumerate(vocabulary)}
    tokens_N = torch.tensor([index[char] for char in text], dtype=torch.int64)
    return vocabulary, *train_val_split(tokens_N)


def train_val_split(tokens_N: Tensor) -> tuple[Tensor, Tensor]:
    """Train and validation of a corpus without splits: its first 90 % and the rest."""
    n_train = int(0.9 * len(tokens_N))
    return tokens_N[:n_train], tokens_N[n_train:]


def document_tokens(
    texts: Iterable[str],
    encode: Callable[[str], list[int]],
    end_of_text: int | None,
    min_chars: int = 0,
    max_texts: int = 0,
) -> Tensor:
    """The tokens of documents, concatenated, as for WikiText-2: after each text the end-of-text token. int64 [N].

    Args:
        end_of_text: the token after each text; None for a tokenizer that has none.
        min_chars: leave out texts of at most so many characters, white space at both ends not counted; 0 leaves out
            only empty texts.
        max_texts: stop after the first so many texts that are long enough (0 = all).
    """
    kept = [text for text in texts if text and (min_chars == 0 or len(text.strip()) > min_chars)]
    tokens: list[int] = []
    for text in kept[: max_texts or None]:
        tokens += encode(text)
        if end_of_text is not None:
            tokens.append(end_of_text)
    return torch.tensor(tokens, dtype=torch.int64)


def gpt2_encoding(folder: Path) -> Any:
    """tiktoken's encoding "gpt2" from a folder that holds its two files: `encode_ordinary`, `decode`, `eot_token`."""
    import tiktoken

    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)
    return tiktoken.get_encoding("gpt2")


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, each with its line feed; carriage returns are kept."""
    with path.open(encoding="utf-8", newline="\n") as f:
        return list(f)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a table with named columns: CSV with a header, JSON lines, or parquet."""
    if path.suffix.lower() == ".parquet":
        from pyarrow import parquet

        return parquet.ParquetFile(path).read().to_pylist()
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return [json.loads(line) for line in read_lines(path) if line.strip()]
    with path.open(newline="", encoding="utf-8-sig") as f:
        return list(csv.DictReader(f))


def ag_news(path: Path) -> list[Example]:
    """The texts of AG News with their classes 0..3.

    The released CSV has no header and the columns class 1..4, title, description; title and description are joined by
    a space. The parquet files of the Hugging Face hub have the columns text and label 0..3.
    """
    if path.suffix.lower() == ".parquet":
        return [(row["text"], row["label"]) for row in read_rows(path)]
    with path.open(newline="", encoding="utf-8-sig") as f:
        return [(f"{title} {description}", int(label) - 1) for label, title, description in csv.reader(f)]


def holdout_split(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Train and test examples of a dataset that comes without this split; a fifth of them, rounded down, tests.

    The test examples are those whose row number, counted from 0, has the smallest SHA-256 digest of "0 NUMBER" (the
    first 0 is the split's fixed seed). Both parts keep the order of the rows.
    """
    by_digest = sorted(range(len(examples)), key=lambda i: hashlib.sha256(f"0 {i}".encode()).hexdigest())
    test = set(by_digest[: len(examples) // 5])
    return (
        [example for i, example in enumerate(examples) if i not in test],
        [example for i, example in enumerate(examples) if i in test],
    )
