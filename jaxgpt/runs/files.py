"""The files of a run folder: reading with types checked, and writing that neither a crash nor a link can harm."""

import os
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from jaxgpt import strict_json
from jaxgpt.data.files import atomic_replace, read_small
from jaxgpt.errors import UserError

MAX_BYTES = 2**27  # of a file that is read as a whole: a vocabulary of a million byte pairs has 50 MB

Value = TypeVar("Value")


class Unreadable(UserError):
    """A file that is not what it should be: no regular file, too large, no JSON, or JSON of other types."""


# -------------------------------------------------------------------------------------------------------------- reading


def read_bytes(path: Path) -> bytes:
    """The content of a regular file.

    Raises:
        FileNotFoundError: there is no such file.
        Unreadable: it is a folder, a pipe or a device, has more than `MAX_BYTES`, or cannot be read.
    """
    try:
        return read_small(path, MAX_BYTES)
    except FileNotFoundError:
        raise
    except OSError as e:
        raise Unreadable(f"{path.name} cannot be read ({e.strerror})") from None


def read_json(path: Path, kind: type[Value]) -> Value:
    """The content of a JSON file as a value of `kind`, a type that msgspec can decode.

    Raises: as `read_bytes`, and `Unreadable` for what is no JSON or has other types.
    """
    return decode_json(read_bytes(path), kind, path.name)


def decode_json(content: bytes, kind: type[Value], name: str) -> Value:
    """JSON as a value of `kind`. Raises `Unreadable`, which begins with `name`, for other types and what is no JSON."""
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as e:
        raise Unreadable(f"{name} is damaged ({e})") from None


# -------------------------------------------------------------------------------------------------------------- writing


def write_bytes(path: Path, content: bytes) -> None:
    """Writes the file completely or not at all, and durably: it and its name are on the disk at return.

    Raises:
        OSError: it cannot be written. What was there is left as it was.
    """
    with atomic_replace(path) as partial, partial.open("xb") as f:  # x: a new file, no link is followed
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    fsync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes a text as UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes values as indented JSON, as `write_bytes` does."""
    write_bytes(path, json_text(values).encode())


def json_text(values: dict[str, Any]) -> str:
    """Values as indented JSON; a number that is not finite becomes null."""
    return strict_json.dumps(values, indent=2) + "\n"


def append(path: Path, content: str) -> None:
    """Appends to a file, which is made if it is missing. A link is not followed.

    Raises:
        OSError: it cannot be written. Part of the content may have been.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with open(os.open(path, flags, 0o666), "wb") as f:
        f.write(content.encode())


def truncate(path: Path, size: int) -> None:
    """Cuts a file to its first `size` bytes, durably. A link is not followed."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0))
    try:
        os.ftruncate(descriptor, size)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync(path: Path) -> None:
    """Forces a file to the disk, or the names in a folder: a new name is not there before its folder is."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
