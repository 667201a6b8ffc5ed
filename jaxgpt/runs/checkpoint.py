"""Checkpoints: a `TrainState` written and read by orbax.

A checkpoint is named by its number of updates. It does not depend on the devices that wrote it: it can be restored on
any number of them. Orbax may save in the background. A checkpoint gets its name only when it is complete, so a killed
process leaves no partial one.
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
LARGE = 2**27  # bytes of a state: on a CPU, one of this size or more is not written in the background


def open_checkpoints(folder: Path, keep: int = 3, writes: bool = True) -> Manager:
    """The checkpoints of a run folder.

    Args:
        keep: how many of the latest checkpoints to keep; the one with the lowest validation loss is kept as well.
        writes: if False, nothing in the folder is changed, so that a run may be evaluated while it trains.

    Raises:
        UserError: the checkpoints cannot be read.
    """
    _silence_orbax()

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
    with _reported_as_user_error(
        folder, "cannot be read", "remove the folder of the damaged step, whose files are empty or cut short"
    ):
        return ocp.CheckpointManager(folder.absolute(), options=options)


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


def save(manager: Manager, state: TrainState, val_loss: float | None) -> None:
    """Saves the state under its step, possibly in the background; an existing checkpoint of the step is left as it is.

    Args:
        val_loss: the validation loss of the state, if it was measured (nats per token).

    Raises:
        UserError: this checkpoint, or the one before it, could not be written.
    """
    step = int(state.step)
    metrics = None if val_loss is None else {"val_loss": val_loss}
    with _reported_as_user_error(
        manager.directory, "could not be written", "make room there and start again: it goes on"
    ):
        if step in manager.all_steps():
            return
        on_cpu, on_one_device = jax.default_backend() == "cpu", len(state.step.sharding.device_set) == 1
        large = on_cpu and sum(x.nbytes for x in jax.tree.leaves(state)) >= LARGE
        if on_cpu and not on_one_device:
            # Orbax saves a replicated array slice by slice, one slice per device: three times the work, on the cores
            # that train. So it gets one host copy (the next step reuses the state's own memory), one save at a time.
            # A state on one device orbax copies itself.
            manager.wait_until_finished()
            state = jax.tree.map(lambda x: np.array(x, copy=True), state)
        manager.save(step, args=ocp.args.StandardSave(state._asdict()), metrics=metrics, force=True)
        if large:
            # In the background, the copy and its write buffers would add to the step's own memory, and the save would
            # take as much time from the step's cores as it takes alone (docs/benchmarks.md).
            manager.wait_until_finished()
            _return_free_memory()


def _return_free_memory() -> None:
    """Returns freed memory to the system: glibc keeps it for the thread that allocated it, and no other can use it."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def wait(manager: Manager) -> None:
    """Waits until all saves are complete. Raises `UserError` if one could not be written."""
    with _reported_as_user_error(
        manager.directory, "could not be written", "make room there and start again: it goes on"
    ):
        manager.wait_until_finished()


def restore(manager: Manager, like: TrainState, step: int, remedy: str) -> TrainState:
    """The state of a step.

    Args:
        like: a state of abstract arrays: the shapes, dtypes and devices of the result.
        remedy: the last part of the message if the checkpoint cannot be read.

    Raises:
        UserError: there is no such checkpoint, it cannot be read, or its model or vocabulary is another.
    """
    path = manager.directory / str(step)
    with _reported_as_user_error(path, "cannot be read", remedy):
        with ocp.StandardCheckpointer() as reader:
            saved = reader.metadata(path / "default").item_metadata["params"]
    table = "token_emb.embedding"  # [V, C]: compared first, as another vocabulary changes the head's shape too
    for name, p in sorted(like.params.items(), key=lambda item: item[0] != table):
        if name in saved and tuple(saved[name].shape) != p.shape:
            of_vocabulary = name == table and saved[name].shape[1] == p.shape[1]
            what = "vocabulary (tokenizer.json)" if of_vocabulary else "model (config.json)"
            raise UserError(
                f"{path}: {name} is {list(saved[name].shape)} in the checkpoint and {list(p.shape)} by the run's "
                f"{what}; bring back the file that it was trained with"
            )
    with _reported_as_user_error(path, "cannot be read", remedy):
        return TrainState(**manager.restore(step, args=ocp.args.StandardRestore(like._asdict())))


def pick_step(manager: Manager, which: str) -> int | None:
    """The step of the "last" or "best" checkpoint, or None. The best is the last if no checkpoint was evaluated."""
    best = manager.best_step() if which == "best" else None
    return manager.latest_step() if best is None else best


@contextlib.contextmanager
def _reported_as_user_error(path: Any, what: str, remedy: str) -> Iterator[None]:
    """Turns what orbax and tensorstore raise, which has no common base class, into a `UserError`."""
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
