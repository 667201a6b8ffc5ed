"""Readers: files and datasets of the Hugging Face hub as streams of texts and rows, never whole in memory.

A text file is one text, read in pieces whose borders change no token. CSV, JSON Lines and Parquet files are tables:
rows with named columns. Texts, CSV and JSON Lines may be compressed, as `.gz` or `.zst`.
"""

import codecs
import contextlib
import csv
import difflib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import IO, Any

from jaxgpt.data.files import PIECE_BYTES, NotAvailable, NotRegular, open_regular, read_pieces, unreachable_reason
from jaxgpt.errors import UserError, first_line

Texts = Callable[[], Iterator[str]]  # each call starts a new pass over the texts
TABLE_SUFFIXES = (".csv", ".jsonl", ".ndjson", ".parquet")
HUB = "https://huggingface.co"
TABLE_ROWS = 1024  # rows of a Parquet file or a hub dataset in memory at a time
PIECE_CHARS = 2**20
LONGEST_PIECE = 2**22  # characters: a text without white space is cut there, which may split a token in two
LONGEST_LINE = 2**28  # characters of a text in a line or a field: it is in memory whole
# How much more text than its own size a Parquet file may hold. Compressors shrink prose to a quarter, source code to a
# tenth and server logs to a fiftieth; a file far beyond that repeats itself, by accident or to fill a memory or a disk.
# The same of a file in .gz or .zst.
PARQUET_FACTOR = 200
OFFSET_BYTES = 4  # of Arrow, for each value of a column
PARQUET_FLOOR = 2**26  # bytes of text that any Parquet file may hold: a small one may repeat a phrase as it likes

# Matches up to the last place where a cut changes no token: after a visible character, before a line end or before a
# single blank. GPT-2's pattern never joins a character with white space that follows it; it may join white space with
# what follows.
_CUT = re.compile(r"(?s:.*)\S(?=[\r\n]| \S)")

COMPRESSION = {".gz": "gzip", ".zst": "zstd"}  # pyarrow's names, by suffix

_SURROGATE = re.compile("[\ud800-\udfff]")

csv.field_size_limit(LONGEST_LINE)  # the default limit of 128 KiB refuses long texts


# ---------------------------------------------------------------------------------------------------------- text files


def text_pieces(path: Path, option: str) -> Iterator[str]:
    """A UTF-8 file in pieces of about a megabyte, which give the same tokens as the whole text.

    Args:
        option: the flag and its value, with which error messages begin. Likewise in all of this module.

    Raises:
        NotAvailable: there is no such file.
        UserError: the file is not UTF-8, or it cannot be read.
    """
    yield from _cut_where_no_token_changes(_decoded(path, option))


def pieces_of(text: str) -> Iterator[str]:
    """A text in pieces of about a megabyte, which give the same tokens as the whole; see `LONGEST_PIECE`."""
    return _cut_where_no_token_changes(text[i : i + PIECE_CHARS] for i in range(0, len(text), PIECE_CHARS))


def _decoded(path: Path, option: str) -> Iterator[str]:
    """A UTF-8 file's text, cut anywhere."""
    decoder, n_read = codecs.getincrementaldecoder("utf-8")(), 0
    for piece in _pieces(path, option):
        n_pending = len(decoder.getstate()[0])  # bytes of an incomplete character
        try:
            text = decoder.decode(piece)
        except UnicodeDecodeError as e:
            raise _not_utf8(option, n_read - n_pending + e.start) from None
        n_read += len(piece)
        yield text
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise _not_utf8(option, n_read - len(decoder.getstate()[0])) from None


def _pieces(path: Path, option: str) -> Iterator[bytes]:
    """A file's bytes in order, decompressed if its suffix says so. Raises what `read_pieces` raises."""
    if path.suffix.lower() not in COMPRESSION:
        yield from read_pieces(path, option)
        return
    with _reported_as_user_error(option, path.suffix.lower()), open_regular(path) as f:
        with _decompressed(f, path, option) as stream:
            while piece := stream.read(PIECE_BYTES):
                yield piece


@contextlib.contextmanager
def _decompressed(file: IO[bytes], path: Path, option: str) -> Iterator[IO[bytes]]:
    """The content of an open file, decompressed if the suffix of its path says so.

    Raises:
        UserError: while it is read, if it holds far more than a text would; see `PARQUET_FACTOR`.
    """
    codec = COMPRESSION.get(path.suffix.lower())
    if codec is None:
        yield file
        return
    import pyarrow

    with pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), codec) as stream:
        most = max(PARQUET_FLOOR, PARQUET_FACTOR * os.fstat(file.fileno()).st_size)
        with io.BufferedReader(_Bounded(stream, most, option), PIECE_BYTES) as buffered:
            yield buffered


class _Bounded(io.RawIOBase):
    """A stream that raises `UserError` once more bytes than `most` have been read of it."""

    def __init__(self, stream: Any, most: int, option: str):
        self._stream, self._left, self._most, self._option = stream, most, most, option

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise UserError(
                f"{self._option}: more than {self._most:,} bytes of text, {PARQUET_FACTOR} times the file and more; "
                "give a file that does not repeat itself so"
            )
        buffer[: len(data)] = data
        return len(data)


def table_suffix(path: Path) -> str:
    """The suffix that says what table a file holds, ".jsonl" also of x.jsonl.gz; another suffix if it holds none."""
    suffix = path.suffix.lower()
    inner = Path(path.stem).suffix.lower()
    return inner if suffix in COMPRESSION and inner in TABLE_SUFFIXES and inner != ".parquet" else suffix


def _cut_where_no_token_changes(texts: Iterable[str]) -> Iterator[str]:
    """The texts, which follow each other, with their borders moved to places where a cut changes no token."""
    uncut: list[str] = []  # since the last cut
    last_char, n_uncut = "", 0  # of `uncut`
    for text in texts:
        if match := _CUT.match(last_char + text):
            end = match.end() - len(last_char)
            yield "".join(uncut) + text[:end]
            uncut, n_uncut, text = [], 0, text[end:]
        elif n_uncut + len(text) > LONGEST_PIECE:
            yield "".join(uncut)
            uncut, n_uncut = [], 0
        uncut.append(text)
        n_uncut += len(text)
        last_char = text[-1:] or last_char
    if any(uncut):
        yield "".join(uncut)


def _not_utf8(option: str, position: int) -> UserError:
    return UserError(f"{option}: not UTF-8 text (byte {position}); convert it, for instance with iconv -t UTF-8")


def read_lines(path: Path, option: str) -> Iterator[str]:
    r"""The lines of a UTF-8 file, each with its `\n`. Raises what `text_pieces` raises."""
    unfinished: list[str] = []  # parts of the current line
    number = 1
    for piece in text_pieces(path, option):
        *ends, rest = piece.split("\n")
        for end in ends:
            yield "".join(unfinished) + end + "\n"
            unfinished = []
        number += len(ends)
        unfinished.append(rest)
        if sum(map(len, unfinished)) > LONGEST_LINE:
            raise _too_long(option, number)
    if any(unfinished):
        yield "".join(unfinished)


def _too_long(option: str, number: int) -> UserError:
    return UserError(f"{option}: line {number} has more than {LONGEST_LINE:,} characters; give a text a line")


# --------------------------------------------------------------------------------------------------------------- tables


def read_rows(
    path: Path, columns: Sequence[str], option: str, row_groups: Sequence[int] | None = None
) -> Iterator[tuple[Any, ...]]:
    """The rows of a table: the values of the given columns, in their order.

    Args:
        path: a CSV file with a header, or a JSON Lines or Parquet file, by its suffix; the first two may be
            compressed.
        row_groups: of a Parquet file, those to read; None for all.

    Raises:
        NotAvailable: there is no such file.
        UserError: a column is missing, or the file is not of the format of its suffix.
    """
    suffix = table_suffix(path)
    reader = {".csv": _csv_rows, ".parquet": partial(_parquet_rows, row_groups=row_groups)}.get(suffix, _json_rows)
    with _reported_as_user_error(option, suffix), open_regular(path) as f, _decompressed(f, path, option) as content:
        yield from reader(content, columns, option)


def row_group_bytes(path: Path, columns: Sequence[str], option: str) -> list[int]:
    """The bytes of each row group of a Parquet file once it is decompressed, all columns together.

    Raises:
        NotAvailable, UserError: as `read_rows`.
    """
    from pyarrow import parquet

    with _reported_as_user_error(option, ".parquet"), open_regular(path) as f, parquet.ParquetFile(f) as table:
        require_columns(columns, table.schema_arrow.names, option)
        return [table.metadata.row_group(i).total_byte_size for i in range(table.metadata.num_row_groups)]


@contextlib.contextmanager
def _reported_as_user_error(option: str, suffix: str) -> Iterator[None]:
    """Turns the errors of reading a table into `NotAvailable` and `UserError`."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise NotAvailable(f"{option}: no such file; check the path") from None
    except NotRegular:
        raise UserError(f"{option}: a pipe or a device; give a regular file") from None
    except UnicodeDecodeError as e:
        raise _not_utf8(option, e.start) from None
    except (OSError, csv.Error) as e:
        raise UserError(f"{option}: cannot be read as {suffix} ({e}); give a whole {suffix} file") from None
    except Exception as e:
        # By its module: pyarrow takes a fifth of a second to import, and few tables are Parquet files.
        if not type(e).__module__.startswith("pyarrow"):
            raise
        reason = (str(e).splitlines() or [""])[0]
        raise UserError(f"{option}: cannot be read as parquet ({reason}); give a whole file") from None


def require_columns(columns: Sequence[str], available: Sequence[str], option: str) -> None:
    """Raises `UserError` if a column is missing or occurs twice. The message lists the columns and the closest name."""
    for column in columns:
        if list(available).count(column) > 1:
            raise UserError(f"{option}: several columns are called {column!r}; give each a name of its own")
        if column not in available:
            closest = difflib.get_close_matches(column, available, 1)
            hint = f"; did you mean {closest[0]}?" if closest else ""
            has = ", ".join(map(repr, available)) or "none"
            raise UserError(f"{option}: no column {column!r}; it has {has}{hint}")


def _lines(file: IO[bytes], option: str, newline: str | None) -> Iterator[str]:
    """The lines of a UTF-8 file, at most `LONGEST_LINE` each."""
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline) as text:
        for number in count(1):
            line = text.readline(LONGEST_LINE)
            if len(line) == LONGEST_LINE and line[-1] not in "\r\n":
                raise _too_long(option, number)
            if not line:
                return
            yield line


def _csv_rows(file: IO[bytes], columns: Sequence[str], option: str) -> Iterator[tuple[Any, ...]]:
    reader = csv.DictReader(_lines(file, option, newline=""))
    require_columns(columns, reader.fieldnames or [], option)
    for row in reader:
        # DictReader keeps extra fields under the key None. A trailing comma adds an empty one, which is harmless.
        if any(row.get(None, ())):
            raise UserError(
                f"{option}: line {reader.line_num} has more fields than the header; put texts with commas in quotes"
            )
        values = tuple(row[column] for column in columns)
        if None in values:
            raise UserError(f"{option}: line {reader.line_num} has fewer fields than the header; complete it")
        yield values


def _json_rows(file: IO[bytes], columns: Sequence[str], option: str) -> Iterator[tuple[Any, ...]]:
    for number, line in enumerate(_lines(file, option, newline=None), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{option}: line {number} is not JSON ({e}); give one object a line") from None
        if not isinstance(row, dict):
            raise UserError(f"{option}: line {number} is no object; give one {{...}} a line")
        require_columns(columns, list(row), f"{option}, line {number}")
        values = tuple(row[column] for column in columns)
        if "\\u" in line and any(isinstance(value, str) and _SURROGATE.search(value) for value in values):
            raise UserError(f"{option}: line {number} holds half of a surrogate pair (\\ud800 to \\udfff); mend it")
        yield values


def _parquet_rows(
    file: IO[bytes], columns: Sequence[str], option: str, row_groups: Sequence[int] | None
) -> Iterator[tuple[Any, ...]]:
    import pyarrow
    from pyarrow import parquet

    distinct, n_decoded = list(dict.fromkeys(columns)), 0
    most = max(PARQUET_FLOOR, PARQUET_FACTOR * os.fstat(file.fileno()).st_size)
    too_much = UserError(
        f"{option}: more than {most:,} bytes of text, {PARQUET_FACTOR} times the file and more; give a file that does "
        "not repeat itself so"
    )
    with parquet.ParquetFile(file) as probe:
        schema, stored = probe.schema_arrow, _stored_bytes(probe.metadata, len(distinct))
        require_columns(columns, schema.names, option)
    for name in distinct:
        if pyarrow.types.is_nested(kind := schema.field(name).type):
            raise UserError(f"{option}: the column {name!r} holds {kind}, not text; choose a column of texts")
    if stored > most:  # before a page is decompressed
        raise too_much
    # A repeated text is stored once, in a dictionary. Where all fits, Arrow keeps it so: a batch of a thousand long
    # texts that are one would be large. Of more data, each text is a small part.
    as_stored = distinct if stored <= PARQUET_FLOOR else None
    with parquet.ParquetFile(file, read_dictionary=as_stored) as table:
        for batch in table.iter_batches(TABLE_ROWS, row_groups=row_groups, columns=distinct):
            n_decoded += sum(map(_decoded_bytes, batch.columns))
            if n_decoded > most:
                raise too_much
            values = {name: _values(batch.column(name)) for name in distinct}
            yield from zip(*(values[name] for name in columns), strict=True)


def _stored_bytes(metadata: Any, n_columns: int) -> int:
    """What the pages of all columns take once they are decompressed, and the ends of some columns' values in memory.

    The sizes of single columns are there too, but pyarrow 26 aborts the process where their statistics are damaged.
    """
    pages = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    return pages + OFFSET_BYTES * metadata.num_rows * n_columns


def _decoded_bytes(column: Any) -> int:
    """The memory that a column's values take, each of a dictionary as often as it occurs."""
    import pyarrow
    from pyarrow import compute

    if not isinstance(column, pyarrow.DictionaryArray) or pyarrow.types.is_primitive(column.type.value_type):
        return column.nbytes
    length_K = compute.binary_length(column.dictionary)  # pyright: ignore[reportAttributeAccessIssue]
    n_bytes = compute.sum(length_K.take(column.indices))  # pyright: ignore[reportAttributeAccessIssue]
    return OFFSET_BYTES * len(column) + (n_bytes.as_py() or 0)


def _values(column: Any) -> Iterator[Any]:
    """A column's values, one at a time; those of a dictionary are one object each."""
    import pyarrow

    if not isinstance(column, pyarrow.DictionaryArray):
        return (value.as_py() for value in column)
    used = column.indices.unique().drop_null()
    value_of = dict(zip(used.to_pylist(), column.dictionary.take(used).to_pylist(), strict=True))
    return (None if i is None else value_of[i] for i in column.indices.to_pylist())


def join_columns(rows: Iterable[tuple[Any, ...]], option: str) -> Iterator[str]:
    """The text of each row: its values joined by blanks, a missing value as an empty text.

    Raises:
        UserError: a value is not text.
    """
    for number, row in enumerate(rows, 1):
        for value in row:
            if not isinstance(value, str | None):
                raise UserError(f"{option}: row {number} holds {value!r:.40}, not text; choose a column of texts")
        yield " ".join(value or "" for value in row)


# -------------------------------------------------------------------------------------------------------------- the hub


def hub_splits(spec: str, option: str, own_files: str = "file:PATH") -> Mapping[Any, Any]:
    """The splits of a hub dataset, or of a folder that its `save_to_disk` has written: a `datasets.Dataset` for each.

    Only Parquet files are read: no code of a dataset runs. A dataset in the cache of the `datasets` library needs no
    network.

    Args:
        spec: NAME[:CONFIG][@REVISION]. NAME may be a local folder with the layout of a hub dataset.
        own_files: what takes the dataset's files instead, for the error messages.

    Raises:
        NotAvailable: the dataset is not on this machine and cannot be downloaded.
        UserError: the dataset has no Parquet files.
    """
    if is_saved_dataset(Path(spec)):
        return _saved_splits(spec, option)
    with hub_builder(spec, option, own_files) as builder:
        builder.download_and_prepare()
        splits = builder.as_dataset()
        assert isinstance(splits, dict)
        return splits


def is_saved_dataset(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk` of the `datasets` library, with one split or several."""
    return any(os.path.isfile(folder / name) for name in ("dataset_dict.json", "state.json"))


def _saved_splits(folder: str, option: str) -> Mapping[Any, Any]:
    """The splits in a folder of `save_to_disk`: Arrow files, mapped into memory. A single dataset is called "train"."""
    import datasets

    datasets.utils.logging.set_verbosity_error()
    try:
        found = datasets.load_from_disk(folder)
    except Exception as e:  # of the library, of pyarrow and of json
        reason = f"{type(e).__name__}: {first_line(e)}"
        raise UserError(f"{option}: cannot be read as a folder of save_to_disk ({reason}); save it again") from None
    return found if isinstance(found, datasets.DatasetDict) else {"train": found}


@contextlib.contextmanager
def hub_builder(spec: str, option: str, own_files: str = "file:PATH") -> Iterator[Any]:
    """A context manager that yields the `datasets.DatasetBuilder` of a hub dataset, which has downloaded nothing yet.

    What fails within is reported, too. Args and Raises as of `hub_splits`.
    """
    name, config, revision = split_spec(spec)
    no_network = None if os.path.isdir(name) else unreachable_reason(hub_endpoint(), any_answer=True)
    import datasets

    datasets.utils.logging.set_verbosity_error()
    try:
        with _offline_mode() if no_network else contextlib.nullcontext():
            builder = datasets.load_dataset_builder(name, config or None, revision=revision or None)
            module = type(builder).__module__
            if ".parquet." not in module and ".cache." not in module:
                kind = module.rsplit(".", 1)[-1]
                raise UserError(f"{option}: made of {kind}, not of parquet files; give its files with {own_files}")
            yield builder
    except UserError:
        raise
    except Exception as e:  # the errors of the library and of its transports have no common base class
        reason = f"{type(e).__name__}: {first_line(e, 200)}"
        if no_network:
            reason = f"no network ({no_network})"
        raise NotAvailable(
            f"{option}: cannot be had from {hub_endpoint()}: {reason}; check the name, and "
            f"NAME:CONFIG where it has several, or give its files with {own_files}"
        ) from None


def hub_endpoint() -> str:
    """The hub's address."""
    return os.environ.get("HF_ENDPOINT", HUB)


def split_spec(spec: str) -> tuple[str, str, str]:
    """Name, configuration and revision of NAME[:CONFIG][@REVISION]; "" for what is left out."""
    if os.path.isdir(spec):
        return spec, "", ""
    dataset, _, revision = spec.partition("@")
    name, _, config = dataset.partition(":")
    return name, config, revision


@contextlib.contextmanager
def _offline_mode() -> Iterator[None]:
    """Makes the hub's libraries search their caches only, and silences them.

    They read `HF_HUB_OFFLINE` when they are imported. These flags, which they consult at each request, can be restored.
    """
    import datasets.config
    import huggingface_hub.constants

    modules: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True
        with contextlib.redirect_stderr(None):
            yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value
