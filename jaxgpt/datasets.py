"""A dataset's name -> its texts: find, download, verify.

Names: `tinyshakespeare`; `pydoc`, the language reference inside every Python; `wikitext-2`, `wikitext-103`;
`hf:NAME[:CONFIG]`, the hub's parquet datasets; `bin:DIR`, nanoGPT's train.bin and val.bin; `file:PATH`, UTF-8 text, or
rows with a column of texts in CSV, JSON lines or parquet. `a,b` takes the first that can be had.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from jaxgpt.data_files import (
    NotAvailable,
    Remote,
    data_folders,
    find,
    is_kind,
    require_folder,
    sha256_of,
)
from jaxgpt.errors import UserError
from jaxgpt.texts import TABLES, Texts, hub_splits, lines, require_columns, rows, text_pieces, texts_of

REMOTES = {
    "tinyshakespeare": Remote(
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        file="tinyshakespeare/input.txt",
    )
}
# One text a line, in files of a data folder; else from the hub.
LINE_SETS = {
    "wikitext-2": "Salesforce/wikitext:wikitext-2-raw-v1",
    "wikitext-103": "Salesforce/wikitext:wikitext-103-raw-v1",
}
LINE_FILES = {  # by split, in the releases' and in plain names
    "train": ("train.txt", "wiki.train.raw", "wiki.train.tokens"),
    "validation": ("valid.txt", "wiki.valid.raw", "wiki.valid.tokens"),
    "test": ("test.txt", "wiki.test.raw", "wiki.test.tokens"),
}
NAMES = (*REMOTES, "pydoc", *LINE_SETS, "hf:NAME[:CONFIG]", "bin:DIR", "file:PATH")
DEFAULT_COLUMN = "text"


@dataclass(frozen=True)
class Corpus:
    """Texts and where they came from."""

    name: str  # as in a configuration: the one that was taken of a list, a file's path made absolute
    sha256: str  # tells this data from any other: of a single text that of its UTF-8 bytes
    source: str
    splits: Mapping[str, Texts] = field(compare=False, repr=False)  # "train" and "validation", or "all"
    documents: bool = False  # each text stands for itself and is ended by the end-of-text token, where there is one
    bins: Mapping[str, Path] = field(default_factory=dict)  # in place of texts: tokens by split, in files of uint16

    @property
    def text(self) -> str:
        """All of it, train first. For corpora that fit the memory."""
        return "".join(text for texts in self.splits.values() for text in texts())


def of_text(name: str, text: str, source: str) -> Corpus:
    """A text that is at hand."""
    return Corpus(name, hashlib.sha256(text.encode()).hexdigest(), source, {"all": lambda: iter([text])})


def load_corpus(spec: str, data_dir: Path | None, say: Callable[[str], None], text_column: str | None = None) -> Corpus:
    """The first dataset of a comma-separated list that can be had.

    Args:
        spec: a dataset's name, or several separated by commas.
        data_dir: a folder to look in before all others, or None.
        say: takes the one line that tells which of several was taken.
        text_column: of rows, the column that holds the texts; None for "text".

    Raises:
        UserError: an unknown name, or no dataset of the list can be had.
    """
    # A path may itself hold a comma: a single existing file wins over reading the name as a list.
    require_folder(data_dir)
    whole_is_path = spec.startswith(("file:", "bin:")) and is_kind(Path.exists, path_of(spec))
    names = [spec] if whole_is_path else [name.strip() for name in spec.split(",")]
    for name in names:
        if name not in (*REMOTES, *LINE_SETS, "pydoc") and not name.startswith(("file:", "hf:", "bin:")):
            raise UserError(f"--dataset {name!r}: unknown dataset; choose of {', '.join(NAMES)}")
        if text_column and not (name.startswith("hf:") or path_of(name).suffix.lower() in TABLES):
            raise UserError(f"--text-column {text_column}: {name} has no columns; leave it out")
    refusals = []
    for name in names:
        try:
            corpus = _load_one(name, data_dir, say, text_column or DEFAULT_COLUMN)
        except NotAvailable as e:
            refusals.append(str(e))
            continue
        if len(names) > 1:
            say(f"dataset: {corpus.name}, the first of {spec} that can be had ({corpus.source})")
        return corpus
    raise NotAvailable("; ".join(refusals))


def path_of(name: str) -> Path:
    """The path of a `file:PATH` or `bin:DIR`."""
    path = Path(name.partition(":")[2])
    try:
        return path.expanduser()
    except RuntimeError:  # ~ of a user that does not exist
        return path


def absolute(name: str) -> str:
    """A dataset's name with the paths in it made absolute, so that a run finds it from any folder."""
    if name.startswith("hf:"):
        folder = Path(name.removeprefix("hf:"))
        return f"hf:{folder.resolve()}" if is_kind(Path.is_dir, folder) else name
    return f"{name.partition(':')[0]}:{path_of(name).resolve()}" if name.startswith(("file:", "bin:")) else name


def _load_one(name: str, data_dir: Path | None, say: Callable[[str], None], column: str) -> Corpus:
    named = f"--dataset {name}"
    if name == "pydoc":
        return _pydoc()
    if name in LINE_SETS:
        return _line_set(name, named, data_dir, say)
    if name.startswith("hf:"):
        return _hub(absolute(name), name.removeprefix("hf:"), named, column)
    if name.startswith("bin:"):
        return _bins(path_of(name), named)
    if name.startswith("file:"):
        path = path_of(name)
        corpus = _table(path, named, column) if path.suffix.lower() in TABLES else _text(path, named)
        return replace(corpus, name=absolute(name))
    path = find(REMOTES[name], named, data_folders(data_dir), say, "--dataset pydoc", own="--dataset file:")
    return replace(_text(path, named), name=name, source=os.path.abspath(path))


def _text(path: Path, named: str) -> Corpus:
    digest = hashlib.sha256()
    for piece in text_pieces(path, named):
        digest.update(piece.encode())
    if digest.digest() == hashlib.sha256().digest():
        raise UserError(f"{named}: the file is empty; give one with text")
    return Corpus("", digest.hexdigest(), str(path), {"all": lambda: text_pieces(path, named)})


def _table(path: Path, named: str, column: str) -> Corpus:
    def texts() -> Iterator[str]:
        return texts_of(rows(path, [column], _column_named(named, column)), _column_named(named, column))

    return Corpus("", _digest({"all": texts}, column), str(path), {"all": texts}, documents=True)


def _column_named(named: str, column: str) -> str:
    """Errors about a column begin with its flag."""
    return f"{named} --text-column {column}"


def _pydoc() -> Corpus:
    try:
        from pydoc_data import topics
    except ImportError:
        raise NotAvailable("--dataset pydoc: this Python comes without pydoc_data; use file:PATH") from None
    text = "\n".join(topics.topics[topic] for topic in sorted(topics.topics))
    return of_text("pydoc", text, "pydoc_data.topics of this Python")


def _line_set(name: str, named: str, data_dir: Path | None, say: Callable[[str], None]) -> Corpus:
    """From the first data folder that holds two splits of it, else from the hub."""
    folders = data_folders(data_dir)
    for folder in folders:
        found = {}
        for split, files in LINE_FILES.items():
            there = [folder / name / file for file in files if is_kind(Path.is_file, folder / name / file)]
            found.update({split: there[0]} if there else {})
        if "train" not in found and len(found) == 2:
            say(
                f"{os.path.abspath(folder / name)}: no train split; {found['validation'].name} trains, "
                f"{found['test'].name} validates"
            )
            found = {"train": found["validation"], "validation": found["test"]}
        if "train" in found and len(found) > 1:
            paths = {"train": found["train"], "validation": found.get("validation") or found["test"]}
            splits = {split: _lines_of(path, named) for split, path in paths.items()}
            digest = hashlib.sha256("".join(sha256_of(path, named) for path in paths.values()).encode()).hexdigest()
            return Corpus(name, digest, os.path.abspath(paths["train"]), splits, documents=True)
    try:
        return replace(_hub(name, LINE_SETS[name], named, DEFAULT_COLUMN), name=name)
    except NotAvailable as e:
        looked = ", ".join(os.path.abspath(folder / name) for folder in folders)
        files = " and ".join(files[0] for files in list(LINE_FILES.values())[:2])
        raise NotAvailable(f"{e}; {files} were looked for in {looked}") from None


def _lines_of(path: Path, named: str) -> Texts:
    return lambda: lines(path, named)


def _hub(name: str, spec: str, named: str, column: str) -> Corpus:
    loaded = hub_splits(spec, named)
    if "train" not in loaded:
        raise UserError(f"{named}: no train split; it has {', '.join(loaded)}; give its files with file:PATH")
    require_columns([column], loaded["train"].column_names, _column_named(named, column))

    def texts_in(split: str) -> Texts:
        def values() -> Iterator[tuple]:
            for batch in loaded[split].select_columns([column]).iter(1024):
                yield from zip(batch[column], strict=True)

        return lambda: texts_of(values(), _column_named(named, column))

    held_out = next((split for split in ("validation", "valid", "val", "test") if split in loaded), None)
    splits = {"train": texts_in("train"), "validation": texts_in(held_out)} if held_out else {"all": texts_in("train")}
    return Corpus(name, _digest(splits, column), f"hf:{spec}", splits, documents=True)


def _digest(splits: Mapping[str, Texts], column: str) -> str:
    """Of all texts with their borders."""
    digest = hashlib.sha256(column.encode())
    for split, texts in splits.items():
        digest.update(f"\0{split}".encode())
        for text in texts():
            data = text.encode("utf-8", "surrogatepass")
            digest.update(f"\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def _bins(folder: Path, named: str) -> Corpus:
    """nanoGPT's files: tokens of one split each, uint16, nothing else."""
    paths = {"train": folder / "train.bin", "validation": folder / "val.bin"}
    for path in paths.values():
        if not is_kind(Path.is_file, path):
            raise NotAvailable(f"{named}: no {path.name} there; give a folder with train.bin and val.bin")
        if not path.stat().st_size or path.stat().st_size % 2:
            raise UserError(
                f"{named}: {path.name} has {path.stat().st_size} bytes, no whole number of uint16 tokens; write it "
                "again"
            )
    digest = hashlib.sha256("".join(sha256_of(path, named) for path in paths.values()).encode()).hexdigest()
    return Corpus(f"bin:{folder.resolve()}", digest, str(folder.resolve() / "train.bin"), {}, True, paths)
