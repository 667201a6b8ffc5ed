"""The exceptions that end a command with a message, and the checks of flags' values that raise them.

`cli.args.exit_code` turns the exceptions into exit codes.
"""

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

MAX_NAME_BYTES = 240  # file systems allow 255; a temporary name is longer than the final one


class UserError(Exception):
    """Something that the user can put right. The message is one sentence that names the flag and the remedy. Exit 2."""


class DamagedRun(UserError):
    """A run whose files are not as they were written, with nothing sound to go on from. Exit 4."""


class OutputError(UserError):
    """Standard output cannot be written, but for a reader that has gone (`BrokenPipeError`). Exit 2."""


class LossNotFinite(ArithmeticError):
    """Training diverged: a loss, a gradient norm or a value of the state is NaN or infinite, or five updates in a row
    were skipped. The message names the step. Exit 3."""


def first_line(error: object, most: int = 160) -> str:
    """The first line of an error's message, at most so many characters; "" of an error without one."""
    return (str(error).splitlines() or [""])[0][:most]


def flag(name: str) -> str:
    """The command-line flag of a field: `model.n_layer` -> `--model.n-layer`."""
    return "--" + name.replace("_", "-")


def require(ok: bool, name: str, value: Any, remedy: str) -> None:
    """Raises `UserError` with the flag, the value and the remedy unless `ok`."""
    if not ok:
        raise UserError(f"{flag(name)} {value}: {remedy}")


def require_at_least(minimum: int, config: Any, *names: str, prefix: str = "") -> None:
    for name in names:
        value = getattr(config, name)
        require(value >= minimum, prefix + name, value, f"give a whole number of at least {minimum}")


def require_at_most(maximum: int, config: Any, *names: str, prefix: str = "") -> None:
    """For sizes beyond any machine, which would end without memory and without a word."""
    for name in names:
        value = getattr(config, name)
        require(value <= maximum, prefix + name, value, f"give at most {maximum}")


def require_int32(config: Any, prefix: str = "") -> None:
    """For every whole number of a configuration: devices count in int32, and none means anything beyond it."""
    for name in (f.name for f in dataclasses.fields(config)):
        value = getattr(config, name)
        require(not isinstance(value, int) or value < 2**31, prefix + name, value, "give at most 2147483647")


def require_seed(seed: int) -> None:
    require(0 <= seed < 2**31, "seed", seed, "give a whole number from 0 to 2147483647")


def require_writable(option: str, path: Path) -> None:
    """Checks that a file can be written, before the work that produces its content.

    Args:
        option: the flag that gave the path.

    Raises:
        UserError: its folder does not exist or cannot be written, its name is too long, or something that is no regular
            file is there.
    """
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise UserError(f"{option} {path}: no such folder; create it first")
    if len(os.fsencode(path.name)) > MAX_NAME_BYTES:
        raise UserError(f"{option} {path}: cannot be written; choose a shorter name")
    if os.path.lexists(path) and not os.path.isfile(path):
        raise UserError(f"{option} {path}: cannot be written, it is no regular file; choose another name")
    try:
        with tempfile.TemporaryFile(dir=folder):  # os.access says of /proc, and of every folder to root, that it can be
            pass
    except OSError as e:
        raise UserError(f"{option} {path}: cannot be written ({e.strerror}); choose a writable folder") from None
