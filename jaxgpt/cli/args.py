"""Command lines: flags from dataclasses, errors as exit codes. Imports no jax, so that `--help` is instant."""

import argparse
import contextlib
import dataclasses
import difflib
import importlib
import io
import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar

import jaxgpt
from jaxgpt.config import DeviceLayout, FaultPolicy, FinetuneConfig, ProcessLayout, TrainConfig, differences
from jaxgpt.environment import CheckedOutput, reason, require_device_count
from jaxgpt.errors import DamagedRun, LossNotFinite, UserError, flag, require
from jaxgpt.presets import PRESETS
from jaxgpt.versions import require_sound_jaxlib

Flags = TypeVar("Flags")


@dataclass(frozen=True)
class BatchTokens:
    """The flag that gives a batch in tokens."""

    batch_tokens: int = 0
    """The batch in tokens, in place of --batch-size: a multiple of a row's tokens, that is of --model.block-size, or
    in fine-tuning of --max-tokens (0 = by --batch-size)."""

    def __post_init__(self):
        if self.batch_tokens:
            assert isinstance(self, TrainConfig | FinetuneConfig), "comes before one of them"
            object.__setattr__(self, "batch_size", _rows_of(self.batch_tokens, self))
        super().__post_init__()  # pyright: ignore[reportAttributeAccessIssue]


@dataclass(frozen=True)
class TrainFlags(BatchTokens, FaultPolicy, DeviceLayout, ProcessLayout, TrainConfig):
    """The flags of `jaxgpt train`: a run's configuration, devices, where to read and write, what to do about faults."""

    out_dir: Path | None = None
    """Run folder (default: runs/<dataset>-<preset>-<time>). A run of the same configuration there is resumed."""
    data_dir: Path | None = None
    """Folder to look for datasets in first."""
    overwrite: bool = False
    """Start again if --out-dir holds a run."""
    init_from: str | None = None
    """Weights to start from, with their model and tokenizer: a run, a folder or repository of Hugging Face's GPT-2,
    nanoGPT's ckpt.pt, llm.c's .bin, or a safetensors file. Default: random weights."""
    summary: bool = False
    """Print layers, shapes, parameters, FLOP per token and the memory that a step needs before training."""
    loader: Literal["auto", "device", "host"] = "auto"
    """Where the tokens are kept; the batches are the same. auto: on the device while they are few for its memory."""

    def __post_init__(self):
        super().__post_init__()
        self.check_processes()
        if self.distributed:
            remedy = "a save that fails in one process ends all; leave it out with --distributed"
            require(self.on_save_error == "stop", "on_save_error", self.on_save_error, remedy)


def config_of(flags: TrainConfig) -> TrainConfig:
    """The configuration in flags that extend it: the fields that determine a run's numbers."""
    return TrainConfig(**{f.name: getattr(flags, f.name) for f in dataclasses.fields(TrainConfig)})


def _rows_of(batch_tokens: int, flags: TrainConfig | FinetuneConfig) -> int:
    """The batch size that --batch-tokens gives. Raises `UserError` if there is none, or another one was given too."""
    if isinstance(flags, FinetuneConfig):
        time, default = "--max-tokens", FinetuneConfig.batch_size
    else:
        time, default = "--model.block-size", PRESETS[flags.preset].batch_size
    rows, rest = divmod(batch_tokens, flags.n_time)
    if rows < 1 or rest:
        near = max(1, round(batch_tokens / flags.n_time)) * flags.n_time
        raise UserError(f"--batch-tokens {batch_tokens}: no multiple of {time} {flags.n_time}; give one, as {near}")
    if flags.batch_size not in (default, rows):
        raise UserError(f"--batch-tokens {batch_tokens}: --batch-size {flags.batch_size} is another; give one of both")
    return rows


def parse_train_flags(args: list[str], description: str | None, prog: str, flags: type[Flags] = TrainFlags) -> Flags:
    """Parses the flags of a command that takes a configuration; `--preset` chooses the defaults.

    Args:
        prog: the command's name in messages, as "jaxgpt train".
        flags: a dataclass that extends `TrainConfig`. A default of its own counts before the preset's.

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
    fields: Any = dataclasses.fields(flags)  # pyright: ignore[reportArgumentType]
    own = {f.name for f in fields if f.default != getattr(TrainConfig, f.name, f.default)}
    names = [f.name for f in dataclasses.fields(TrainConfig) if f.name not in own]
    default = flags(**{name: getattr(PRESETS[preset], name) for name in names})
    return parse_flags(flags, args, description, prog, default)


def given_flags(args: list[str]) -> set[str]:
    """The fields, as `model.n_layer`, whose flags are among a command's words, whatever their values."""
    words = (word.removeprefix("--").partition("=")[0] for word in args if word.startswith("--"))
    # A switch is turned off by "no" before its last part: --model.no-bias.
    return {re.sub(r"(^|\.)no_(\w+)$", r"\1\2", word.replace("-", "_")) for word in words}


def train_command(config: TrainConfig, out_dir: Path, data_dir: Path | None = None) -> str:
    """The command that trains, or goes on with, a run of a configuration, for a shell."""
    words = ["jaxgpt", "train", "--preset", config.preset]
    for name, _, value in differences(PRESETS[config.preset], config):
        if isinstance(value, bool):
            path, dot, last = name.rpartition(".")
            words.append(flag(f"{path}{dot}{'' if value else 'no_'}{last}"))
        else:
            words += [flag(name), str(value)]
    words += ["--data-dir", str(data_dir)] if data_dir else []
    return shlex.join([*words, "--out-dir", str(out_dir)])


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
            registry = _number_registry()
            return tyro.cli(flags, args=args, description=description, prog=prog, registry=registry, **kwargs)
    except SystemExit as e:
        if not e.code:
            raise
        raise UserError(_unframed(messages.getvalue())) from None


def integer(text: str) -> int:
    """A whole number in ASCII digits. Python's `int` also takes "1_000", " 7" and the digits of other scripts.

    Raises:
        ValueError: the text is none.
    """
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        raise ValueError(f"{text!r}: give a whole number, in at most 18 digits 0 to 9")
    return int(text)


def number(text: str) -> float:
    """A number in ASCII digits, "inf" or "nan". Raises `ValueError` for another text, as `integer` does."""
    if not re.fullmatch(r"[+-]?(([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|inf|nan)", text):
        raise ValueError(f"{text!r}: give a number, in digits 0 to 9")
    return float(text)


def _number_registry() -> Any:
    """tyro's rules with `integer` and `number` in place of Python's `int` and `float`."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def rule(type_info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        parse = {int: integer, float: number}.get(type_info.type)  # pyright: ignore[reportArgumentType, reportCallIssue]
        if parse is None:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar=type_info.type.__name__.upper(),
            instance_from_str=lambda args: parse(args[0]),
            is_instance=lambda x: isinstance(x, int if parse is integer else int | float),
            str_from_instance=lambda instance: [str(instance)],
        )

    return registry


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

    The code is 2 for a `UserError` and for what the system refuses (memory, descriptors, a place to write), 3 for a
    `LossNotFinite` and 4 for a `DamagedRun`, each printed as one line to standard error; 141 if the reader of standard
    output has gone.
    """
    # The parent process may have closed either.
    sys.stdout = open(os.devnull, "w") if sys.stdout is None else sys.stdout  # noqa: SIM115
    sys.stderr = open(os.devnull, "w") if sys.stderr is None else sys.stderr  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the terminal's encoding may lack characters of a text
    try:
        with contextlib.redirect_stdout(CheckedOutput(sys.stdout)):
            try:
                require_device_count()
                require_sound_jaxlib()
                code = main() or 0
            except SystemExit as e:  # from --help
                code = e.code if isinstance(e.code, int) else int(e.code is not None)
            sys.stdout.flush()
    except DamagedRun as e:
        code = print_error(e, 4)
    except UserError as e:
        code = print_error(e, 2)
    except LossNotFinite as e:
        code = print_error(e, 3)
    except BrokenPipeError:  # as in `jaxgpt generate RUN | head -1`
        code = 141
    except Exception as e:
        if not (message := reason(e)):
            raise
        code = print_error(message, 2)
    with contextlib.suppress(OSError, UserError):  # what an error left behind; the interpreter would print a failure
        CheckedOutput(sys.stdout).flush()
    return code


def print_error(message: object, code: int) -> int:
    """Prints an error as one line to standard error. Returns `code`."""
    with contextlib.suppress(OSError):  # standard error has gone as well
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
