"""A run's folder: its files, and how a run is begun, resumed and opened. All files are JSON, text, images or orbax's.

config.json, tokenizer.json, data.json, manifest.json, metrics.jsonl, steps.csv, summary.json, sample.txt,
learning_curves.png, checkpoints/; on demand diagnostics.jsonl, samples.jsonl, attention.gif, attention/, inspect/.
"""

import contextlib
import csv
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import filelock
import msgspec
import numpy as np

from jaxgpt import config as configs
from jaxgpt import distributed, strict_json
from jaxgpt.config import FinetuneConfig, TrainConfig
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.data.corpora import Corpus
from jaxgpt.data.files import PARTIAL, atomic_replace
from jaxgpt.data.labeled import LabeledTexts
from jaxgpt.data.shards import REVISION
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import DamagedRun, UserError, flag
from jaxgpt.runs import files, manifest
from jaxgpt.runs.files import Unreadable
from jaxgpt.runs.manifest import FileDigest, Manifest
from jaxgpt.runs.status import (
    FOLDERS,
    FORMAT,
    LOCK,
    RECORDS,
    RESULTS,
    WRITTEN_FILES,
    Base,
    DataRecord,
    changed_file,
    checkpoint_steps,
    read_config_and_data,
    run_status,
    status_by_names,
)

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
    identity: dict[str, str] = field(default_factory=dict)  # digests of config.json, tokenizer.json and data.json
    has_manifests: bool = True  # False for a run begun before there were manifests
    finished: bool = False
    problem: str = ""  # what is wrong with its files that a resumption mends
    lock: filelock.BaseFileLock | None = field(default=None, compare=False, repr=False)  # of a run that trains here
    writes: bool = True  # False in all but the first of several processes: what they would write is left out

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def data_dir(self) -> Path | None:
        """The data folder that the training text was read from, if it still exists."""
        folder = Path(self.source).parent.parent
        return folder if Path(self.source).is_absolute() and folder.is_dir() else None

    @property
    def config_text(self) -> str:
        """The content of a new run's config.json."""
        return files.json_text(configs.to_json(self.config))

    def complete(self) -> None:
        """Writes config.json, after all else: the folder is a run once it is there."""
        files.write_text(self.path / "config.json", self.config_text)

    def finish(self, step: int) -> None:
        """Writes the manifest of the finished run, after all else: its presence says that the run is complete."""
        if not self.writes:
            return
        names = [*RECORDS, "steps.csv", *RESULTS, *self._map_names()]
        digests = manifest.digest_files(self.path, names)
        self.write_manifest(step, checkpoint_steps(self.path), digests)

    def write_manifest(
        self, step: int, checkpoints: Sequence[int], digests: dict[str, FileDigest] | None = None
    ) -> None:
        """Writes manifest.json: the last checkpoint's step, all checkpoints, and of a finished run its files."""
        content = Manifest(step, digests or {}, self.identity, checkpoints=tuple(checkpoints))
        manifest.write(self.path / manifest.NAME, content)

    def read_manifest(self) -> Manifest | None:
        """The content of manifest.json; None if there is none, or it is damaged."""
        return manifest.read_if_sound(self.path / manifest.NAME)

    def discard(self) -> None:
        """Removes the files of a run that could not make its first step."""
        if self.writes:
            _remove_run(self.path)

    def close(self) -> None:
        """Releases the folder: another process may train there. (The system releases it when the process ends.)"""
        if self.lock is not None:
            self.lock.release()

    def write_text(self, name: str, text: str) -> None:
        """Writes a text file of the result, completely or not at all."""
        if self.writes:
            files.write_text(self.path / name, text)

    # ---------------------------------------------------------------------------------------------------------- records

    def read_metrics(self) -> list[dict[str, Any]]:
        """The reports so far: one dictionary per line of metrics.jsonl. Raises `DamagedRun` for a line that is none."""
        path = self.path / "metrics.jsonl"
        lines = path.read_bytes().splitlines() if path.is_file() else []
        reports = []
        for number, line in enumerate(lines, 1):
            try:
                report = files.decode_json(line, dict[str, int | float | None], path.name)
            except Unreadable as e:
                raise DamagedRun(f"{path}: line {number} is damaged ({e}); bring the file back") from None
            if not all(isinstance(report.get(name), int | float) for name in ("step", "val_loss", "elapsed_s")):
                raise DamagedRun(f"{path}: line {number} is no report; bring the file back")
            reports.append(report)
        return reports

    def read_steps(self) -> list[tuple[int, float, float, float]]:
        """The rows of steps.csv, one per update: step, training loss (nats), gradient norm, learning rate.

        Raises:
            DamagedRun: a line has another form.
        """
        path = self.path / "steps.csv"
        if not path.is_file():
            return []
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
        rows = []
        for number, line in enumerate(lines, 2):
            try:
                step, loss, norm, lr = line.split(",")
                rows.append((int(step), float(loss), float(norm), float(lr)))
            except ValueError:
                raise DamagedRun(f"{path}: line {number} is damaged; bring the file back") from None
        return rows

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Appends a line to one of RECORDS; `record` holds the "step"."""
        assert name in RECORDS and "step" in record
        if self.writes:
            files.append(self.path / name, strict_json.dumps(record) + "\n")

    def append_steps(self, rows: list[tuple[int, float, float, float]]) -> None:
        """Appends rows of (step, training loss, gradient norm, learning rate) to steps.csv."""
        if not self.writes:
            return
        path = self.path / "steps.csv"
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows(rows if path.exists() and path.stat().st_size else [STEP_FIELDS, *rows])
        files.append(path, text.getvalue())

    def save_map(self, step: int, maps_LHTS: np.ndarray) -> None:
        """Writes the attention maps after `step` updates to attention/<step>.npy."""
        if not self.writes:
            return
        folder = self.path / "attention"
        folder.mkdir(exist_ok=True)
        with atomic_replace(folder / f"{step:08}.npy") as partial, partial.open("wb") as f:
            np.save(f, maps_LHTS)

    def read_maps(self) -> list[tuple[int, Path]]:
        """The steps with attention maps, in order, and their files."""
        return [(int(path.stem), path) for path in sorted((self.path / "attention").glob("*.npy"))]

    def _map_names(self) -> list[str]:
        return [f"attention/{path.name}" for _, path in self.read_maps()]

    def flush(self) -> None:
        """Forces the records to the disk, before a checkpoint that relies on them is written."""
        for name in self._record_names():
            files.fsync(self.path / name)
        if self._map_names():
            files.fsync(self.path / "attention")
        files.fsync(self.path)

    def digest_records(self) -> dict[str, FileDigest]:
        """The digests of the records as they are now, by their path in the run folder."""
        return manifest.digest_files(self.path, self._record_names())

    def _record_names(self) -> list[str]:
        return [name for name in (*RECORDS, "steps.csv", *self._map_names()) if (self.path / name).is_file()]

    def rewind(self, step: int, records: dict[str, FileDigest] | None) -> None:
        """Removes the records after `step` updates: a run killed after its last checkpoint repeats those updates.

        A last line that the kill cut short is removed as well.

        Args:
            records: the records up to that step, as the checkpoint's manifest has them; None without a manifest.
        """
        for at, path in self.read_maps():
            if at >= step if records is None else f"attention/{path.name}" not in records:
                path.unlink()
        if records is not None:
            for name in (*RECORDS, "steps.csv"):
                if not (self.path / name).is_file():
                    continue
                if name not in records:
                    (self.path / name).unlink()
                elif (self.path / name).stat().st_size > records[name].size:
                    files.truncate(self.path / name, records[name].size)
            return
        for name in RECORDS:
            _rewrite_lines(self.path / name, lambda line: json.loads(line)["step"] < step)
        header = ",".join(STEP_FIELDS)
        _rewrite_lines(
            self.path / "steps.csv",
            lambda line: line == header or (line.count(",") == 3 and int(line.split(",")[0]) < step),
        )


def create_together(
    path: Path,
    config: TrainConfig | FinetuneConfig,
    tokenizer: Tokenizer,
    corpus: Corpus,
    overwrite: bool,
    base: dict[str, Any] | None = None,
) -> RunDir:
    """`create`, by the first of several processes. The others open what it has created, and write nothing to it.

    Raises:
        UserError: as `create`; or this process has another configuration, data or vocabulary than the first.
    """
    path = Path(distributed.broadcast(str(path)))  # its default name holds the time
    run = distributed.on_first(lambda: create(path, config, tokenizer, corpus, overwrite, base=base))
    # Sent, not read from the folder: another host's file system may not show yet what has just been written.
    own = {name: getattr(run, name) for name in ("identity", "has_manifests", "finished")} if run else {}
    told, there, sha256 = distributed.broadcast((own, configs.to_json(config), corpus.sha256))
    if run is not None:
        return run
    different = _differences(configs.from_json(there), sha256, config, corpus.sha256)
    if not different and told["identity"]["tokenizer.json"] != _tokenizer_digest(tokenizer.to_json()):
        different = ["another vocabulary"]
    if different:
        raise UserError(f"process 0 trains something else ({'; '.join(different)}); start all with the same flags")
    return RunDir(path, config, tokenizer, corpus.sha256, corpus.source, writes=False, **told)


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
        overwrite: replace a run, or the parts of one, that are there.
        complete: make a new folder a run at once. If not, the caller puts more files there first, and then calls
            `RunDir.complete`.
        labels: a classifier's classes.
        base: the weights that it starts from: "run", "step" and "sha256"; None for random ones, and for a run that is
            there already and goes on from its own.

    Raises:
        UserError: the folder cannot be written, holds other files, a run of another configuration, data, vocabulary
            or base, or a run that another process is training.
        DamagedRun: parts of a run are there, and it cannot be gone on from them.
    """
    run = RunDir(path, config, tokenizer, corpus.sha256, corpus.source, labels)
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"--out-dir {str(path)!r}: not valid UTF-8; choose another name") from None
    try:
        before = status_by_names(path)
        if before and before.state == "foreign":
            raise UserError(
                f"--out-dir {path}: holds files that are no run ({before.problem}); choose an empty or new folder"
            )
        path.mkdir(parents=True, exist_ok=True)
        files.fsync(path.parent)
        run = replace(run, lock=_lock(path))
        try:
            was_new = before is not None and before.state == "new"
            return _begin_or_resume(run, corpus, was_new, overwrite, complete, base)
        except BaseException:
            run.close()
            raise
    except OSError as e:
        raise UserError(f"--out-dir {path}: cannot be written ({e.strerror}); choose a writable folder") from None


def _begin_or_resume(
    run: RunDir,
    corpus: Corpus | LabeledTexts,
    was_new: bool,
    overwrite: bool,
    complete: bool,
    base: dict[str, Any] | None,
) -> RunDir:
    """The run in a folder that is locked; `was_new`: whether there was none before the lock."""
    path = run.path
    status = run_status(path)
    if was_new and status.state != "new":
        raise UserError(f"--out-dir {path}: another process has just begun a run here; start again to resume it")
    if status.state == "damaged" and not overwrite:
        raise DamagedRun(
            f"--out-dir {path}: {status.problem}; bring that back, choose another folder, or --overwrite to start again"
        )
    tokenizer_values = run.tokenizer.to_json()
    tokenizer_digest = {"tokenizer.json": _tokenizer_digest(tokenizer_values)}
    if status.state == "new" or overwrite:
        _remove_run(path)
        files.write_json(path / "tokenizer.json", tokenizer_values)
        record = DataRecord(
            corpus.name, corpus.sha256, corpus.source, run.labels, Base(**base) if base else None, FORMAT
        )
        texts = {"config.json": run.config_text, "data.json": files.json_text(msgspec.to_builtins(record))}
        files.write_text(path / "data.json", texts["data.json"])
        if complete:
            run.complete()
        digests = {name: manifest.digest(text.encode()) for name, text in texts.items()}
        return replace(run, identity=digests | tokenizer_digest)
    data, digests = _require_same(run, base)
    run = replace(
        run,
        identity=digests | tokenizer_digest,
        has_manifests=data.format > 1,
        finished=status.state == "finished",
        problem=status.problem,
    )
    written = run.read_manifest()
    if written and (changed := changed_file(written, run.identity)):
        raise DamagedRun(f"--out-dir {path}: {changed}; bring it back, or --overwrite to start again")
    _remove_partial_files(path)
    files.write_json(path / "tokenizer.json", tokenizer_values)  # it may have been damaged
    return run


def default_run_dir(dataset: str, kind: str) -> Path:
    """runs/<dataset>-<kind>-<time>: the folder of a new run, one that does not exist yet."""
    dataset = re.sub(r"[^\w.-]+", "_", Path(REVISION.sub("", dataset)).stem if "/" in dataset else dataset)
    stem = Path("runs") / f"{dataset}-{kind}-{datetime.now():%Y%m%d-%H%M%S}"
    for number in range(1000):
        path = stem if not number else stem.with_name(f"{stem.name}-{number}")
        if not os.path.lexists(path):
            return path
    raise UserError(f"--out-dir: {stem} and a thousand others exist; name one")


def open_run(path: Path) -> RunDir:
    """The run in a folder, to be read.

    Raises:
        UserError: there is none, or one of its files is damaged.
        DamagedRun: one of its files is another than the one that its last checkpoint was written with.
    """
    where = f"RUN {path}"
    if not os.path.isfile(path / "config.json"):  # unlike Path.is_file, no error for a name too long
        raise UserError(f"{where}: no run here (no config.json); give a folder that jaxgpt train has written")
    with _readable(where, "give another folder"):
        config, data, digests = read_config_and_data(path)
        values = files.read_json(path / "tokenizer.json", dict)
        identity = digests | {"tokenizer.json": _tokenizer_digest(values)}
        # Without it, or if it is damaged, each checkpoint still has its own, which is checked when that is read.
        written = manifest.read_if_sound(path / manifest.NAME)
        if written and (changed := changed_file(written, identity)):
            raise DamagedRun(f"{where}: {changed}; bring it back")
        tokenizer = tokenizers.from_json(values)
    return RunDir(
        path, config, tokenizer, data.sha256, data.source, data.labels, identity, has_manifests=data.format > 1
    )


def _tokenizer_digest(values: dict[str, Any]) -> str:
    return manifest.digest(strict_json.dumps(tokenizers.identity(values), sort_keys=True).encode())


@contextlib.contextmanager
def _readable(flag_and_path: str, remedy: str) -> Iterator[None]:
    """Reports what reading damaged files raises as a `UserError`."""
    try:
        yield
    except UserError as e:
        raise e if str(e).startswith(flag_and_path) else UserError(f"{flag_and_path}: {e}; {remedy}") from None
    except FileNotFoundError as e:
        raise UserError(f"{flag_and_path}: {Path(e.filename).name} is missing; {remedy}") from None
    except (OSError, ValueError) as e:
        raise UserError(f"{flag_and_path}: not readable as a run ({type(e).__name__}: {e}); {remedy}") from None


def own_tokenizer(path: Path | None, config: TrainConfig) -> Tokenizer | None:
    """The trained byte pairs of the run in a folder, if there is one.

    A resumed run keeps them: byte pairs trained again, by another version of the library, may differ.
    """
    if path is None or not config.tokenizer.startswith("bpe:"):
        return None
    try:
        there = files.read_json(path / "config.json", dict).get("tokenizer")
    except (OSError, UserError):
        return None
    return _loadable_tokenizer(path) if there == config.tokenizer else None


def _loadable_tokenizer(path: Path) -> Tokenizer | None:
    """The tokenizer of the run in a folder, or None if its file is damaged; a resumed run writes the file again."""
    try:
        return tokenizers.from_json(files.read_json(path / "tokenizer.json", dict))
    except (OSError, UserError, ValueError):
        return None


def recorded_choice(path: Path | None, spec: str) -> str:
    """The one of the datasets in `spec` ("a,b") that the run in a folder was begun with; else `spec` unchanged.

    `--dataset a,b` so resumes a run that was begun with b because a could not be had, and `hf:NAME` one that was begun
    with `hf:NAME@COMMIT`, whatever the hub has by now.
    """
    recorded = recorded_dataset(path)
    names = [name.strip() for name in spec.split(",")]
    return recorded if recorded and not {recorded, REVISION.sub("", recorded)}.isdisjoint(names) else spec


def recorded_base(path: Path | None) -> Base | None:
    """The weights that the run in a folder was begun from; None if there is no run, or it began from random ones."""
    try:
        return files.read_json(path / "data.json", DataRecord).base if path else None
    except (OSError, UserError, ValueError):  # ValueError: the path holds a NUL
        return None


def has_checkpoint(path: Path | None) -> bool:
    """Whether the run in a folder has a checkpoint, sound or not."""
    return path is not None and bool(checkpoint_steps(path))


def recorded_dataset(path: Path | None) -> str | None:
    """The name of the dataset that the run in a folder was begun with; None if there is no run."""
    try:
        return files.read_json(path / "data.json", DataRecord).dataset if path else None
    except (OSError, UserError, ValueError):  # ValueError: the path holds a NUL
        return None


def _differences(there: Any, sha256_there: str, here: Any, sha256_here: str) -> list[str]:
    """In what two configurations differ, or if in nothing, their texts: flags with both values."""
    fields = configs.differences(there, here)
    different = [f"{flag(name)} {old} there, {new} here" for name, old, new in fields]
    if not different and sha256_there != sha256_here:
        different = [f"--dataset {here.dataset} with another text"]
    return different


def _require_same(run: RunDir, base: dict[str, Any] | None) -> tuple[DataRecord, dict[str, str]]:
    """What data.json of the run in the folder says, and digests by file. Raises `UserError` if it is another run."""
    with _readable(f"--out-dir {run.path}", "choose another folder, or --overwrite to start again"):
        there, data, digests = read_config_and_data(run.path)
    if not data.dataset:
        raise UserError(
            f"--out-dir {run.path}: holds a model that was imported without a text; train from it with --init-from "
            f"{run.path}, into another folder"
        )
    different = _differences(there, data.sha256, run.config, run.data_sha256)
    if not different and base and (data.base is None or data.base.sha256 != base["sha256"]):
        different = [f"other weights to start from than those of {base['run']} after {base['step']} steps"]
    if not different and (own := _loadable_tokenizer(run.path)) and not tokenizers.same(own, run.tokenizer):
        different = ["another vocabulary"]
    if different:
        raise UserError(
            f"--out-dir {run.path}: holds a run of another configuration ({'; '.join(different)}); "
            "choose another folder, or --overwrite to start again"
        )
    return data, digests


def _lock(path: Path) -> filelock.BaseFileLock:
    """Locks the folder for this process. Raises `UserError` if another process holds it."""
    lock = filelock.FileLock(path / LOCK, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise UserError(
            f"--out-dir {path}: another process is training here; wait for it, or choose another folder"
        ) from None
    except OSError as e:
        raise UserError(
            f"--out-dir {path}: {LOCK} cannot be written ({e.strerror}); choose a writable folder, or remove that file"
        ) from None
    return lock


def _remove_run(path: Path) -> None:
    """Removes the files that a run writes: config.json first, so that what an interruption leaves is no run."""
    for name in WRITTEN_FILES:
        (path / name).unlink(missing_ok=True)
    _remove_partial_files(path)
    for name, own in FOLDERS.items():
        folder = path / name
        if folder.is_symlink():
            folder.unlink()
        for file in folder.iterdir() if folder.is_dir() else ():
            if own.fullmatch(file.name):
                shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()
        with contextlib.suppress(OSError):  # no such folder, or one that holds other files
            folder.rmdir()


def _remove_partial_files(path: Path) -> None:
    """Removes what writes that a kill cut short have left."""
    for name in WRITTEN_FILES:
        (path / (name + PARTIAL)).unlink(missing_ok=True)
    for file in (path / "attention").glob("*" + PARTIAL):
        file.unlink(missing_ok=True)


def _rewrite_lines(path: Path, keep: Callable[[str], bool]) -> None:
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and _keeps(keep, line.rstrip("\n"))]
        files.write_text(path, "".join(kept))


def _keeps(keep: Callable[[str], bool], line: str) -> bool:
    """Whether to keep a line. A damaged line, which `keep` cannot read, is not kept."""
    try:
        return keep(line)
    except (ValueError, KeyError, TypeError):
        return False
