"""What a run folder holds, by name, and its classification: new, foreign, resumable, finished or damaged."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxgpt import config as configs
from jaxgpt.config import FinetuneConfig, TrainConfig
from jaxgpt.data.files import PARTIAL
from jaxgpt.errors import UserError
from jaxgpt.runs import files, manifest
from jaxgpt.runs.files import Unreadable
from jaxgpt.runs.manifest import Manifest

FORMAT = 2  # of data.json: 1 had no manifests

RECORDS = ("metrics.jsonl", "diagnostics.jsonl", "samples.jsonl")  # each line is a JSON object with a "step"
RESULTS = ("summary.json", "sample.txt", "learning_curves.png", "confusion.png", "attention.gif")  # made at the end
WRITTEN_FILES = ("config.json", "tokenizer.json", "data.json", manifest.NAME, *RECORDS, "steps.csv", *RESULTS)
FOLDERS = {  # and the names in them
    "checkpoints": re.compile(r"\d+(\..*)?"),
    "attention": re.compile(r"\d{8}\.npy(\.partial)?"),
    "inspect": re.compile(r"(gradients|attention|surprise)\.png(\.partial)?"),
}
LOCK = ".lock"
OWN_NAMES = {*WRITTEN_FILES, *(name + PARTIAL for name in WRITTEN_FILES), *FOLDERS, LOCK}
CHECKPOINT_NAME = re.compile(r"0|[1-9]\d{0,15}")


@dataclass(frozen=True)
class Base:
    """The weights that a run starts from, if they are not random: a run's, or another program's."""

    run: str
    step: int
    sha256: str


@dataclass(frozen=True)
class DataRecord:
    """The content of data.json: what a run is trained on."""

    dataset: str
    sha256: str  # of the text
    source: str  # where it was read from
    labels: tuple[str, ...] = ()  # a classifier's classes
    base: Base | None = None
    format: int = 1  # of the run folder


@dataclass(frozen=True)
class RunStatus:
    """The classification of a folder.

    `foreign`: it holds files that no run writes; `problem` names one. `damaged`: parts of a run that cannot be gone on
    from; `problem` says what is wrong. Of a resumable run, `problem` says what a resumption mends, if anything.
    """

    state: Literal["new", "foreign", "resumable", "finished", "damaged"]
    problem: str = ""


def run_status(path: Path) -> RunStatus:
    """Classifies a folder, which may not exist. Reads the run's small files whole, and its checkpoints not at all.

    Raises:
        OSError: the folder cannot be read.
    """
    if by_names := status_by_names(path):
        return by_names
    try:
        return _status_of_run(path)
    except FileNotFoundError as e:
        return RunStatus("damaged", f"{Path(e.filename).name} is missing")
    except UserError as e:
        return RunStatus("damaged", str(e))


def status_by_names(path: Path) -> RunStatus | None:
    """The part of `run_status` that reads no file; None if the folder holds a run.

    Raises:
        OSError: the folder cannot be read.
    """
    try:
        entries = {entry.name: entry for entry in os.scandir(path)}
    except FileNotFoundError:
        return RunStatus("new")
    if foreign := next(_foreign(entries), None):
        return RunStatus("foreign", foreign)
    if wrong := next(_of_wrong_kind(entries), None):
        return RunStatus("damaged", wrong)
    if "config.json" not in entries:
        parts = _traces(path)
        return RunStatus("damaged", f"config.json is missing beside {', '.join(parts)}") if parts else RunStatus("new")
    return None


def _status_of_run(path: Path) -> RunStatus:
    _, data, digests = read_config_and_data(path)
    steps = checkpoint_steps(path)
    n_recorded = _n_recorded_steps(path)
    if data.format == 1:  # from before there were manifests
        try:
            if not (path / manifest.NAME).exists():
                summary = files.read_json(path / "summary.json", dict)
                return RunStatus("finished" if isinstance(summary.get("steps"), int) else "resumable")
        except FileNotFoundError:
            return RunStatus("resumable")
        except Unreadable as e:
            return RunStatus("resumable", str(e))
    elif not steps and n_recorded > 1:  # the first checkpoint is complete before a second step is recorded
        return RunStatus("damaged", f"there is no checkpoint, though {n_recorded} steps are recorded")
    try:
        whole = manifest.read(path / manifest.NAME)
    except FileNotFoundError:
        return RunStatus("resumable")
    except Unreadable as e:
        return RunStatus("resumable", str(e))
    if changed := changed_file(whole, digests):
        return RunStatus("damaged", changed)
    if missing := [step for step in whole.checkpoints if step not in steps]:
        return RunStatus("resumable", f"checkpoints/{missing[-1]} is missing")
    if not whole.files:
        return RunStatus("resumable")
    difference = manifest.first_difference(path, whole.files)
    return RunStatus("resumable", difference) if difference else RunStatus("finished")


def read_config_and_data(path: Path) -> tuple[TrainConfig | FinetuneConfig, DataRecord, dict[str, str]]:
    """The configuration of the run in a folder, what data.json says, and the digests of both files by name.

    Raises:
        FileNotFoundError: one of them is missing.
        UserError: one is damaged, was written by another version, or has values out of their range.
    """
    contents = {name: files.read_bytes(path / name) for name in ("config.json", "data.json")}
    config = configs.from_json(files.decode_json(contents["config.json"], dict, "config.json"))
    data = files.decode_json(contents["data.json"], DataRecord, "data.json")
    return config, data, {name: manifest.digest(content) for name, content in contents.items()}


def changed_file(written: Manifest, digests: dict[str, str]) -> str | None:
    """What to say of the first of the run's own files that is another than a manifest says; None if there is none."""
    for name, found in digests.items():
        if written.run.get(name, found) != found:
            return f"{name} is not the one that the checkpoint after {written.step} steps was written with"
    return None


def checkpoint_steps(path: Path) -> list[int]:
    """The steps of the checkpoints that a run folder has, in order."""
    try:
        return sorted(int(entry.name) for entry in os.scandir(path / "checkpoints") if _is_checkpoint(entry))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_checkpoint(entry: "os.DirEntry[str]") -> bool:
    return bool(CHECKPOINT_NAME.fullmatch(entry.name)) and entry.is_dir(follow_symlinks=False)


def _foreign(entries: "dict[str, os.DirEntry[str]]") -> Iterator[str]:
    """The paths of the files and folders that no run writes."""
    for name, entry in entries.items():
        is_file, is_folder = entry.is_file(follow_symlinks=False), entry.is_dir(follow_symlinks=False)
        if name not in OWN_NAMES or (is_file if name in FOLDERS else is_folder):
            yield name
        elif is_folder:
            inner = (file.name for file in os.scandir(entry.path))
            yield from (f"{name}/{file}" for file in inner if not FOLDERS[name].fullmatch(file))


def _of_wrong_kind(entries: "dict[str, os.DirEntry[str]]") -> Iterator[str]:
    """What is wrong with the entries that are links, or not the files or folders that they should be."""
    for name, entry in entries.items():
        if name not in FOLDERS:
            if not entry.is_file(follow_symlinks=False):
                yield f"{name} is no regular file"
        elif not entry.is_dir(follow_symlinks=False):
            yield f"{name} is no folder"
        else:
            for inner in os.scandir(entry.path):
                if name == "checkpoints" and not inner.is_dir(follow_symlinks=False):
                    yield f"{name}/{inner.name} is no folder"
                elif name != "checkpoints" and not inner.is_file(follow_symlinks=False):
                    yield f"{name}/{inner.name} is no regular file"


def _traces(path: Path) -> list[str]:
    """The parts of a run that one interrupted at its very beginning does not have."""
    results = (*RECORDS, "steps.csv", *RESULTS, manifest.NAME)
    found = [name for name in results if (path / name).is_file() and (path / name).stat().st_size]
    return [*found, "checkpoints/"] if checkpoint_steps(path) else found


def _n_recorded_steps(path: Path) -> int:
    """How many complete lines steps.csv has after its first, counted up to 2."""
    try:
        with (path / "steps.csv").open("rb") as f:
            lines = [f.readline(1000) for _ in range(3)]
    except FileNotFoundError:
        return 0
    return sum(line.endswith(b"\n") for line in lines[1:])
