"""A dataset's name -> texts with classes: find, download, split.

Names: `ag_news`; `hf:NAME[:CONFIG]`, the hub's parquet datasets; `file:PATH`, CSV, JSON lines or parquet with named
columns. Where there is no test split, a fifth of the texts is set apart, always the same.
"""

import csv
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.config import FinetuneConfig
from jaxgpt.data_files import NotAvailable, data_folders, is_kind, require_folder
from jaxgpt.datasets import absolute, path_of
from jaxgpt.errors import UserError
from jaxgpt.texts import TABLES, hub_splits, lines, require_columns, rows, texts_of

AG_NEWS_HUB = "fancyzhx/ag_news"
TEST_PART = 5  # one text of so many is set apart
SPLIT_SEED = 0  # of what is set apart; a run's own seed must not change what it is tested on

AG_NEWS_NAMES = ("World", "Sports", "Business", "Sci/Tech")
_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,17}")

Example = tuple[str, int]  # a text and its class


@dataclass(frozen=True)
class Labelled:
    """Texts with classes, and where they came from."""

    name: str
    sha256: str
    source: str
    labels: tuple[str, ...]
    train: Sequence[Example] = field(compare=False, repr=False)
    test: Sequence[Example] = field(compare=False, repr=False)


def load_labelled(config: FinetuneConfig, data_dir: Path | None, say: Callable[[str], None]) -> Labelled:
    """The texts that a configuration names.

    Raises:
        UserError: an unknown name or column, an empty text, a class of the test texts that no training text has, fewer
            than two classes; or the data cannot be had.
    """
    spec, test_spec = config.dataset, config.test_dataset
    require_folder(data_dir)
    named = f"--dataset {spec}"
    if spec == "ag_news":
        for flag, value in (("--text-column", config.text_column), ("--label-column", config.label_column)):
            if value and not test_spec:
                raise UserError(f"{flag} {value}: ag_news has no named columns; leave it out")
        found = _ag_news(named, data_dir, say)
    elif spec.startswith("file:"):
        found = _table(spec, config, named)
    elif spec.startswith("hf:"):
        found = _hub(spec.removeprefix("hf:"), config, named)
    else:
        raise UserError(f"{named!s}: unknown dataset; choose of ag_news, hf:NAME[:CONFIG], file:PATH")
    if test_spec:
        named_test = f"--test-dataset {test_spec}"
        if not test_spec.startswith("file:"):
            raise UserError(f"{named_test}: give file:PATH")
        found.test, found.test_named = _table(test_spec, config, named_test).train, named_test
    labels, train, test = found.classes()
    if not test:
        train, test = set_apart(train)
        say(f"{spec}: no test split; {len(test):,} of its texts are set apart to test on")
    if not train or not test:
        raise UserError(f"{named}: {len(train)} texts to train on and {len(test)} to test on; give more")
    if config.train_samples > len(train):
        raise UserError(f"--train-samples {config.train_samples}: there are {len(train)} training texts; give fewer")
    name = absolute(spec)
    return Labelled(name, _digest(labels, train, test), found.source, labels, train, test)


def set_apart(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """The texts to train and to test on, by a digest of their place: the same on every machine and for every seed."""

    def rank(at: int) -> bytes:
        return hashlib.sha256(f"{SPLIT_SEED} {at}".encode()).digest()

    n_test = len(examples) // TEST_PART
    tested = set(sorted(range(len(examples)), key=rank)[:n_test])
    train = [example for at, example in enumerate(examples) if at not in tested]
    return train, [examples[at] for at in sorted(tested)]


def choose(examples: Sequence[Example], n_samples: int, seed: int) -> list[Example]:
    """The training texts: all (0), or so many that the seed draws."""
    if not n_samples:
        return list(examples)
    drawn = np.random.Generator(np.random.Philox(seed)).random(len(examples)).argsort(kind="stable")
    return [examples[at] for at in sorted(drawn[:n_samples])]


@dataclass
class _Found:
    """Rows as they were read: (text, label as it stands there)."""

    source: str
    named: str
    train: list[tuple[str, Any]]
    test: list[tuple[str, Any]]
    names: Sequence[str] | None = None  # of the classes, in order
    first: int = 0  # the number of the first class
    test_named: str = ""

    def classes(self) -> tuple[tuple[str, ...], list[Example], list[Example]]:
        """The classes' names, and the rows with classes counted from 0."""
        if self.names is not None:
            names = tuple(self.names)
            numbered = {self.first + at: at for at in range(len(names))}
            named = {int(name) if _NUMBER.fullmatch(name) else name: at for at, name in enumerate(names)}
            # Here a number counts the classes; in a file of one's own a class whose name is a number means that.
            index, test_index = named | numbered, numbered | named if self.test_named else named | numbered
        else:
            given = {self._plain(label, self.named, at) for at, (_, label) in enumerate(self.train, 1)}
            numbers = all(isinstance(label, int) for label in given)
            ordered = sorted(given) if numbers else sorted(given, key=str)
            index = test_index = {label: at for at, label in enumerate(ordered)}
            names = tuple(map(str, ordered))
        if len(names) < 2:
            raise UserError(f"{self.named}: {len(names)} classes in it; give texts of two or more")
        train = self._indexed(self.train, index, names, self.named)
        return names, train, self._indexed(self.test, test_index, names, self.test_named or self.named)

    def _indexed(self, found: Iterable, index: dict[Any, int], names: Sequence[str], named: str) -> list[Example]:
        examples = []
        for number, (text, label) in enumerate(found, 1):
            plain = self._plain(label, named, number)
            if plain not in index:
                known = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
                raise UserError(f"{named}: row {number} has the label {label!r}, outside the classes {known}; mend it")
            if not text.strip():
                raise UserError(f"{named}: row {number} has an empty text; leave that row out")
            examples.append((text, index[plain]))
        return examples

    @staticmethod
    def _plain(label: Any, named: str, number: int) -> Any:
        """A label as a number where it is one: in CSV all are texts. Not 01, nor true, which equals 1."""
        if label is None or label == "":
            raise UserError(f"{named}: row {number} has no label; give it one, or leave that row out")
        if isinstance(label, bool):
            return str(label)
        if isinstance(label, str):
            return int(label) if _NUMBER.fullmatch(label.strip()) else label
        if isinstance(label, int):
            return int(label)
        raise UserError(f"{named}: row {number} has the label {label!r}; whole numbers and texts can be classes")


def _ag_news(named: str, data_dir: Path | None, say: Callable[[str], None]) -> _Found:
    """As released: no header; class 1..4, title, description. Else from the hub, where it is the same in parquet."""
    folders = data_folders(data_dir)
    for folder in folders:
        here = folder / "ag_news"
        if is_kind(Path.is_file, here / "test.csv"):
            names: Sequence[str] = AG_NEWS_NAMES
            if is_kind(Path.is_file, here / "classes.txt"):
                names = [line.strip() for line in lines(here / "classes.txt", named) if line.strip()]
            test = _released(here / "test.csv", named)
            whole = is_kind(Path.is_file, here / "train.csv")
            train = _released(here / "train.csv", named) if whole else test
            return _Found(os.path.abspath(here / "test.csv"), named, train, test if whole else [], names, first=1)
    try:
        return _hub(AG_NEWS_HUB, FinetuneConfig(), named)
    except NotAvailable as e:
        looked = ", ".join(os.path.abspath(folder / "ag_news") for folder in folders)
        raise NotAvailable(f"{e}; test.csv was looked for in {looked}") from None


def _released(path: Path, named: str) -> list[tuple[str, Any]]:
    found = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as f:
            for number, row in enumerate(csv.reader(f), 1):
                if len(row) != 3:
                    raise UserError(f"{named}: {path}: row {number} has {len(row)} columns, not class, title, text")
                found.append((f"{row[1]} {row[2]}", row[0]))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"{named}: {path} cannot be read ({e}); bring the released file back") from None
    return found


def _columns(config: FinetuneConfig) -> tuple[list[str], str]:
    return (config.text_column or "text").split(","), config.label_column or "label"


def _table(spec: str, config: FinetuneConfig, named: str) -> _Found:
    path, (text_columns, label_column) = path_of(spec), _columns(config)
    if path.suffix.lower() not in TABLES:
        raise UserError(f"{named}: no file of rows; give one of {', '.join(TABLES)}")
    values = list(rows(path, [*text_columns, label_column], named))
    texts = texts_of((row[:-1] for row in values), named)
    found = [(text, row[-1]) for text, row in zip(texts, values, strict=True)]
    if not found:
        raise UserError(f"{named}: no rows; give a file with texts")
    return _Found(os.path.abspath(path), named, found, [])


def _hub(spec: str, config: FinetuneConfig, named: str) -> _Found:
    loaded = hub_splits(spec, named)
    text_columns, label_column = _columns(config)
    if "train" not in loaded:
        raise UserError(f"{named}: no train split; it has {', '.join(loaded)}; give its files with file:PATH")
    held_out, found = None, {}
    for split in ("test", "validation"):  # some test splits are published without their labels, as -1
        if split in loaded and (
            label_column not in loaded[split].column_names or any(label != -1 for label in loaded[split][label_column])
        ):
            held_out = split
            break
    for split in ("train", held_out) if held_out else ("train",):
        require_columns([*text_columns, label_column], loaded[split].column_names, named)
        columns = [loaded[split][column] for column in text_columns]
        texts = texts_of(zip(*columns, strict=True), named)
        found[split] = list(zip(texts, loaded[split][label_column], strict=True))
    names = getattr(loaded["train"].features[label_column], "names", None)
    return _Found(f"hf:{spec}", named, found["train"], found.get(held_out, []), names)


def _digest(labels: Sequence[str], *splits: Sequence[Example]) -> str:
    digest = hashlib.sha256("\0".join(labels).encode())
    for split in splits:
        digest.update(f"\0\0{len(split)}".encode())
        for text, label in split:
            data = text.encode("utf-8", "surrogatepass")
            digest.update(f"\0{label} {len(data)} ".encode() + data)
    return digest.hexdigest()
