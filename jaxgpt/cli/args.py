"""Command lines: flags from dataclasses, errors as exit codes. Imports no jax, so that `--help` is instant."""

import argparse
import contextlib
import dataclasses
import difflib
import importlib
import io
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar

import jaxgpt
from jaxgpt.config import TrainConfig
from jaxgpt.errors import LossNotFinite, UserError
from jaxgpt.presets import PRESETS
from jaxgpt.versions import require_sound_jaxlib

Flags = TypeVar("Flags")


@dataclass(frozen=True)
class TrainFlags(TrainConfig):
    """The flags of `jaxgpt train`: a run's configuration, and where to read and write."""

    out_dir: Path | None = None
    """Run folder (default: runs/<dataset>-<preset>-<time>). A run of the same configuration there is resumed."""
    data_dir: Path | None = None
    """Folder to look for datasets in first."""
    overwrite: bool = False
    """Start again if --out-dir holds a run."""
    summary: bool = False
    """Print layers, shapes, parameters, FLOP per token and the memory that a step needs before training."""
    loader: Literal["auto", "device", "host"] = "auto"
    """Where the tokens are kept; the batches are the same. auto: on the device while they are few for its memory."""


def config_of(flags: TrainConfig) -> TrainConfig:
    """The configuration in flags that extend it: the fields that determine a run's numbers."""
    return TrainConfig(**{f.name: getattr(flags, f.name) for f in dataclasses.fields(TrainConfig)})


def parse_train_flags(args: list[str], description: str | None, prog: str, flags: type[Flags] = TrainFlags) -> Flags:
    """Parses the flags of a command that takes a configuration; `--preset` chooses the defaults.

    Args:
        prog: the command's name in messages, as "jaxgpt train".
        flags: a dataclass that extends `TrainConfig`.

    Raises:
        UserError: flags that cannot be read, or values out of their range.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset", nargs="?", default=TrainConfig.preset)
    preset = first.parse_known_args(args)[0].preset
    if preset not in PRESETS:
        near = difflib.get_close_matches(preset or "", PRESETS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"--preset {preset}: unknown preset; choose of {', '.join(PRESETS)}{hint}")
    default = flags(**{f.name: getattr(PRESETS[preset], f.name) for f in dataclasses.fields(TrainConfig)})
    return parse_flags(flags, args, description, prog, default)


def parse_flags(flags: type[Flags], args: list[str], description: str | None, prog: str, default: Any = None) -> Flags:
    """Parses flags into a dataclass, a flag per field.

    Args:
        prog: the command's name in messages, as "jaxgpt evaluate".
        default: an instance whose values are the defaults.

    Raises:
        UserError: flags that cannot be read.
        SystemExit: `--help` was given, and has been printed.
    """
    import tyro  # here: a benchmark may import this module in an environment without tyro

    messages = io.StringIO()
    kwargs = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(messages):
            return tyro.cli(flags, args=args, description=description, prog=prog, **kwargs)
    except SystemExit as e:
        if not e.code:
            raise
        raise UserError(_unframed(messages.getvalue())) from None


def import_from_checkout(module: str) -> ModuleType:
    """Imports a module of the repository that is not installed with jaxgpt, such as `parity_tests`.

    Raises:
        UserError: this jaxgpt does not lie in a checkout.
    """
    root, package = Path(jaxgpt.__file__).parents[1], module.partition(".")[0]
    if not ((root / package).is_dir() and (root / "pyproject.toml").is_file()):
        raise UserError(
            f"{package}/ is not installed with jaxgpt; run this command from a checkout of the repository, "
            "with the parity extra installed"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module(module)


def exit_code(main: Callable[[], int | None]) -> int:
    """Runs a command and returns its exit code.

    The code is 2 for a `UserError` and 3 for a `LossNotFinite`, each printed as one line to standard error; 141 if the
    reader of standard output has gone.
    """
    if sys.stdout is None:  # the parent process has closed it
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the terminal's encoding may lack characters of a text
    try:
        given = os.environ.get("JAX_NUM_CPU_DEVICES", "1")
        if not re.fullmatch("[0-9]{1,4}", given) or int(given) < 1:
            raise UserError(f"JAX_NUM_CPU_DEVICES={given}: give a number of devices from 1 on, or unset it")
        require_sound_jaxlib()
        code = main() or 0
        sys.stdout.flush()
    except SystemExit as e:  # from --help
        return e.code if isinstance(e.code, int) else 0
    except UserError as e:
        code = print_error(e, 2)
    except LossNotFinite as e:
        code = print_error(e, 3)
    except BrokenPipeError:  # as in `jaxgpt generate RUN | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    return code


def print_error(message: object, code: int) -> int:
    """Prints an error as one line to standard error. Returns `code`."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    return code


def _unframed(message: str) -> str:
    """The text of tyro's framed message on one line, without the frame, its title and its colours.

    tyro prints a message, or nothing (`console_outputs=False`); it has no public way to return the text.
    """
    from rich.text import Text

    rows = [row[1:-1].strip() for row in Text.from_ansi(message).plain.splitlines()]  # without the frame's sides
    words = " ".join(row for row in rows[1:-1] if row.strip("─-")).split()
    return " ".join(words).partition(" For full helptext")[0]
