"""Checkpoints: a `TrainState` written by orbax, with a manifest of its files, and verified before it is read.

A checkpoint is named by its number of updates. It does not depend on the devices that wrote it: it can be restored on
any number of them. Of several processes, each writes and reads its own part of the arrays; process 0 does all else, and
what it finds holds for all. It is written under a temporary name: the arrays, then, when every file is on the disk, the
manifest, then its name. So a killed process, or a power loss, leaves no incomplete checkpoint under a final name.
"""

import contextlib
import ctypes
import dataclasses
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxgpt import distributed
from jaxgpt.data.files import PARTIAL
from jaxgpt.errors import DamagedRun, UserError, first_line
from jaxgpt.runs import files, manifest
from jaxgpt.runs.files import Unreadable
from jaxgpt.runs.manifest import Manifest
from jaxgpt.runs.run_dir import RunDir
from jaxgpt.runs.status import FOLDERS, changed_file, checkpoint_steps
from jaxgpt.train_step import TrainState

LARGE = 2**27  # bytes of a state: on a CPU, one of this size or more is not written in the background
ARRAYS = "default"  # orbax's folder in that of a checkpoint
ATTEMPTS = 5  # to read a run that another process trains, and whose checkpoints it removes


class Checkpoints:
    """The checkpoints of a run. The latest few are kept, and the one with the lowest validation loss.

    Args:
        keep: how many of the latest.
        writes: if False, nothing in the folder is changed, so that a run may be evaluated while it trains.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, run: RunDir, keep: int = 3, writes: bool = True):
        _silence_orbax()
        _avoid_leaks_of_tensorstore()
        self.run, self.folder, self._keep = run, run.checkpoints, keep
        self._saving: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1) if writes else None
        if writes:
            distributed.on_first(self._make_folder)

    def _make_folder(self) -> None:
        with _reported_as_user_error(self.folder, "cannot be written"):
            self.folder.mkdir(exist_ok=True)
            for entry in list(self.folder.iterdir()):  # what a killed process left
                if "." in entry.name and FOLDERS["checkpoints"].fullmatch(entry.name):
                    shutil.rmtree(entry)  # status.py has refused what is no folder

    def close(self) -> None:
        """Waits for a save in the background; its error has been, or is not to be, reported."""
        if self._thread is not None:
            self._thread.shutdown()

    def path(self, step: int) -> Path:
        """The folder of the checkpoint of a step."""
        return self.folder / str(step)

    def steps(self) -> list[int]:
        """The steps of the checkpoints, in order."""
        return checkpoint_steps(self.run.path)

    # ----------------------------------------------------------------------------------------------------------- saving

    def save(self, state: TrainState, val_loss: float | None = None, stopped_early: bool = False) -> None:
        """Saves the state under its step, possibly in the background; a checkpoint of the step is left as it is.

        Args:
            val_loss: the validation loss of the state, if it was measured (nats per token).
            stopped_early: whether the run stops early after this step.

        Raises:
            UserError: this checkpoint, or the one before it, could not be written.
        """
        assert self._thread is not None
        self.wait()
        step, known = int(state.step), distributed.broadcast(self.steps())
        if step in known:
            return
        if distributed.is_distributed():
            self._save_together(state, val_loss, stopped_early)
            return
        with _reported_as_user_error(self.folder, "could not be written"):
            content = self._content(step, val_loss, stopped_early)
            if jax.default_backend() == "cpu" and sum(x.nbytes for x in jax.tree.leaves(state)) >= LARGE:
                # In the background, a copy and the write buffers would add to the step's own memory, and the save would
                # take as much time from the step's cores as it takes alone (docs/benchmarks.md).
                self._write(jax.tree.map(np.asarray, state), content)
                return
            copied = jax.tree.map(lambda x: np.array(x, copy=True), state)  # the next step reuses the state's memory
            self._saving = self._thread.submit(self._write, copied, content)
            if not known:
                # From here on, recorded steps without a checkpoint tell that checkpoints were lost (status.py).
                self.wait()

    def _content(self, step: int, val_loss: float | None, stopped_early: bool) -> Manifest:
        """The manifest of a checkpoint to be written, but for its files. The records are on the disk before it is."""
        self.run.flush()
        return Manifest(step, {}, self.run.identity, self.run.digest_records(), val_loss, stopped_early)

    def _save_together(self, state: TrainState, val_loss: float | None, stopped_early: bool) -> None:
        """Saves the state of several processes. Not in the background: a save has collectives, as the next step has."""
        step = int(state.step)
        with _reported_as_user_error(self.folder, "could not be written"):
            content = distributed.on_first(lambda: self._content(step, val_loss, stopped_early))
            partial_path = self.path(step).with_name(f"{step}{PARTIAL}")
            try:
                distributed.on_first(lambda: _make_empty(partial_path))
                _write_arrays(partial_path, state)
                distributed.on_first(lambda: content and self._complete(partial_path, content))
            except BaseException:
                if self.run.writes:
                    shutil.rmtree(partial_path, ignore_errors=True)
                raise
        _return_free_memory()

    def wait(self) -> None:
        """Waits until the save in the background is complete. Raises `UserError` if it could not be written."""
        saving, self._saving = self._saving, None
        with _reported_as_user_error(self.folder, "could not be written"):
            if saving is not None:
                saving.result()

    def _write(self, state: TrainState, content: Manifest) -> None:
        partial_path = self.path(content.step).with_name(f"{content.step}{PARTIAL}")
        try:
            _make_empty(partial_path)
            _write_arrays(partial_path, state)
            self._complete(partial_path, content)
        except BaseException:
            shutil.rmtree(partial_path, ignore_errors=True)
            raise
        finally:
            _return_free_memory()

    def _complete(self, partial_path: Path, content: Manifest) -> None:
        """Gives a checkpoint whose arrays are written its manifest, and then its name."""
        names = _fsync_all(partial_path)
        content = dataclasses.replace(content, files=manifest.digest_files(partial_path, names))
        manifest.write(partial_path / manifest.NAME, content)
        os.rename(partial_path, self.path(content.step))
        files.fsync(self.folder)
        self._keep_up_to(content.step)

    def _keep_up_to(self, step: int) -> None:
        """Removes the checkpoints not to be kept, and all after a step. Before that, manifest.json lists the others."""
        steps, losses = self.steps(), {}
        for saved in steps:
            if saved <= step:
                with contextlib.suppress(DamagedRun):  # one that nobody can use
                    losses[saved] = self._val_loss(saved)
        kept = {*list(losses)[-self._keep :], _best(losses)}
        self.run.write_manifest(step, [saved for saved in steps if saved in kept])
        for saved in steps:
            if saved not in kept:
                self._remove(saved)

    def _remove(self, step: int) -> None:
        """Removes a checkpoint: its name first, so that an interruption leaves no part of it under that name."""
        path = self.path(step)
        removed = path.with_name(f"{path.name}.removed")
        os.rename(path, removed)
        shutil.rmtree(removed)

    def go_on_from(self, step: int, say: Callable[[str], None]) -> None:
        """Removes the checkpoints that the run, which is at `step`, cannot use: later ones, and any without a manifest.

        The later ones are damaged, and `restore_last` has told so; `say` receives a line for each of the others.
        """
        for saved in self.steps():
            try:
                if saved < step:
                    self.manifest(saved)
            except DamagedRun as e:
                say(f"{e}; removing it")
        with _reported_as_user_error(self.folder, "could not be removed"):
            self._keep_up_to(step)

    # ---------------------------------------------------------------------------------------------------------- reading

    def manifest(self, step: int) -> Manifest | None:
        """The manifest of a checkpoint; None for one from before there were manifests.

        Raises:
            DamagedRun: there is none, or it is damaged, or of another run.
        """
        path = self.path(step)
        try:
            found = manifest.read(path / manifest.NAME)
        except FileNotFoundError:
            if self.run.has_manifests:
                raise DamagedRun(f"{path} is damaged: {manifest.NAME} is missing") from None
            return None
        except Unreadable as e:
            raise DamagedRun(f"{path} is damaged: {e}") from None
        if found.step != step:
            raise DamagedRun(f"{path} is damaged: it holds the state after {found.step} steps")
        return found

    def best_step(self) -> int | None:
        """The step of the lowest validation loss, the last of equals; the last step if none was measured.

        Raises:
            DamagedRun: a checkpoint is missing or damaged, so that it is not known.
        """
        steps, missing = self._listing()
        if missing:
            raise DamagedRun(f"{self.path(missing[-1])} is missing, and may be the best; try --checkpoint last")
        try:
            return _best({step: self._val_loss(step) for step in steps})
        except DamagedRun as e:
            raise DamagedRun(f"{e}, and may be the best; try --checkpoint last") from None

    def stopped_early(self) -> bool:
        """Whether the run stopped early, so that the best of its states is its result."""
        steps = self.steps()
        try:
            if steps and (found := self.manifest(steps[-1])):
                return found.stopped_early
            # A run from before there were manifests.
            return "stopped_early" in files.read_json(self.run.path / "summary.json", dict)
        except (DamagedRun, FileNotFoundError, Unreadable):  # a damaged checkpoint is told when it is read
            return False

    def restore(self, step: int, like: TrainState, records: bool = False) -> TrainState:
        """The state of a step.

        Args:
            like: a state of abstract arrays: the shapes, dtypes and devices of the result.
            records: whether the run's records up to the step are verified too.

        Raises:
            UserError: its model or vocabulary is another.
            DamagedRun: its files, or the run's, are not as they were written.
        """
        path = self.path(step)
        distributed.on_first(lambda: self._verify(step, like, records))
        with _reported_as_damage(path), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
            state = TrainState(
                **reader.restore((path / ARRAYS).absolute(), args=ocp.args.StandardRestore(like._asdict()))
            )
        if int(state.step) != step:
            raise DamagedRun(f"{path} is damaged: it holds the state after {int(state.step)} steps")
        return state

    def _verify(self, step: int, like: TrainState, records: bool) -> None:
        """Raises what `restore` does for a checkpoint that is not as it was written."""
        path = self.path(step)
        if found := self.manifest(step):
            if changed := changed_file(found, self.run.identity):
                raise DamagedRun(f"RUN {self.run.path}: {changed}; bring it back")
            if difference := manifest.first_difference(path, found.files):
                raise DamagedRun(f"{path} is damaged: {difference}")
            if records and (difference := manifest.first_difference(self.run.path, found.records, beginning=True)):
                raise DamagedRun(f"{path} does not fit the run's records: {difference}")
        else:  # its digests would have told of another model or vocabulary
            with _reported_as_damage(path), ocp.StandardCheckpointer() as reader:
                saved = reader.metadata((path / ARRAYS).absolute()).item_metadata["params"]
            _require_shapes(path, saved, like)

    def restore_last(
        self, like: Callable[[], TrainState], say: Callable[[str], None], records: bool = False
    ) -> TrainState | None:
        """The state of the last sound checkpoint; None if there is no checkpoint.

        Args:
            like: gives what `restore` takes.
            say: receives a line that names the damaged ones after it.
            records: as in `restore`.

        Raises:
            UserError: as `restore`.
            DamagedRun: none is sound.
        """
        for _ in range(ATTEMPTS):
            steps, missing = distributed.broadcast(self._listing())
            newest_missing = [step for step in missing if not steps or step > steps[-1]]
            problems = [f"{self.path(step)} is missing" for step in newest_missing[-1:]]
            for step in reversed(steps):
                try:
                    state = self.restore(step, like(), records)
                except DamagedRun as e:
                    if not distributed.broadcast(self.path(step).exists()):
                        break  # the run still trains, and has removed it for a later one
                    problems.append(str(e))
                else:
                    if problems:
                        say(f"{problems[0]}; taking the checkpoint after {step} steps")
                    return state
            else:
                if not problems:
                    return None
                raise DamagedRun(f"{problems[0]}, and no other checkpoint is sound; bring it back, or train again")
        raise UserError(f"RUN {self.run.path}: its checkpoints change faster than they can be read; try again")

    def _listing(self) -> tuple[list[int], list[int]]:
        """The steps of the checkpoints, and those of the ones that manifest.json lists and that are missing."""
        while True:
            written, steps = self.run.read_manifest(), self.steps()
            # A run that trains writes manifest.json before it removes a checkpoint: unchanged, it fits the list.
            if self.run.read_manifest() == written:
                return steps, [step for step in written.checkpoints if step not in steps] if written else []

    def _val_loss(self, step: int) -> float | None:
        """The validation loss of a checkpoint, if it was measured (nats per token)."""
        if found := self.manifest(step):
            return found.val_loss
        with contextlib.suppress(FileNotFoundError, Unreadable):  # from before there were manifests
            return files.read_json(self.path(step) / "metrics" / "metrics", dict[str, float]).get("val_loss")
        return None


def _make_empty(folder: Path) -> None:
    """Makes a folder in place of what has its name."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def _write_arrays(folder: Path, state: TrainState) -> None:
    """Writes a state's arrays below a folder; several processes do it together, each its own part."""
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer:
        writer.save((folder / ARRAYS).absolute(), args=ocp.args.StandardSave(state._asdict()))


def _best(losses: dict[int, float | None]) -> int | None:
    """The step of the lowest validation loss, the last of equals; the last step if none was measured."""
    measured = {step: loss for step, loss in losses.items() if loss is not None}
    return min(measured, key=lambda step: (measured[step], -step)) if measured else max(losses, default=None)


def _fsync_all(folder: Path) -> list[str]:
    """Forces all files below a folder, and the folders, to the disk; returns the files' paths below it."""
    names = []
    for parent, _, inner in os.walk(folder, topdown=False):
        for name in inner:
            names.append(os.path.relpath(os.path.join(parent, name), folder))
            files.fsync(Path(parent, name))
        files.fsync(Path(parent))
    return names


def _require_shapes(path: Path, saved: Any, like: TrainState) -> None:
    """Raises `UserError` if a parameter has another shape in a checkpoint than by the run's configuration."""
    table = "token_emb.embedding"  # [V, C]: compared first, as another vocabulary changes the head's shape too
    for name, p in sorted(like.params.items(), key=lambda item: item[0] != table):
        if name in saved and tuple(saved[name].shape) != p.shape:
            of_vocabulary = name == table and saved[name].shape[1] == p.shape[1]
            what = "vocabulary (tokenizer.json)" if of_vocabulary else "model (config.json)"
            raise UserError(
                f"{path}: {name} is {list(saved[name].shape)} in the checkpoint and {list(p.shape)} by the run's "
                f"{what}; bring back the file that it was trained with"
            )


def _return_free_memory() -> None:
    """Returns freed memory to the system: glibc keeps it for the thread that allocated it, and no other can use it."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


@cache
def _silence_orbax() -> None:
    """Silences what orbax and tensorstore print of a failure: they raise it too, and it becomes one `UserError`."""
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    # After one file has failed, tensorstore's threads still report the others to an event loop that is closed by then.
    # No Python frame can catch that error: this hook is the only place where it can be dropped.
    hook = sys.unraisablehook

    def hook_without_closed_loop(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = hook_without_closed_loop


@cache
def _avoid_leaks_of_tensorstore() -> None:
    """Keeps orbax from calls whose results tensorstore never frees (0.1.77 to 0.1.86): all that it returns as JSON.

    Of each array that orbax writes or reads, it asks for the normal form of a path that is absolute already, and after
    each save for the bytes written, which it logs. A thousand saves and restores of minigpt would leak a fifth of the
    process's memory. Without these names in a later orbax, nothing is replaced.
    """
    with contextlib.suppress(ImportError, AttributeError):
        from orbax.checkpoint._src.serialization import tensorstore_utils

        tensorstore = tensorstore_utils.ts

        class AbsolutePath:
            def __init__(self, spec: dict[str, Any]):
                self.spec = spec

            def to_json(self) -> dict[str, Any]:
                return self.spec

        own = {name: getattr(tensorstore.KvStore, name) for name in dir(tensorstore.KvStore) if name[:2] != "__"}
        replaced = {
            "KvStore": SimpleNamespace(**{**own, "Spec": AbsolutePath}),
            "experimental_collect_matching_metrics": lambda prefix: [],
        }
        names = {name: getattr(tensorstore, name) for name in dir(tensorstore)}
        tensorstore_utils.ts = SimpleNamespace(**{**names, **replaced})


@contextlib.contextmanager
def _reported_as_user_error(path: Path, what: str) -> Iterator[None]:
    """Turns what orbax and tensorstore raise, which has no common base class, into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        if distributed.is_lost_process(e):
            raise
        remedy = "make room there and start again: it goes on"
        full = re.search("No space left on device|File too large|Disk quota exceeded", str(e))
        reason = full[0] if full else first_line(e)
        if isinstance(e, MemoryError):
            reason, remedy = "out of memory", "give the process more of it and start again"
        if reason == "File too large":
            remedy = "raise the limit on a file's size (ulimit -f), or move the run to a disk that takes larger files"
        raise UserError(f"{path}: the checkpoint {what} ({type(e).__name__}: {reason}); {remedy}") from e


@contextlib.contextmanager
def _reported_as_damage(path: Path) -> Iterator[None]:
    """Turns what orbax and tensorstore raise of a checkpoint that they cannot read into a `DamagedRun`."""
    try:
        yield
    except MemoryError:
        raise UserError(f"{path}: out of memory; give the process more of it and start again") from None
    except Exception as e:
        if distributed.is_lost_process(e):
            raise
        # Of several processes, one that cannot read its part must not try another checkpoint than the others.
        kind = UserError if distributed.is_distributed() else DamagedRun
        raise kind(f"{path} is damaged ({type(e).__name__}: {first_line(e)})") from e
