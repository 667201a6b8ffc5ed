"""Reading and writing safetensors files, with errors as `UserError`s. Imports neither jax nor torch."""

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from jaxgpt.errors import UserError, require_writable

SAVE = "safetensors.torch.save_file(model.float().state_dict(), FILE)"


def read(path: Path, flag: str) -> dict[str, np.ndarray]:
    """The tensors of a file, by name.

    Args:
        flag: the flag that gave the path, for messages.

    Raises:
        UserError: the file cannot be read, is not a safetensors file, or has values that are not finite.
    """
    if not os.path.lexists(path):
        raise UserError(f"{flag} {path}: no such file; check the path")
    if not os.path.isfile(path):
        raise UserError(f"{flag} {path}: not a regular file; give a safetensors file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{flag} {path}: cannot be read (permission denied); give a readable file")
    try:
        tensors = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError, AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"{flag} {path}: cannot be read as safetensors ({e}); write it with {SAVE}") from None
    for name, p in tensors.items():
        if not np.isfinite(p.astype(np.float64) if p.dtype.kind not in "biuc" else p).all():
            raise UserError(f"{flag} {path}: {name} holds values that are not finite; they cannot be used")
    return tensors


def require_new(files: Mapping[str, Path | None], overwrite: bool, keep_out_of: Path | None = None) -> None:
    """Checks that files can be written, before the work that produces their contents.

    Args:
        files: paths by flag; None if the flag was not given.
        overwrite: files may exist, and are then replaced.
        keep_out_of: a folder that must not contain the files.

    Raises:
        UserError: a file exists, cannot be written or lies in `keep_out_of`, or two paths are the same file.
    """
    seen: dict[Path, str] = {}
    for flag, path in files.items():
        if path is None:
            continue
        place = Path(os.path.realpath(path))
        if place in seen:
            raise UserError(f"{flag} {path}: the same file as {seen[place]}; choose another name")
        seen[place] = flag
        if keep_out_of and place.is_relative_to(os.path.realpath(keep_out_of)):
            raise UserError(f"{flag} {path}: lies in the run {keep_out_of}; choose a place outside of it")
        if os.path.lexists(path) and not (overwrite and os.path.isfile(path)):
            raise UserError(f"{flag} {path}: exists already; choose another name, or --overwrite to replace a file")
        require_writable(flag, path)


def write(files: Iterable[tuple[str, Path, Mapping[str, np.ndarray]]]) -> None:
    """Writes files, all of them or none; each is (flag, path, tensors). Raises `UserError` if one cannot be written."""
    partials: list[tuple[Path, Path]] = []
    try:
        for flag, path, tensors in files:
            partials.append((path.with_name(path.name + ".partial"), path))
            contiguous = {name: np.array(p, order="C") for name, p in tensors.items()}
            try:
                safetensors.numpy.save_file(contiguous, partials[-1][0], {"format": "pt"})
            except (OSError, safetensors.SafetensorError) as e:
                raise UserError(f"{flag} {path}: cannot be written ({e}); choose a place with room") from None
        for partial, path in partials:
            os.replace(partial, path)
    finally:
        for partial, _ in partials:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
