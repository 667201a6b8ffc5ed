"""Checkpoints: orbax behind a few functions.

A checkpoint is a `TrainState`, named by the number of updates done. It knows nothing of devices: it can be restored on
any number of them. Saving may go on in the background; a checkpoint appears under its name only once it is complete, so
a killed process leaves none half-written.
"""

import contextlib
import ctypes
import logging
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from jaxgpt.errors import UserError
from jaxgpt.train_step import TrainState

Manager = ocp.CheckpointManager
LARGE = 2**27  # bytes of a state: from here on it is not written beside the training on a CPU


def open_checkpoints(folder: Path, keep: int = 3, writes: bool = True) -> Manager:
    """The checkpoints of a run folder: the latest `keep` are kept, and the one with the lowest validation loss.

    Without `writes` nothing in the folder is touched, so a run may be evaluated while it trains.
    """
    _silence()

    def val_loss(metrics: dict[str, float]) -> float:
        return metrics["val_loss"]

    best = preservation_policy.BestN(get_metric_fn=val_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False)
    policy = preservation_policy.AnyPreservationPolicy([preservation_policy.LatestN(keep), best])
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy if writes else None,
        best_fn=val_loss,
        best_mode="min",
        cleanup_tmp_directories=writes,
        create=writes,
        read_only=not writes,
    )
    with _told(folder, "cannot be read", "remove the folder of the damaged step, whose files are empty or cut short"):
        return ocp.CheckpointManager(folder.absolute(), options=options)


@cache
def _silence() -> None:
    """What orbax and tensorstore print of a failure, from several threads, is raised as well, and told in one line."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    hook = sys.unraisablehook

    def without_late_ones(found: Any) -> None:
        if str(found.exc_value) != "Event loop is closed":  # of a file that ends after another has failed
            hook(found)

    sys.unraisablehook = without_late_ones


def save(manager: Manager, state: TrainState, val_loss: float | None) -> None:
    """Saves the state under its step, or begins to; a step that is there already stays as it is.

    Raises:
        UserError: this or the save before it could not be written.
    """
    step = int(state.step)
    metrics = None if val_loss is None else {"val_loss": val_loss}
    with _told(manager.directory, "could not be written", "make room there and start again: it goes on"):
        if step in manager.all_steps():
            return
        on_cpu, alone = jax.default_backend() == "cpu", len(state.step.sharding.device_set) == 1
        large = on_cpu and sum(x.nbytes for x in jax.tree.leaves(state)) >= LARGE
        if on_cpu and not alone:
            # Of arrays that are whole on every device orbax saves a slice from each: three times the work, here
            # beside the training, on the same cores. Copies, as the state's own memory is the next step's; and one
            # at a time. Of a state on one device orbax makes the one copy itself.
            manager.wait_until_finished()
            state = jax.tree.map(lambda x: np.array(x, copy=True), state)
        manager.save(step, args=ocp.args.StandardSave(state._asdict()), metrics=metrics, force=True)
        if large:
            # Its copy and what is written of it would stand beside the step's own memory, and its work take from the
            # step's cores as much time as it takes alone (docs/benchmarks.md).
            manager.wait_until_finished()
            _return_free_memory()


def _return_free_memory() -> None:
    """Returns to the system what is freed: glibc keeps it for the thread that had it, where no other finds it."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def wait(manager: Manager) -> None:
    """Returns when all saves are complete. Raises `UserError` if one could not be written."""
    with _told(manager.directory, "could not be written", "make room there and start again: it goes on"):
        manager.wait_until_finished()


def restore(manager: Manager, like: TrainState, step: int, remedy: str) -> TrainState:
    """The state of a step, with the shapes, dtypes and devices of `like`, a state of abstract arrays.

    Args:
        remedy: what the user is told to do if the checkpoint cannot be read.

    Raises:
        UserError: no such checkpoint, it cannot be read, or it is of another model or vocabulary.
    """
    path = manager.directory / str(step)
    with _told(path, "cannot be read", remedy):
        with ocp.StandardCheckpointer() as reader:
            there = reader.metadata(path / "default").item_metadata["params"]
    table = "token_emb.embedding"  # [V, C]; the head differs with it
    for name, p in sorted(like.params.items(), key=lambda item: item[0] != table):
        if name in there and tuple(there[name].shape) != p.shape:
            of_vocabulary = name == table and there[name].shape[1] == p.shape[1]
            what = "vocabulary (tokenizer.json)" if of_vocabulary else "model (config.json)"
            raise UserError(
                f"{path}: {name} is {list(there[name].shape)} in the checkpoint and {list(p.shape)} by the run's "
                f"{what}; bring back the file that it was trained with"
            )
    with _told(path, "cannot be read", remedy):
        return TrainState(**manager.restore(step, args=ocp.args.StandardRestore(like._asdict())))


def pick_step(manager: Manager, which: str) -> int | None:
    """The step of the "last" or "best" checkpoint, None where there is none. Where none was evaluated, best is last."""
    best = manager.best_step() if which == "best" else None
    return manager.latest_step() if best is None else best


@contextlib.contextmanager
def _told(path: Any, what: str, remedy: str) -> Iterator[None]:
    """Turns what orbax and tensorstore raise, which has no common base class, into one line."""
    try:
        yield
    except Exception as e:
        full = re.search("No space left on device|File too large|Disk quota exceeded", str(e))
        reason = full[0] if full else (str(e).splitlines() or [""])[0][:160]
        if isinstance(e, MemoryError):
            reason, remedy = "out of memory", "give the process more of it and start again"
        if reason == "File too large":
            remedy = "raise the limit on a file's size (ulimit -f), or move the run to a disk that takes larger files"
        raise UserError(f"{path}: the checkpoint {what} ({type(e).__name__}: {reason}); {remedy}") from e
