"""Datasets by name: what `--dataset`, `--tokenizer` and the limits of a configuration mean, in terms of `data.py`.

Files are looked for in the folders that `jaxgpt` searches; nothing is downloaded. Axes: N tokens.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from jaxgpt.config import DataConfig, FinetuneConfig, UserError
from torch_ref import data

CHECKOUT = Path(__file__).resolve().parents[1]


class Tokenizer(NamedTuple):
    """Text to tokens and back. `encode` raises `KeyError` for a character that the vocabulary lacks."""

    vocab_size: int
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    end_of_text: int | None = None


def load_corpus(config: DataConfig, data_dir: Path | None) -> tuple[Tokenizer, Tensor, Tensor]:
    """A language model's tokenizer and the tokens of train and validation, int64 [N] each.

    A corpus is one text (tinyshakespeare, file:PATH), of which the first 90 % train, or two files with a document in
    each line (wikitext-2, wikitext-103). Raises `UserError` for a dataset that is not there or cannot be read.
    """
    named = f"--dataset {config.dataset}"
    _require_folder(data_dir)
    with reading(named):
        if config.dataset in ("wikitext-2", "wikitext-103"):
            documents = [data.read_lines(path) for path in wikitext_files(config.dataset, data_dir)]
            text = "".join(line for lines in documents for line in lines)
        else:
            documents = []
            text = text_file(config.dataset, data_dir).read_bytes().decode("utf-8")
    if not documents:
        for limit in ("min_chars", "max_train_texts", "max_val_texts"):
            if value := getattr(config, limit):
                flag = "--" + limit.replace("_", "-")
                raise UserError(f"{flag} {value}: {named} is a single text; give {flag} 0")

    tokenizer = make_tokenizer(config.tokenizer, text, data_dir)
    if documents:
        train_N, val_N = (
            data.document_tokens(lines, tokenizer.encode, tokenizer.end_of_text, config.min_chars, max_texts)
            for lines, max_texts in zip(documents, (config.max_train_texts, config.max_val_texts), strict=True)
        )
    elif config.tokenizer == "char":
        _, train_N, val_N = data.char_tokens(text)
    else:
        train_N, val_N = data.train_val_split(torch.tensor(tokenizer.encode(text)))
    return tokenizer, train_N, val_N[: config.max_val_tokens or None]


def make_tokenizer(kind: str, text: str, data_dir: Path | None) -> Tokenizer:
    """The tokenizer that `--tokenizer` names; `char` takes its vocabulary from the text."""
    if kind == "char":
        vocabulary = sorted(set(text))
        index = {char: i for i, char in enumerate(vocabulary)}
        return Tokenizer(
            vocab_size=len(vocabulary),
            encode=lambda text: [index[char] for char in text],
            decode=lambda ids: "".join(vocabulary[i] for i in ids),
        )
    if kind == "byte":
        return Tokenizer(256, lambda text: list(text.encode()), lambda ids: bytes(ids).decode(errors="replace"))
    if kind == "gpt2":
        encoding = data.gpt2_encoding(gpt2_folder(data_dir))
        return Tokenizer(encoding.n_vocab, encoding.encode_ordinary, encoding.decode, encoding.eot_token)
    raise UserError(f"--tokenizer {kind}: unknown to the reference; choose of char, byte, gpt2")


def load_examples(
    config: FinetuneConfig, data_dir: Path | None
) -> tuple[list[str], list[data.Example], list[data.Example]]:
    """A classifier's classes by name, and its training and test texts. Raises `UserError` as `load_corpus` does.

    `ag_news` is looked for as released; file:PATH is a table with named columns, of which a fifth tests unless
    `--test-dataset` names another.
    """
    spec, test_spec = config.dataset, config.test_dataset
    named, test = f"--dataset {spec}", []
    _require_folder(data_dir)
    with reading(named):
        if spec == "ag_news":
            if config.text_column or config.label_column or test_spec:
                raise UserError(f"{named}: read as released; leave out --text-column, --label-column, --test-dataset")
            classes = ["World", "Sports", "Business", "Sci/Tech"]
            path = find(["ag_news/test.csv", "ag_news/test.parquet"], named, data_dir)
            train = data.ag_news(path)
            if (train_path := path.with_stem("train")).exists():
                train, test = data.ag_news(train_path), train
        elif spec.startswith("file:"):
            rows = labeled_rows(spec, config)
            labels = {label for _, label in rows}
            numbers = all(label.removeprefix("-").isdecimal() for label in labels)
            classes = sorted(labels, key=int if numbers else None)
            train = [(text, classes.index(label)) for text, label in rows]
        else:
            raise UserError(f"{named}: unknown to the reference; choose of ag_news, file:PATH")
    if test_spec:
        with reading(f"--test-dataset {test_spec}"):
            index = {name: i for i, name in enumerate(classes)}
            test = [(text, index.get(label, -1)) for text, label in labeled_rows(test_spec, config)]
    if not test:
        train, test = data.holdout_split(train)
        print(f"{spec}: no test split; {len(test):,} of its texts are held out as the test split")
    if len(classes) < 2 or not train or not test:
        raise UserError(f"{named}: {len(classes)} classes, {len(train)} training and {len(test)} test texts; give more")
    for text, label in train + test:
        if not text.strip() or not 0 <= label < len(classes):
            raise UserError(f"{named}: {text!r:.40} is empty, or of none of the classes {', '.join(classes)}; mend it")
    if config.train_samples > len(train):
        raise UserError(f"--train-samples {config.train_samples}: there are {len(train)} training texts; give fewer")
    return classes, train, test


def labeled_rows(spec: str, config: FinetuneConfig) -> list[tuple[str, str]]:
    """The text and the label of each row of file:PATH; several columns of texts are joined by spaces."""
    text_columns, label_column = (config.text_column or "text").split(","), config.label_column or "label"
    rows = data.read_rows(Path(spec.removeprefix("file:")).expanduser())
    if any(row[label_column] in (None, "") for row in rows):
        raise ValueError("a row without a label")
    return [(" ".join(row[column] or "" for column in text_columns), str(row[label_column]).strip()) for row in rows]


def few_shot(examples: Sequence[data.Example], n_samples: int, seed: int) -> list[data.Example]:
    """So many examples, drawn by the seed, in their old order (0: all)."""
    if not n_samples:
        return list(examples)
    drawn = np.random.Generator(np.random.Philox(seed)).random(len(examples)).argsort(kind="stable")[:n_samples]
    return [examples[i] for i in sorted(drawn)]


# ---------------------------------------------------------------------------------------------------- where files are


def text_file(spec: str, data_dir: Path | None) -> Path:
    """The file of a dataset that is one text."""
    if spec == "tinyshakespeare":
        return find(["tinyshakespeare/input.txt"], f"--dataset {spec}", data_dir)
    if spec.startswith("file:"):
        return Path(spec.removeprefix("file:")).expanduser()
    names = "tinyshakespeare, wikitext-2, wikitext-103, file:PATH"
    raise UserError(f"--dataset {spec}: unknown to the reference; choose of {names}")


def wikitext_files(name: str, data_dir: Path | None) -> list[Path]:
    """The files to train and to validate on: the first two that there are of train, validation and test."""
    for folder in data_folders(data_dir):
        there = []
        for split in ("train", "valid", "test"):
            paths = [folder / name / file for file in (f"{split}.txt", f"wiki.{split}.raw", f"wiki.{split}.tokens")]
            there += [path for path in paths if path.is_file()][:1]
        if len(there) >= 2:
            if "train" not in there[0].name:
                where = os.path.abspath(folder / name)
                print(f"{where}: no train split; {there[0].name} trains, {there[1].name} validates")
            return there[:2]
    return [find([f"{name}/{split}.txt"], f"--dataset {name}", data_dir) for split in ("train", "valid")]


def gpt2_folder(data_dir: Path | None) -> Path:
    """The folder with GPT-2's vocabulary in tiktoken's two files: TIKTOKEN_CACHE_DIR, or tiktoken/ of a data folder."""
    files = "6d1cbeee0f20b3d9449abfede4726ed8212e3aee", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"
    own = os.environ.get("TIKTOKEN_CACHE_DIR")
    folders = [Path(own)] if own else []
    folders += [folder / "tiktoken" for folder in data_folders(data_dir)]
    for folder in folders:
        if all((folder / file).is_file() for file in files):
            return folder
    raise UserError(_not_found("--tokenizer gpt2", " and ".join(files), folders))


def find(files: Iterable[str], named: str, data_dir: Path | None) -> Path:
    """The first of the files that a data folder has. Raises `UserError` that says where to put it."""
    folders = data_folders(data_dir)
    for folder in folders:
        for file in files:
            if (folder / file).is_file():
                return folder / file
    raise UserError(_not_found(named, " or ".join(files), folders))


def _not_found(named: str, files: str, folders: Iterable[Path]) -> str:
    looked = ", ".join(map(os.path.abspath, folders))
    return f"{named}: {files} in none of {looked}; put it into one of them, or give --data-dir"


def data_folders(data_dir: Path | None) -> list[Path]:
    """Where data is looked for, in order; the last is where `jaxgpt` keeps its downloads."""
    given = [data_dir, os.environ.get("JAXGPT_DATA_DIR")]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxgpt"
    near = [Path("data"), CHECKOUT / "data", Path("../shared/data"), CHECKOUT / "../shared/data", cache / "data"]
    folders = [*(Path(folder) for folder in given if folder), *near]
    return list({os.path.abspath(folder): folder for folder in folders}.values())


def _require_folder(data_dir: Path | None) -> None:
    if data_dir and not data_dir.is_dir():
        raise UserError(f"--data-dir {data_dir}: no such folder; create it or leave the flag out")


@contextmanager
def reading(named: str) -> Iterator[None]:
    """Reports what is wrong with a file as a `UserError` that begins with its flag."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{named}: no such file; check the path") from None
    except OSError as e:
        raise UserError(f"{named}: cannot be read ({e.strerror}); give a readable file") from None
    except UnicodeDecodeError as e:
        raise UserError(
            f"{named}: not UTF-8 text (byte {e.start}); convert it, for instance with iconv -t UTF-8"
        ) from e
    except KeyError as e:
        raise UserError(f"{named}: no column {e}; give --text-column and --label-column") from None
    except (TypeError, ValueError) as e:
        raise UserError(f"{named}: cannot be read as its name says ({e}); mend it") from None
