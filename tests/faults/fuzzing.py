"""Fuzzing of every reader of files that come from elsewhere: valid files with random damage, and JSON of other shapes.

A reader takes a folder of files and returns their content, or raises a `UserError`. Nothing else may happen: no other
exception, no hang, no memory beyond a bound. Files that are kept with a digest, such as those of the token cache and
of a finished run, may also not be read as anything else than what was written.
"""

import contextlib
import copy
import dataclasses
import functools
import io
import json
import os
import resource
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxgpt.config import FinetuneConfig, ModelConfig, TrainConfig
from jaxgpt.errors import UserError
from tests.faults.bad_inputs import time_limit

SECONDS = 20  # for one reading, on a machine that does other things as well
EXTRA_BYTES = 2**31  # of address space, above what the process has

# --------------------------------------------------------------------------------------------------------- the damage

FRAGMENTS = [
    *(
        b"\0" * 8,
        b"\xff" * 8,
        b"\xed\xa0\x80",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\x1a",
        b"\r",
        b"\n",
        b"\n\n",
        b"\xe2\x80\xa8",
    ),
    *(b",", b'"', b"'", b"\\", b"\\ud800", b"{", b"}", b"[", b"]", b'{"step":', b"-", b"0", b"9" * 5000, b"1e999"),
    *(b"NaN", b"Infinity", b"null", b"true", b"1_0", "٣".encode(), b"PAR1", b"[" * 100_000, b'{"a":' * 20_000),
    *(b"\x80\x02c__builtin__\nexit\n", b"step,train_loss,grad_norm,lr\n", b"x" * 100_000),
]
NESTED = "a place for nested brackets"  # json.dumps itself has no more than a thousand levels
VALUES = [
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e300, 2**31, 2**63, 2**64, 10**400, float("nan"), float("inf")),
    *("", "x", "\0", "\ud800", "٣", "1", "../..", "/dev/zero", "x" * 5000, [], {}, [[]], {"a": 1}, [None], NESTED),
]


@st.composite
def damaged_bytes(draw: st.DrawFn, valid: bytes) -> bytes:
    """A file's bytes after one to four changes."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        n = draw(st.integers(1, max(1, len(content) // 2)))
        match draw(st.sampled_from(["flip", "insert", "cut", "double", "end", "overwrite", "empty"])):
            case "flip" if at < len(content):
                content[at] ^= 1 << draw(st.integers(0, 7))
            case "insert":
                content[at:at] = draw(st.sampled_from(FRAGMENTS) | st.binary(min_size=1, max_size=20))
            case "overwrite":
                fragment = draw(st.sampled_from(FRAGMENTS) | st.binary(min_size=1, max_size=20))
                content[at : at + len(fragment)] = fragment
            case "cut":
                del content[at : at + n]
            case "double":
                content[at:at] = content[at : at + n]
            case "end":
                del content[at:]
            case "empty" if draw(st.integers(0, 9)) == 0:
                content.clear()
    return bytes(content)


@st.composite
def damaged_json(draw: st.DrawFn, valid: bytes) -> bytes:
    """JSON, or a line of JSON Lines, with one to three values replaced, removed, renamed or doubled."""
    lines = valid.decode().splitlines() if valid.count(b"\n{") else [valid.decode()]
    at = draw(st.integers(0, len(lines) - 1))
    value = [json.loads(lines[at])]
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(value))
        container, key = draw(st.sampled_from(places))
        # Some library makes the processor flush subnormal numbers to 0; hypothesis then refuses to draw them.
        floats = st.floats(allow_subnormal=False)
        new = copy.deepcopy(draw(st.sampled_from(VALUES) | st.integers() | floats | st.text(max_size=20)))
        match draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "wrap"])):
            case "replace":
                container[key] = new
            case "remove" if container is not value:
                del container[key]
            case "rename" if isinstance(container, dict):
                container[draw(st.text(max_size=5))] = container.pop(key)
            case "wrap":
                container[key] = draw(st.sampled_from([[container[key]], {"a": container[key]}, str(container[key])]))
    text = json.dumps(value[0]).replace(f'"{NESTED}"', "[" * 50_000 + "]" * 50_000)
    return "\n".join([*lines[:at], text, *lines[at + 1 :]]).encode() + b"\n"


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in nested lists and dictionaries: the container and the key."""
    for key in range(len(value)) if isinstance(value, list) else list(value):
        yield value, key
        if isinstance(value[key], list | dict):
            yield from _places(value[key])


@st.composite
def damaged_files(draw: st.DrawFn, files: dict[str, bytes]) -> dict[str, bytes]:
    """The files of a folder, one of them damaged or missing."""
    name = draw(st.sampled_from(sorted(files)))
    kinds = [damaged_bytes(files[name])]
    if name.endswith((".json", ".jsonl")) and files[name].strip():
        kinds = [*kinds, damaged_json(files[name]), damaged_json(files[name])]
    if draw(st.integers(0, 29)) == 0 and len(files) > 1:
        return {other: content for other, content in files.items() if other != name}
    return {**files, name: draw(st.one_of(kinds))}


# -------------------------------------------------------------------------------------------------------- the readers


@dataclass(frozen=True)
class Reader:
    """A reader of the files in a folder.

    Args:
        make: puts valid files into an empty folder.
        read: returns their content, or raises a `UserError`.
        damages: which of the files to damage, by the end of their names.
        digests: the files are kept with digests, so that all that is read is as it was written.
    """

    name: str
    make: Callable[[Path], object]
    read: Callable[[Path], Any]
    damages: str = ""
    digests: bool = False


WORDS = "all is good hére. \U0001f600 "
ROWS = [("la la ti", "north"), ("mo, ru", "south"), ('ha "ha" la', "east")] * 4
MODEL = ModelConfig(n_layer=1, n_head=1, n_embd=4, block_size=4)
LANGUAGE = TrainConfig(batch_size=2, steps=1, model=MODEL)


def _silent(line: str) -> None:
    pass


def _make_table(suffix: str) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        import csv

        import pyarrow
        from pyarrow import parquet

        path = folder / f"rows{suffix}"
        if suffix == ".csv":
            with path.open("w", newline="", encoding="utf-8") as f:
                csv.writer(f).writerows([("text", "label"), *ROWS])
        elif suffix == ".jsonl":
            path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in ROWS))
        else:
            texts, labels = map(list, zip(*ROWS, strict=True))
            parquet.write_table(pyarrow.table({"text": texts, "label": labels}), path)

    return make


def _read_corpus(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        from jaxgpt.data.corpora import load_corpus

        corpus = load_corpus(name.format(folder), folder, _silent)
        return corpus.sha256, [text for texts in corpus.splits.values() for text in texts()]

    return read


def _read_labeled(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        from jaxgpt.data.labeled import load_labeled

        data = load_labeled(FinetuneConfig(dataset=name.format(folder)), folder, _silent)
        return data.labels, list(data.train), list(data.test)

    return read


def _make_ag_news(folder: Path) -> None:
    (folder / "ag_news").mkdir()
    rows = "".join(f'"{1 + n % 4}","Title {n}","Words ""and"" more, {n}"\n' for n in range(12))
    for name in ("train.csv", "test.csv"):
        (folder / "ag_news" / name).write_text(rows)
    (folder / "ag_news" / "classes.txt").write_text("World\nSports\nBusiness\nSci/Tech\n")


def _make_lines(folder: Path) -> None:
    (folder / "wikitext-2").mkdir()
    for name in ("train.txt", "valid.txt"):
        (folder / "wikitext-2" / name).write_text(f" = Title = \n\n {WORDS}\n" * 5, encoding="utf-8")


def _make_token_files(folder: Path) -> None:
    for name in ("train.bin", "val.bin"):
        (folder / name).write_bytes(np.frombuffer(WORDS.encode() * 5, np.uint8).astype("<u2").tobytes())


def _read_token_files(folder: Path) -> Any:
    from jaxgpt.data.corpora import load_corpus
    from jaxgpt.data.token_cache import tokenize_corpus

    corpus = load_corpus(f"bin:{folder}", None, _silent)
    _, data = tokenize_corpus(dataclasses.replace(LANGUAGE, tokenizer="byte"), corpus)
    assert max(data.train_N.max(), data.val_N.max()) < 256
    return data.train_N.tolist(), data.val_N.tolist()


def _make_shards(folder: Path) -> None:
    """llm.c's files."""
    for name in ("x_train_000000.bin", "x_train_000001.bin", "x_val_000000.bin"):
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, 200
        (folder / name).write_bytes(header.tobytes() + np.arange(200, dtype="<u2").tobytes())


def _read_shards(folder: Path) -> Any:
    from jaxgpt.data.corpora import load_corpus
    from jaxgpt.data.token_cache import tokenize_corpus

    corpus = load_corpus(f"bin:{folder}", None, _silent)
    _, data = tokenize_corpus(dataclasses.replace(LANGUAGE, tokenizer="byte", packing="chunks"), corpus)
    shards = data.train_N.read(((0, file) for file in range(data.train_N.n_files)), 0)
    tokens = [data.val_N, *(shard.tokens_N for shard in shards)]
    assert max(tokens_N.max(initial=0) for tokens_N in tokens) < 256
    return [tokens_N.tolist() for tokens_N in tokens]


@functools.cache
def _params() -> dict[str, np.ndarray]:
    """Parameters of the small model, all 0.5."""
    import jax

    from jaxgpt.model import gpt

    shapes = jax.eval_shape(lambda: gpt.init_params(jax.random.key(0), MODEL, 12, gpt.Numerics()))
    return {name: np.full(p.shape, 0.5, p.dtype) for name, p in shapes.items()}


@functools.cache
def _opt_state() -> Any:
    """The shapes of its optimizer state."""
    import jax

    from jaxgpt import optimizer

    return jax.eval_shape(optimizer.make_optimizer(LANGUAGE).init, _params())


def _make_weights(folder: Path) -> None:
    import jax
    import safetensors.numpy

    from jaxgpt.interop import torch_names

    params = _params()
    opt_state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), _opt_state())
    for name, tensors in (
        ("weights", torch_names.to_torch(params)),
        ("optimizer", torch_names.optimizer_to_torch(opt_state)),
    ):
        contiguous = {name: np.array(p, order="C") for name, p in tensors.items()}
        safetensors.numpy.save_file(contiguous, folder / f"{name}.safetensors", {"format": "pt"})


def _read_weights(folder: Path) -> Any:
    import jax

    from jaxgpt.interop import safetensors, torch_names

    params = _params()
    tensors = safetensors.read(folder / "weights.safetensors", "--weights")
    weights = torch_names.from_torch(torch_names.tutorial_names(tensors), params)
    tensors = safetensors.read(folder / "optimizer.safetensors", "--optimizer-state")
    opt_state = torch_names.optimizer_from_torch(tensors, _opt_state())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((weights, opt_state)))
    return {name: p.tolist() for name, p in weights.items()}


def _make_run(folder: Path) -> None:
    """A finished language model's run without checkpoints."""
    from jaxgpt.data.corpora import corpus_from_text
    from jaxgpt.data.tokenizer import CharTokenizer
    from jaxgpt.runs import files, run_dir

    run = run_dir.create(
        folder / "run", LANGUAGE, CharTokenizer.from_text(WORDS), corpus_from_text("pydoc", WORDS, "here"), False
    )
    with contextlib.closing(run):
        run.append_steps([(step, 2.5 - step / 10, 1.0, 3e-4) for step in range(4)])
        for step in (1, 3):
            run.append("metrics.jsonl", {"step": step, "train_loss": 2.0, "val_loss": 2.25, "elapsed_s": 1.5})
        files.write_json(run.path / "summary.json", {"steps": 4, "val_loss": 2.25})
        run.finish(4)
    (folder / "run" / ".lock").unlink()


def _read_run(folder: Path) -> Any:
    """What is taken from a run before its checkpoint is read."""
    from jaxgpt.data.tokenizer import identity
    from jaxgpt.runs import run_dir
    from jaxgpt.runs.status import run_status

    run_status(folder / "run")
    run_dir.recorded_choice(folder / "run", "pydoc")
    run_dir.own_tokenizer(folder / "run", dataclasses.replace(LANGUAGE, tokenizer="bpe:300"))
    run = run_dir.open_run(folder / "run")
    run.read_manifest()
    return run.config, identity(run.tokenizer.to_json()), run.data_sha256, run.labels


def _read_records(folder: Path) -> Any:
    from jaxgpt.data.tokenizer import CharTokenizer
    from jaxgpt.runs.run_dir import RunDir
    from jaxgpt.runs.status import run_status

    run_status(folder / "run")
    run = RunDir(folder / "run", LANGUAGE, CharTokenizer("a"), "")
    return run.read_steps(), run.read_metrics()


def _rewind_records(folder: Path) -> Any:
    """Resumes a run that was begun before there were manifests: damaged lines are removed."""
    from jaxgpt.data.tokenizer import CharTokenizer
    from jaxgpt.runs.run_dir import RunDir

    run = RunDir(folder / "run", LANGUAGE, CharTokenizer("a"), "")
    run.rewind(2, None)
    assert all(step < 2 for step, *_ in run.read_steps())
    return run.read_metrics()


def _tokenize(folder: Path, tokenizer: str) -> Any:
    """Tokens of a text by way of the caches below the folder."""
    from jaxgpt.data import token_cache
    from jaxgpt.data.corpora import corpus_from_text

    corpus = corpus_from_text("pydoc", WORDS * 20, "here")
    config = dataclasses.replace(LANGUAGE, tokenizer=tokenizer)
    environment = mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(folder)})
    with environment, mock.patch.object(token_cache, "MAX_UNCACHED_TOKENS", 0):
        _, data = token_cache.tokenize_corpus(config, corpus)
    return data.tokenizer.to_json(), data.train_N.tolist(), data.val_N.tolist()


class _Accepted(Exception):
    """The texts that a classifier would have got."""


def _read_stdin(folder: Path) -> Any:
    from jaxgpt.cli import classify
    from jaxgpt.runs import restore
    from jaxgpt.tasks import classification

    def accept(_run: Any, _executor: Any, _state: Any, texts: list[str]) -> None:
        raise _Accepted(texts)

    stdin = io.TextIOWrapper(io.BytesIO((folder / "stdin").read_bytes()), encoding="utf-8")
    try:
        with (
            mock.patch.object(sys, "stdin", stdin),
            mock.patch.object(restore, "restore_classifier", lambda path, which: (None, None, None)),
            mock.patch.object(classification, "classify", accept),
        ):
            classify.main(["RUN"])
    except _Accepted as e:
        (texts,) = e.args
        assert texts and all(text.strip() and "\n" not in text for text in texts)
        return texts
    raise AssertionError("neither refused nor classified")


READERS = (
    Reader("text", lambda folder: (folder / "words.txt").write_text(WORDS * 9), _read_corpus("file:{}/words.txt")),
    Reader("CSV", _make_table(".csv"), _read_corpus("file:{}/rows.csv")),
    Reader("JSON Lines", _make_table(".jsonl"), _read_corpus("file:{}/rows.jsonl")),
    Reader("Parquet", _make_table(".parquet"), _read_corpus("file:{}/rows.parquet")),
    Reader("labeled CSV", _make_table(".csv"), _read_labeled("file:{}/rows.csv")),
    Reader("labeled JSON Lines", _make_table(".jsonl"), _read_labeled("file:{}/rows.jsonl")),
    Reader("labeled Parquet", _make_table(".parquet"), _read_labeled("file:{}/rows.parquet")),
    Reader("AG News", _make_ag_news, _read_labeled("ag_news")),
    Reader("texts by line", _make_lines, _read_corpus("wikitext-2"), damages="train.txt"),
    Reader("token files", _make_token_files, _read_token_files),
    Reader("shards of tokens", _make_shards, _read_shards),
    Reader("weights and optimizer state", _make_weights, _read_weights),
    Reader("run, configuration", _make_run, _read_run, damages="config.json", digests=True),
    Reader("run, vocabulary", _make_run, _read_run, damages="tokenizer.json", digests=True),
    Reader("run, data", _make_run, _read_run, damages="data.json", digests=True),
    Reader("run, manifest", _make_run, _read_run, damages="manifest.json", digests=True),
    Reader("run, summary", _make_run, _read_run, damages="summary.json", digests=True),
    Reader("run, steps", _make_run, _read_records, damages="steps.csv"),
    Reader("run, reports", _make_run, _read_records, damages="metrics.jsonl"),
    Reader("run without manifests, records", _make_run, _rewind_records, damages="steps.csv"),
    Reader("run without manifests, reports", _make_run, _rewind_records, damages="metrics.jsonl"),
    Reader("token cache", lambda f: _tokenize(f, "byte"), lambda f: _tokenize(f, "byte"), digests=True),
    Reader("byte-pair cache", lambda f: _tokenize(f, "bpe:300"), lambda f: _tokenize(f, "bpe:300"), digests=True),
    Reader("standard input", lambda folder: (folder / "stdin").write_text(f"{WORDS}\nmo ru\n"), _read_stdin),
)

# --------------------------------------------------------------------------------------------------------- running it


@contextlib.contextmanager
def memory_limit() -> Iterator[None]:
    """Limits the address space of this process to `EXTRA_BYTES` more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + EXTRA_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def fuzz(reader: Reader, n_examples: int) -> Counter[str]:
    """Reads damaged files, the same ones each time. Returns how many were "told" and how many were "read".

    Raises:
        AssertionError: files with digests were read as something else.
        Exception: what the reader raised, if it is no `UserError`.
    """
    answers: Counter[str] = Counter()
    with TemporaryDirectory() as place:
        folder = Path(place) / "fuzz"

        def put(files: dict[str, bytes]) -> None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for name, content in files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)

        put({})
        reader.make(folder)
        valid = {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
        expected = reader.read(folder)
        damageable = {name: content for name, content in valid.items() if name.endswith(reader.damages)}

        @settings(
            max_examples=n_examples,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(damaged_files(damageable))
        def read_damaged(damaged: dict[str, bytes]) -> None:
            put({name: content for name, content in valid.items() if name not in damageable} | damaged)
            try:
                with time_limit(SECONDS):
                    content = reader.read(folder)
            except UserError:
                answers["told"] += 1
                return
            assert not reader.digests or content == expected, "damaged files were read as something else"
            answers["read"] += 1

        with memory_limit():
            read_damaged()
    return answers
