"""A corpus and a tokenizer -> the tokens of train and validation, in memory or in a memory-mapped file of the cache.

A folder of the cache holds, of each split, `SPLIT.bin` (the tokens, nothing else) and `SPLIT.ends.npy` (where each text
ends), and `index.json` with their sizes and checksums. Its name is the digest of data and tokenizer. It appears under
that name only when it is complete; one that is damaged is made again.
"""

import atexit
import contextlib
import dataclasses
import hashlib
import json
import mmap
import os
import shutil
import tempfile
import time
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.checks import flag
from jaxgpt.config import TrainConfig
from jaxgpt.data_files import PIECE_BYTES, cache_folder, new_folder
from jaxgpt.datasets import Corpus
from jaxgpt.errors import UserError
from jaxgpt.texts import Texts
from jaxgpt.tokenizer import Tokenizer, make_tokenizer

TRAIN_FRACTION = 0.9  # of a corpus without splits the first 90 % train, the rest validates, as documented
IN_MEMORY = 2**22  # characters and bytes: as many tokens are made again faster than a file is kept
DOCUMENTED_PROMPT = "ROMEO:"
CHECKED_BYTES = 2**30  # files up to this size are read through before they are used
PROGRESS_SECONDS = 10.0


class Split(NamedTuple):
    """Tokens of one split, and for texts that stand for themselves the position after each."""

    tokens_N: np.ndarray
    end_D: np.ndarray

    def texts(self, first: int, n_texts: int) -> "Split":
        """Of its texts `n_texts` (0: all that follow) from `first` on."""
        end_D = self.end_D[first : first + n_texts] if n_texts else self.end_D[first:]
        start = int(self.end_D[first - 1]) if first else 0
        stop = int(end_D[-1]) if len(end_D) else start
        return Split(self.tokens_N[start:stop], end_D - start)


class Data(NamedTuple):
    """What a language model is trained on."""

    tokenizer: Tokenizer
    train_N: np.ndarray
    val_N: np.ndarray


def prepare(
    config: TrainConfig,
    corpus: Corpus,
    data_dir: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    tokenizer: Tokenizer | None = None,
) -> tuple[TrainConfig, Data]:
    """The tokens, and the configuration with the number of steps that its epochs come to.

    Args:
        tokenizer: a run's own, in place of a new one.

    Raises:
        UserError: as `make_tokenizer` and `split_tokens` do.
    """
    tokenizer = tokenizer or make_tokenizer(config.tokenizer, corpus, data_dir, say)
    data = Data(tokenizer, *split_tokens(corpus, tokenizer, config, say))
    if config.epochs:
        steps = config.epochs * (n_chunks(len(data.train_N), config.model.block_size) // config.batch_size)
        config = dataclasses.replace(config, steps=min(config.steps, steps))
    return config, data


def sample_prompt(given: str | None, tokenizer: Tokenizer, corpus: Corpus) -> str:
    """What a run's sample continues: the documented prompt where the vocabulary has it, unless one is given.

    Raises:
        UserError: the given `--prompt` has characters outside the vocabulary.
    """
    try:
        tokenizer.encode(given or DOCUMENTED_PROMPT)
    except UserError as e:
        if given:
            raise UserError(f"--prompt: {e}") from None
        texts = next(iter(corpus.splits.values()))
        return next(text[0] for text in texts() if text)
    return given or DOCUMENTED_PROMPT


def release(tokens_N: np.ndarray) -> None:
    """Lets go of what was read through a memory-mapped file: it counts as this process's memory until it ends.

    The system keeps it at hand as long as it has room, so reading it again is cheap. Does nothing to other arrays. Not
    for what was mapped to be changed in memory alone (`mode="c"`): the changes would be gone.
    """
    mapped: Any = tokens_N
    while isinstance(mapped, np.ndarray):
        mapped = mapped.base
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
        with contextlib.suppress(OSError):  # where memory is locked
            mapped.madvise(mmap.MADV_DONTNEED)


def n_chunks(n_tokens: int, block_size: int) -> int:
    """The number of chunks of a block plus one at stride a block: for start in range(0, n_tokens - block_size, ...)."""
    return len(range(0, n_tokens - block_size, block_size))


def token_dtype(vocab_size: int) -> type[np.generic]:
    """The smallest unsigned type that holds every token, to spend little of a device's memory."""
    return np.uint8 if vocab_size <= 2**8 else np.uint16 if vocab_size <= 2**16 else np.int32


def split_tokens(
    corpus: Corpus, tokenizer: Tokenizer, config: TrainConfig, say: Callable[[str], None] = lambda line: None
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens [N] of train and validation, of the smallest type that holds the vocabulary; perhaps memory-mapped.

    Each text of a corpus of many is followed by the end-of-text token, where the tokenizer has one. Texts are left out
    and limited in number as the configuration says. A corpus without splits is cut at 90 % of its tokens, one of many
    texts after the text in which that falls.

    Raises:
        UserError: nothing is left, or a split cannot fill what a step needs; or tokens outside the vocabulary.
    """
    if corpus.bins or not corpus.documents:
        kind = "holds tokens, not texts" if corpus.bins else "is a single text"
        for name in ("min_chars", "max_train_texts", "max_val_texts"):
            if value := getattr(config, name):
                raise UserError(f"{flag(name)} {value}: --dataset {corpus.name} {kind}; give {flag(name)} 0")
    if corpus.bins:
        splits = {split: _bin(path, split, tokenizer, corpus.name) for split, path in corpus.bins.items()}
    else:
        splits = _tokenised(corpus, tokenizer, config.min_chars, say)
    if "all" in splits:
        splits = _cut(splits["all"], corpus)
    train, validation = splits["train"], splits["validation"]
    if config.max_train_texts:
        train = train.texts(0, config.max_train_texts)
    if config.max_val_texts:
        validation = validation.texts(0, config.max_val_texts)
    val_N = validation.tokens_N[: config.max_val_tokens or None]
    _require_enough(corpus, config, len(train.tokens_N), len(val_N))
    return train.tokens_N, val_N


def _cut(split: Split, corpus: Corpus) -> dict[str, Split]:
    at = int(TRAIN_FRACTION * len(split.tokens_N))
    if not corpus.documents:
        none = np.zeros(0, np.int64)
        return {"train": Split(split.tokens_N[:at], none), "validation": Split(split.tokens_N[at:], none)}
    # The text in which 90 % falls still trains, unless none would be left to validate.
    n_train = min(int(np.searchsorted(split.end_D, at)) + 1, len(split.end_D) - 1)
    if n_train < 1:
        raise UserError(f"--dataset {corpus.name}: a single text of its own; give two or more, or the text as .txt")
    return {"train": split.texts(0, n_train), "validation": split.texts(n_train, 0)}


def _require_enough(corpus: Corpus, config: TrainConfig, n_train: int, n_val: int) -> None:
    block_size = config.model.block_size
    if n_train <= block_size or n_val <= block_size:
        raise UserError(
            f"--dataset {corpus.name}: too short: {n_train} training and {n_val} validation tokens, each must hold a "
            f"block plus one ({block_size + 1}); give a longer text or a smaller --model.block-size"
        )
    chunks = n_chunks(n_train, block_size)
    more = f" than --max-train-texts {config.max_train_texts}" if config.max_train_texts else ""
    if config.eval_batches and n_val >= 2**31:
        raise UserError(
            f"--eval-batches {config.eval_batches}: cannot draw from {n_val:,} tokens; give --max-val-tokens"
        )
    if config.packing == "windows" and n_train >= 2**31:
        raise UserError(f"--packing windows: {n_train:,} tokens are more than it can number; give --packing chunks")
    if config.packing != "windows" and chunks < config.batch_size:
        raise UserError(
            f"--dataset {corpus.name}: {chunks} chunks of --model.block-size {block_size} to train on, fewer than "
            f"--batch-size {config.batch_size}; lower it, or give more text{more}"
        )


def _bin(path: Path, split: str, tokenizer: Tokenizer, name: str) -> Split:
    """nanoGPT's file of a split, as it is."""
    tokens_N = np.memmap(path, np.dtype("<u2"), "r")
    step = PIECE_BYTES
    for at in range(0, len(tokens_N), step) if tokenizer.vocab_size < 2**16 else ():
        release(tokens_N)
        if (largest := int(tokens_N[at : at + step].max())) >= tokenizer.vocab_size:
            raise UserError(
                f"--dataset {name}: {path.name} holds token {largest}, outside the vocabulary of "
                f"{tokenizer.vocab_size}; give the --tokenizer that it was made with"
            )
    return Split(tokens_N, np.zeros(0, np.int64))


# ----------------------------------------------------------------------------------------------- tokenising and caching


def _tokenised(corpus: Corpus, tokenizer: Tokenizer, min_chars: int, say: Callable[[str], None]) -> dict[str, Split]:
    form = {name: value for name, value in tokenizer.to_json().items() if name != "folder"}
    key = hashlib.sha256(json.dumps([2, corpus.sha256, form, min_chars], sort_keys=True).encode()).hexdigest()
    folder = cache_folder() / "tokens" / key[:32]
    if (folder / "index.json").exists():
        try:
            return _opened(folder, set(corpus.splits))
        except (OSError, AttributeError, EOFError, KeyError, TypeError, ValueError):
            say(f"{folder} is damaged; tokenising again")
    writers = {split: _Writer(texts, corpus, tokenizer, min_chars) for split, texts in corpus.splits.items()}
    if tokenizer.kind in ("char", "byte") and all(writer.fill(IN_MEMORY) for writer in writers.values()):
        return {split: writer.in_memory() for split, writer in writers.items()}
    try:
        with new_folder(folder) as partial:
            _write(partial, writers, say)
    except OSError as e:
        folder = Path(tempfile.mkdtemp(prefix="jaxgpt-tokens-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        say(f"{cache_folder()} cannot be written ({e.strerror}); keeping the tokens in {folder} until the end")
        try:
            _write(folder, {s: _Writer(t, corpus, tokenizer, min_chars) for s, t in corpus.splits.items()}, say)
        except OSError as e:
            raise UserError(
                f"--dataset {corpus.name}: no room for its tokens in {folder} ({e.strerror}); make room, or set "
                "XDG_CACHE_HOME to a folder that has it"
            ) from None
    return _opened(folder, set(corpus.splits))


class _Writer:
    """The tokens of one split, made piece by piece."""

    def __init__(self, texts: Texts, corpus: Corpus, tokenizer: Tokenizer, min_chars: int):
        self.corpus, self.tokenizer, self.min_chars = corpus, tokenizer, min_chars
        self.dtype = np.dtype(token_dtype(tokenizer.vocab_size)).newbyteorder("<")
        self._batches = self._encoded(texts)
        self._made: list[np.ndarray] = []
        self.end_D = array("q")
        self.n_tokens = 0

    def fill(self, limit: int) -> bool:
        """Makes tokens and keeps them in memory; False if there are more than `limit`."""
        for tokens_N in self._batches:
            self._made.append(tokens_N)
            if self.n_tokens > limit:
                return False
        return True

    def in_memory(self) -> Split:
        self._require_some()
        return Split(np.concatenate(self._made), np.array(self.end_D, np.int64))

    def write(self, path: Path, say: Callable[[str], None]) -> int:
        """Writes all tokens to a file; returns its checksum."""
        checksum, told = 0, time.monotonic()
        with path.open("wb") as f:
            for tokens_N in self._take():
                data = tokens_N.tobytes()
                checksum = zlib.crc32(data, checksum)
                f.write(data)
                if time.monotonic() - told > PROGRESS_SECONDS:
                    told = time.monotonic()
                    say(f"tokenising {self.corpus.name}: {self.n_tokens:,} tokens")
        self._require_some()
        return checksum

    def _take(self) -> Iterator[np.ndarray]:
        yield from self._made
        yield from self._batches

    def _require_some(self) -> None:
        if not self.n_tokens:
            least = f"no text has more than --min-chars {self.min_chars} characters" if self.min_chars else "no text"
            raise UserError(f"--dataset {self.corpus.name}: {least}; give one that has")

    def _encoded(self, texts: Texts) -> Iterator[np.ndarray]:
        """The tokens of about a megabyte of texts at a time; the tokenizers' own code runs in parallel."""
        # The `tokenizers` library takes two hundred bytes for each byte that it works on.
        n_threads = min(os.cpu_count() or 1, 2 if self.tokenizer.kind == "bpe" else 8)
        for tokens in _in_order(self._encode, _batched(self._chosen(texts())), n_threads):
            if self.corpus.documents:
                for text_tokens in tokens:
                    self.n_tokens += len(text_tokens)
                    self.end_D.append(self.n_tokens)
            else:
                self.n_tokens += sum(map(len, tokens))
            yield np.concatenate(tokens)

    def _chosen(self, texts: Iterable[str]) -> Iterator[str]:
        for text in texts:
            if text and not (self.min_chars and len(text.strip()) <= self.min_chars):
                yield text

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        end = self.tokenizer.end_of_text if self.corpus.documents else None
        suffix = np.array([] if end is None else [end], self.dtype)
        try:
            return [np.concatenate([self.tokenizer.encode(text).astype(self.dtype), suffix]) for text in texts]
        except UserError as e:
            raise UserError(f"--dataset {self.corpus.name}: {e}") from None


def _batched(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= PIECE_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _in_order(function: Callable, values: Iterable, n_threads: int) -> Iterator:
    """`map` on several threads, a few values ahead and no more."""
    with ThreadPoolExecutor(n_threads) as pool:
        ahead: deque[Future] = deque()
        for value in values:
            ahead.append(pool.submit(function, value))
            if len(ahead) > n_threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


@dataclass(frozen=True)
class _File:
    """What index.json says of a split."""

    dtype: str
    n_tokens: int
    n_texts: int
    crc32: int
    ends_crc32: int


def _write(folder: Path, writers: dict[str, _Writer], say: Callable[[str], None]) -> None:
    index = {}
    for split, writer in writers.items():
        crc32 = writer.write(folder / f"{split}.bin", say)
        ends = folder / f"{split}.ends.npy"
        np.save(ends, np.array(writer.end_D, np.int64))
        index[split] = vars(_File(writer.dtype.str, writer.n_tokens, len(writer.end_D), crc32, _crc32(ends)))
    (folder / "index.json").write_text(json.dumps(index))
    for path in folder.iterdir():  # on the disk itself, before the folder takes its name
        with path.open("rb") as f:
            os.fsync(f.fileno())


def _opened(folder: Path, wanted: set[str]) -> dict[str, Split]:
    """The splits of a folder. Raises ValueError and others if it is damaged."""
    splits = {}
    for split, values in json.loads((folder / "index.json").read_text()).items():
        file, path = _File(**values), folder / f"{split}.bin"
        dtype = np.dtype(file.dtype)
        if path.stat().st_size != file.n_tokens * dtype.itemsize:
            raise ValueError(f"{path} is cut short")
        if path.stat().st_size <= CHECKED_BYTES and _crc32(path) != file.crc32:
            raise ValueError(f"{path} has changed")
        ends = folder / f"{split}.ends.npy"
        if _crc32(ends) != file.ends_crc32:
            raise ValueError(f"{ends} has changed")
        splits[split] = Split(np.memmap(path, dtype, "r"), np.load(ends))
    if set(splits) != wanted:
        raise ValueError(f"{folder} has other splits")
    return splits


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as f:
        while piece := f.read(PIECE_BYTES):
            checksum = zlib.crc32(piece, checksum)
    return checksum
