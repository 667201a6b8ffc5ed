"""What the reference's two commands share: flags, files of tensors, and errors as exit codes."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import tyro
from torch import Tensor

from jaxgpt.config import UserError


class LossNotFinite(ArithmeticError):
    """Training diverged: a loss is NaN or infinite, or five updates in a row were skipped."""


def exit_code(main: Callable[[], None]) -> int:
    """Runs a command; reports an error of the user's (exit code 2) or a diverged loss (3) in one line."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the terminal may not have all characters of a sample
    try:
        main()
        sys.stdout.flush()
        return 0
    except (UserError, LossNotFinite) as e:
        print("error:", " ".join(str(e).split()), file=sys.stderr)
        return 2 if isinstance(e, UserError) else 3
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output has ended, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def parse(flags: type, prog: str, description: str, default: Any = None) -> Any:
    """The command line as an instance of a dataclass. Raises `UserError` for flags that cannot be read."""
    given, message = {} if default is None else {"default": default}, io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return tyro.cli(flags, prog=prog, description=description, **given)
    except SystemExit as e:
        if not e.code:  # of --help
            raise
        raise UserError(message.getvalue().translate(dict.fromkeys(map(ord, "╭╮╰╯─│"), " "))) from None


def read_tensors(flag: str, path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises `UserError` if it cannot be read or a value is not finite."""
    try:
        tensors = safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise UserError(f"{flag} {path}: no such file; check the path") from None
    except (OSError, safetensors.SafetensorError) as e:
        raise UserError(f"{flag} {path}: cannot be read as safetensors ({e}); give a whole file") from None
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{flag} {path}: {name} holds values that are not finite; they cannot be used")
    return tensors


def require_new(files: Mapping[str, Path | None], overwrite: bool) -> None:
    """Checks, before the work, that files can be written later. Raises `UserError` by flag if one cannot."""
    given = {flag: path for flag, path in files.items() if path}
    for flag, path in given.items():
        if os.path.lexists(path) and not (overwrite and path.is_file()):
            raise UserError(f"{flag} {path}: exists already; choose another name, or --overwrite to replace a file")
        if not os.access(path.resolve().parent, os.W_OK):
            raise UserError(f"{flag} {path}: cannot be written; choose a folder that is there and writable")
    if len({path.resolve() for path in given.values()}) < len(given):
        raise UserError(f"{' and '.join(given)}: the same file; choose two names")


def write_tensors(files: Mapping[str, tuple[Path, Mapping[str, Tensor]]]) -> None:
    """Writes safetensors files (path and tensors by flag), all or none. Raises `UserError` if one cannot be written."""
    partials = {flag: path.with_name(path.name + ".partial") for flag, (path, _) in files.items()}
    try:
        for flag, (path, tensors) in files.items():
            try:
                plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
                safetensors.torch.save_file(plain, partials[flag], {"format": "pt"})
            except (OSError, safetensors.SafetensorError) as e:
                raise UserError(f"{flag} {path}: cannot be written ({e}); choose a place with room") from None
        for flag, (path, _) in files.items():
            partials[flag].replace(path)
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)


def require_same(named: str, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raises `UserError` unless names, shapes and dtypes are those of the model (of `step`: one number)."""
    if odd := sorted(set(tensors) ^ set(wanted)):
        raise UserError(f"{named}: not of this model ({', '.join(odd[:4])} on one side only); give other --model flags")
    for name, tensor in tensors.items():
        if name == "step":
            if tensor.numel() != 1 or tensor.dtype in (torch.bool, torch.complex64):
                raise UserError(f"{named}: step is {tensor.tolist()}; one number of updates is needed")
        elif (tensor.shape, tensor.dtype) != (wanted[name].shape, wanted[name].dtype):
            raise UserError(
                f"{named}: {name} is {_kind(tensor)}, not {_kind(wanted[name])}; give the --model flags and the "
                "--dtype of its training"
            )


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
