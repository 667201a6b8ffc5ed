"""What all commands share: flags from dataclasses, errors as exit codes. Imports no jax, so `--help` is instant."""

import argparse
import contextlib
import dataclasses
import difflib
import io
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from jaxgpt.config import TrainConfig
from jaxgpt.errors import LossNotFinite, UserError
from jaxgpt.presets import PRESETS
from jaxgpt.versions import require_sound_jaxlib

Flags = TypeVar("Flags")


@dataclass(frozen=True)
class TrainFlags(TrainConfig):
    """The flags of scripts/train.py: a run's configuration, and where to read and write."""

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
    """Of flags that extend a configuration the part that determines a run's numbers."""
    return TrainConfig(**{f.name: getattr(flags, f.name) for f in dataclasses.fields(TrainConfig)})


def parse_train_flags(args: list[str], description: str, flags: type[Flags] = TrainFlags) -> Flags:
    """The flags of a command that takes a configuration (a dataclass over TrainConfig), defaults by `--preset`."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset", nargs="?", default=TrainConfig.preset)
    preset = first.parse_known_args(args)[0].preset
    if preset not in PRESETS:
        near = difflib.get_close_matches(preset or "", PRESETS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"--preset {preset}: unknown preset; choose of {', '.join(PRESETS)}{hint}")
    default = flags(**{f.name: getattr(PRESETS[preset], f.name) for f in dataclasses.fields(TrainConfig)})
    return parse_flags(flags, args, description, default)


def parse_flags(flags: type[Flags], args: list[str], description: str, default: Any = None) -> Flags:
    """Flags from the fields of a dataclass. Raises `UserError`, one line, for flags that cannot be read."""
    import tyro  # not above: what only measures may run without it

    messages = io.StringIO()
    kwargs = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(messages):
            return tyro.cli(flags, args=args, description=description, **kwargs)
    except SystemExit as e:
        if not e.code:
            raise
        raise UserError(_one_line(messages.getvalue())) from None


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Runs a script's `main` and exits: 2 with one line for what the user can put right, 3 for a loss not finite."""
    if sys.stdout is None:  # closed by whoever started us
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a text's characters may be unknown to this terminal
    try:
        given = os.environ.get("JAX_NUM_CPU_DEVICES", "1")
        if not re.fullmatch("[0-9]{1,4}", given) or int(given) < 1:
            raise UserError(f"JAX_NUM_CPU_DEVICES={given}: give a number of devices from 1 on, or unset it")
        require_sound_jaxlib()
        code = main() or 0
        sys.stdout.flush()
    except UserError as e:
        code = _say_error(e, 2)
    except LossNotFinite as e:
        code = _say_error(e, 3)
    except KeyboardInterrupt:
        _say_error("interrupted", 130)
        os._exit(130)  # asked for twice, or before anything was begun: do not wait for threads
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)


def _say_error(message: object, code: int) -> int:
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    return code


def _one_line(box: str) -> str:
    """The text of tyro's framed message, without its frame, its title and its colours."""
    box = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("│╭╮╰╯─ \n") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    return re.sub(r" For full helptext, (see|run) .*$", "", " ".join(line for line in lines if line))
