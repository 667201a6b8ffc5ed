"""Reading and writing safetensors files, with errors as `UserError`s. Imports neither jax nor torch."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from jaxgpt import strict_json
from jaxgpt.data.files import NotRegular, open_regular
from jaxgpt.errors import UserError, require_writable
from jaxgpt.interop.torch_files import float32_of_bfloat16

SAVE = "safetensors.torch.save_file(model.float().state_dict(), FILE)"
PYTORCH = {"format": "pt"}  # metadata by which transformers knows that tensors have PyTorch's layout
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # numpy has no bfloat16
_INTEGERS = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U8": "|u1", "BOOL": "|b1"}


def read(path: Path, flag: str) -> dict[str, np.ndarray]:
    """The tensors of a file, by name: bfloat16 as float32, others in their type.

    Args:
        flag: the flag that gave the path, for messages.

    Raises:
        UserError: the file cannot be read, is not a safetensors file, or has values that are not finite.
    """
    entries, start = _header(path, flag)
    mapped = np.memmap(path, np.uint8, "r") if os.path.getsize(path) else np.zeros(0, np.uint8)
    tensors = {}
    for name, entry in entries.items():
        dtype = (_FLOATS | _INTEGERS).get(entry["dtype"])
        if dtype is None:
            raise UserError(f"{flag} {path}: {name} is of type {entry['dtype']}; write it with {SAVE}")
        first, last = entry["data_offsets"]
        p = np.frombuffer(mapped[start + first : start + last].tobytes(), dtype).reshape(entry["shape"])
        p = float32_of_bfloat16(p) if entry["dtype"] == "BF16" else p
        if p.dtype.kind == "f" and not np.isfinite(p).all():
            raise UserError(f"{flag} {path}: {name} holds values that are not finite; they cannot be used")
        tensors[name] = p
    return tensors


def shapes(path: Path, flag: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's tensors, by name; no tensor is read. Raises what `read` raises."""
    return {name: tuple(entry["shape"]) for name, entry in _header(path, flag)[0].items()}


def metadata(path: Path, flag: str) -> dict[str, str]:
    """The texts that a file holds beside its tensors, by name. Raises what `read` raises."""
    with _opened(path, flag) as file:
        return file.metadata() or {}


def _header(path: Path, flag: str) -> tuple[dict, int]:
    """The entries of a file's header by tensor, and where their data begins; the library has verified them."""
    with _opened(path, flag):
        pass
    with open_regular(path) as f:
        n_bytes = int.from_bytes(f.read(8), "little")
        entries = strict_json.loads(f.read(n_bytes))
    entries.pop("__metadata__", None)
    return entries, 8 + n_bytes


@contextlib.contextmanager
def _opened(path: Path, flag: str) -> Iterator:
    """A file opened by the library, which reads the header, and checks that types, shapes and offsets fit the file."""
    if not os.path.lexists(path):
        raise UserError(f"{flag} {path}: no such file; check the path")
    if not os.path.isfile(path):
        raise UserError(f"{flag} {path}: not a regular file; give a safetensors file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{flag} {path}: cannot be read (permission denied); give a readable file")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except (OSError, NotRegular, safetensors.SafetensorError, *(AttributeError, KeyError, TypeError, ValueError)) as e:
        raise UserError(f"{flag} {path}: cannot be read as safetensors ({e}); write it with {SAVE}") from None


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


def write(files: Iterable[tuple[str, Path, Mapping[str, np.ndarray]]], metadata: Mapping[str, str] = PYTORCH) -> None:
    """Writes files, all of them or none; each is (flag, path, tensors).

    Args:
        metadata: the text, by its name, that each file holds beside its tensors. At most one: the library writes
            several in an order that changes from file to file.

    Raises:
        UserError: one cannot be written.
    """
    partials: list[tuple[Path, Path]] = []
    try:
        for flag, path, tensors in files:
            partials.append((path.with_name(path.name + ".partial"), path))
            contiguous = {name: np.array(p, order="C") for name, p in tensors.items()}
            try:
                safetensors.numpy.save_file(contiguous, partials[-1][0], dict(metadata))
            except (OSError, safetensors.SafetensorError) as e:
                raise UserError(f"{flag} {path}: cannot be written ({e}); choose a place with room") from None
        for partial, path in partials:
            os.replace(partial, path)
    finally:
        for partial, _ in partials:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
