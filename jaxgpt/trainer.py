"""The training loop: dispatches of K steps, reports, checkpoints, and what is left in the run folder at the end."""

import contextlib
import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from jaxgpt import checkpoint, parallel, run_folder
from jaxgpt.console import Display, handle_stop_signals
from jaxgpt.errors import LossNotFinite, UserError
from jaxgpt.loader import Loader
from jaxgpt.optimizer import learning_rate
from jaxgpt.run_folder import RunFolder
from jaxgpt.train_step import TrainState
from jaxgpt.versions import versions

DISPATCH_SECONDS = 1.0  # long against the cost of a dispatch (about 8 ms on CPU), short for a progress bar and Ctrl-C


@dataclass(frozen=True)
class Watch:
    """What is looked at beside the training: the state before update 0, `every`, 2 `every`, ..., and after the last."""

    every: int
    look: Callable[[TrainState, int], None]  # with the number of updates done
    at_end: bool = False


class Task(Protocol):
    """What is trained: its batches, its validation and its end. `language_model.py` and `finetune.py` have one each."""

    loader: Loader
    watches: Sequence[Watch]
    steps_per_epoch: int | None
    title: str

    def validate(self, params: Any, step: int, n_batches: int | None = None) -> dict[str, float]:
        """Figures of the state after `step` updates, of the first batches or all: "val_loss" and more."""

    def line(self, report: dict[str, Any], n_steps: int) -> str:
        """A report for a person."""

    def finish(self, params: Any) -> tuple[dict[str, Any], str]:
        """At the end: what the summary tells of the result, and the same for a person."""


def run_training(
    run: RunFolder,
    executor: parallel.Executor,
    make_task: Callable[[], Task],
    first_state: Callable[[], TrainState],
    display: Display,
    started: float,
) -> int:
    """Trains to the end, or until a signal; the run goes on from its last checkpoint.

    Args:
        first_state: the state of a run that has no checkpoint yet.
        started: `time.perf_counter()` at the command's start, for the time to the first step.

    Returns:
        The command's exit code: 0, or 128 + the signal that stopped the run.

    Raises:
        UserError: the disk is full or the memory exhausted while it trains.
        LossNotFinite: a loss or gradient norm is not finite; the checkpoints hold states from before it.
    """
    checkpoints = checkpoint.open_checkpoints(run.checkpoints, run.config.keep_checkpoints)
    task = None
    try:
        with _told_in_one_line(run):
            with stop_signals() as stop:
                task = make_task()
                trainer = Trainer(run, executor, checkpoints, task, first_state, display, started)
                trainer.train(stop)
            if trainer.complete:  # from here on a signal ends the process at once: all is saved
                trainer.finish()
                return 0
    finally:
        display.close()
        if task is not None:
            task.loader.close()
        with contextlib.suppress(Exception):  # what a failed save still has to say was said
            checkpoints.close()
    display.line(
        f"stopped after {trainer.done} of {run.config.steps} steps, all saved; "
        f"the same command with --out-dir {run.path} goes on"
    )
    return 128 + stop[0]


@contextlib.contextmanager
def _told_in_one_line(run: RunFolder) -> Iterator[None]:
    """Turns a full disk and exhausted memory into `UserError`; a run without its first step is taken back."""
    try:
        yield
    except OSError as e:
        raise UserError(
            f"--out-dir {run.path}: cannot be written ({e.strerror}); make room there and start again: it goes on"
        ) from e
    except (MemoryError, jax.errors.JaxRuntimeError) as e:
        if isinstance(e, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(e):
            raise
        if not run.read_steps():
            run.discard()
        raise UserError(
            f"--batch-size {run.config.batch_size}: out of memory; lower it, --model.block-size or --model.n-embd"
        ) from e


class Trainer:
    """One run in this process, from its last checkpoint (or the seed) to its end."""

    def __init__(
        self,
        run: RunFolder,
        executor: parallel.Executor,
        checkpoints: checkpoint.Manager,
        task: Task,
        first_state: Callable[[], TrainState],
        display: Display,
        started: float,
    ):
        self.run, self.config, self.executor, self.display = run, run.config, executor, display
        self.task, self._first_state = task, first_state
        self.checkpoints = checkpoints
        self.state = self._restored_state()
        self.done = int(self.state.step)  # updates done
        run.rewind(self.done)
        reports = run.read_metrics()
        self.val_losses = [r["val_loss"] for r in reports]
        self.tokens_per_s = reports[-1]["tokens_per_s"] if reports else 0.0
        self.started = started - (reports[-1]["elapsed_s"] if reports else 0.0)
        self.first_step_s: float | None = None
        self._process_started = started
        self._pace = 1  # steps of the next dispatch

    @property
    def complete(self) -> bool:
        """Whether there is nothing left to train."""
        return self.done == self.config.steps or self.stopped_early

    @property
    def stopped_early(self) -> bool:
        """Whether the last --patience reports were no better than the best before them, with steps still to come."""
        patience, to_come = self.config.patience, self.done < self.config.steps
        return bool(patience and to_come) and reports_without_gain(self.val_losses, self.config.min_delta) >= patience

    def train(self, stop: list[int]) -> None:
        """Runs dispatches until the last step, or until `stop` holds a signal; saves before it returns."""
        config = self.config
        if not self.complete:
            self.state, _ = self.executor.updates(self.state, self.task.loader.take(self.done, 0), 0)  # compiles
        self.display.start(self.done, config.steps)
        seconds_all = seconds = 0.0  # in dispatches: of this process, and since the last report
        done_first = done_reported = self.done
        while not self.complete and not stop:
            for watch in self.task.watches:
                if self.done % watch.every == 0:
                    begun = time.perf_counter()
                    watch.look(self.state, self.done)
                    self._process_started += time.perf_counter() - begun  # no part of the time to the first step
            n_steps = self._next_dispatch()
            begun = time.perf_counter()
            feed = self.task.loader.take(self.done, n_steps)
            self.state, metrics = self.executor.updates(self.state, feed, n_steps)
            elapsed = time.perf_counter() - begun
            self.first_step_s = self.first_step_s or time.perf_counter() - self._process_started
            self._pace = max(1, min(self.task.loader.max_steps, round(DISPATCH_SECONDS * n_steps / elapsed)))
            seconds, seconds_all = seconds + elapsed, seconds_all + elapsed
            self._record(metrics)
            self.tokens_per_s = self._tokens(self.done - done_first) / seconds_all
            self.display.progress(self.done, float(metrics[-1, 0]), self._tokens(n_steps) / elapsed)
            val_loss, best = math.inf, min(self.val_losses, default=math.inf)
            if self._is_due(config.eval_every or self.task.steps_per_epoch, by_epoch=not config.eval_every):
                val_loss = self._report(metrics[-1], self._tokens(self.done - done_reported) / seconds)
                seconds, done_reported = 0.0, self.done
            # A run that stops early is kept as it stopped too: killed from here on, it has nothing to train again.
            if self._is_due(config.checkpoint_every) or val_loss < best or self.stopped_early:
                self._save(val_loss)
        if stop and self.done > done_first:
            self._save()
        for watch in self.task.watches:
            if watch.at_end and self.complete:
                watch.look(self.state, self.done)
        self.display.close()
        checkpoint.wait(self.checkpoints)
        self._draw()

    def finish(self) -> None:
        """The result over the whole validation split, and the summary: last, as it tells that the run is complete."""
        config, run = self.config, self.run
        early = {"stopped_early": self._take_best()} if self.stopped_early else {}
        figures, told = self.task.finish(self.state.params)
        summary = {
            "params": sum(p.size for p in self.state.params.values()),
            "steps": self.done,
            **early,
            **figures,
            "tokens_per_s": self.tokens_per_s,
            "first_step_s": self.first_step_s,
            "wall_s": time.perf_counter() - self.started,
            "device": self.executor.describe_devices(),
            "dtype": config.dtype,
            "versions": versions(),
            "data_sha256": run.data_sha256,
        }
        run_folder.write_json(run.path / "summary.json", summary)
        self.display.line(told)
        self.display.line(
            f"{summary['params']:,} parameters, {self.done} steps in {summary['wall_s']:.0f} s "
            f"({self.tokens_per_s:,.0f} tokens/s; first step after {self.first_step_s or 0:.1f} s); all in {run.path}"
        )

    def _restored_state(self) -> TrainState:
        """The last checkpoint's state, else the initial one, on the devices."""
        step = checkpoint.pick_step(self.checkpoints, "last")
        if step is None:
            # Not beside a restore, which may yet find that there is nothing to train, or nothing it can read.
            self.executor.compile_ahead(self.task.loader.take(0, 0))
            return self._first_state()
        self.display.line(f"resuming after {step} of {self.config.steps} steps")
        remedy = "remove this folder to go on from the one before it"
        return checkpoint.restore(self.checkpoints, self.executor.abstract_state(), step, remedy)

    def _take_best(self) -> dict[str, Any]:
        """Puts the best checkpoint's state in place of one that was not better; what the summary tells of it."""
        config = self.config
        best = checkpoint.pick_step(self.checkpoints, "best")
        assert best is not None, "a report that was better than all before it was kept"
        self.state = checkpoint.restore(self.checkpoints, self.executor.abstract_state(), best, "start again")
        by = f" by more than {config.min_delta:g}" if config.min_delta else ""
        self.display.line(
            f"stopped early after {self.done} of {config.steps} steps: validation loss has not fallen{by} for "
            f"{config.patience} reports; the result is the best, {min(self.val_losses):.4f} after {best} steps"
        )
        return {"patience": config.patience, "min_delta": config.min_delta, "best_step": best}

    def _next_dispatch(self) -> int:
        """How many steps to run now: what fits the pace, up to the next report, checkpoint, look or the end."""
        config, to_checkpoint = self.config, self._to_due(self.config.checkpoint_every)
        to_report = self._to_due(config.eval_every or self.task.steps_per_epoch, by_epoch=not config.eval_every)
        to_look = [watch.every - self.done % watch.every for watch in self.task.watches]
        return min(self._pace, to_report, to_checkpoint, config.steps - self.done, *to_look)

    def _is_due(self, every: int, by_epoch: bool = False) -> bool:
        """Whether the step just done is a multiple of `every`, counted from 0, or ends an epoch, or is the last."""
        return self._to_due(every, by_epoch) == every or self.done == self.config.steps

    def _to_due(self, every: int, by_epoch: bool = False) -> int:
        return every - (self.done - (not by_epoch)) % every

    def _record(self, metrics: np.ndarray) -> None:
        """Counts and writes down a dispatch's steps. Raises `LossNotFinite` at the first that went wrong."""
        rows = []
        for loss, grad_norm in metrics.tolist():
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                self.run.append_steps(rows)
                raise self._not_finite(f"step {self.done}: loss {loss}, gradient norm {grad_norm}")
            rows.append((self.done, loss, grad_norm, learning_rate(self.config, self.done)))
            self.done += 1
        self.run.append_steps(rows)

    def _report(self, metrics: np.ndarray, tokens_per_s: float) -> float:
        """Evaluates on random validation batches and reports the step just done; returns the validation loss."""
        loss, grad_norm = metrics.tolist()
        figures = self._validated()
        epoch = {"epoch": self.done / self.task.steps_per_epoch} if self.task.steps_per_epoch else {}
        report = {
            "step": self.done - 1,
            **epoch,
            "train_loss": loss,
            **figures,
            "lr": learning_rate(self.config, self.done - 1),
            "grad_norm": grad_norm,
            "tokens_per_s": tokens_per_s,
            "elapsed_s": time.perf_counter() - self.started,
        }
        self.run.append("metrics.jsonl", report)
        self.val_losses.append(figures["val_loss"])
        self.display.report(report, self.task.line(report, self.config.steps))
        return figures["val_loss"]

    def _validated(self, n_batches: int | None = None) -> dict[str, float]:
        """The task's figures of the state as it is. Raises `LossNotFinite`."""
        figures = self.task.validate(self.state.params, self.done, n_batches)
        if not math.isfinite(figures["val_loss"]):
            raise self._not_finite(f"step {self.done - 1}: validation loss {figures['val_loss']} after the update")
        return figures

    def _save(self, val_loss: float = math.inf) -> None:
        """Keeps the state, with its validation loss if it was just measured."""
        if val_loss == math.inf:
            self._validated(1)  # an update can overflow after a finite loss: never keep such a state
        self.run.flush()
        checkpoint.save(self.checkpoints, self.state, val_loss if val_loss < math.inf else None)

    def _not_finite(self, what: str) -> LossNotFinite:
        checkpoint.wait(self.checkpoints)
        step = checkpoint.pick_step(self.checkpoints, "last")
        kept = f"the state after {step} steps is kept in {self.run.checkpoints}" if step else "no checkpoint yet"
        return LossNotFinite(f"{what}; {kept}; try a lower --lr or --clip 1 in another --out-dir")

    def _tokens(self, steps: int) -> int:
        return steps * self.config.tokens_per_step

    def _draw(self) -> None:
        from jaxgpt.report import learning_curves  # imports matplotlib, which the first step need not wait for

        learning_curves(
            self.run.path / "learning_curves.png", self.task.title, self.run.read_steps(), self.run.read_metrics()
        )


def reports_without_gain(val_losses: Sequence[float], min_delta: float) -> int:
    """How many of the last reports in a row were not below the best before them by more than `min_delta`."""
    best, waited = math.inf, 0
    for val_loss in val_losses:
        best, waited = (val_loss, 0) if val_loss < best - min_delta else (best, waited + 1)
    return waited


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yields a list that SIGINT, SIGTERM or SIGHUP is appended to; a second signal acts as if this were not here."""
    received: list[int] = []
    before: dict[int, Any] = {}

    def handle(number: int, _frame: Any) -> None:
        received.append(number)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before |= handle_stop_signals(handle)
    try:
        yield received
    finally:
        restore()


def new_folder(dataset: str, kind: str) -> Path:
    """runs/<dataset>-<kind>-<time>, one that is not there yet."""
    dataset = re.sub(r"[^\w.-]+", "_", Path(dataset).stem if "/" in dataset else dataset)
    stem = Path("runs") / f"{dataset}-{kind}-{datetime.now():%Y%m%d-%H%M%S}"
    for number in range(1000):
        path = stem if not number else stem.with_name(f"{stem.name}-{number}")
        if not os.path.lexists(path):
            return path
    raise UserError(f"--out-dir: {stem} and a thousand others exist; name one")
