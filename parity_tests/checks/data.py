"""The data of both sides: each reads the same files and makes tokens, batches and labels of them with its own code."""

import contextlib
import csv
import dataclasses
import io
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from jaxgpt.config import FinetuneConfig, ModelConfig, TrainConfig
from jaxgpt.data import labeled, sampler
from jaxgpt.data.corpora import load_corpus
from jaxgpt.data.sampler import PADDING
from jaxgpt.data.token_cache import tokenize_corpus
from jaxgpt.data.tokenizer import END_OF_TEXT, Gpt2Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.parity.harness import Row
from jaxgpt.presets import PRESETS
from parity_tests.tolerances import row
from torch_ref import data as reference
from torch_ref import datasets, finetune
from torch_ref.train import in_order

TOKENS, BATCHES, EXAMPLES = "data, tokens that differ", "data, batches that differ", "data, examples that differ"
MIN_CHARS = 10
SMALL = TrainConfig(batch_size=3, model=ModelConfig(n_layer=1, n_head=1, n_embd=3, block_size=5))


def check_data(quick: bool) -> Iterator[Row]:
    """Texts of our own with all kinds of characters and lines, and the tutorials' datasets where they are found."""
    with tempfile.TemporaryDirectory() as folder, _without_caches(folder):
        yield from compare_own(Path(folder))
        if not quick:
            yield from compare_found()


def compare_own(folder: Path) -> Iterator[Row]:
    """Characters, bytes and byte pairs; one text, documents, and labeled texts."""
    write_own(folder)
    config = dataclasses.replace(SMALL, dataset=f"file:{folder / 'text.txt'}")
    for tokenizer in ("char", "byte"):
        yield from compare_corpus(dataclasses.replace(config, tokenizer=tokenizer), f"our text, {tokenizer}", folder)
    documents = dataclasses.replace(SMALL, dataset="wikitext-2", min_chars=MIN_CHARS, max_train_texts=40)
    config = dataclasses.replace(documents, tokenizer="byte")
    yield from compare_corpus(config, "our documents, byte", folder)
    config = dataclasses.replace(documents, tokenizer="bpe:300")
    yield from compare_documents(config, "our documents, byte pairs of their own", folder)
    config = dataclasses.replace(documents, tokenizer="gpt2")
    yield from compare_corpus(config, "our documents, GPT-2's byte pairs", folder)
    config = FinetuneConfig(dataset="ag_news", max_tokens=9)
    yield from compare_labeled(config, "our texts as AG News, train and test", folder)
    (folder / "ag_news" / "train.csv").unlink()
    yield from compare_labeled(config, "our texts as AG News, test alone", folder)


def compare_found() -> Iterator[Row]:
    """The datasets of the tutorials, as they train on them."""
    yield from compare_corpus(PRESETS["tinygpt"], "tinyshakespeare, char", None)
    yield from compare_corpus(PRESETS["wikitext2"], "WikiText-2, GPT-2's byte pairs", None)
    yield from compare_labeled(FinetuneConfig(dataset="ag_news"), "AG News", None)


# ---------------------------------------------------------------------------------------------------------- comparisons


def compare_corpus(config: TrainConfig, case: str, data_dir: Path | None) -> Iterator[Row]:
    """The vocabulary's size, every token of train and validation, and the batches of a whole split."""
    try:
        theirs, *their_splits = _silently(lambda: datasets.load_corpus(config, data_dir))
    except UserError as e:  # the reference downloads nothing
        yield row(TOKENS, "int64", case, note=str(e), not_run=True)
        return
    ours = _our_data(config, data_dir)
    n_wrong = abs(theirs.vocab_size - ours.tokenizer.vocab_size)
    n_wrong += sum(map(_n_differing, (ours.train_N, ours.val_N), (s.numpy() for s in their_splits)))
    yield row(TOKENS, "int64", f"{case}, {len(ours.train_N) + len(ours.val_N):,} tokens", n_wrong)
    yield row(BATCHES, "int64", case, compare_batches(config, ours.val_N, their_splits[1]))


def compare_documents(config: TrainConfig, case: str, data_dir: Path) -> Iterator[Row]:
    """Which documents are kept and how they end. Both sides take our tokenizer, which has no counterpart in PyTorch."""
    ours = _our_data(config, data_dir)
    end_of_text = ours.tokenizer.vocab_size - 1

    def encode(text: str) -> list[int]:
        return ours.tokenizer.encode(text).tolist()

    paths = datasets.wikitext_files(config.dataset, data_dir)
    n_wrong = 0
    for path, limit, tokens_N in zip(paths, (config.max_train_texts, 0), (ours.train_N, ours.val_N), strict=True):
        texts = reference.read_lines(path)
        theirs = reference.document_tokens(texts, encode, end_of_text, config.min_chars, limit)
        n_wrong += _n_differing(tokens_N, theirs.numpy())
    yield row(TOKENS, "int64", f"{case}, {len(ours.train_N) + len(ours.val_N):,} tokens", n_wrong)


def compare_batches(config: TrainConfig, ours_N: np.ndarray, theirs_N: torch.Tensor) -> int:
    """How many inputs and targets differ in the batches of a whole split, in order."""
    n_wrong, batches = 0, in_order(theirs_N, config)
    for batch in sampler.whole_split(ours_N, config.batch_size, config.model.block_size):
        real_B = batch.counts_BT.any(axis=1)  # the other rows fill the last batch
        ours = sampler.inputs_and_targets(batch.window_BT[real_B])
        theirs = next(batches, (torch.empty(0),) * 2)
        n_wrong += sum(_n_differing(np.ravel(a), b.numpy().ravel()) for a, b in zip(ours, theirs, strict=True))
    return n_wrong + sum(idx_BT.numel() for idx_BT, _ in batches)


def compare_labeled(config: FinetuneConfig, case: str, data_dir: Path | None) -> Iterator[Row]:
    """Classes, texts and labels; and where GPT-2's vocabulary is found, the padded tokens of the texts to test on."""
    try:
        classes, train, test = _silently(lambda: datasets.load_examples(config, data_dir))
    except UserError as e:
        yield row(EXAMPLES, "int64", case, note=str(e), not_run=True)
        return
    ours = labeled.load_labeled(config, data_dir, lambda line: None)
    n_wrong = _n_differing(list(ours.labels), classes)
    n_wrong += _n_differing(list(ours.train), train) + _n_differing(list(ours.test), test)
    yield row(EXAMPLES, "int64", f"{case}, {len(train) + len(test):,} texts", n_wrong)
    try:
        folder = datasets.gpt2_folder(data_dir)
    except UserError as e:
        yield row(TOKENS, "int64", case, note=str(e), not_run=True)
        return
    encoding, tokenizer, texts = reference.gpt2_encoding(folder), Gpt2Tokenizer(folder), [text for text, _ in test]
    ids = [encoding.encode_ordinary(text) for text in texts]
    idx_NT, length_N = (a.numpy() for a in finetune.pad(ids, config.max_tokens, encoding.eot_token))
    ours_NT = labeled.encode(texts, tokenizer, config.max_tokens)
    n_wrong = int(((ours_NT != PADDING).sum(1) != length_N).sum())
    n_wrong += int((np.where(ours_NT == PADDING, labeled.pad_token(tokenizer), ours_NT) != idx_NT).sum())
    yield row(TOKENS, "int64", f"{case}, {ours_NT.size:,} tokens of texts to test on", n_wrong)


def _n_differing(ours: Any, theirs: Any) -> int:
    """How many places of two sequences differ, those that one alone has included."""
    n = min(len(ours), len(theirs))
    if isinstance(ours, np.ndarray):
        different = int((ours[:n] != theirs[:n]).sum())
    else:
        different = sum(a != b for a, b in zip(ours[:n], theirs[:n], strict=True))
    return different + abs(len(ours) - len(theirs))


def _our_data(config: TrainConfig, data_dir: Path | None) -> Any:
    def silent(line: str) -> None:
        pass

    return tokenize_corpus(config, load_corpus(config.dataset, data_dir, silent), data_dir, silent)[1]


# ---------------------------------------------------------------------------------------------------------------- texts


def write_own(folder: Path) -> None:
    """text.txt, wikitext-2/ and ag_news/ with texts of our own, in UTF-8."""
    draw = random.Random(0)

    def words(n: int) -> str:
        return " ".join(draw.choice(["la", "née", "mo", "ru", "s'il", "42", "\U0001f600", "Zürich,"]) for _ in range(n))

    (folder / "text.txt").write_bytes(f"{words(900)}\r\n\n\t{END_OF_TEXT}  {words(90)}\n".encode())
    # Empty and blank lines, lines of exactly MIN_CHARS characters and of one more, the name of the end of text itself,
    # carriage returns, and a last line that does not end.
    odd = [
        "",
        " ",
        "x" * MIN_CHARS,
        f"  {'y' * (MIN_CHARS + 1)}  ",
        END_OF_TEXT,
        f"{END_OF_TEXT} {words(3)}",
        "a\rb" * 5,
    ]
    (folder / "wikitext-2").mkdir()
    for split in ("train", "valid"):
        lines = [*odd, *(words(draw.randrange(12)) for _ in range(60)), *odd, words(9)]
        (folder / "wikitext-2" / f"{split}.txt").write_bytes("\n".join(lines).encode())
    (folder / "ag_news").mkdir()
    for split in ("train", "test"):
        with (folder / "ag_news" / f"{split}.csv").open("w", newline="", encoding="utf-8") as f:
            writer = csv.writer(f, quoting=csv.QUOTE_ALL)
            for number in range(30):
                writer.writerow([number % 4 + 1, words(draw.randint(1, 3)), f'{words(draw.randrange(9))} "\n", \\'])


@contextlib.contextmanager
def _without_caches(folder: str) -> Iterator[None]:
    """Tokens are made here: none come from a cache that an earlier version may have written."""
    variables = {"XDG_CACHE_HOME": str(Path(folder) / "cache")}
    with contextlib.suppress(UserError):  # the vocabulary may lie in the user's cache
        variables["TIKTOKEN_CACHE_DIR"] = os.path.abspath(datasets.gpt2_folder(None))
    with patch.dict(os.environ, variables):
        yield


def _silently(load: Callable[[], Any]) -> Any:
    """Runs `load` and drops what the reference prints, which would stand in the suite's table."""
    with contextlib.redirect_stdout(io.StringIO()):
        return load()
