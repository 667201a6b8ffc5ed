"""Manifests: what a checkpoint, or a finished run, consists of, with a digest of every file.

A manifest is written last and verified first. Files without one are incomplete; files that differ from theirs are
damaged. The digests are XXH3 of 128 bits: they find every accident, at the speed of the memory, and are no protection
against somebody who writes a manifest of their own.
"""

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import xxhash

from jaxgpt.runs import files
from jaxgpt.runs.files import Unreadable

NAME = "manifest.json"
PIECE_BYTES = 2**20


@dataclass(frozen=True)
class FileDigest:
    """The size of a file, or of its beginning, and the digest of that."""

    size: int  # bytes
    xxh3_128: str  # hexadecimal


@dataclass(frozen=True)
class Manifest:
    """What belongs to the state after `step` updates."""

    step: int
    files: dict[str, FileDigest]  # by path, below the manifest's folder
    run: dict[str, str]  # the run's identity, `RunDir.identity`: digests of configuration, vocabulary and data
    records: dict[str, FileDigest] = field(default_factory=dict)  # of a checkpoint: the run's records up to it, by path
    val_loss: float | None = None  # of a checkpoint: the validation loss of its state, if it was measured (nats)
    stopped_early: bool = False  # of a checkpoint: whether the run stopped early at this step
    checkpoints: tuple[int, ...] = ()  # of a run: the steps of its checkpoints


class _Envelope(msgspec.Struct):
    """The form of the file: a manifest as it stands there, and the digest of those bytes."""

    xxh3_128: str
    manifest: msgspec.Raw


def digest(content: bytes) -> str:
    """The digest of bytes, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(content)


def digest_file(path: Path, size: int | None = None) -> FileDigest:
    """The digest of a regular file, or of its first `size` bytes.

    Raises:
        FileNotFoundError: there is no such file.
        Unreadable: it is no regular file of its own, is shorter than `size`, or cannot be read.
    """
    found, left = xxhash.xxh3_128(), size
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise Unreadable(f"{path.name} is no regular file")
        with path.open("rb", buffering=0) as f:
            while left != 0 and (piece := f.read(PIECE_BYTES if left is None else min(PIECE_BYTES, left))):
                found.update(piece)
                left = None if left is None else left - len(piece)
            n_bytes = f.tell()
    except FileNotFoundError:
        raise
    except OSError as e:
        raise Unreadable(f"{path.name} cannot be read ({e.strerror})") from None
    if size is not None and n_bytes < size:
        raise Unreadable(f"{path.name} has {n_bytes:,} bytes instead of {size:,}")
    return FileDigest(n_bytes, found.hexdigest())


def digest_files(folder: Path, names: Iterable[str]) -> dict[str, FileDigest]:
    """The digests of the files in a folder that exist, by name."""
    return {name: digest_file(folder / name) for name in sorted(names) if (folder / name).is_file()}


def first_difference(folder: Path, expected: dict[str, FileDigest], beginning: bool = False) -> str | None:
    """What is wrong with the first file that is not as its digest says; None if all are as they were written.

    Args:
        beginning: compare as much of each file as its digest covers; the file may go on.
    """
    for name, wanted in expected.items():
        path = folder / name
        try:
            if not beginning and path.lstat().st_size != wanted.size:
                return f"{name} has {path.lstat().st_size:,} bytes instead of {wanted.size:,}"
            if digest_file(path, wanted.size if beginning else None) != wanted:
                return f"{name} is not as it was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as e:
            return f"{name} cannot be read ({e.strerror})"
        except Unreadable as e:
            return f"{name[: -len(path.name)]}{e}"
    return None


def write(path: Path, manifest: Manifest) -> None:
    """Writes a manifest completely or not at all, and durably. Raises `OSError` if it cannot be written."""
    content = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
    files.write_bytes(path, msgspec.json.encode(_Envelope(digest(content), msgspec.Raw(content))) + b"\n")


def read(path: Path) -> Manifest:
    """The manifest in a file.

    Raises:
        FileNotFoundError: there is none.
        Unreadable: it is not as it was written.
    """
    envelope = files.read_json(path, _Envelope)
    if digest(bytes(envelope.manifest)) != envelope.xxh3_128:
        raise Unreadable(f"{path.name} is not as it was written")
    return files.decode_json(bytes(envelope.manifest), Manifest, path.name)


def read_if_sound(path: Path) -> Manifest | None:
    """The manifest in a file; None if there is none, or it is not as it was written."""
    try:
        return read(path)
    except (FileNotFoundError, Unreadable):
        return None
