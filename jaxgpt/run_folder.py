"""A run's folder: what it holds, how it is begun, resumed and opened. Everything in it is JSON, text, PNG or orbax.

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
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt import config as configs
from jaxgpt import tokenizer as tokenizers
from jaxgpt.checks import flag
from jaxgpt.config import FinetuneConfig, TrainConfig
from jaxgpt.data_files import replacing
from jaxgpt.datasets import Corpus
from jaxgpt.errors import UserError
from jaxgpt.labelled import Labelled
from jaxgpt.tokenizer import Tokenizer

try:
    import fcntl
except ImportError:  # not a Unix: two processes in one folder are then not noticed
    fcntl = None

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
RECORDS = ("metrics.jsonl", "diagnostics.jsonl", "samples.jsonl")  # lines with the "step" that they are of
FOLDERS = {  # and what their files are called
    "checkpoints": re.compile(r"\d+(\..*)?"),
    "attention": re.compile(r"\d{8}\.npy(\.partial)?"),
    "inspect": re.compile(r"(gradients|attention|surprise)\.png(\.partial)?"),
}
OWN_NAMES = {*WRITTEN_FILES, *(name + ".partial" for name in WRITTEN_FILES), *FOLDERS, ".lock"}
STEP_FIELDS = ("step", "train_loss", "grad_norm", "lr")


@dataclass(frozen=True)
class RunFolder:
    """A run on disk: where it is, its configuration, its tokenizer, and the digest of the text it was trained on."""

    path: Path
    config: Any  # TrainConfig, or FinetuneConfig of a classifier
    tokenizer: Tokenizer
    data_sha256: str
    source: str = ""  # where that text was
    labels: tuple[str, ...] = ()  # of a classifier
    lock: Any = field(default=None, compare=False, repr=False)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def result(self) -> str:
        """Which checkpoint is the run's result: "last", or, of a run that stopped early, "best"."""
        try:
            summary = json.loads((self.path / "summary.json").read_text())
        except (OSError, ValueError):  # still training, or the file is damaged
            return "last"
        return "best" if "stopped_early" in summary else "last"

    @property
    def data_dir(self) -> Path | None:
        """The data folder that the text came from, if it is still there."""
        folder = Path(self.source).parent.parent
        return folder if Path(self.source).is_absolute() and folder.is_dir() else None

    def complete(self) -> None:
        """Writes config.json, last of all: it is what makes the folder a run."""
        write_json(self.path / "config.json", configs.to_json(self.config))

    def discard(self) -> None:
        """Takes back a run that was begun and could not make its first step."""
        _remove_run(self.path)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The reports so far, a dictionary a line of metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def read_steps(self) -> list[tuple[int, float, float, float]]:
        """Step, train loss, gradient norm and learning rate of every update so far, from steps.csv."""
        path = self.path / "steps.csv"
        if not path.exists():
            return []
        with path.open(newline="") as f:
            rows = list(csv.reader(f))[1:]
        return [(int(step), float(loss), float(norm), float(lr)) for step, loss, norm, lr in rows]

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Adds a line to one of RECORDS."""
        assert name in RECORDS and "step" in record
        with (self.path / name).open("a") as f:
            f.write(json.dumps(record) + "\n")

    def append_steps(self, rows: list[tuple[int, float, float, float]]) -> None:
        path = self.path / "steps.csv"
        with path.open("a", newline="") as f:
            writer = csv.writer(f, lineterminator="\n")
            writer.writerows(rows if f.tell() else [STEP_FIELDS, *rows])

    def save_map(self, step: int, maps_LHTS: np.ndarray) -> None:
        """Keeps the attention maps after `step` updates as attention/<step>.npy."""
        folder = self.path / "attention"
        folder.mkdir(exist_ok=True)
        with replacing(folder / f"{step:08}.npy") as partial, partial.open("wb") as f:
            np.save(f, maps_LHTS)

    def read_maps(self) -> list[tuple[int, Path]]:
        """The steps with attention maps, in order, and their files."""
        return [(int(path.stem), path) for path in sorted((self.path / "attention").glob("*.npy"))]

    def flush(self) -> None:
        """Has the records on the disk itself, before a checkpoint that counts on them."""
        for name in (*RECORDS, "steps.csv"):
            if (self.path / name).exists():
                with (self.path / name).open("a") as f:
                    os.fsync(f.fileno())

    def rewind(self, step: int) -> None:
        """Forgets what was recorded after `step` updates: a run killed after its last checkpoint does them again.

        A last line cut short by the kill belongs to what is forgotten.
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
    corpus: Corpus | Labelled,
    overwrite: bool,
    complete: bool = True,
    labels: tuple[str, ...] = (),
    base: dict[str, Any] | None = None,
) -> RunFolder:
    """Begins a run in a new or empty folder, or opens the run there if it is the same one; this process then holds it.

    Without `complete` a new folder is no run yet: what it needs is put there first, then `RunFolder.complete` called.

    Args:
        labels, base: of a classifier its classes, and the weights it starts from: "run", "step" and "sha256".

    Raises:
        UserError: the folder cannot be written, holds something else, a run of another configuration, data, vocabulary
            or base, or one that another process is training.
    """
    run = RunFolder(path, config, tokenizer, corpus.sha256, corpus.source, labels)
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
        if not begun and (path / "config.json").exists():
            raise UserError(f"--out-dir {path}: another process has just begun a run here; start again to resume it")
        fresh = not begun or overwrite
        if fresh:
            _remove_run(path)
        write_json(path / "tokenizer.json", tokenizer.to_json())  # when resuming too: it may have been damaged
        if fresh:
            data = {"dataset": corpus.name, "sha256": corpus.sha256, "source": corpus.source}
            write_json(path / "data.json", data | ({"labels": list(labels), "base": base} if labels else {}))
            if complete:
                run.complete()
    except OSError as e:
        raise UserError(f"--out-dir {path}: cannot be written ({e.strerror}); choose a writable folder") from None
    return run


def open_run(path: Path) -> RunFolder:
    """The run in a folder. Raises `UserError` if there is none."""
    with _readable(f"RUN {path}", "give another folder"):
        config, data = _read_config(path, f"RUN {path}")
        tokenizer, labels = tokenizers.load(path / "tokenizer.json"), tuple(data.get("labels", ()))
        return RunFolder(path, config, tokenizer, data["sha256"], data["source"], labels)


def _read_config(path: Path, flag_and_path: str) -> tuple[TrainConfig | FinetuneConfig, dict[str, Any]]:
    if not os.path.isfile(path / "config.json"):  # unlike Path.is_file, no error for a name too long
        raise UserError(
            f"{flag_and_path}: no run here (no config.json); give a folder that scripts/train.py has written"
        )
    config = configs.from_json(json.loads((path / "config.json").read_text(encoding="utf-8")))
    return config, json.loads((path / "data.json").read_text(encoding="utf-8"))


@contextlib.contextmanager
def _readable(flag_and_path: str, remedy: str) -> Iterator[None]:
    """Turns what reading damaged files raises into one line."""
    try:
        yield
    except UserError as e:
        raise e if str(e).startswith(flag_and_path) else UserError(f"{flag_and_path}: {e}; {remedy}") from None
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"{flag_and_path}: not readable as a run ({type(e).__name__}: {e}); {remedy}") from None


def own_tokenizer(path: Path | None, config: TrainConfig) -> Tokenizer | None:
    """The byte pairs that the run in a folder was begun with: trained anew, another library version may differ."""
    if path is None or not config.tokenizer.startswith("bpe:"):
        return None
    try:
        there = json.loads((path / "config.json").read_text(encoding="utf-8"))["tokenizer"]
    except (OSError, KeyError, TypeError, ValueError):
        return None
    return _loadable_tokenizer(path) if there == config.tokenizer else None


def _loadable_tokenizer(path: Path) -> Tokenizer | None:
    """The run's own, unless it was damaged: then it is written anew."""
    try:
        return tokenizers.load(path / "tokenizer.json")
    except (OSError, UserError, AttributeError, KeyError, TypeError, ValueError):
        return None


def recorded_choice(path: Path | None, spec: str) -> str:
    """Of a list of datasets the one that the run in a folder was begun with, else the list as it is.

    So that `--dataset a,b` resumes a run begun with b on a machine that could not have a then.
    """
    try:
        recorded = json.loads((path / "data.json").read_text(encoding="utf-8"))["dataset"] if path else None
    except (OSError, KeyError, TypeError, ValueError):
        return spec
    return recorded if recorded in [name.strip() for name in spec.split(",")] else spec


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes whole or not at all."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes whole or not at all."""
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


def _require_same(run: RunFolder, base: dict[str, Any] | None) -> None:
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


def _lock(path: Path) -> Any:
    """Holds the folder until the process ends or the returned file is closed."""
    file = (path / ".lock").open("w")
    if fcntl:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"--out-dir {path}: another process is training here; wait for it, or choose another folder"
            ) from None
    return file


def _remove_run(path: Path) -> None:
    """Removes what a run writes, config.json first so that an interruption leaves no run that looks whole."""
    for name in WRITTEN_FILES:
        (path / name).unlink(missing_ok=True)
    for name, own in FOLDERS.items():
        for file in (path / name).iterdir() if (path / name).is_dir() else ():
            if own.fullmatch(file.name):
                shutil.rmtree(file) if file.is_dir() else file.unlink()
        with contextlib.suppress(OSError):  # not there, or somebody put more into it
            (path / name).rmdir()


def _holds_others(path: Path) -> bool:
    """Whether a folder holds what no run has written."""
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
    """Whether to keep a line; one that cannot be read was damaged, and is not kept."""
    try:
        return keep(line)
    except (ValueError, KeyError, TypeError):
        return False
