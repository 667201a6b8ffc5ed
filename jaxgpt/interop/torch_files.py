"""Files of `torch.save`, read and written in numpy: nanoGPT keeps its checkpoints in them. torch is not needed.

Such a file is a zip archive of uncompressed entries: NAME/data.pkl, a pickle of protocol 2, and NAME/data/KEY, the
bytes of a storage. In the pickle, a tensor is a call of `torch._utils._rebuild_tensor_v2` with the key of its storage,
an offset, a shape and strides.

`load` interprets the opcodes of the pickle itself. It knows plain values and tensors, and calls nothing that a file
names, so a hostile file can do no more than be refused.
"""

import math
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from jaxgpt.data.files import atomic_replace, open_regular
from jaxgpt.errors import UserError

MAX_PICKLE_BYTES = 2**26  # without the tensors' values: a thousand layers take 4 MB
MAGIC = b"PK\x03\x04"

# The types of storages, by torch's names, and numpy's types of their elements. numpy has no bfloat16.
_STORAGES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "|i1",
    "ByteStorage": "|u1",
    "BoolStorage": "|b1",
}
_STORAGE_OF = {"f4": "FloatStorage", "f8": "DoubleStorage", "i8": "LongStorage"}  # what `save` writes


class _Refused(ValueError):
    """What the pickle holds beside plain values and tensors."""


class _Global(NamedTuple):
    """A name in a pickle, of which nothing is imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


_ORDERED_DICT = _Global("collections", "OrderedDict")
_TENSOR = _Global("torch._utils", "_rebuild_tensor_v2")
_PARAMETER = _Global("torch._utils", "_rebuild_parameter")
_SIZE = _Global("torch", "Size")


def float32_of_bfloat16(bits: np.ndarray) -> np.ndarray:
    """The values of bfloat16s, given as uint16, in float32: bfloat16 is its upper half."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


# -------------------------------------------------------------------------------------------------------------- reading


def load(path: Path, flag: str) -> Any:
    """The values of a file: dictionaries, lists, tuples, strings, numbers, and tensors as numpy arrays.

    Tensors of bfloat16 become float32. Arrays may share memory, and cannot be written to.

    Args:
        flag: the flag that gave the path, for messages.

    Raises:
        UserError: the file cannot be read, is none of `torch.save`, or holds more than plain values and tensors.
    """
    try:
        with open_regular(path) as f, zipfile.ZipFile(f) as archive:
            return _load(archive, f)
    except _Refused as e:
        raise UserError(f"{flag} {path}: {e}; save tensors and plain values alone") from None
    except MemoryError:
        raise UserError(f"{flag} {path}: out of memory; give the process more of it") from None
    except OSError as e:
        raise UserError(f"{flag} {path}: cannot be read ({e.strerror or e}); give a readable file") from None
    except (
        *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError),  # of zipfile, which names no base
        *(ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError),  # of a senseless pickle
    ) as e:
        reason = f"{type(e).__name__}: {str(e)[:200]}"
        raise UserError(f"{flag} {path}: is no sound file of torch.save ({reason}); save it again") from None


def _load(archive: zipfile.ZipFile, f: IO[bytes]) -> Any:
    (pickled,) = [info for info in archive.infolist() if info.filename.split("/")[1:] == ["data.pkl"]]
    prefix = pickled.filename.removesuffix("data.pkl")
    n_bytes = f.seek(0, 2)

    def read(name: str, most: int) -> bytes:
        info = archive.getinfo(prefix + name)
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed")
        if info.file_size > min(most, n_bytes):
            raise ValueError(f"{name} has {info.file_size:,} bytes")
        return archive.read(info)

    if f"{prefix}byteorder" in archive.namelist() and read("byteorder", 10) != b"little":
        raise ValueError("its bytes are in big-endian order")
    storages: dict[str, np.ndarray] = {}

    def storage(kind: Any, key: Any, numel: Any) -> np.ndarray:
        if not (isinstance(kind, _Global) and kind.module == "torch" and kind.name in _STORAGES):
            raise _Refused(f"it holds a tensor in {kind}")
        if key not in storages:
            dtype = _STORAGES[kind.name]
            data = np.frombuffer(read(f"data/{key}", n_bytes), "<u2" if dtype == "bfloat16" else dtype)
            storages[key] = float32_of_bfloat16(data) if dtype == "bfloat16" else data
        if len(storages[key]) != numel:
            raise ValueError(f"data/{key} has {len(storages[key])} elements, {numel} by the pickle")
        return storages[key]

    return _unpickled(read("data.pkl", MAX_PICKLE_BYTES), storage)


def _unpickled(data: bytes, storage: Callable[[Any, Any, Any], np.ndarray]) -> Any:
    """The value that a pickle of protocol 2 describes.

    Args:
        storage: gives the elements of a storage from its type, key and number of elements.

    Raises:
        _Refused: the pickle holds anything but plain values and tensors.
        Exception: one of those that `load` lists, for a pickle that makes no sense.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def above_mark() -> list[Any]:
        at = marks.pop()
        items = stack[at:]
        del stack[at:]
        return items

    for opcode, arg, _ in pickletools.genops(data):
        match opcode.name:
            case "PROTO":
                pass
            case "STOP":
                (value,) = stack
                return value
            case "MARK":
                marks.append(len(stack))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(arg)
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[opcode.name]())
            case "TUPLE":
                stack.append(tuple(above_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                n = int(opcode.name[-1])
                if len(stack) < n:
                    raise IndexError("too few values for a tuple")
                stack[-n:] = [tuple(stack[-n:])]
            case "APPEND":
                item = stack.pop()
                _of(list, stack[-1]).append(item)
            case "APPENDS":
                items = above_mark()
                _of(list, stack[-1]).extend(items)
            case "SETITEM":
                item, key = stack.pop(), stack.pop()
                _of(dict, stack[-1])[_key(key)] = item
            case "SETITEMS":
                items = above_mark()
                _of(dict, stack[-1]).update(zip(map(_key, items[::2]), items[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                memo[_of(int, arg)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[_of(int, arg)])
            case "GLOBAL":
                stack.append(_Global(*_of(str, arg).split(" ", 1)))
            case "BINPERSID":
                _, kind, key, _, numel = stack.pop()
                stack.append(storage(kind, key, numel))
            case "REDUCE":
                args, function = stack.pop(), stack.pop()
                stack.append(_called(function, _of(tuple, args)))
            case "BUILD":  # a state dict's versions, which its modules have in `_metadata`
                stack.pop()
                _of(dict, stack[-1])
            case name:
                raise _Refused(f"its pickle has the opcode {name}")
    raise ValueError("the pickle has no end")


def _of(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{type(value).__name__} in place of {kind.__name__}")
    return value


def _key(value: Any) -> str | int:
    """A key of a dictionary. One of nested tuples would be hashed by recursion in C, which may exhaust the stack."""
    if not isinstance(value, str | int):
        raise _Refused(f"a dictionary has a {type(value).__name__} as a key")
    return value


def _called(function: Any, args: tuple[Any, ...]) -> Any:
    """What a call in a pickle gives: an empty dictionary, a size or a tensor; no other call is known."""
    if function == _ORDERED_DICT and not args:
        return {}
    if function == _SIZE:
        return tuple(*args)
    if function == _PARAMETER:
        return _of(np.ndarray, args[0])
    if function == _TENSOR:
        return _tensor(*args[:4])
    raise _Refused(f"its pickle calls {str(function)[:80]}")


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any) -> np.ndarray:
    """A view of a storage. Raises `ValueError` if the storage does not hold it, or it repeats elements."""
    elements = _of(np.ndarray, storage)
    sizes = [_of(int, n) for n in (offset, *_of(tuple, shape), *_of(tuple, stride))]
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    n = math.prod(shape)
    if min(sizes) < 0 or n > len(elements) or (n and last >= len(elements)):
        raise ValueError(f"a tensor of shape {list(shape)} in a storage of {len(elements)} elements")
    steps = [step * elements.itemsize for step in stride]
    view = np.lib.stride_tricks.as_strided(elements[offset:], shape, steps, writeable=False)
    return view if n else np.zeros(shape, elements.dtype)


# -------------------------------------------------------------------------------------------------------------- writing


def save(path: Path, values: Any) -> None:
    """Writes values as `torch.save` does, such that `torch.load(weights_only=True)` reads them; whole or not at all.

    Args:
        values: dictionaries, lists, tuples, strings, numbers, None, and arrays of float32, float64 or int64. An array
            that occurs twice is stored once.

    Raises:
        OSError: the file cannot be written.
    """
    arrays: dict[int, np.ndarray] = {}
    pickled = b"\x80\x02" + b"".join(_pickled(values, arrays)) + b"."
    with atomic_replace(path) as partial, zipfile.ZipFile(partial, "x", zipfile.ZIP_STORED) as archive:

        def write(name: str, data: Any) -> None:
            with archive.open(f"archive/{name}", "w", force_zip64=len(data) >= 2**31) as entry:
                entry.write(data)

        write("data.pkl", pickled)
        write("byteorder", b"little")
        for key, array in enumerate(arrays.values()):
            little = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
            write(f"data/{key}", little.tobytes())
        write("version", b"3\n")


def _pickled(value: Any, arrays: dict[int, np.ndarray]) -> list[bytes]:
    """The opcodes of protocol 2 for a value. Adds its arrays to `arrays`, by identity, in the order of their keys."""

    def integers(items: tuple[int, ...]) -> list[bytes]:
        return [b"(", *(_pickled_integer(item) for item in items), b"t"]

    match value:
        case None:
            return [b"N"]
        case bool():
            return [b"\x88" if value else b"\x89"]
        case int():
            return [_pickled_integer(value)]
        case float():
            return [b"G" + struct.pack(">d", value)]
        case str():
            data = value.encode()
            return [b"X" + struct.pack("<I", len(data)) + data]
        case dict():
            return [b"}(", *(part for item in value.items() for each in item for part in _pickled(each, arrays)), b"u"]
        case list():
            return [b"](", *(part for item in value for part in _pickled(item, arrays)), b"e"]
        case tuple():
            return [b"(", *(part for item in value for part in _pickled(item, arrays)), b"t"]
        case np.ndarray():
            arrays.setdefault(id(value), value)
            key = list(arrays).index(id(value))
            kind = _STORAGE_OF[value.dtype.str[1:]]
            stride = tuple(math.prod(value.shape[at + 1 :]) for at in range(value.ndim))
            storage = [b"(", *_pickled("storage", {}), f"ctorch\n{kind}\n".encode(), *_pickled(str(key), {})]
            storage += [*_pickled("cpu", {}), _pickled_integer(value.size), b"tQ"]
            hooks = b"ccollections\nOrderedDict\n)R"
            rest = [b"K\x00", *integers(value.shape), *integers(stride), b"\x89", hooks, b"tR"]
            return [b"ctorch._utils\n_rebuild_tensor_v2\n(", *storage, *rest]
    raise AssertionError(f"no place for {type(value).__name__} in a file of torch.save")


def _pickled_integer(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data
