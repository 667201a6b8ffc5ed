"""The token cache: tokenizes a corpus once, into memory-mapped files below the user's cache folder.

The folder of a corpus and a tokenizer holds

    SPLIT.bin         the tokens of a split, little-endian, without a header
    SPLIT.ends.npy    int64 [D], the position after each document
    index.json        the type, sizes and checksums of these files

Its name is the digest of the data and the tokenizer. It gets that name only when it is complete, and a damaged folder
is written again. Axes: N tokens, D documents.
"""

import atexit
import dataclasses
import hashlib
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
from typing import NamedTuple

import numpy as np

from jaxgpt import strict_json
from jaxgpt.config import TrainConfig
from jaxgpt.data.corpora import Corpus
from jaxgpt.data.files import PIECE_BYTES, atomic_folder, cache_folder, open_regular, read_small
from jaxgpt.data.nanogpt import open_tokens
from jaxgpt.data.readers import Texts
from jaxgpt.data.shard_cache import ShardCache, default_workers
from jaxgpt.data.shards import TokenFiles, TokenFileShards, TokenShards
from jaxgpt.data.tokenizer import Tokenizer, identity, make_tokenizer
from jaxgpt.errors import UserError, flag

TRAIN_FRACTION = 0.9  # of a corpus without splits: the first 90 % train, the rest validates, as documented
MAX_UNCACHED_TOKENS = 2**22  # characters and bytes up to this number are tokenized faster than a file is checked
MAX_CHECKED_BYTES = 2**30  # the checksum of a larger file is not verified at each start
PROGRESS_SECONDS = 10.0
MAX_INDEX_BYTES = 2**20
TOKEN_DTYPES = ("|u1", "<u2", "<i4")  # of a file: those of `token_dtype`, little-endian
FORMAT = 2  # of a folder of the cache; part of its name


class Split(NamedTuple):
    """The tokens of one split.

    Args:
        tokens_N: in memory or memory-mapped.
        end_D: int64, the position after each document; empty for a corpus of one text.
    """

    tokens_N: np.ndarray
    end_D: np.ndarray

    def documents(self, first: int, n_documents: int) -> "Split":
        """The part with `n_documents` documents (0: all that remain) from number `first` on."""
        end_D = self.end_D[first : first + n_documents] if n_documents else self.end_D[first:]
        start = int(self.end_D[first - 1]) if first else 0
        stop = int(end_D[-1]) if len(end_D) else start
        return Split(self.tokens_N[start:stop], end_D - start)


class Data(NamedTuple):
    """What a language model trains on: the tokenizer, and the tokens [N] of train, or their shards, and validation."""

    tokenizer: Tokenizer
    train_N: np.ndarray | TokenShards
    val_N: np.ndarray


def tokenize_corpus(
    config: TrainConfig,
    corpus: Corpus,
    data_dir: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    tokenizer: Tokenizer | None = None,
) -> tuple[TrainConfig, Data]:
    """Tokenizes a corpus, and derives the number of steps from `--epochs`.

    Args:
        data_dir: a folder to search for GPT-2's vocabulary before all others.
        say: receives lines about the progress.
        tokenizer: the tokenizer of an existing run; None makes the one that the configuration names.

    Returns:
        The configuration with the total number of steps, and the tokens.

    Raises:
        UserError: what `make_tokenizer`, `split_tokens` and `open_shards` raise.
    """
    tokenizer = tokenizer or make_tokenizer(config.tokenizer, corpus, data_dir, say)
    require_token_dtype(config.token_dtype, corpus)
    if corpus.shards:
        return config, Data(tokenizer, *open_shards(corpus, tokenizer, config, say))
    train_N, val_N = split_tokens(corpus, tokenizer, config, say)
    if config.epochs:
        steps = config.epochs * (n_chunks(len(train_N), config.model.block_size) // config.batch_size)
        config = dataclasses.replace(config, steps=min(config.steps, steps))
    return config, Data(tokenizer, train_N, val_N)


def open_shards(
    corpus: Corpus, tokenizer: Tokenizer, config: TrainConfig, say: Callable[[str], None] = lambda line: None
) -> tuple[TokenShards, np.ndarray]:
    """The training tokens of a corpus in shards, and the tokens [N] that validate.

    Those are the first shard: of the corpus' validation split if it has one, else of the first file.

    Raises:
        UserError: a flag does not go with shards, the tokens are too few, or cannot be had.
    """
    for name in ("max_train_texts", "max_val_texts", "epochs"):
        if value := getattr(config, name):
            raise UserError(f"{flag(name)} {value}: --dataset {corpus.name} comes in shards; give {flag(name)} 0")
    if config.packing == "windows":
        raise UserError(
            f"--packing windows: draws from all tokens, and --dataset {corpus.name} comes in shards; give --packing "
            "chunks"
        )
    if not config.eval_every:
        raise UserError(f"--eval-every 0: --dataset {corpus.name} comes in shards, of unknown number; give a number")
    if isinstance(corpus.shards, TokenFiles):
        if config.min_chars:
            raise UserError(
                f"--min-chars {config.min_chars}: {corpus.name} holds tokens, not texts; give --min-chars 0"
            )
        shards = TokenFileShards(corpus.shards, tokenizer.vocab_size)
    else:
        assert corpus.shards
        dtype = np.dtype(token_dtype(tokenizer.vocab_size)).newbyteorder("<")
        shards = ShardCache(corpus.name, corpus.shards, tokenizer, dtype, config.min_chars, say, default_workers())
        say(
            f"streaming {corpus.name}: {shards.n_files:,} Parquet files of {corpus.shards.n_bytes / 1e9:,.3g} GB, "
            f"tokenized by {default_workers()} processes into {shards.work.folder}"
        )
    val_N = shards.validation()[: config.max_val_tokens or None]
    _require_enough(corpus, config, 2**31 - 1, len(val_N))
    return shards, val_N


def require_token_dtype(told: str, corpus: Corpus) -> None:
    """Raises `UserError` if `--token-dtype` is given for a corpus whose files say themselves what they hold."""
    if told != "auto" and corpus.nanogpt is None:
        what = "files say it in their header" if corpus.holds_tokens else "texts have none"
        raise UserError(f"--token-dtype {told}: --dataset {corpus.name} is none of nanoGPT's ({what}); leave it out")


def n_chunks(n_tokens: int, block_size: int) -> int:
    """The number of chunks of `block_size + 1` tokens that start at multiples of `block_size`."""
    return len(range(0, n_tokens - block_size, block_size))


def token_dtype(vocab_size: int) -> type[np.generic]:
    """The smallest type that holds every token: uint8, uint16 or int32. The tokens of a run may lie on the device."""
    return np.uint8 if vocab_size <= 2**8 else np.uint16 if vocab_size <= 2**16 else np.int32


# --------------------------------------------------------------------------------------------------------------- splits


def split_tokens(
    corpus: Corpus, tokenizer: Tokenizer, config: TrainConfig, say: Callable[[str], None] = lambda line: None
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of train and validation, from the cache if they are there.

    The end-of-text token, if the tokenizer has one, follows each document. `min_chars` leaves out short documents, and
    `max_train_texts`, `max_val_texts` and `max_val_tokens` limit their number. A corpus without splits is cut at 90 %
    of its tokens, a corpus of documents after the document at that position.

    Args:
        say: receives lines about the progress.

    Returns:
        The tokens [N] of train and of validation, of type `token_dtype`, in memory or memory-mapped.

    Raises:
        UserError: no text remains, a split is too short for one step, or a token file is not what it is said to be.
    """
    assert not corpus.shards
    if corpus.nanogpt or not corpus.documents:
        kind = "holds tokens, not texts" if corpus.nanogpt else "is a single text"
        for name in ("min_chars", "max_train_texts", "max_val_texts"):
            if value := getattr(config, name):
                raise UserError(f"{flag(name)} {value}: --dataset {corpus.name} {kind}; give {flag(name)} 0")
    if corpus.nanogpt:
        tokens = open_tokens(corpus.nanogpt, tokenizer, config.token_dtype)
        splits = {split: Split(tokens_N, np.zeros(0, np.int64)) for split, tokens_N in tokens.items()}
    else:
        splits = _cached_splits(corpus, tokenizer, config.min_chars, say)
    if "all" in splits:
        splits = _cut(splits["all"], corpus)
    train, validation = splits["train"], splits["validation"]
    if config.max_train_texts:
        train = train.documents(0, config.max_train_texts)
    if config.max_val_texts:
        validation = validation.documents(0, config.max_val_texts)
    val_N = validation.tokens_N[: config.max_val_tokens or None]
    _require_enough(corpus, config, len(train.tokens_N), len(val_N))
    return train.tokens_N, val_N


def _cut(split: Split, corpus: Corpus) -> dict[str, Split]:
    """Train and validation of a corpus without splits."""
    position = int(TRAIN_FRACTION * len(split.tokens_N))
    if not corpus.documents:
        no_ends = np.zeros(0, np.int64)
        return {
            "train": Split(split.tokens_N[:position], no_ends),
            "validation": Split(split.tokens_N[position:], no_ends),
        }
    # The document at the position trains, unless it is the last, so that one remains to validate.
    n_train = min(int(np.searchsorted(split.end_D, position)) + 1, len(split.end_D) - 1)
    if n_train < 1:
        raise UserError(f"--dataset {corpus.name}: a single text of its own; give two or more, or the text as .txt")
    return {"train": split.documents(0, n_train), "validation": split.documents(n_train, 0)}


def _require_enough(corpus: Corpus, config: TrainConfig, n_train: int, n_val: int) -> None:
    """Raises `UserError` unless the tokens suffice for a step, and the sampler's int32 can number them."""
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


# ----------------------------------------------------------------------------------------------------------- tokenizing


def _cached_splits(
    corpus: Corpus, tokenizer: Tokenizer, min_chars: int, say: Callable[[str], None]
) -> dict[str, Split]:
    """The corpus' splits, from the cache or tokenized into it. Few characters or bytes stay in memory."""
    key = strict_json.dumps([FORMAT, corpus.sha256, identity(tokenizer.to_json()), min_chars], sort_keys=True)
    folder = cache_folder() / "tokens" / hashlib.sha256(key.encode()).hexdigest()[:32]
    if (folder / "index.json").exists():
        try:
            return _open_folder(folder, set(corpus.splits))
        except (OSError, AttributeError, EOFError, KeyError, TypeError, ValueError):
            say(f"{folder} is damaged; tokenising again")

    def encoders() -> dict[str, _SplitEncoder]:
        return {split: _SplitEncoder(texts, corpus, tokenizer, min_chars) for split, texts in corpus.splits.items()}

    started = encoders()
    if tokenizer.kind in ("char", "byte") and all(e.encode_up_to(MAX_UNCACHED_TOKENS) for e in started.values()):
        return {split: encoder.in_memory() for split, encoder in started.items()}
    try:
        with atomic_folder(folder) as partial:
            _write_folder(partial, started, say)
    except OSError as e:
        cache, folder = cache_folder(), None
        try:
            folder = Path(tempfile.mkdtemp(prefix="jaxgpt-tokens-"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            say(f"{cache} cannot be written ({e.strerror}); keeping the tokens in {folder} until the end")
            _write_folder(folder, encoders(), say)
        except OSError as e:
            raise UserError(
                f"--dataset {corpus.name}: no room for its tokens in {folder or cache} ({e.strerror}); make room, or "
                "set XDG_CACHE_HOME to a folder that has it"
            ) from None
    return _open_folder(folder, set(corpus.splits))


class _SplitEncoder:
    """Encodes the texts of one split as a stream, first into memory, then into a file."""

    def __init__(self, texts: Texts, corpus: Corpus, tokenizer: Tokenizer, min_chars: int):
        self.corpus, self.tokenizer, self.min_chars = corpus, tokenizer, min_chars
        self.dtype = np.dtype(token_dtype(tokenizer.vocab_size)).newbyteorder("<")
        self.end_D = array("q")
        self.n_tokens = 0  # so far
        self._stream = self._encoded(texts)
        self._in_memory: list[np.ndarray] = []

    def encode_up_to(self, max_tokens: int) -> bool:
        """Encodes into memory. Returns False if there are more than `max_tokens` tokens, and stops."""
        for tokens_N in self._stream:
            self._in_memory.append(tokens_N)
            if self.n_tokens > max_tokens:
                return False
        return True

    def in_memory(self) -> Split:
        """The split, after `encode_up_to` returned True."""
        self._require_tokens()
        return Split(np.concatenate(self._in_memory), np.array(self.end_D, np.int64))

    def write(self, path: Path, say: Callable[[str], None]) -> int:
        """Encodes the rest, and writes all tokens to a file. Returns its CRC-32."""
        crc32, last_report = 0, time.monotonic()
        with path.open("wb") as f:
            for tokens_N in self._all_tokens():
                data = tokens_N.tobytes()
                crc32 = zlib.crc32(data, crc32)
                f.write(data)
                if time.monotonic() - last_report > PROGRESS_SECONDS:
                    last_report = time.monotonic()
                    say(f"tokenising {self.corpus.name}: {self.n_tokens:,} tokens")
        self._require_tokens()
        return crc32

    def _all_tokens(self) -> Iterator[np.ndarray]:
        yield from self._in_memory
        yield from self._stream

    def _require_tokens(self) -> None:
        if not self.n_tokens:
            reason = f"no text has more than --min-chars {self.min_chars} characters" if self.min_chars else "no text"
            raise UserError(f"--dataset {self.corpus.name}: {reason}; give one that has")

    def _encoded(self, texts: Texts) -> Iterator[np.ndarray]:
        """The tokens [N] of about a megabyte of texts at a time, encoded in several threads."""
        # The tokenizers run outside Python's global lock. `tokenizers` uses 200 bytes of memory for each byte of text.
        n_threads = min(os.cpu_count() or 1, 2 if self.tokenizer.kind == "bpe" else 8)
        for encoded in _map_in_threads(self._encode, _batched(self._long_enough(texts())), n_threads):
            if self.corpus.documents:
                for tokens_N in encoded:
                    self.n_tokens += len(tokens_N)
                    self.end_D.append(self.n_tokens)
            else:
                self.n_tokens += sum(map(len, encoded))
            yield np.concatenate(encoded)

    def _long_enough(self, texts: Iterable[str]) -> Iterator[str]:
        for text in texts:
            if text and not (self.min_chars and len(text.strip()) <= self.min_chars):
                yield text

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        """The tokens of each text, with the end-of-text token after a document."""
        end = self.tokenizer.end_of_text if self.corpus.documents else None
        suffix = np.array([] if end is None else [end], self.dtype)
        try:
            return [np.concatenate([self.tokenizer.encode(text).astype(self.dtype), suffix]) for text in texts]
        except UserError as e:
            raise UserError(f"--dataset {self.corpus.name}: {e}") from None


def _batched(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of texts with about a million characters each."""
    batch, n_chars = [], 0
    for text in texts:
        batch.append(text)
        n_chars += len(text)
        if n_chars >= PIECE_BYTES:
            yield batch
            batch, n_chars = [], 0
    if batch:
        yield batch


def _map_in_threads(function: Callable, values: Iterable, n_threads: int) -> Iterator:
    """`map` in several threads, in order. Unlike `Executor.map`, it takes few values before they are needed."""
    with ThreadPoolExecutor(n_threads) as pool:
        pending: deque[Future] = deque()
        for value in values:
            pending.append(pool.submit(function, value))
            if len(pending) > n_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


# ---------------------------------------------------------------------------------------------- the files of the cache


@dataclass(frozen=True)
class _IndexEntry:
    """What index.json records of a split."""

    dtype: str
    n_tokens: int
    n_texts: int
    crc32: int
    ends_crc32: int


def _write_folder(folder: Path, encoders: dict[str, _SplitEncoder], say: Callable[[str], None]) -> None:
    index = {}
    for split, encoder in encoders.items():
        crc32 = encoder.write(folder / f"{split}.bin", say)
        ends = folder / f"{split}.ends.npy"
        np.save(ends, np.array(encoder.end_D, np.int64))
        entry = _IndexEntry(encoder.dtype.str, encoder.n_tokens, len(encoder.end_D), crc32, _crc32(ends))
        index[split] = vars(entry)
    (folder / "index.json").write_text(strict_json.dumps(index))
    for path in folder.iterdir():  # the content must be on the disk before the folder gets its name
        with path.open("rb") as f:
            os.fsync(f.fileno())


def _open_folder(folder: Path, expected: set[str]) -> dict[str, Split]:
    """The memory-mapped splits of a folder. Raises ValueError, or what JSON and numpy raise, if it is damaged."""
    splits = {}
    index = strict_json.loads(read_small(folder / "index.json", MAX_INDEX_BYTES))
    if set(index) != expected:
        raise ValueError(f"{folder}: other splits")
    for split, values in index.items():
        entry, path, ends = _IndexEntry(**values), folder / f"{split}.bin", folder / f"{split}.ends.npy"
        if entry.dtype not in TOKEN_DTYPES:
            raise ValueError(f"{folder}: tokens of type {entry.dtype}")
        dtype, n_bytes = np.dtype(entry.dtype), path.stat().st_size
        if n_bytes != entry.n_tokens * dtype.itemsize:
            raise ValueError(f"{path}: wrong size")
        if n_bytes <= MAX_CHECKED_BYTES and _crc32(path) != entry.crc32:
            raise ValueError(f"{path}: wrong checksum")
        if _crc32(ends) != entry.ends_crc32:
            raise ValueError(f"{ends}: wrong checksum")
        splits[split] = Split(np.memmap(path, dtype, "r"), np.load(ends))
    return splits


def _crc32(path: Path) -> int:
    crc32 = 0
    with open_regular(path) as f:
        while piece := f.read(PIECE_BYTES):
            crc32 = zlib.crc32(piece, crc32)
    return crc32
