"""Readers: files and datasets of the Hugging Face hub as streams of texts and rows, never whole in memory.

A text file is one text, read in pieces whose borders change no token. CSV, JSON Lines and Parquet files are tables:
rows with named columns.
"""

import codecs
import contextlib
import csv
import difflib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxgpt.data.files import NotAvailable, read_pieces, unreachable_reason
from jaxgpt.errors import UserError

Texts = Callable[[], Iterator[str]]  # each call starts a new pass over the texts
TABLE_SUFFIXES = (".csv", ".jsonl", ".ndjson", ".parquet")
HUB = "https://huggingface.co"
TABLE_ROWS = 1024  # rows of a Parquet file or a hub dataset in memory at a time

# Matches up to the last place where a cut changes no token: after a visible character, before a line end or before a
# single blank. GPT-2's pattern never joins a character with white space that follows it; it may join white space with
# what follows.
_CUT = re.compile(r"(?s:.*)\S(?=[\r\n]| \S)")

_SURROGATE = re.compile("[\ud800-\udfff]")

csv.field_size_limit(2**31 - 1)  # the default limit of 128 KiB refuses long texts


# ---------------------------------------------------------------------------------------------------------- text files


def text_pieces(path: Path, option: str) -> Iterator[str]:
    """A UTF-8 file in pieces of about a megabyte, which give the same tokens as the whole text.

    Args:
        option: the flag and its value, with which error messages begin. Likewise in all of this module.

    Raises:
        NotAvailable: there is no such file.
        UserError: the file is not UTF-8, or it cannot be read.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    uncut: list[str] = []  # decoded text since the last cut
    last_char, n_read = "", 0  # of `uncut`; in bytes
    for piece in read_pieces(path, option):
        n_pending = len(decoder.getstate()[0])  # bytes of an incomplete character
        try:
            text = decoder.decode(piece)
        except UnicodeDecodeError as e:
            raise _not_utf8(option, n_read - n_pending + e.start) from None
        n_read += len(piece)
        if match := _CUT.match(last_char + text):
            end = match.end() - len(last_char)
            yield "".join(uncut) + text[:end]
            uncut, text = [], text[end:]
        uncut.append(text)
        last_char = text[-1:] or last_char
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise _not_utf8(option, n_read - len(decoder.getstate()[0])) from None
    if any(uncut):
        yield "".join(uncut)


def _not_utf8(option: str, position: int) -> UserError:
    return UserError(f"{option}: not UTF-8 text (byte {position}); convert it, for instance with iconv -t UTF-8")


def read_lines(path: Path, option: str) -> Iterator[str]:
    r"""The lines of a UTF-8 file, each with its `\n`. Raises what `text_pieces` raises."""
    unfinished: list[str] = []  # parts of the current line
    for piece in text_pieces(path, option):
        *ends, rest = piece.split("\n")
        for end in ends:
            yield "".join(unfinished) + end + "\n"
            unfinished = []
        unfinished.append(rest)
    if any(unfinished):
        yield "".join(unfinished)


# --------------------------------------------------------------------------------------------------------------- tables


def read_rows(path: Path, columns: Sequence[str], option: str) -> Iterator[tuple[Any, ...]]:
    """The rows of a table: the values of the given columns, in their order.

    Args:
        path: a CSV file with a header, or a JSON Lines or Parquet file, by its suffix.

    Raises:
        NotAvailable: there is no such file.
        UserError: a column is missing, or the file is not of the format of its suffix.
    """
    if not os.path.isfile(path):
        raise NotAvailable(f"{option}: no such file; check the path")
    suffix = path.suffix.lower()
    reader = {".csv": _csv_rows, ".parquet": _parquet_rows}.get(suffix, _json_rows)
    try:
        yield from reader(path, columns, option)
    except UnicodeDecodeError as e:
        raise _not_utf8(option, e.start) from None
    except (OSError, csv.Error) as e:
        raise UserError(f"{option}: cannot be read as {suffix} ({e}); give a whole {suffix} file") from None


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


def _csv_rows(path: Path, columns: Sequence[str], option: str) -> Iterator[tuple[Any, ...]]:
    with path.open(newline="", encoding="utf-8-sig") as f:
        reader = csv.DictReader(f)
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


def _json_rows(path: Path, columns: Sequence[str], option: str) -> Iterator[tuple[Any, ...]]:
    with path.open(encoding="utf-8-sig") as f:
        for number, line in enumerate(f, 1):
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


def _parquet_rows(path: Path, columns: Sequence[str], option: str) -> Iterator[tuple[Any, ...]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            require_columns(columns, file.schema_arrow.names, option)
            for batch in file.iter_batches(TABLE_ROWS, columns=list(dict.fromkeys(columns))):
                yield from zip(*(batch.column(column).to_pylist() for column in columns), strict=True)
    except pyarrow.ArrowException as e:
        raise UserError(f"{option}: cannot be read as parquet ({str(e).splitlines()[0]}); give a whole file") from None


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


def hub_splits(spec: str, option: str) -> Mapping[Any, Any]:
    """The splits of a hub dataset, a `datasets.Dataset` for each name.

    Only Parquet files are read: no code of a dataset runs. A dataset in the cache of the `datasets` library needs no
    network.

    Args:
        spec: NAME[:CONFIG]. NAME may be a local folder with the layout of a hub dataset.

    Raises:
        NotAvailable: the dataset is not on this machine and cannot be downloaded.
        UserError: the dataset has no Parquet files.
    """
    name, _, config = spec.partition(":")
    endpoint = os.environ.get("HF_ENDPOINT", HUB)
    no_network = None if os.path.isdir(name) else unreachable_reason(endpoint, any_answer=True)
    import datasets

    datasets.utils.logging.set_verbosity_error()
    try:
        with _offline_mode() if no_network else contextlib.nullcontext():
            builder = datasets.load_dataset_builder(name, config or None)
            module = type(builder).__module__
            if ".parquet." not in module and ".cache." not in module:
                kind = module.rsplit(".", 1)[-1]
                raise UserError(f"{option}: made of {kind}, not of parquet files; give its files with file:PATH")
            builder.download_and_prepare()
            splits = builder.as_dataset()
            assert isinstance(splits, dict)
            return splits
    except UserError:
        raise
    except Exception as e:  # the errors of the library and of its transports have no common base class
        reason = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}"
        if no_network:
            reason = f"no network ({no_network})"
        raise NotAvailable(
            f"{option}: cannot be had from {endpoint}: {reason}; check the name, and "
            "NAME:CONFIG where it has several, or give its files with file:PATH"
        ) from None


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
