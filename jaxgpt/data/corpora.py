"""Corpora: finds, downloads and verifies the texts of a named dataset.

Names: `tinyshakespeare`; `pydoc`, the language reference that ships with Python; `wikitext-2` and `wikitext-103`;
`hf:NAME[:CONFIG]`, a Parquet dataset of the Hugging Face hub; `bin:DIR`, tokens as nanoGPT, llm.c or modded-nanogpt
write them; `file:PATH`, a UTF-8 text, or a CSV, JSON Lines or Parquet file with a column of texts, all but the last
also as `.gz` or `.zst`. `hf:` and `file:` take a folder of `save_to_disk`, too. Of several names separated by commas,
the first that is available is taken.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from jaxgpt.data.files import (
    NotAvailable,
    RemoteFile,
    data_folders,
    find_or_download,
    require_folder,
    sha256_of,
)
from jaxgpt.data.nanogpt import NanoGptFiles, nanogpt_files
from jaxgpt.data.readers import (
    TABLE_ROWS,
    TABLE_SUFFIXES,
    Texts,
    hub_builder,
    hub_endpoint,
    hub_splits,
    is_saved_dataset,
    join_columns,
    read_lines,
    read_rows,
    require_columns,
    split_spec,
    table_suffix,
    text_pieces,
)
from jaxgpt.data.shards import (
    REVISION,
    ParquetFiles,
    TokenFiles,
    keep_list,
    kept_list,
    parquet_files,
    token_files,
)
from jaxgpt.errors import UserError

REMOTE_TEXTS = {
    "tinyshakespeare": RemoteFile(
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        file="tinyshakespeare/input.txt",
    )
}
# Datasets whose files hold one text per line. Without files in a data folder they come from the hub, under these names.
LINE_DATASETS = {
    "wikitext-2": "Salesforce/wikitext:wikitext-2-raw-v1",
    "wikitext-103": "Salesforce/wikitext:wikitext-103-raw-v1",
}
LINE_FILES = {  # the accepted names of each split's file: a plain one, and those of WikiText's releases
    "train": ("train.txt", "wiki.train.raw", "wiki.train.tokens"),
    "validation": ("valid.txt", "wiki.valid.raw", "wiki.valid.tokens"),
    "test": ("test.txt", "wiki.test.raw", "wiki.test.tokens"),
}
NAMES = (*REMOTE_TEXTS, "pydoc", *LINE_DATASETS, "hf:NAME[:CONFIG]", "bin:DIR", "file:PATH")
DEFAULT_COLUMN = "text"
# Hub datasets of more bytes are streamed: to tokenize the 3 GB of text in them takes a core ten minutes.
STREAMED_BYTES = 2**30
Streaming = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class Corpus:
    """The texts of a dataset, by split, and where they come from.

    Args:
        name: the dataset's name, as a configuration records it: one name, with absolute paths.
        sha256: identifies the data, in hexadecimal. For a single text it is the digest of its UTF-8 bytes.
        source: the file or the hub dataset that was read.
        splits: the texts of "train" and "validation", or of "all" where the dataset has no splits.
        documents: each text is a document, which ends with the end-of-text token if the tokenizer has one.
        nanogpt: for nanoGPT's `bin:DIR`, its files of tokens, instead of `splits`.
        shards: for a corpus that is read a shard at a time, its files, instead of `splits`.
    """

    name: str
    sha256: str
    source: str
    splits: Mapping[str, Texts] = field(compare=False, repr=False)
    documents: bool = False
    nanogpt: NanoGptFiles | None = None
    shards: ParquetFiles | TokenFiles | None = None

    @property
    def holds_tokens(self) -> bool:
        """Whether it consists of tokens, not of texts."""
        return self.nanogpt is not None or isinstance(self.shards, TokenFiles)

    @property
    def text(self) -> str:
        """All texts in one string, those of "train" first. For corpora that fit in memory."""
        return "".join(text for texts in self.splits.values() for text in texts())


def corpus_from_text(name: str, text: str, source: str) -> Corpus:
    """A corpus of one text in memory."""
    return Corpus(name, hashlib.sha256(text.encode()).hexdigest(), source, {"all": lambda: iter([text])})


def load_corpus(
    spec: str,
    data_dir: Path | None,
    say: Callable[[str], None],
    text_column: str | None = None,
    streaming: Streaming = "never",
) -> Corpus:
    """The first available dataset of a comma-separated list.

    Args:
        spec: the name of a dataset, or several separated by commas.
        data_dir: a folder to search before all others; None without `--data-dir`.
        say: receives a line about what was chosen, downloaded or replaced.
        text_column: for tables, the column of texts; None for "text".
        streaming: whether a hub dataset is read a shard at a time: "auto" if it has more than `STREAMED_BYTES`.

    Raises:
        UserError: a name is unknown, or the data is not valid.
        NotAvailable: no dataset of the list is available. The message gives the reason for each.
    """
    require_folder(data_dir)
    # A path may contain a comma, so an existing path takes precedence over a list.
    is_path = spec.startswith(("file:", "bin:")) and os.path.exists(path_of(spec))
    names = [spec] if is_path else [name.strip() for name in spec.split(",")]
    for name in names:
        if name not in (*REMOTE_TEXTS, *LINE_DATASETS, "pydoc") and not name.startswith(("file:", "hf:", "bin:")):
            raise UserError(f"--dataset {name!r}: unknown dataset; choose of {', '.join(NAMES)}")
        has_columns = table_suffix(path_of(name)) in TABLE_SUFFIXES or is_saved_dataset(path_of(name))
        if text_column and not (name.startswith("hf:") or has_columns):
            raise UserError(f"--text-column {text_column}: {name} has no columns; leave it out")
        if streaming == "always" and not name.startswith("hf:"):
            raise UserError(
                f"--streaming always: {name} is no dataset hf:NAME, and only those are streamed; leave it out"
            )
    reasons = []
    for name in names:
        try:
            corpus = _load_one(name, data_dir, say, text_column or DEFAULT_COLUMN, streaming)
        except NotAvailable as e:
            reasons.append(str(e))
            continue
        if len(names) > 1:
            say(f"dataset: {corpus.name}, the first of {spec} that can be had ({corpus.source})")
        return corpus
    raise NotAvailable("; ".join(reasons))


def load_test_texts(spec: str, data_dir: Path | None, option: str, own_files: str) -> Texts:
    """The texts of a dataset's test split, which `load_corpus` leaves out where there is another to validate on.

    Args:
        spec: `wikitext-2`, `wikitext-103` or `hf:NAME[:CONFIG]`.
        option: the flags and values, with which error messages begin.
        own_files: what takes the dataset's files instead, for the error messages.

    Raises:
        UserError: the dataset has no test split, or its texts are in another column than "text".
        NotAvailable: it is not on this machine and cannot be downloaded.
    """
    require_folder(data_dir)
    if spec in LINE_DATASETS:
        paths = [folder / spec / file for folder in data_folders(data_dir) for file in LINE_FILES["test"]]
        if found := [path for path in paths if os.path.isfile(path)]:
            return _lines_of(found[0], option)
    elif not spec.startswith("hf:"):
        raise UserError(f"{option}: has no test split; choose val or train")
    splits = hub_splits(LINE_DATASETS.get(spec, spec.removeprefix("hf:")), option, own_files)
    if "test" not in splits:
        raise UserError(f"{option}: has no test split; it has {', '.join(splits)}")
    require_columns([DEFAULT_COLUMN], splits["test"].column_names, option)
    return _hub_texts(splits["test"], DEFAULT_COLUMN, option)


def texts_of_file(path: Path, option: str) -> Texts:
    """The texts of a file: the lines of a text, each with its end, or the column "text" of a table.

    Raises on the first pass what `read_lines` and `read_rows` raise.
    """
    if table_suffix(path) in TABLE_SUFFIXES:
        return lambda: join_columns(read_rows(path, [DEFAULT_COLUMN], option), option)
    return _lines_of(path, option)


def streaming_of_run(name: str, streaming: Streaming) -> Streaming:
    """What `--streaming` means for a run that has recorded the dataset `name`.

    The name of a hub dataset that was streamed has its commit. Without one, "auto" is "never": a run of an earlier
    version has not streamed, whatever the size.
    """
    of_hub = name.startswith("hf:") and not os.path.isdir(split_spec(name.removeprefix("hf:"))[0])
    return "never" if streaming == "auto" and of_hub and not REVISION.search(name) else streaming


def path_of(name: str) -> Path:
    """The path in a dataset's name `file:PATH` or `bin:DIR`."""
    path = Path(name.partition(":")[2])
    try:
        return path.expanduser()
    except RuntimeError:  # "~user" of an unknown user
        return path


def absolute_name(name: str) -> str:
    """A dataset's name with absolute paths, so that a run finds its data from any working directory."""
    if name.startswith("hf:"):
        folder = Path(name.removeprefix("hf:"))
        return f"hf:{folder.resolve()}" if os.path.isdir(folder) else name
    return f"{name.partition(':')[0]}:{path_of(name).resolve()}" if name.startswith(("file:", "bin:")) else name


def _load_one(
    name: str, data_dir: Path | None, say: Callable[[str], None], column: str, streaming: Streaming
) -> Corpus:
    option = f"--dataset {name}"
    if name == "pydoc":
        return _pydoc()
    if name in LINE_DATASETS:
        return _line_dataset(name, option, data_dir, say)
    if name.startswith("hf:"):
        saved = is_saved_dataset(Path(name.removeprefix("hf:")))
        if streaming != "never" and not saved and (corpus := _streamed_dataset(name, option, column, streaming)):
            return corpus
        return _hub_dataset(absolute_name(name), name.removeprefix("hf:"), option, column)
    if name.startswith("bin:"):
        return _token_files(path_of(name), option)
    if name.startswith("file:"):
        path = path_of(name)
        if is_saved_dataset(path):
            return _hub_dataset(absolute_name(name), str(path), option, column)
        corpus = _table(path, option, column) if table_suffix(path) in TABLE_SUFFIXES else _text_file(path, option)
        return replace(corpus, name=absolute_name(name))
    remote, folders = REMOTE_TEXTS[name], data_folders(data_dir)
    path = find_or_download(remote, option, folders, say, "--dataset pydoc", own_file_flag="--dataset file:")
    return replace(_text_file(path, option), name=name, source=os.path.abspath(path))


def _text_file(path: Path, option: str) -> Corpus:
    digest, n_chars = hashlib.sha256(), 0
    for piece in text_pieces(path, option):
        digest.update(piece.encode())
        n_chars += len(piece)
    if not n_chars:
        raise UserError(f"{option}: the file is empty; give one with text")
    return Corpus("", digest.hexdigest(), str(path), {"all": lambda: text_pieces(path, option)})


def _table(path: Path, option: str, column: str) -> Corpus:
    def texts() -> Iterator[str]:
        return join_columns(read_rows(path, [column], column_option), column_option)

    column_option = f"{option} --text-column {column}"
    return Corpus("", _digest({"all": texts}, column), str(path), {"all": texts}, documents=True)


def _pydoc() -> Corpus:
    try:
        from pydoc_data import topics
    except ImportError:
        raise NotAvailable("--dataset pydoc: this Python comes without pydoc_data; use file:PATH") from None
    text = "\n".join(topics.topics[topic] for topic in sorted(topics.topics))
    return corpus_from_text("pydoc", text, "pydoc_data.topics of this Python")


def _line_dataset(name: str, option: str, data_dir: Path | None, say: Callable[[str], None]) -> Corpus:
    """A dataset of `LINE_DATASETS`: from the first data folder with two of its splits, else from the hub."""
    folders = data_folders(data_dir)
    for folder in folders:
        paths = {}
        for split, files in LINE_FILES.items():
            present = [folder / name / file for file in files if os.path.isfile(folder / name / file)]
            if present:
                paths[split] = present[0]
        if "train" not in paths and len(paths) == 2:
            say(
                f"{os.path.abspath(folder / name)}: no train split; {paths['validation'].name} trains, "
                f"{paths['test'].name} validates"
            )
            paths = {"train": paths["validation"], "validation": paths["test"]}
        if "train" in paths and len(paths) > 1:
            paths = {"train": paths["train"], "validation": paths.get("validation") or paths["test"]}
            splits = {split: _lines_of(path, option) for split, path in paths.items()}
            source = os.path.abspath(paths["train"])
            return Corpus(name, _digest_of_files(paths, option), source, splits, documents=True)
    try:
        return replace(_hub_dataset(name, LINE_DATASETS[name], option, DEFAULT_COLUMN), name=name)
    except NotAvailable as e:
        searched = ", ".join(os.path.abspath(folder / name) for folder in folders)
        files = " and ".join(files[0] for files in list(LINE_FILES.values())[:2])
        raise NotAvailable(f"{e}; {files} were looked for in {searched}") from None


def _lines_of(path: Path, option: str) -> Texts:
    return lambda: read_lines(path, option)


def _hub_dataset(name: str, spec: str, option: str, column: str) -> Corpus:
    datasets, column_option = hub_splits(spec, option), f"{option} --text-column {column}"
    if "train" not in datasets:
        raise UserError(f"{option}: no train split; it has {', '.join(datasets)}; give its files with file:PATH")
    require_columns([column], datasets["train"].column_names, column_option)

    def texts_of(split: str) -> Texts:
        return _hub_texts(datasets[split], column, column_option)

    validation = next((split for split in ("validation", "valid", "val", "test") if split in datasets), None)
    if validation:
        splits = {"train": texts_of("train"), "validation": texts_of(validation)}
    else:
        splits = {"all": texts_of("train")}
    return Corpus(name, _digest(splits, column), f"hf:{spec}", splits, documents=True)


def _hub_texts(dataset: Any, column: str, column_option: str) -> Texts:
    """The texts of one split of a hub dataset."""

    def rows() -> Iterator[tuple]:
        for batch in dataset.select_columns([column]).iter(TABLE_ROWS):
            yield from zip(batch[column], strict=True)

    return lambda: join_columns(rows(), column_option)


def _streamed_dataset(name: str, option: str, column: str, streaming: Streaming) -> Corpus | None:
    """A hub dataset that is read a shard at a time; None if it is too small for that, or known to a cache alone."""
    folder = split_spec(name.removeprefix("hf:"))[0]
    is_folder = os.path.isdir(folder)
    files = None if is_folder else kept_list(name, column)
    if files is None:
        with hub_builder(name.removeprefix("hf:"), option) as builder:
            data_files = builder.config.data_files
            if not data_files or "train" not in data_files:
                return None
            if is_folder and streaming == "auto" and sum(map(os.path.getsize, data_files["train"])) <= STREAMED_BYTES:
                return None  # before all files are read for their digests
            files = parquet_files(data_files, folder if is_folder else "", column, hub_endpoint())
        name = absolute_name(name) if is_folder else f"{REVISION.sub('', name)}@{files.revision}"
        if not is_folder:
            keep_list(name, files)
    if streaming == "auto" and files.n_bytes <= STREAMED_BYTES:
        return None
    return Corpus(name, files.sha256, name, {}, documents=True, shards=files)


def _token_files(folder: Path, option: str) -> Corpus:
    """Files of tokens: llm.c's, or nanoGPT's, one a split and without a header."""
    if shards := token_files(folder, option):
        source = str(folder.resolve() / shards.train[0].path.name)
        return Corpus(f"bin:{folder.resolve()}", shards.sha256, source, {}, documents=True, shards=shards)
    files = nanogpt_files(folder, option)
    digest = _digest_of_files(files.paths, option)
    if files.chars is not None:
        digest = hashlib.sha256(f"{digest}{files.chars}".encode("utf-8", "surrogatepass")).hexdigest()
    source = str(folder.resolve() / "train.bin")
    return Corpus(f"bin:{folder.resolve()}", digest, source, {}, documents=True, nanogpt=files)


def _digest(splits: Mapping[str, Texts], column: str) -> str:
    """The SHA-256 of all texts and of where each one ends."""
    digest = hashlib.sha256(column.encode())
    for split, texts in splits.items():
        digest.update(f"\0{split}".encode())
        for text in texts():
            data = text.encode("utf-8", "surrogatepass")
            digest.update(f"\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def _digest_of_files(paths: Mapping[str, Path], option: str) -> str:
    """The SHA-256 of the files' digests in hexadecimal, in the order of the splits."""
    return hashlib.sha256("".join(sha256_of(path, option) for path in paths.values()).encode()).hexdigest()
