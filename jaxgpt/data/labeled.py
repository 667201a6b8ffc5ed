"""Labeled texts for classification: finds, downloads and splits them, and encodes them.

Names: `ag_news`; `hf:NAME[:CONFIG]`, a Parquet dataset of the Hugging Face hub; `file:PATH`, a CSV, JSON Lines or
Parquet file with columns of texts and labels. Without a test split, a fifth of the texts is the holdout split, always
the same.

Axes: N examples, B rows of a batch, T time.
"""

import csv
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.config import FinetuneConfig
from jaxgpt.data.corpora import DEFAULT_COLUMN, absolute_name, path_of
from jaxgpt.data.files import NotAvailable, data_folders, require_folder
from jaxgpt.data.readers import (
    TABLE_SUFFIXES,
    hub_splits,
    join_columns,
    read_lines,
    read_rows,
    require_columns,
    table_suffix,
)
from jaxgpt.data.sampler import PADDING
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError

AG_NEWS_HUB = "fancyzhx/ag_news"
AG_NEWS_CLASSES = ("World", "Sports", "Business", "Sci/Tech")
DEFAULT_LABEL_COLUMN = "label"
HOLDOUT_DIVISOR = 5  # one text of this many is in the holdout split
HOLDOUT_SEED = 0  # not the run's seed, so that all runs are tested on the same texts

_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,17}")

Example = tuple[str, int]  # a text and its class, counted from 0


@dataclass(frozen=True)
class LabeledTexts:
    """Labeled examples, and where they come from.

    Args:
        name: the dataset's name, with an absolute path.
        sha256: identifies the classes and all examples, in hexadecimal.
        source: the file or the hub dataset that was read.
        labels: the names of the classes.
        train: the examples to train on.
        test: the examples to test on.
    """

    name: str
    sha256: str
    source: str
    labels: tuple[str, ...]
    train: Sequence[Example] = field(compare=False, repr=False)
    test: Sequence[Example] = field(compare=False, repr=False)


def load_labeled(config: FinetuneConfig, data_dir: Path | None, say: Callable[[str], None]) -> LabeledTexts:
    """The labeled texts that a configuration names.

    Args:
        data_dir: a folder to search before all others; None without `--data-dir`.
        say: receives a line if a holdout split was made.

    Raises:
        UserError: an unknown name or column, an empty text, a row without a label, a test label that no training text
            has, or fewer than two classes.
        NotAvailable: the data is not on this machine and cannot be downloaded.
    """
    spec, test_spec = config.dataset, config.test_dataset
    require_folder(data_dir)
    option = f"--dataset {spec}"
    if spec == "ag_news":
        for flag, value in (("--text-column", config.text_column), ("--label-column", config.label_column)):
            if value and not test_spec:
                raise UserError(f"{flag} {value}: ag_news has no named columns; leave it out")
        dataset = _ag_news(option, data_dir)
    elif spec.startswith("file:"):
        dataset = _table(spec, config, option)
    elif spec.startswith("hf:"):
        dataset = _hub_dataset(spec.removeprefix("hf:"), config, option)
    else:
        raise UserError(f"{option}: unknown dataset; choose of ag_news, hf:NAME[:CONFIG], file:PATH")
    if test_spec:
        test_option = f"--test-dataset {test_spec}"
        if not test_spec.startswith("file:"):
            raise UserError(f"{test_option}: give file:PATH")
        dataset.test = _table(test_spec, config, test_option).train
    labels, train, test = dataset.examples(own_test=bool(test_spec))
    if not test:
        train, test = holdout_split(train)
        say(f"{spec}: no test split; {len(test):,} of its texts are held out as the test split")
    if not train or not test:
        raise UserError(f"{option}: {len(train)} texts to train on and {len(test)} to test on; give more")
    if config.train_samples > len(train):
        raise UserError(f"--train-samples {config.train_samples}: there are {len(train)} training texts; give fewer")
    return LabeledTexts(absolute_name(spec), _digest(labels, train, test), dataset.source, labels, train, test)


def holdout_split(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """The examples to train on and the holdout split: the same on every machine and for every seed of a run.

    The examples whose positions have the smallest digests are held out.
    """

    def digest(position: int) -> bytes:
        return hashlib.sha256(f"{HOLDOUT_SEED} {position}".encode()).digest()

    n_test = len(examples) // HOLDOUT_DIVISOR
    held_out = set(sorted(range(len(examples)), key=digest)[:n_test])
    train = [example for position, example in enumerate(examples) if position not in held_out]
    return train, [examples[position] for position in sorted(held_out)]


def choose(examples: Sequence[Example], n_samples: int, seed: int) -> list[Example]:
    """A random sample of the training examples in their order, a function of the seed.

    Args:
        n_samples: the size of the sample; 0 takes all examples.
    """
    if not n_samples:
        return list(examples)
    shuffled = np.random.Generator(np.random.Philox(seed)).random(len(examples)).argsort(kind="stable")
    return [examples[position] for position in sorted(shuffled[:n_samples])]


# ------------------------------------------------------------------------------------------------------------- encoding


def encode(texts: Sequence[str], tokenizer: Tokenizer, max_tokens: int) -> np.ndarray:
    """The token ids of texts, int32 [N, T]: the first T of each, PADDING on the right.

    Args:
        max_tokens: T.

    Raises:
        UserError: the tokenizer cannot encode a text.
    """
    idx_NT = np.full((len(texts), max_tokens), PADDING, np.int32)
    for row_T, text in zip(idx_NT, texts, strict=True):
        ids = tokenizer.encode(text)[:max_tokens]
        row_T[: len(ids)] = ids
    return idx_NT


def pad_token(tokenizer: Tokenizer) -> int:
    """The token that stands for PADDING in the model's input: the end of text, as documented, or the first token."""
    return tokenizer.end_of_text or 0


def eval_batches(idx_NT: np.ndarray, label_N: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All examples in order, as batches idx_BT and label_B. Rows with the label PADDING fill the last batch."""
    for start in range(0, len(idx_NT), batch_size):
        idx_BT, label_B = idx_NT[start : start + batch_size], label_N[start : start + batch_size]
        n_missing = batch_size - len(idx_BT)
        idx_BT = np.pad(idx_BT, ((0, n_missing), (0, 0)), mode="edge")
        yield idx_BT, np.pad(label_B, (0, n_missing), constant_values=PADDING)


# -------------------------------------------------------------------------------------------------------------- reading


@dataclass
class _RawRows:
    """Texts with their labels as the file has them.

    Args:
        option: the flag and its value, with which error messages begin.
    """

    option: str
    rows: list[tuple[str, Any]]

    def labels(self) -> list[Any]:
        """The normalized label of each row, see `_normalized`."""
        return [_normalized(label, number, self.option) for number, (_, label) in enumerate(self.rows, 1)]

    def examples(self, class_of: dict[Any, int], names: Sequence[str]) -> list[Example]:
        """The examples, by the class of each normalized label."""
        examples = []
        for number, (text, label) in enumerate(self.rows, 1):
            normalized = _normalized(label, number, self.option)
            if normalized not in class_of:
                known = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
                raise UserError(
                    f"{self.option}: row {number} has the label {label!r}, outside the classes {known}; mend it"
                )
            if not text.strip():
                raise UserError(f"{self.option}: row {number} has an empty text; leave that row out")
            examples.append((text, class_of[normalized]))
        return examples


def _normalized(label: Any, number: int, option: str) -> Any:
    """A label as an int if it is a whole number, because CSV has only texts; else as a text.

    "01" stays a text. True becomes one, because it would equal 1.
    """
    if label is None or label == "":
        raise UserError(f"{option}: row {number} has no label; give it one, or leave that row out")
    if isinstance(label, bool):
        return str(label)
    if isinstance(label, str):
        return int(label) if _NUMBER.fullmatch(label.strip()) else label
    if isinstance(label, int):
        return int(label)
    raise UserError(f"{option}: row {number} has the label {label!r}; whole numbers and texts can be classes")


@dataclass
class _RawDataset:
    """The rows of a dataset.

    Args:
        class_names: in the order of the classes; None: the sorted labels of the training rows.
        first_class: the number of the first class in the rows, if the class names are known.
    """

    source: str
    train: _RawRows
    test: _RawRows | None = None
    class_names: Sequence[str] | None = None
    first_class: int = 0

    def examples(self, own_test: bool) -> tuple[tuple[str, ...], list[Example], list[Example]]:
        """The names of the classes, and the examples to train and to test on.

        Args:
            own_test: the test rows come from a file of the user, not from the dataset.
        """
        if self.class_names is not None:
            names = tuple(self.class_names)
            by_number = {self.first_class + k: k for k in range(len(names))}
            by_name = {int(name) if _NUMBER.fullmatch(name) else name: k for k, name in enumerate(names)}
            # A class name may be a number. In the dataset, a number counts the classes; in a user's file it is a name.
            train_classes = by_name | by_number
            test_classes = by_number | by_name if own_test else train_classes
        else:
            labels = set(self.train.labels())
            all_numbers = all(isinstance(label, int) for label in labels)
            ordered = sorted(labels) if all_numbers else sorted(labels, key=str)
            names = tuple(map(str, ordered))
            train_classes = test_classes = {label: k for k, label in enumerate(ordered)}
        if len(names) < 2:
            raise UserError(f"{self.train.option}: {len(names)} classes in it; give texts of two or more")
        train = self.train.examples(train_classes, names)
        return names, train, self.test.examples(test_classes, names) if self.test else []


def _ag_news(option: str, data_dir: Path | None) -> _RawDataset:
    """AG News as released, from the first data folder that has it, else from the hub.

    The released files have no header: the class from 1 to 4, the title, the description. test.csv alone will do.
    """
    folders = data_folders(data_dir)
    for folder in (folder / "ag_news" for folder in folders):
        if os.path.isfile(folder / "test.csv"):
            names: Sequence[str] = AG_NEWS_CLASSES
            if os.path.isfile(folder / "classes.txt"):
                names = [line.strip() for line in read_lines(folder / "classes.txt", option) if line.strip()]
            source, test = os.path.abspath(folder / "test.csv"), _ag_news_rows(folder / "test.csv", option)
            if not os.path.isfile(folder / "train.csv"):
                return _RawDataset(source, test, None, names, first_class=1)
            train = _ag_news_rows(folder / "train.csv", option)
            return _RawDataset(source, train, test, names, first_class=1)
    try:
        return _hub_dataset(AG_NEWS_HUB, FinetuneConfig(), option)
    except NotAvailable as e:
        searched = ", ".join(os.path.abspath(folder / "ag_news") for folder in folders)
        raise NotAvailable(f"{e}; test.csv was looked for in {searched}") from None


def _ag_news_rows(path: Path, option: str) -> _RawRows:
    rows = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as f:
            for number, row in enumerate(csv.reader(f), 1):
                if len(row) != 3:
                    raise UserError(f"{option}: {path}: row {number} has {len(row)} columns, not class, title, text")
                rows.append((f"{row[1]} {row[2]}", row[0]))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"{option}: {path} cannot be read ({e}); bring the released file back") from None
    return _RawRows(option, rows)


def _columns(config: FinetuneConfig) -> tuple[list[str], str]:
    """The columns of texts, which are joined, and the column of labels."""
    return (config.text_column or DEFAULT_COLUMN).split(","), config.label_column or DEFAULT_LABEL_COLUMN


def _table(spec: str, config: FinetuneConfig, option: str) -> _RawDataset:
    path, (text_columns, label_column) = path_of(spec), _columns(config)
    if table_suffix(path) not in TABLE_SUFFIXES:
        raise UserError(f"{option}: no file of rows; give one of {', '.join(TABLE_SUFFIXES)}")
    rows = list(read_rows(path, [*text_columns, label_column], option))
    texts = join_columns((row[:-1] for row in rows), option)
    labeled = [(text, row[-1]) for text, row in zip(texts, rows, strict=True)]
    if not labeled:
        raise UserError(f"{option}: no rows; give a file with texts")
    return _RawDataset(os.path.abspath(path), _RawRows(option, labeled))


def _hub_dataset(spec: str, config: FinetuneConfig, option: str) -> _RawDataset:
    datasets = hub_splits(spec, option)
    text_columns, label_column = _columns(config)
    if "train" not in datasets:
        raise UserError(f"{option}: no train split; it has {', '.join(datasets)}; give its files with file:PATH")

    def rows_of(split: str) -> _RawRows:
        dataset = datasets[split]
        require_columns([*text_columns, label_column], dataset.column_names, option)
        texts = join_columns(zip(*(dataset[column] for column in text_columns), strict=True), option)
        return _RawRows(option, list(zip(texts, dataset[label_column], strict=True)))

    def has_labels(split: str) -> bool:
        """Some test splits are published without their labels, as -1."""
        dataset = datasets[split]
        return label_column not in dataset.column_names or any(label != -1 for label in dataset[label_column])

    test = next((split for split in ("test", "validation") if split in datasets and has_labels(split)), None)
    train_rows, test_rows = rows_of("train"), rows_of(test) if test else None
    names = getattr(datasets["train"].features[label_column], "names", None)
    return _RawDataset(f"hf:{spec}", train_rows, test_rows, names)


def _digest(labels: Sequence[str], *splits: Sequence[Example]) -> str:
    """The SHA-256 of the class names and all examples, in hexadecimal."""
    digest = hashlib.sha256("\0".join(labels).encode())
    for examples in splits:
        digest.update(f"\0\0{len(examples)}".encode())
        for text, label in examples:
            data = text.encode("utf-8", "surrogatepass")
            digest.update(f"\0{label} {len(data)} ".encode() + data)
    return digest.hexdigest()
