"""The shard cache: other processes download and tokenize the Parquet files of a corpus while a training reads.

The folder of a corpus and a tokenizer, below the user's cache folder, holds for each Parquet file, by its number,

    download/...            the file itself while shards are made of it, unless it lies on this machine
    FILE.json               the row groups of each of its shards
    FILE-SHARD.bin          the tokens of a shard, little-endian, without a header
    FILE-SHARD.json         their number and XXH3-128

A worker makes a shard whole or not at all, whenever it is killed. The records stay when the tokens are removed to bound
the disk: tokens that are made again must be those of the record.

Nothing here imports jax: a worker has to start fast. Axes: N tokens.
"""

import contextlib
import errno
import hashlib
import itertools
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import numpy as np
import xxhash

from jaxgpt import strict_json
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.data.files import (
    ABANDONED_SECONDS,
    PIECE_BYTES,
    NotAvailable,
    atomic_replace,
    cache_folder,
    drop_mapped_pages,
)
from jaxgpt.data.readers import hub_endpoint, join_columns, read_rows, row_group_bytes
from jaxgpt.data.shards import ParquetFiles, Shard, SourceFile, TokenShards, digest_of, read_record, write_record
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError, first_line

FORMAT = 1  # of a folder; part of its name
SHARD_BYTES = 2**26  # a shard is made of row groups with this much data or more: some 15 million tokens of English
MAX_CACHE_BYTES = 2**35  # of tokens; those read longest ago are removed beyond it
MAX_WORKERS = 16
ROWS_A_WRITE = 256  # texts whose tokens are written at a time
DOWNLOAD_ATTEMPTS = 6  # with 1, 2, 4, ... seconds between them
MAX_RESTARTS = 3  # of the workers in a row, after one has died


def default_workers() -> int:
    """A worker for each core but the one that feeds the training."""
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_WORKERS, n_cores - 1))


# -------------------------------------------------------------------------------------------------- in a worker process


@dataclass(frozen=True)
class Work:
    """What a worker needs to make shards.

    Args:
        option: the flag and its value, with which messages begin.
        folder: of the shards.
        tokenizer: its `to_json()`.
        dtype: of the tokens, as numpy names it.
        min_chars: only texts with more characters, white space at the ends not counted, are taken; 0 for all.
        shard_bytes: data of a shard before it is tokenized, at least; a row group is in one shard.
    """

    option: str
    files: ParquetFiles
    folder: Path
    tokenizer: dict[str, Any]
    dtype: str
    min_chars: int = 0
    shard_bytes: int = SHARD_BYTES

    @property
    def sources(self) -> tuple[SourceFile, ...]:
        """The files by their numbers: those to train on, then the one that validates."""
        return (*self.files.train, self.files.validation) if self.files.validation else self.files.train

    def record(self, file: int, number: int | None = None) -> Path:
        """The path of the record of a shard, or of a file."""
        return self.tokens(file, number).with_suffix(".json")

    def tokens(self, file: int, number: int | None) -> Path:
        """The path of a shard's tokens."""
        return self.folder / (f"{file:05}.bin" if number is None else f"{file:05}-{number:05}.bin")

    def parquet(self, file: int) -> Path:
        """The path of a Parquet file on this machine, downloaded or not."""
        base = self.folder / "download" if self.files.repo else Path(self.files.revision)
        return base / self.sources[file].path

    def n_shards(self, file: int) -> int | None:
        """The number of shards of a file; None before its row groups are known."""
        record = read_record(self.record(file))
        return len(record["row_groups"]) if record else None


class ShardMaker:
    """Makes the shards of a corpus, one at a time. Several processes may make those of one folder.

    Args:
        work: what to make.
    """

    def __init__(self, work: Work):
        self.work, self.tokenizer = work, tokenizers.from_json(work.tokenizer)

    def prepare(self, file: int) -> None:
        """Downloads a file if it is not there, checks its digest, and records the row groups of each shard.

        Raises:
            NotAvailable: it cannot be downloaded.
            UserError: it is not the file of the corpus, or has no such column; or the disk is full.
        """
        with self._locked(file, None):
            path = self._checked_file(file)
            if self.work.n_shards(file) is None:
                sizes = row_group_bytes(path, [self.work.files.column], self._column(file))
                groups = _row_groups_of_shards(sizes, self.work.shard_bytes)
                write_record(self.work.record(file), {"row_groups": groups})

    def make(self, file: int, number: int) -> None:
        """Writes the tokens of a shard, and their record, unless they are there.

        Raises:
            UserError: what `prepare` raises; a text cannot be encoded; or the tokens are not those of the record.
        """
        with self._locked(file, number):
            path, record_path = self.work.tokens(file, number), self.work.record(file, number)
            before = read_record(record_path)
            if before and path.is_file():
                return
            if self.work.n_shards(file) is None or not self.work.parquet(file).is_file():
                self.prepare(file)
            first, last = (read_record(self.work.record(file)) or {})["row_groups"][number]
            with atomic_replace(path) as partial:
                try:
                    record = self._write(partial, file, range(first, last))
                except NotAvailable:  # another training has removed the file
                    self.prepare(file)
                    record = self._write(partial, file, range(first, last))
                if before and record != before:
                    raise UserError(
                        f"{self.work.option}: {path.name} has other tokens than when it was first made, by another "
                        f"version of a library perhaps; remove {self.work.folder}, and start with --overwrite"
                    )
            write_record(record_path, record)

    def _write(self, path: Path, file: int, row_groups: range) -> dict[str, Any]:
        """Writes the tokens of row groups; returns their record."""
        digest, n_tokens = xxhash.xxh3_128(), 0
        end = self.tokenizer.end_of_text
        suffix = np.array([] if end is None else [end], self.work.dtype)
        texts = self._texts(file, row_groups)
        with path.open("wb") as f:
            while batch := list(itertools.islice(texts, ROWS_A_WRITE)):
                parts = [part for text in batch for part in (self._encode(text, file), suffix)]
                data = np.concatenate(parts).tobytes()
                f.write(data)
                digest.update(data)
                n_tokens += sum(map(len, parts))
        return {"n_tokens": n_tokens, "xxh3": digest.hexdigest()}

    def _texts(self, file: int, row_groups: range) -> Iterator[str]:
        column, least = self._column(file), self.work.min_chars
        rows = read_rows(self.work.parquet(file), [self.work.files.column], column, row_groups)
        return (text for text in join_columns(rows, column) if text and not (least and len(text.strip()) <= least))

    def _encode(self, text: str, file: int) -> np.ndarray:
        try:
            return self.tokenizer.encode(text).astype(self.work.dtype)
        except UserError as e:
            raise UserError(f"{self.work.option}: {self.work.sources[file].path}: {e}") from None

    def _column(self, file: int) -> str:
        return f"{self.work.option} --text-column {self.work.files.column}: {self.work.sources[file].path}"

    @contextlib.contextmanager
    def _locked(self, file: int, number: int | None) -> Iterator[None]:
        """Locks a file or a shard for this process, and turns what the disk refuses into a `UserError`."""
        try:
            lock = self.work.tokens(file, number).with_suffix(".lock")
            lock.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(lock):
                yield
        except OSError as e:
            raise UserError(
                f"{self.work.option}: {self.work.folder} cannot be written ({e.strerror or e}); make room there, or "
                "set XDG_CACHE_HOME to a folder that has it"
            ) from None

    def _checked_file(self, file: int) -> Path:
        """The path of a Parquet file that has the digest of the list; a wrong download is tried once more."""
        source, path = self.work.sources[file], self.work.parquet(file)
        where = f"{self.work.option}: {source.path}"
        for last in (False, True):
            if self.work.files.repo and not path.is_file():
                self._download(source, where)
            try:
                if digest_of(path, source.digest.partition(":")[0]) == source.digest:
                    return path
            except FileNotFoundError:
                raise NotAvailable(f"{where} is gone; bring it back") from None
            except OSError as e:
                raise UserError(f"{where} cannot be read ({e.strerror}); give a readable file") from None
            if not self.work.files.repo or last:
                remedy = "start again, to download it anew" if self.work.files.repo else "bring that back"
                raise UserError(f"{where} is another file than the list of the corpus has; {remedy}")
            path.unlink()
        raise AssertionError("unreachable")

    def _download(self, source: SourceFile, where: str) -> None:
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
        from huggingface_hub.utils import disable_progress_bars, logging

        disable_progress_bars()
        logging.set_verbosity_error()
        for attempt in range(DOWNLOAD_ATTEMPTS):
            try:
                huggingface_hub.hf_hub_download(
                    self.work.files.repo,
                    source.path,
                    repo_type="dataset",
                    revision=self.work.files.revision,
                    local_dir=self.work.folder / "download",
                    endpoint=hub_endpoint(),
                )
                return
            except Exception as e:  # the errors of the library and of its transports have no common base class
                if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                    raise
                gone = isinstance(e, EntryNotFoundError) and not isinstance(e, LocalEntryNotFoundError)
                if gone or attempt == DOWNLOAD_ATTEMPTS - 1:
                    reason = f"{type(e).__name__}: {first_line(e, 200)}"
                    remedy = "it is no longer there" if gone else "start again: it goes on"
                    raise NotAvailable(f"{where} cannot be had from {hub_endpoint()} ({reason}); {remedy}") from None
                time.sleep(2**attempt)


def _row_groups_of_shards(sizes: list[int], shard_bytes: int) -> list[tuple[int, int]]:
    """The row groups [first, last) of each shard: those that together have `shard_bytes`, and at last the rest."""
    shards, first, n_bytes = [], 0, 0
    for last, size in enumerate(sizes, 1):
        n_bytes += size
        if n_bytes >= shard_bytes or last == len(sizes):
            shards.append((first, last))
            first, n_bytes = last, 0
    return shards


_maker: ShardMaker  # of a worker process


def _begin_worker(work: Work, lifeline: Any) -> None:
    """Prepares a worker process, which ends when the other end of a pipe does: a killed parent leaves none behind."""
    global _maker

    def end_with_the_parent() -> None:
        with contextlib.suppress(EOFError, OSError):
            lifeline.recv_bytes()
        os._exit(0)

    threading.Thread(target=end_with_the_parent, daemon=True).start()
    # Of signals to the whole group of processes the parent decides: it ends the workers after its last step.
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    _maker = ShardMaker(work)


def _prepare(file: int) -> None:
    _maker.prepare(file)


def _make(file: int, number: int) -> None:
    _maker.make(file, number)


# ---------------------------------------------------------------------------------------------- in the training process


class _Task(NamedTuple):
    """A call of a worker: `future` belongs to `pool`, which is of no use any more once a worker has died."""

    function: Callable[..., None]
    args: tuple[int, ...]
    pool: ProcessPoolExecutor
    future: "Future[None]"


class _Workers:
    """Processes that call `_prepare` and `_make`. They start with the first task; if one dies, all are replaced."""

    def __init__(self, work: Work, n_workers: int):
        self._work, self._n_workers = work, n_workers
        self._restarts, self._closed = 0, False
        self._lock = threading.Lock()  # `close` is called by another thread than the rest
        self._begin()

    def _begin(self) -> None:
        context = get_context("spawn")  # a fork of a process with threads may wait forever
        reader, self._lifeline = context.Pipe(duplex=False)
        self._pool = ProcessPoolExecutor(self._n_workers, context, _begin_worker, (self._work, reader))

    def submit(self, function: Callable[..., None], *args: int) -> _Task:
        pool = self._pool
        try:
            return _Task(function, args, pool, pool.submit(function, *args))
        except BrokenProcessPool:
            self._replace(pool)
            return self.submit(function, *args)

    def wait(self, task: _Task) -> None:
        """Waits for a task. Raises what it raised."""
        try:
            task.future.result()
            self._restarts = 0
        except BrokenProcessPool:
            self._replace(task.pool)
            self.wait(self.submit(task.function, *task.args))

    def _replace(self, pool: ProcessPoolExecutor) -> None:
        """Starts other processes in place of a pool's, unless that has been done."""
        with self._lock:
            if pool is self._pool and not self._closed and self._restarts < MAX_RESTARTS:
                self._restarts += 1
                self._lifeline.close()
                self._begin()
            elif pool is self._pool:
                raise UserError(
                    f"{self._work.option}: a process that tokenizes was killed {MAX_RESTARTS + 1} times in a row, by a "
                    "lack of memory perhaps; start again: it goes on"
                )

    def close(self) -> None:
        """Ends the processes at once; what they were writing is left out."""
        with self._lock:
            self._closed = True
            self._lifeline.close()
        self._pool.shutdown(cancel_futures=True)


class ShardCache(TokenShards):
    """The shards of a corpus of Parquet files, made while they are read.

    Args:
        name: the dataset's.
        dtype: of the tokens, little-endian.
        min_chars, shard_bytes: as of `Work`.
        say: receives a line if a damaged shard is made again.
        n_workers: processes that download and tokenize.
        max_bytes: of tokens on the disk. Beyond it those read longest ago are removed, but for the ones that validate,
            the one being read and those made ahead of it.
    """

    def __init__(
        self,
        name: str,
        files: ParquetFiles,
        tokenizer: Tokenizer,
        dtype: np.dtype,
        min_chars: int,
        say: Callable[[str], None],
        n_workers: int,
        max_bytes: int = MAX_CACHE_BYTES,
        shard_bytes: int = SHARD_BYTES,
    ):
        values = tokenizer.to_json()
        key = [FORMAT, files.sha256, tokenizers.identity(values), min_chars, shard_bytes]
        digest = hashlib.sha256(strict_json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        folder = cache_folder() / "shards" / digest
        self.work = Work(f"--dataset {name}", files, folder, values, dtype.str, min_chars, shard_bytes)
        self.dtype, self.n_files = dtype, len(files.train)
        self._say, self._n_workers, self._max_bytes = say, n_workers, max_bytes
        self._workers: _Workers | None = None
        self._downloaded: set[int] = set()  # files that this process has asked for

    def validation(self) -> np.ndarray:
        """The tokens [N] that validate: the first shard of the validation split, or else of the first file.

        Raises:
            UserError: they cannot be had, or they are all that there is.
        """
        file = len(self.work.files.train) if self.work.files.validation else 0
        workers = _Workers(self.work, 1)
        try:
            source = self.work.sources[file]
            if self.work.n_shards(file) is None:
                self._downloaded.add(file)
                self._say(f"reading {source.path} ({source.size / 1e9:,.3g} GB), whose first shard validates")
                workers.wait(workers.submit(_prepare, file))
            if not self.work.n_shards(file):
                raise UserError(f"{self.work.option}: {source.path} has no rows; give a file with texts")
            if len(self.work.sources) == self.work.n_shards(file) == 1:
                raise UserError(
                    f"{self.work.option}: too short to stream: its only shard validates; give --streaming never"
                )
            return self._open(workers, file, 0)
        finally:
            workers.close()

    def known_counts(self, file: int) -> tuple[list[int], bool]:
        n_shards, counts = self.work.n_shards(file), []
        for number in range(self._n_held_out(file), n_shards or 0):
            record = read_record(self.work.record(file, number))
            if record is None:
                return counts, False
            counts.append(record["n_tokens"])
        return counts, n_shards is not None

    def read(self, passes: Iterable[tuple[int, int]], first: int) -> Iterator[Shard]:
        """As of `TokenShards`. While a shard is read, those after it are made, and the next file is downloaded."""
        workers = self._workers = self._workers or _Workers(self.work, self._n_workers)
        self._remove_abandoned_downloads()
        ahead: deque[tuple[Shard, _Task]] = deque()  # without their tokens
        upcoming = ((epoch, file, self._preparation(workers, file)) for epoch, file in passes)
        following = next(upcoming)
        while True:
            epoch, file, preparation = following
            while ahead and preparation and not preparation.future.done():  # a download
                yield self._take(workers, ahead, {file})
            if preparation:
                workers.wait(preparation)
            no_tokens_N, following = np.zeros(0, self.dtype), None
            for number in range(self._n_held_out(file) + first, self.work.n_shards(file) or 0):
                ahead.append((Shard(epoch, file, number, no_tokens_N), workers.submit(_make, file, number)))
                following = following or next(upcoming)
                while len(ahead) > 2 * self._n_workers:
                    yield self._take(workers, ahead, {file, following[1]})
            following, first = following or next(upcoming), 0

    def close(self) -> None:
        if self._workers:
            self._workers.close()

    def _n_held_out(self, file: int) -> int:
        """How many of a file's first shards validate."""
        return 1 if file == 0 and not self.work.files.validation else 0

    def _preparation(self, workers: _Workers, file: int) -> _Task | None:
        """The task of downloading a file; None if all of its shards are there."""
        n_shards = self.work.n_shards(file)
        numbers = range(self._n_held_out(file), n_shards or 0)
        if n_shards is not None and all(self.work.tokens(file, number).is_file() for number in numbers):
            return None
        self._downloaded.add(file)
        return workers.submit(_prepare, file)

    def _take(self, workers: _Workers, ahead: "deque[tuple[Shard, _Task]]", files: set[int]) -> Shard:
        """The first of the shards that are being made; makes room on the disk, but not of `files`."""
        shard, task = ahead.popleft()
        workers.wait(task)
        tokens_N = self._open(workers, shard.file_number, shard.number)
        following = [other for other, _ in ahead]
        self._remove_downloads({*files, *(other.file_number for other in following)})
        self._remove_old_tokens([shard, *following])
        return shard._replace(tokens_N=tokens_N)

    def _open(self, workers: _Workers, file: int, number: int) -> np.ndarray:
        """The tokens [N] of a shard, checked; one that is damaged or has been removed is made again."""
        path = self.work.tokens(file, number)
        for _ in range(2):
            record = read_record(self.work.record(file, number))
            if record and path.is_file():
                tokens_N = _checked_tokens(path, np.dtype(self.work.dtype), record)
                if tokens_N is not None:
                    os.utime(path)
                    return tokens_N
                self._say(f"{path} is damaged; tokenizing it again")
                path.unlink(missing_ok=True)
            workers.wait(workers.submit(_make, file, number))
        raise UserError(f"{self.work.option}: {path} is damaged again and again; check that disk")

    def _remove_downloads(self, needed: set[int]) -> None:
        """Removes the files that this process has downloaded, but the ones that are needed."""
        if self.work.files.repo:
            for file in self._downloaded - needed:
                self.work.parquet(file).unlink(missing_ok=True)
            self._downloaded &= needed

    def _remove_abandoned_downloads(self) -> None:
        """Removes the files that a killed run has left and no other has gone on from."""
        for file in range(len(self.work.sources) if self.work.files.repo else 0):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - self.work.parquet(file).stat().st_mtime > ABANDONED_SECONDS:
                    self.work.parquet(file).unlink()

    def _remove_old_tokens(self, needed: list[Shard]) -> None:
        """Removes the tokens read longest ago, so that those on the disk are `max_bytes` at most."""
        needed_paths = {self.work.tokens(shard.file_number, shard.number) for shard in needed}
        held_out = len(self.work.files.train) if self.work.files.validation else 0
        needed_paths.add(self.work.tokens(held_out, 0))
        found = []
        for path in self.work.folder.glob("*.bin"):
            with contextlib.suppress(FileNotFoundError):  # another process has removed it
                found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        n_bytes = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if n_bytes > self._max_bytes and path not in needed_paths:
                path.unlink(missing_ok=True)
                n_bytes -= size


def _checked_tokens(path: Path, dtype: np.dtype, record: dict[str, Any]) -> np.ndarray | None:
    """A shard's tokens [N], memory-mapped; None if they are not those of the record."""
    if path.stat().st_size != record["n_tokens"] * dtype.itemsize:
        return None
    if not record["n_tokens"]:
        return np.zeros(0, dtype)
    tokens_N, digest = np.memmap(path, dtype, "r"), xxhash.xxh3_128()
    for start in range(0, len(tokens_N), PIECE_BYTES):
        digest.update(tokens_N[start : start + PIECE_BYTES].tobytes())
        drop_mapped_pages(tokens_N)
    return tokens_N if digest.hexdigest() == record["xxh3"] else None
