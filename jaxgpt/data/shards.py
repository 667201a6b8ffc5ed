"""Corpora in many files: the list that identifies one, and the shards of tokens that a training reads from it.

`ParquetFiles` lists the Parquet files of a hub dataset, from which `shard_cache` makes shards of tokens. `TokenFiles`
are shards that others have made, in the format of llm.c and modded-nanogpt:

    256 int32    little-endian: 20240520, version 1, the number of tokens, zeros
    uint16       the tokens, little-endian

Both give their tokens as `TokenShards`. Axes: N tokens.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxgpt import strict_json
from jaxgpt.data.files import (
    NotAvailable,
    NotRegular,
    atomic_write,
    cache_folder,
    drop_mapped_pages,
    open_regular,
    read_small,
    sha256_of,
)
from jaxgpt.errors import UserError

HEADER_BYTES = 1024
MAGIC, VERSION = 20240520, 1  # of uint16 tokens
LLAMA_MAGIC = 20240801  # of uint32 tokens
CHECKED_TOKENS = 2**20  # whose vocabulary is checked at a time
MAX_RECORD_BYTES = 2**27
PATHS_A_REQUEST = 500
REVISION = re.compile("@[0-9a-f]{40}$")  # of a dataset's name: the commit of the hub's repository


class TokenShards(Protocol):
    """The training tokens of a corpus in shards. A shard is read whole before the next one, and checked before it is.

    Each of the corpus' files has one or several shards, which are numbered from 0. The tokens that validate are in none
    of them.
    """

    n_files: int
    dtype: np.dtype  # of the tokens

    def known_counts(self, file: int) -> tuple[list[int], bool]:
        """The number of tokens of a file's first shards, and whether these are all; nothing is made to tell it."""
        ...

    def read(self, passes: Iterable[tuple[int, int]], first: int) -> Iterator["Shard"]:
        """The shards of files in the order given, of the first file from shard `first` on.

        Args:
            passes: an epoch and a file of it; endless.

        Raises:
            UserError: a shard cannot be had, or is not what it was.
        """
        ...

    def close(self) -> None:
        """Ends what goes on in the background."""
        ...


class Shard(NamedTuple):
    """A shard of tokens as it is read in an epoch: its file, its number in that file, and its tokens [N], mapped."""

    epoch: int
    file_number: int
    number: int
    tokens_N: np.ndarray


# ----------------------------------------------------------------------------------------------- Parquet files of a hub


@dataclass(frozen=True)
class SourceFile:
    """A file of a dataset: its path in the dataset, its size in bytes, and its digest as `digest_of` takes it."""

    path: str
    size: int
    digest: str


@dataclass(frozen=True)
class ParquetFiles:
    """The Parquet files of a dataset at one revision.

    Args:
        repo: the dataset's name on the hub; "" for a folder of this machine.
        revision: the hub's commit; for a folder its absolute path.
        column: that holds the texts.
        train: the files to train on.
        validation: the first file of the dataset's validation split; None if it has no such split.
    """

    repo: str
    revision: str
    column: str
    train: tuple[SourceFile, ...]
    validation: SourceFile | None = None

    @property
    def n_bytes(self) -> int:
        """Of the files to train on."""
        return sum(file.size for file in self.train)

    @property
    def sha256(self) -> str:
        """Identifies the texts and their order: the digest of the names, sizes and digests of all files."""
        files = [[file.path, file.size, file.digest] for file in (*self.train, self.validation) if file]
        text = strict_json.dumps([self.column, self.validation is not None, files])
        return hashlib.sha256(text.encode()).hexdigest()


def digest_of(path: Path, kind: str) -> str:
    """A file's digest: "sha256:..." as the hub has it for large files, "git:..." (its blob's SHA-1) for small ones.

    Raises:
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with open_regular(path) as f:
        while piece := f.read(2**20):
            digest.update(piece)
    return f"{kind}:{digest.hexdigest()}"


def parquet_files(data_files: dict[str, list[str]], folder: str, column: str, endpoint: str) -> ParquetFiles:
    """The list of a dataset's Parquet files, with sizes and digests.

    Args:
        data_files: of each split, as the library `datasets` resolves them: paths below `folder`, or the hub's URLs
            "hf://datasets/NAME@COMMIT/PATH".
        folder: of a dataset on this machine; "" for one of the hub.

    Raises:
        KeyError: there is no train split.
        Exception: those of huggingface_hub.
    """
    validation = next((split for split in ("validation", "valid", "val", "test") if split in data_files), None)
    train, held_out = data_files["train"], data_files[validation][:1] if validation else []
    if folder:
        revision, repo = os.path.abspath(folder), ""
        files = [
            SourceFile(os.path.relpath(path, folder), os.path.getsize(path), digest_of(Path(path), "sha256"))
            for path in (*train, *held_out)
        ]
    else:
        urls = [re.fullmatch("hf://datasets/(.+?)@([0-9a-f]{40})/(.+)", url) for url in (*train, *held_out)]
        assert all(urls), "the library's URLs have another form"
        repo, revision, _ = urls[0].groups()  # pyright: ignore[reportOptionalMemberAccess]
        files = _hub_files(repo, revision, [url[3] for url in urls if url], endpoint)
    return ParquetFiles(repo, revision, column, tuple(files[: len(train)]), files[-1] if held_out else None)


def _hub_files(repo: str, revision: str, paths: list[str], endpoint: str) -> list[SourceFile]:
    from huggingface_hub import HfApi

    api, of_path = HfApi(endpoint=endpoint), {}
    for first in range(0, len(paths), PATHS_A_REQUEST):
        part = paths[first : first + PATHS_A_REQUEST]
        for info in api.get_paths_info(repo, part, revision=revision, repo_type="dataset"):
            lfs: Any = getattr(info, "lfs", None)
            digest = f"sha256:{lfs.sha256}" if lfs else f"git:{getattr(info, 'blob_id', '')}"
            of_path[info.path] = SourceFile(info.path, getattr(info, "size", 0), digest)
    return [of_path[path] for path in paths]


def kept_list(name: str, column: str) -> ParquetFiles | None:
    """The list that `keep_list` has kept of a dataset "NAME[:CONFIG]@COMMIT"; None if there is none, or damaged."""
    values = read_record(_list_path(name, column))
    if values is None:
        return None
    train, validation = ([SourceFile(*file) for file in values[split]] for split in ("train", "validation"))
    return ParquetFiles(values["repo"], values["revision"], column, tuple(train), validation[0] if validation else None)


def keep_list(name: str, files: ParquetFiles) -> None:
    """Keeps the list of a dataset "NAME[:CONFIG]@COMMIT" in the cache: a run then resumes without asking the hub."""
    splits = {"train": files.train, "validation": [files.validation] if files.validation else []}
    lists = {split: [[file.path, file.size, file.digest] for file in list_] for split, list_ in splits.items()}
    try:
        write_record(_list_path(name, files.column), {"repo": files.repo, "revision": files.revision, **lists})
    except OSError:  # without a cache the hub is asked again
        pass


def _list_path(name: str, column: str) -> Path:
    key = hashlib.sha256(strict_json.dumps([name, column]).encode()).hexdigest()[:32]
    return cache_folder() / "shards" / f"{key}.json"


# -------------------------------------------------------------------------------------------------------------- records


def write_record(path: Path, values: dict[str, Any]) -> None:
    """Writes values as JSON, with a digest of themselves. Raises `OSError`."""
    atomic_write(path, strict_json.dumps({**values, "sha256": _record_digest(values)}).encode())


def read_record(path: Path) -> dict[str, Any] | None:
    """What `write_record` wrote; None if there is nothing, or it is damaged."""
    try:
        values = strict_json.loads(read_small(path, MAX_RECORD_BYTES))
        return values if values.pop("sha256") == _record_digest(values) else None
    except (OSError, AttributeError, KeyError, TypeError, ValueError):
        return None


def _record_digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(strict_json.dumps(values, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------ files of tokens


class TokenFile(NamedTuple):
    """A file of llm.c's format, whose header has been checked."""

    path: Path
    n_tokens: int
    sha256: str


@dataclass(frozen=True)
class TokenFiles:
    """The shards of a folder, as llm.c and modded-nanogpt write them.

    Args:
        option: the flag and its value, with which messages begin.
        train, validation: in the order of their names.
    """

    option: str
    train: tuple[TokenFile, ...]
    validation: TokenFile

    @property
    def sha256(self) -> str:
        """Identifies the tokens and their order."""
        digests = [file.sha256 for file in (*self.train, self.validation)]
        return hashlib.sha256("".join(digests).encode()).hexdigest()


def token_files(folder: Path, option: str) -> TokenFiles | None:
    """The `*_train*.bin` of a folder and its first `*_val*.bin`; None if it has none of either.

    Raises:
        NotAvailable: it has files of one kind only.
        UserError: a file is not of this format, or cut off.
    """
    train, validation = (sorted(folder.glob(f"*_{split}*.bin")) for split in ("train", "val"))
    if not train and not validation:
        return None
    if not train or not validation:
        raise NotAvailable(
            f"{option}: no *_{'val' if train else 'train'}*.bin beside the others; give a folder with both"
        )
    return TokenFiles(option, tuple(_token_file(path, option) for path in train), _token_file(validation[0], option))


def has_header(path: Path) -> bool:
    """Whether a file begins as those of llm.c do, of any kind of tokens."""
    with open_regular(path) as f:
        return int.from_bytes(f.read(4), "little") in (MAGIC, LLAMA_MAGIC)


def _token_file(path: Path, option: str) -> TokenFile:
    where = f"{option}: {path.name}"
    try:
        with open_regular(path) as f:
            header = np.frombuffer(f.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0"), "<i4")
            size = os.fstat(f.fileno()).st_size
    except NotRegular:
        raise UserError(f"{where} is a pipe or a device; give a regular file") from None
    except OSError as e:
        raise UserError(f"{where} cannot be read ({e.strerror}); give a readable file") from None
    magic, version, n_tokens = map(int, header[:3])
    if magic == LLAMA_MAGIC:
        raise UserError(f"{where} holds uint32 tokens, of Llama 3; give files of GPT-2's uint16 tokens")
    if (magic, version) != (MAGIC, VERSION):
        raise UserError(
            f"{where} has no header of llm.c (begins with {magic}, {version} in place of {MAGIC}, {VERSION}); give "
            "files as llm.c or modded-nanogpt write them"
        )
    if size != HEADER_BYTES + 2 * n_tokens:
        raise UserError(
            f"{where} has {size:,} bytes, and its header says {n_tokens:,} tokens, which are "
            f"{HEADER_BYTES + 2 * n_tokens:,}; get the file again"
        )
    return TokenFile(path, n_tokens, sha256_of(path, option))


class TokenFileShards(TokenShards):
    """`TokenFiles` as shards, one a file.

    Args:
        vocab_size: of the tokenizer that the tokens were made with.
    """

    dtype = np.dtype("<u2")

    def __init__(self, files: TokenFiles, vocab_size: int):
        self._files, self._vocab_size, self.n_files = files, vocab_size, len(files.train)

    def known_counts(self, file: int) -> tuple[list[int], bool]:
        return [self._files.train[file].n_tokens], True

    def read(self, passes: Iterable[tuple[int, int]], first: int) -> Iterator[Shard]:
        assert not first, "a file is one shard"
        for epoch, file in passes:
            yield Shard(epoch, file, 0, self._checked(self._files.train[file]))

    def validation(self) -> np.ndarray:
        """The tokens [N] that validate."""
        return self._checked(self._files.validation)

    def close(self) -> None:
        pass

    def _checked(self, file: TokenFile) -> np.ndarray:
        """A file's tokens. Raises `UserError` if it has changed, or has tokens outside of the vocabulary."""
        if sha256_of(file.path, self._files.option) != file.sha256:
            raise UserError(f"{self._files.option}: {file.path.name} has changed since the start; bring it back")
        if not file.n_tokens:
            return np.zeros(0, self.dtype)
        tokens_N = np.memmap(file.path, self.dtype, "r", offset=HEADER_BYTES, shape=(file.n_tokens,))
        require_vocabulary(tokens_N, self._vocab_size, f"{self._files.option}: {file.path.name}")
        return tokens_N


def require_vocabulary(tokens_N: np.ndarray, vocab_size: int, where: str) -> None:
    """Raises `UserError` if a memory-mapped file has a token outside of the vocabulary.

    Args:
        where: the flag, its value and the file, with which the message begins.
    """
    if vocab_size >= 2 ** (8 * tokens_N.dtype.itemsize):
        return
    for start in range(0, len(tokens_N), CHECKED_TOKENS):
        drop_mapped_pages(tokens_N)
        largest = int(tokens_N[start : start + CHECKED_TOKENS].max())
        if largest >= vocab_size:
            raise UserError(
                f"{where} holds token {largest}, outside the vocabulary of {vocab_size}; give the --tokenizer that it "
                "was made with"
            )
