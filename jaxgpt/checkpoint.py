"""Checkpoints: orbax behind four functions.

A checkpoint is a `TrainState`, named by the number of updates done. It knows nothing of devices: it can be restored on
any number of them. Saving goes on in the background; a checkpoint appears under its name only once it is complete, so a
killed process leaves none half-written.
"""

import logging
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from jaxgpt.errors import UserError
from jaxgpt.train_step import TrainState

Manager = ocp.CheckpointManager


def open_checkpoints(folder: Path, keep: int = 3, writes: bool = True) -> Manager:
    """The checkpoints of a run folder: the latest `keep` are kept, and the one with the lowest validation loss.

    Without `writes` nothing in the folder is touched, so a run may be evaluated while it trains.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)  # it warns of checkpoints without validation loss: they are meant

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
    return ocp.CheckpointManager(folder.absolute(), options=options)


def save(manager: Manager, state: TrainState, val_loss: float | None) -> None:
    """Starts to save the state under its step; a step that is there already stays as it is."""
    step = int(state.step)
    if step not in manager.all_steps():
        metrics = None if val_loss is None else {"val_loss": val_loss}
        manager.save(step, args=ocp.args.StandardSave(state._asdict()), metrics=metrics, force=True)


def restore(manager: Manager, like: TrainState, step: int) -> TrainState:
    """The state of a step, with the shapes, dtypes and devices of `like`, a state of abstract arrays.

    Raises:
        UserError: no such checkpoint, or it cannot be read.
    """
    try:
        return TrainState(**manager.restore(step, args=ocp.args.StandardRestore(like._asdict())))
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"{manager.directory}/{step}: the checkpoint cannot be read ({str(e).splitlines()[0][:200]}); remove this "
            "folder to go on from the one before it"
        ) from e


def pick_step(manager: Manager, which: str) -> int | None:
    """The step of the "last" or "best" checkpoint, None where there is none. A run without metrics has no best but its
    last."""
    steps: Any = manager.latest_step()
    return steps if which == "last" or manager.best_step() is None else manager.best_step()
