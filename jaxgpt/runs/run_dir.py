"""A run's folder: its files, and how a run is begun, resumed and opened. All files are JSON, text, images or orbax's.

config.json, tokenizer.json, data.json, metrics.jsonl, steps.csv, summary.json, sample.txt, learning_curves.png,
checkpoints/; on demand diagnostics.jsonl, samples.jsonl, attention.gif, attention/, inspect/.
"""

import contextlib
import csv
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from jaxgpt import config as configs
from jaxgpt.config import FinetuneConfig, TrainConfig
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.data.corpora import Corpus
from jaxgpt.data.files import atomic_replace
from jaxgpt.data.labeled import LabeledTexts
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError, flag

WRITTEN_FILES = (
    "config.json",
    "tokenizer.json",
    "data.json",
    "metrics.jsonl",
    "steps.csv",
    "summary.json",
    "sample.txt",
    "learning_curves.png",
    "confusion.png",
    "diagnostics.jsonl",
    "samples.jsonl",
    "attention.gif",
)
RECORDS = ("metrics.jsonl", "diagnostics.jsonl", "samples.jsonl")  # each line is a JSON object with a "step"
FOLDERS = {  # and the names of the files in them
    "checkpoints": re.compile(r"\d+(\..*)?"),
    "attention": re.compile(r"\d{8}\.npy(\.partial)?"),
    "inspect": re.compile(r"(gradients|attention|surprise)\.png(\.partial)?"),
}
OWN_NAMES = {*WRITTEN_FILES, *(name + ".partial" for name in WRITTEN_FILES), *FOLDERS, ".lock"}
STEP_FIELDS = ("step", "train_loss", "grad_norm", "lr")


@dataclass(frozen=True)
class RunDir:
    """A run on disk: its folder, its configuration, its tokenizer, and the digest of its training text."""

    path: Path
    config: Any  # TrainConfig, or a classifier's FinetuneConfig
    tokenizer: Tokenizer
    data_sha256: str
    source: str = ""  # where the training text was read from
    labels: tuple[str, ...] = ()  # a classifier's classes
    lock: filelock.BaseFileLock | None = field(default=None, compare=False, repr=False)  # of a run that trains here

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def result(self) -> str:
        """Which checkpoint is the run's result: "best" if the run stopped early, else "last"."""
        try:
            summary = json.loads((self.path / "summary.json").read_text())
        except (OSError, ValueError):  # still training, or the file is damaged
            return "last"
        return "best" if "stopped_early" in summary else "last"

    @property
    def data_dir(self) -> Path | None:
        """The data folder that the training text was read from, if it still exists."""
        folder = Path(self.source).parent.parent
        return folder if Path(self.source).is_absolute() and folder.is_dir() else None

    def complete(self) -> None:
        """Writes config.json, after all else: the folder is a run once it is there."""
        write_json(self.path / "config.json", configs.to_json(self.config))

    def discard(self) -> None:
        """Removes the files of a run that could not make its first step."""
        _remove_run(self.path)

    def close(self) -> None:
        """Releases the folder: another process may train there. (The system releases it when the process ends.)"""
        if self.lock is not None:
            self.lock.release()

    def read_metrics(self) -> list[dict[str, Any]]:
        """The reports so far: one dictionary per line of metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def read_steps(self) -> list[tuple[int, float, float, float]]:
        """The rows of steps.csv, one per update: step, training loss (nats), gradient norm, learning rate."""
        path = self.path / "steps.csv"
        if not path.exists():
            return []
        with path.open(newline="") as f:
            rows = list(csv.reader(f))[1:]
        return [(int(step), float(loss), float(norm), float(lr)) for step, loss, norm, lr in rows]

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Appends a line to one of RECORDS; `record` holds the "step"."""
        assert name in RECORDS and "step" in record
        with (self.path / name).open("a") as f:
            f.write(json.dumps(record) + "\n")

    def append_steps(self, rows: list[tuple[int, float, float, float]]) -> None:
        """Appends rows of (step, training loss, gradient norm, learning rate) to steps.csv."""
        path = self.path / "steps.csv"
        with path.open("a", newline="") as f:
            writer = csv.writer(f, lineterminator="\n")
            writer.writerows(rows if f.tell() else [STEP_FIELDS, *rows])

    def save_map(self, step: int, maps_LHTS: np.ndarray) -> None:
        """Writes the attention maps after `step` updates to attention/<step>.npy."""
        folder = self.path / "attention"
        folder.mkdir(exist_ok=True)
        with atomic_replace(folder / f"{step:08}.npy") as partial, partial.open("wb") as f:
            np.save(f, maps_LHTS)

    def read_maps(self) -> list[tuple[int, Path]]:
        """The steps with attention maps, in order, and their files."""
        return [(int(path.stem), path) for path in sorted((self.path / "attention").glob("*.npy"))]

    def flush(self) -> None:
        """Forces the records to the disk, before a checkpoint that relies on them is written."""
        for name in (*RECORDS, "steps.csv"):
            if (self.path / name).exists():
                with (self.path / name).open("a") as f:
                    os.fsync(f.fileno())

    def rewind(self, step: int) -> None:
        """Removes the records after `step` updates: a run killed after its last checkpoint repeats those updates.

        A last line that the kill cut short is removed as well.
        """
        for name in RECORDS:
            _rewrite_lines(self.path / name, lambda line: json.loads(line)["step"] < step)
        header = ",".join(STEP_FIELDS)
        _rewrite_lines(
            self.path / "steps.csv",
            lambda line: line == header or (line.count(",") == 3 and int(line.split(",")[0]) < step),
        )


def create(
    path: Path,
    config: TrainConfig | FinetuneConfig,
    tokenizer: Tokenizer,
    corpus: Corpus | LabeledTexts,
    overwrite: bool,
    complete: bool = True,
    labels: tuple[str, ...] = (),
    base: dict[str, Any] | None = None,
) -> RunDir:
    """Begins a run in a new or empty folder, or opens the run in the folder if it is the same one.

    The folder is locked until `RunDir.close` or the end of the process.

    Args:
        overwrite: replace a run that is there.
        complete: make a new folder a run at once. If not, the caller puts more files there first, and then calls
            `RunDir.complete`.
        labels, base: a classifier's classes, and the weights that it starts from: "run", "step" and "sha256".

    Raises:
        UserError: the folder cannot be written, holds other files, a run of another configuration, data, vocabulary
            or base, or a run that another process is training.
    """
    run = RunDir(path, config, tokenizer, corpus.sha256, corpus.source, labels)
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"--out-dir {str(path)!r}: not valid UTF-8; choose another name") from None
    try:
        begun = (path / "config.json").exists()
        if begun and not overwrite:
            _require_same(run, base)
        elif not begun and path.is_dir() and _holds_others(path):
            raise UserError(f"--out-dir {path}: holds files that are no run; choose an empty or new folder")
        path.mkdir(parents=True, exist_ok=True)
        run = replace(run, lock=_lock(path))
        try:
            _write_new_files(run, corpus, begun, overwrite, complete, base)
        except BaseException:
            run.close()
            raise
    except OSError as e:
        raise UserError(f"--out-dir {path}: cannot be written ({e.strerror}); choose a writable folder") from None
    return run


def _write_new_files(
    run: RunDir,
    corpus: Corpus | LabeledTexts,
    begun: bool,
    overwrite: bool,
    complete: bool,
    base: dict[str, Any] | None,
) -> None:
    """Writes tokenizer.json, and the other files of a new run; `begun`: whether a run was there before the lock."""
    path = run.path
    if not begun and (path / "config.json").exists():
        raise UserError(f"--out-dir {path}: another process has just begun a run here; start again to resume it")
    fresh = not begun or overwrite
    if fresh:
        _remove_run(path)
    write_json(path / "tokenizer.json", run.tokenizer.to_json())  # when resuming too: it may have been damaged
    if fresh:
        data = {"dataset": corpus.name, "sha256": corpus.sha256, "source": corpus.source}
        of_classifier = {"labels": list(run.labels), "base": base} if run.labels else {}
        write_json(path / "data.json", data | of_classifier)
        if complete:
            run.complete()


def default_run_dir(dataset: str, kind: str) -> Path:
    """runs/<dataset>-<kind>-<time>: the folder of a new run, one that does not exist yet."""
    dataset = re.sub(r"[^\w.-]+", "_", Path(dataset).stem if "/" in dataset else dataset)
    stem = Path("runs") / f"{dataset}-{kind}-{datetime.now():%Y%m%d-%H%M%S}"
    for number in range(1000):
        path = stem if not number else stem.with_name(f"{stem.name}-{number}")
        if not os.path.lexists(path):
            return path
    raise UserError(f"--out-dir: {stem} and a thousand others exist; name one")


def open_run(path: Path) -> RunDir:
    """The run in a folder. Raises `UserError` if there is none."""
    with _readable(f"RUN {path}", "give another folder"):
        config, data = _read_config(path, f"RUN {path}")
        tokenizer, labels = tokenizers.load(path / "tokenizer.json"), tuple(data.get("labels", ()))
        return RunDir(path, config, tokenizer, data["sha256"], data["source"], labels)


def _read_config(path: Path, flag_and_path: str) -> tuple[TrainConfig | FinetuneConfig, dict[str, Any]]:
    if not os.path.isfile(path / "config.json"):  # unlike Path.is_file, no error for a name too long
        raise UserError(f"{flag_and_path}: no run here (no config.json); give a folder that jaxgpt train has written")
    config = configs.from_json(json.loads((path / "config.json").read_text(encoding="utf-8")))
    return config, json.loads((path / "data.json").read_text(encoding="utf-8"))


@contextlib.contextmanager
def _readable(flag_and_path: str, remedy: str) -> Iterator[None]:
    """Reports what reading damaged files raises as a `UserError`."""
    try:
        yield
    except UserError as e:
        raise e if str(e).startswith(flag_and_path) else UserError(f"{flag_and_path}: {e}; {remedy}") from None
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"{flag_and_path}: not readable as a run ({type(e).__name__}: {e}); {remedy}") from None


def own_tokenizer(path: Path | None, config: TrainConfig) -> Tokenizer | None:
    """The trained byte pairs of the run in a folder, if there is one.

    A resumed run keeps them: byte pairs trained again, by another version of the library, may differ.
    """
    if path is None or not config.tokenizer.startswith("bpe:"):
        return None
    try:
        there = json.loads((path / "config.json").read_text(encoding="utf-8"))["tokenizer"]
    except (OSError, KeyError, TypeError, ValueError):
        return None
    return _loadable_tokenizer(path) if there == config.tokenizer else None


def _loadable_tokenizer(path: Path) -> Tokenizer | None:
    """The tokenizer of the run in a folder, or None if its file is damaged; a resumed run writes the file again."""
    try:
        return tokenizers.load(path / "tokenizer.json")
    except (OSError, UserError, AttributeError, KeyError, TypeError, ValueError):
        return None


def recorded_choice(path: Path | None, spec: str) -> str:
    """The one of the datasets in `spec` ("a,b") that the run in a folder was begun with; else `spec` unchanged.

    `--dataset a,b` so resumes a run that was begun with b because a could not be had.
    """
    try:
        recorded = json.loads((path / "data.json").read_text(encoding="utf-8"))["dataset"] if path else None
    except (OSError, KeyError, TypeError, ValueError):
        return spec
    return recorded if recorded in [name.strip() for name in spec.split(",")] else spec


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes the file completely or not at all."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes the file completely or not at all."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8", newline="") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)  # the new name itself is not on the disk before its folder is
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _require_same(run: RunDir, base: dict[str, Any] | None) -> None:
    with _readable(f"--out-dir {run.path}", "choose another folder, or --overwrite to start again"):
        there, data = _read_config(run.path, f"--out-dir {run.path}")
        same_data = data["sha256"] == run.data_sha256
    fields = configs.differences(there, run.config)
    different = [f"{flag(name)} {old} there, {new} here" for name, old, new in fields]
    if not different and not same_data:
        different = [f"--dataset {run.config.dataset} with another text"]
    if not different and base and data.get("base", {}).get("sha256") != base["sha256"]:
        different = [f"other weights to start from than those of {base['run']} after {base['step']} steps"]
    if not different and (own := _loadable_tokenizer(run.path)) and not tokenizers.same(own, run.tokenizer):
        different = ["another vocabulary"]
    if different:
        raise UserError(
            f"--out-dir {run.path}: holds a run of another configuration ({'; '.join(different)}); "
            "choose another folder, or --overwrite to start again"
        )


def _lock(path: Path) -> filelock.BaseFileLock:
    """Locks the folder for this process. Raises `UserError` if another process holds it."""
    lock = filelock.FileLock(path / ".lock", thread_local=False)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise UserError(
            f"--out-dir {path}: another process is training here; wait for it, or choose another folder"
        ) from None
    return lock


def _remove_run(path: Path) -> None:
    """Removes the files that a run writes: config.json first, so that what an interruption leaves is no run."""
    for name in WRITTEN_FILES:
        (path / name).unlink(missing_ok=True)
    for name, own in FOLDERS.items():
        for file in (path / name).iterdir() if (path / name).is_dir() else ():
            if own.fullmatch(file.name):
                shutil.rmtree(file) if file.is_dir() else file.unlink()
        with contextlib.suppress(OSError):  # no such folder, or one that holds other files
            (path / name).rmdir()


def _holds_others(path: Path) -> bool:
    """Whether a folder holds files that no run writes."""
    for entry in path.iterdir():
        own = FOLDERS.get(entry.name)
        if entry.name not in OWN_NAMES or (
            own and not (entry.is_dir() and all(own.fullmatch(file.name) for file in entry.iterdir()))
        ):
            return True
    return False


def _rewrite_lines(path: Path, keep: Callable[[str], bool]) -> None:
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        write_text(path, "".join(line for line in lines if line.endswith("\n") and _keeps(keep, line.rstrip("\n"))))


def _keeps(keep: Callable[[str], bool], line: str) -> bool:
    """Whether to keep a line. A damaged line, which `keep` cannot read, is not kept."""
    try:
        return keep(line)
    except (ValueError, KeyError, TypeError):
        return False
