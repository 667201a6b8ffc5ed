"""Files and hub datasets as streams of texts and rows; nothing is held whole.

Text files are one text, cut where no tokenizer can tell. CSV, JSON lines and parquet are rows with named columns.
"""

import codecs
import contextlib
import csv
import difflib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxgpt.data_files import NotAvailable, is_kind, pieces, unreachable
from jaxgpt.errors import UserError

Texts = Callable[[], Iterator[str]]  # a new pass over the texts each time it is called
TABLES = (".csv", ".jsonl", ".ndjson", ".parquet")
HUB = "https://huggingface.co"

# Before white space that follows a visible character: before a line's end, or a blank between words. GPT-2's pattern
# never joins what stands before white space with it, so such a cut changes no token; after white space it could.
_CUT = re.compile(r"(?s:.*)\S(?=[\r\n]| \S)")

_SURROGATE = re.compile("[\ud800-\udfff]")

csv.field_size_limit(2**31 - 1)  # its default refuses long texts


def text_pieces(path: Path, named: str) -> Iterator[str]:
    """A UTF-8 file in pieces of about a megabyte that give the same tokens as the whole.

    Raises:
        UserError: not UTF-8, or it cannot be read. NotAvailable: no such file.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    held: list[str] = []  # decoded since the last cut
    before, at = "", 0  # the last character held, the bytes read
    for piece in pieces(path, named):
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(piece)
        except UnicodeDecodeError as e:
            raise _not_utf8(named, at - pending + e.start) from None
        at += len(piece)
        if cut := _CUT.match(before + text):
            end = cut.end() - len(before)
            yield "".join(held) + text[:end]
            held, text = [], text[end:]
        held.append(text)
        before = text[-1:] or before
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise _not_utf8(named, at - len(decoder.getstate()[0])) from None
    if any(held):
        yield "".join(held)


def _not_utf8(named: str, byte: int) -> UserError:
    return UserError(f"{named}: not UTF-8 text (byte {byte}); convert it, for instance with iconv -t UTF-8")


def lines(path: Path, named: str) -> Iterator[str]:
    """The lines of a UTF-8 file, each with its end. Raises as `text_pieces` does."""
    held: list[str] = []
    for piece in text_pieces(path, named):
        *whole, rest = piece.split("\n")
        for line in whole:
            yield "".join(held) + line + "\n"
            held = []
        held.append(rest)
    if any(held):
        yield "".join(held)


def rows(path: Path, columns: Sequence[str], named: str) -> Iterator[tuple[Any, ...]]:
    """The values of the named columns of a CSV (with a header), JSON lines or parquet file, row by row.

    Raises:
        UserError: a column is not there, or the file cannot be read as what its name says.
        NotAvailable: no such file.
    """
    if not is_kind(Path.is_file, path):
        raise NotAvailable(f"{named}: no such file; check the path")
    kind = path.suffix.lower()
    read = {".csv": _csv_rows, ".parquet": _parquet_rows}.get(kind, _json_rows)
    try:
        yield from read(path, columns, named)
    except UnicodeDecodeError as e:
        raise _not_utf8(named, e.start) from None
    except (OSError, csv.Error) as e:
        raise UserError(f"{named}: cannot be read as {kind} ({e}); give a whole {kind} file") from None


def require_columns(wanted: Sequence[str], there: Sequence[str], named: str) -> None:
    """Raises `UserError` that names the columns that are there, and the nearest; or one that is there twice."""
    for column in wanted:
        if list(there).count(column) > 1:
            raise UserError(f"{named}: several columns are called {column!r}; give each a name of its own")
        if column not in there:
            near = difflib.get_close_matches(column, there, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"{named}: no column {column!r}; it has {', '.join(map(repr, there)) or 'none'}{hint}")


def _csv_rows(path: Path, columns: Sequence[str], named: str) -> Iterator[tuple[Any, ...]]:
    with path.open(newline="", encoding="utf-8-sig") as f:
        reader = csv.DictReader(f)
        require_columns(columns, reader.fieldnames or [], named)
        for row in reader:
            if any(row.get(None, ())):  # where `csv` puts what is too much; a comma at the end adds an empty field
                raise UserError(
                    f"{named}: line {reader.line_num} has more fields than the header; put texts with commas in quotes"
                )
            values = tuple(row[column] for column in columns)
            if None in values:
                raise UserError(f"{named}: line {reader.line_num} has fewer fields than the header; complete it")
            yield values


def _json_rows(path: Path, columns: Sequence[str], named: str) -> Iterator[tuple[Any, ...]]:
    with path.open(encoding="utf-8-sig") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise UserError(f"{named}: line {number} is not JSON ({e}); give one object a line") from None
            if not isinstance(row, dict):
                raise UserError(f"{named}: line {number} is no object; give one {{...}} a line")
            require_columns(columns, list(row), f"{named}, line {number}")
            values = tuple(row[column] for column in columns)
            if "\\u" in line and any(isinstance(v, str) and _SURROGATE.search(v) for v in values):
                raise UserError(f"{named}: line {number} holds half of a surrogate pair (\\ud800 to \\udfff); mend it")
            yield values


def _parquet_rows(path: Path, columns: Sequence[str], named: str) -> Iterator[tuple[Any, ...]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            require_columns(columns, file.schema_arrow.names, named)
            for batch in file.iter_batches(1024, columns=list(dict.fromkeys(columns))):
                yield from zip(*(batch.column(column).to_pylist() for column in columns), strict=True)
    except pyarrow.ArrowException as e:
        raise UserError(f"{named}: cannot be read as parquet ({str(e).splitlines()[0]}); give a whole file") from None


def texts_of(values: Iterator[tuple[Any, ...]], named: str) -> Iterator[str]:
    """Rows' columns joined by spaces; a missing value is an empty text. Raises `UserError` for what is no text."""
    for number, row in enumerate(values, 1):
        for value in row:
            if not isinstance(value, str | None):
                raise UserError(f"{named}: row {number} holds {value!r:.40}, not text; choose a column of texts")
        yield " ".join(value or "" for value in row)


def hub_splits(spec: str, named: str) -> Mapping[str, Any]:
    """A hub's dataset by split, NAME[:CONFIG], from its parquet files; no code of it is run.

    NAME may be a folder of this machine that is laid out as on the hub. What was downloaded before needs no network.

    Raises:
        NotAvailable: it cannot be had here. UserError: it has no parquet files.
    """
    name, _, config = spec.partition(":")
    refusal = None
    if not is_kind(Path.is_dir, Path(name)):
        refusal = unreachable(os.environ.get("HF_ENDPOINT", HUB), any_answer=True)
        if refusal:
            os.environ["HF_HUB_OFFLINE"] = "1"  # read at the import below: only what is on this machine
    import datasets

    datasets.utils.logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(None) if refusal else contextlib.nullcontext():
            builder = datasets.load_dataset_builder(name, config or None)
            module = type(builder).__module__
            if ".parquet." not in module and ".cache." not in module:
                kind = module.rsplit(".", 1)[-1]
                raise UserError(f"{named}: made of {kind}, not of parquet files; give its files with file:PATH")
            builder.download_and_prepare()
            return builder.as_dataset()
    except UserError:
        raise
    except Exception as e:  # the library's and its transports' errors have no common base class
        reason = (
            f"no network ({refusal})" if refusal else f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}"
        )
        raise NotAvailable(
            f"{named}: cannot be had from {os.environ.get('HF_ENDPOINT', HUB)}: {reason}; check the name, and "
            "NAME:CONFIG where it has several, or give its files with file:PATH"
        ) from None
