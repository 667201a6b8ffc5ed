"""nanoGPT's folders of tokens: `train.bin` and `val.bin`, raw integers without a header, and `meta.pkl` beside them.

Nothing in such a file says what its integers are. `meta.pkl`, where it is there, names the characters that they stand
for. Without it they are GPT-2's byte pairs or bytes, as `--tokenizer` says, and `open_tokens` refuses content that
contradicts it: a file read wrong would train, on nonsense. Axes: N tokens.
"""

import codecs
import io
import os
import pickle
import pickletools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxgpt.data.files import NotAvailable, NotRegular, drop_mapped_pages, open_regular, read_small
from jaxgpt.data.shards import has_header
from jaxgpt.errors import UserError

if TYPE_CHECKING:
    from jaxgpt.data.tokenizer import Tokenizer

META = "meta.pkl"
MAX_META_BYTES = 2**24  # a character takes about 15: enough for all of Unicode's that are assigned
SCANNED_BYTES = 2**22  # of a file in memory at a time
DECODED_TOKENS = 2**20  # of GPT-2's byte pairs, whose bytes have to be UTF-8
MIN_TOKENS = 1024  # of a text in which some regularity of GPT-2's byte pairs is certain to be seen
MIN_PAIRS = 32  # pairs of uint16, of which every second one would be "!" if they were no uint32
MOST_UPPER_HALF = 3  # of a uint32 token: the largest vocabularies have some 262,144 entries
NPY = b"\x93NUMPY"

# What a pickle of plain values consists of. Everything else names code, which is what makes a pickle dangerous.
_PLAIN_OPCODES = frozenset(
    "PROTO FRAME STOP MARK POP POP_MARK DUP MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET "
    "NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT "
    "UNICODE SHORT_BINUNICODE BINUNICODE "
    "EMPTY_DICT DICT SETITEM SETITEMS EMPTY_LIST LIST APPEND APPENDS".split()  # no tuples: they would be hashed as keys
)


@dataclass(frozen=True)
class NanoGptFiles:
    """The files of one folder.

    Args:
        option: the flag and its value, with which messages begin.
        paths: the file of "train" and that of "validation".
        chars: the characters that the tokens number, as `meta.pkl` has them; None without one.
    """

    option: str
    paths: Mapping[str, Path]
    chars: str | None


def nanogpt_files(folder: Path, option: str) -> NanoGptFiles:
    """The files of a folder; their content is not read, but for `meta.pkl`.

    Raises:
        NotAvailable: a file is missing.
        UserError: a file is no regular file, empty, or of another format.
    """
    paths = {"train": folder / "train.bin", "validation": folder / "val.bin"}
    for path in paths.values():
        if not os.path.isfile(path):
            raise NotAvailable(
                f"{option}: no {path.name} there; give a folder with train.bin and val.bin, or with *_train_*.bin and "
                "*_val_*.bin"
            )
        where = f"{option}: {path.name}"
        try:
            with open_regular(path) as f:
                start = f.read(len(NPY))
        except NotRegular:
            raise UserError(f"{where} is a pipe or a device; give a regular file") from None
        except OSError as e:
            raise UserError(f"{where} cannot be read ({e.strerror}); give a readable file") from None
        if not start:
            raise UserError(f"{where} is empty; write it again")
        if has_header(path):
            raise UserError(f"{where} has a header of llm.c; name it as llm.c does, *_{path.stem}_000000.bin")
        if start == NPY:
            raise UserError(f"{where} is an array of numpy.save; write it with the array's tofile")
    meta = folder / META
    return NanoGptFiles(option, paths, read_characters(meta, option) if os.path.lexists(meta) else None)


# ------------------------------------------------------------------------------------------------------------- meta.pkl


def read_characters(path: Path, option: str) -> str:
    """The vocabulary in a `meta.pkl` of nanoGPT's character datasets: sorted characters, numbered from 0.

    The pickle is scanned before it is loaded. Only one of plain values is loaded, and no class can be found in it, so
    it executes nothing.

    Args:
        option: the flag and its value, with which messages begin.

    Raises:
        UserError: the file cannot be read, is no pickle of plain values, or no vocabulary of sorted characters.
    """
    where = f"{option}: {path.name}"
    try:
        data = read_small(path, MAX_META_BYTES)
    except OSError as e:
        raise UserError(
            f"{where} cannot be read ({e.strerror}); give the file that nanoGPT's prepare.py writes"
        ) from None
    try:
        meta = _plain_values(data)
        size, of_char, char_of = meta["vocab_size"], meta["stoi"], meta["itos"]
        if not isinstance(of_char, dict) or not isinstance(char_of, dict):
            raise ValueError("stoi and itos are no dictionaries")
        chars = [char_of[i] for i in range(len(char_of))]
    except (ValueError, TypeError, KeyError) as e:
        raise UserError(
            f"{where} is not of nanoGPT ({' '.join(str(e).split())[:100]}); give the file that its prepare.py writes"
        ) from None
    if not chars or not all(isinstance(char, str) and len(char) == 1 for char in chars):
        raise UserError(f"{where} has tokens that are no single characters; train on the text itself with file:PATH")
    if type(size) is not int or size != len(chars) or of_char != {char: i for i, char in enumerate(chars)}:
        raise UserError(f"{where} contradicts itself: vocab_size, stoi and itos differ; write it again")
    if chars != sorted(chars):
        raise UserError(
            f"{where} does not number its characters in their sorted order; write it with sorted(set(text))"
        )
    return "".join(chars)


class _NoClasses(pickle.Unpickler):
    """Loads plain values; a pickle that names a class or a persistent object is refused."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise ValueError(f"it names {module_name}.{global_name}")

    def persistent_load(self, pid: Any) -> Any:
        raise ValueError("it names a persistent object")


def _plain_values(data: bytes) -> dict[str, Any]:
    """The dictionary in a pickle of plain values. Raises ValueError for another pickle, or for none."""
    n_opcodes = 0
    for opcode, argument, _ in pickletools.genops(data):
        n_opcodes += 1
        if opcode.name not in _PLAIN_OPCODES:
            raise ValueError(f"it is no pickle of plain values ({opcode.name})")
        # The memo is an array of so many entries as the largest number in it.
        if "PUT" in opcode.name and (argument or 0) >= n_opcodes:
            raise ValueError("its memo is too large")
    try:
        values = _NoClasses(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError, IndexError, AttributeError, OverflowError, MemoryError) as e:
        raise ValueError(f"damaged: {e}") from None
    if not isinstance(values, dict):
        raise ValueError("it is no dictionary")
    return values


# ---------------------------------------------------------------------------------------------------------- the tokens


@dataclass
class _Scan:
    """What one pass over a file of integers tells of their type.

    Attributes:
        n_bytes: of the file.
        largest_of_4: the largest of the uint16 at positions 0, 1, 2 and 3 modulo 4: of wider integers, their parts.
        largest_uint32: of the whole file read as such.
        has_zero: whether a byte of it is 0.
    """

    n_bytes: int
    largest_of_4: np.ndarray
    largest_uint32: int = 0
    has_zero: bool = False

    @classmethod
    def of(cls, path: Path) -> "_Scan":
        scan = cls(path.stat().st_size, np.zeros(4, np.int64))
        for part in _mapped_parts(path, np.dtype("|u1"), SCANNED_BYTES):
            padded = np.pad(part, (0, -len(part) % 8))  # with zeros, at the end of the file alone
            np.maximum(scan.largest_of_4, padded.view("<u2").reshape(-1, 4).max(0), out=scan.largest_of_4)
            scan.largest_uint32 = max(scan.largest_uint32, int(padded.view("<u4").max()))
            scan.has_zero = scan.has_zero or not part.all()
        return scan

    @property
    def largest_uint16(self) -> int:
        return int(self.largest_of_4.max())

    @property
    def may_be_uint32(self) -> bool:
        """Whether the upper halves of pairs of uint16 are as small as those of tokens."""
        upper = int(self.largest_of_4[1::2].max())
        return self.n_bytes % 4 == 0 and upper <= MOST_UPPER_HALF < self.largest_of_4[::2].max()

    @property
    def may_be_uint64(self) -> bool:
        return self.n_bytes % 8 == 0 and not self.largest_of_4[2:].any() and bool(self.largest_of_4[0])


def open_tokens(files: NanoGptFiles, tokenizer: "Tokenizer", told: str = "auto") -> dict[str, np.ndarray]:
    """The tokens [N] of each split, memory-mapped: uint16 or uint32.

    Each file is read once as a whole, to find out its type and to compare its content with the tokenizer.

    Args:
        tokenizer: that the tokens are said to be of.
        told: the value of `--token-dtype`: "uint16", "uint32", or "auto" to recognise them.

    Raises:
        UserError: the tokenizer is not the one of `meta.pkl`, or the content is not that of the tokenizer, of the type
            told, or of one type only. In doubt a file is refused.
    """
    _require_tokenizer(files, tokenizer)
    tokens = {}
    for split, path in files.paths.items():
        where = f"{files.option}: {path.name}"
        scan = _Scan.of(path)
        dtype = np.dtype("<u4" if told == "uint32" or told == "auto" and _is_uint32(scan, tokenizer, where) else "<u2")
        if scan.n_bytes % dtype.itemsize:
            raise UserError(
                f"{where} has {scan.n_bytes} bytes, no whole number of {dtype.name} tokens; write it again, or give "
                "its --token-dtype"
            )
        if dtype.itemsize == 2 and not scan.has_zero and scan.n_bytes >= 2 * MIN_TOKENS:
            raise UserError(f"{where} holds the bytes of a text, not uint16 tokens; train on it with file:PATH")
        largest = scan.largest_uint32 if dtype.itemsize == 4 else scan.largest_uint16
        if largest >= tokenizer.vocab_size:
            raise UserError(
                f"{where} holds token {largest} as {dtype.name}, outside the vocabulary of {tokenizer.vocab_size}; "
                "give the --tokenizer that it was made with, or its --token-dtype"
            )
        if tokenizer.kind == "byte":
            _require_text(path, dtype, where)
        elif tokenizer.kind == "gpt2":
            _require_byte_pairs(path, dtype, largest, tokenizer, where)
        tokens[split] = np.memmap(path, dtype, "r")
    if len({tokens_N.dtype for tokens_N in tokens.values()}) > 1:
        raise UserError(f"{files.option}: one of train.bin and val.bin is uint16, the other uint32; write one again")
    return tokens


def _require_tokenizer(files: NanoGptFiles, tokenizer: "Tokenizer") -> None:
    if files.chars is not None and getattr(tokenizer, "chars", None) != files.chars:
        other = "other characters" if tokenizer.kind == "char" else f"--tokenizer {tokenizer.kind}"
        raise UserError(
            f"{files.option}: its {META} says that the tokens are {len(files.chars)} characters, not {other}; give "
            "--tokenizer char, or other data"
        )
    if files.chars is None and tokenizer.kind not in ("gpt2", "byte"):
        raise UserError(
            f"{files.option}: has no {META}, so its tokens are of gpt2 or byte, not of --tokenizer {tokenizer.kind}; "
            "bring that file back, or give --tokenizer gpt2 or byte"
        )


def _is_uint32(scan: _Scan, tokenizer: "Tokenizer", where: str) -> bool:
    """Whether a file holds uint32 tokens, not uint16. Raises `UserError` if it holds neither, or may hold both."""
    if scan.may_be_uint64 and scan.n_bytes >= 8 * MIN_PAIRS:
        raise UserError(f"{where} holds 64-bit integers; write it with numpy's uint16 or uint32")
    if not scan.may_be_uint32:
        return False
    fits = scan.largest_uint32 < tokenizer.vocab_size
    if tokenizer.kind == "char":  # whose vocabulary is known: a token too large settles it
        if not fits:
            return False
        raise UserError(
            f"{where} may hold uint32 tokens, or uint16 of which every second one is 0; give --token-dtype uint32 or "
            "uint16"
        )
    if scan.n_bytes < 4 * MIN_PAIRS:
        raise UserError(f"{where} is too short to tell uint16 tokens from uint32; give --token-dtype")
    if not fits:
        raise UserError(
            f"{where} holds uint32 tokens up to {scan.largest_uint32}, outside the vocabulary of "
            f"{tokenizer.vocab_size}; give the --tokenizer that they were made with, or --token-dtype uint16"
        )
    return True


def _require_text(path: Path, dtype: np.dtype, where: str) -> None:
    """Raises `UserError` unless tokens below 256 are the bytes of a UTF-8 text, which may be cut within a character."""
    is_control = np.zeros(256, bool)
    is_control[:32], is_control[127] = True, True
    is_control[[9, 10, 12, 13]] = False  # tab, line feed, form feed, carriage return
    decoder, position = codecs.getincrementaldecoder("utf-8")(), 0
    for part in _mapped_parts(path, dtype, SCANNED_BYTES):
        byte_N = part.astype(np.uint8)
        if is_control[byte_N].any():
            at = position + int(is_control[byte_N].argmax())
            raise _no_text(where, f"token {at} is a control character")
        # A file may begin within a character: a split is cut anywhere.
        first = 0 if position else next((i for i, byte in enumerate(byte_N[:4]) if byte & 0xC0 != 0x80), 4)
        try:
            decoder.decode(byte_N[first if first < 4 else 0 :].tobytes())
        except UnicodeDecodeError:
            raise _no_text(where, f"no UTF-8 among tokens {position} to {position + len(part)}") from None
        position += len(part)


def _no_text(where: str, reason: str) -> UserError:
    return UserError(
        f"{where} does not hold the bytes of a text ({reason}); give the --tokenizer that it was made with"
    )


def _require_byte_pairs(path: Path, dtype: np.dtype, largest: int, tokenizer: Any, where: str) -> None:
    """Raises `UserError` for tokens that are no text of GPT-2's byte pairs.

    Its first 256 tokens are single bytes; a text always has pairs, too. And the bytes of its tokens are UTF-8: those of
    another vocabulary's soon are not.
    """
    n_tokens = path.stat().st_size // dtype.itemsize
    remedy = "give the --tokenizer that it was made with"
    if largest < 256 and n_tokens >= MIN_TOKENS:
        raise UserError(f"{where} has no token above {largest}, so it is not of GPT-2's byte pairs; {remedy}")
    first_N = next(_mapped_parts(path, dtype, DECODED_TOKENS * dtype.itemsize))
    data = b"".join(map(tokenizer.token_bytes.__getitem__, first_N.tolist()))
    begin = next((i for i, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0)  # as in `_require_text`
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data[begin:])
    except UnicodeDecodeError:
        raise UserError(f"{where} is no UTF-8 text in GPT-2's byte pairs; {remedy}") from None


def _mapped_parts(path: Path, dtype: np.dtype, n_bytes: int) -> Iterator[np.ndarray]:
    """The integers of a file, about `n_bytes` at a time, memory-mapped; the pages of a part are dropped after it."""
    values_N = np.memmap(path, dtype, "r")
    n_values = n_bytes // dtype.itemsize
    for start in range(0, len(values_N), n_values):
        yield values_N[start : start + n_values]
        drop_mapped_pages(values_N)
