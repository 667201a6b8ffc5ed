"""The training loop: dispatches of K steps, reports, checkpoints, and the result in the run folder at the end."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from jaxgpt.callbacks import Callback
from jaxgpt.data.loader import Loader
from jaxgpt.errors import LossNotFinite, UserError
from jaxgpt.optimizer import learning_rate
from jaxgpt.parallel import Executor
from jaxgpt.runs import checkpoint, run_dir
from jaxgpt.runs.run_dir import RunDir
from jaxgpt.signals import stop_signals
from jaxgpt.train_step import TrainState
from jaxgpt.versions import versions

DISPATCH_SECONDS = 1.0  # long against the cost of a dispatch (about 8 ms on a CPU), short for a progress bar and Ctrl-C


class Task(Protocol):
    """What is trained: its batches, its validation, its result. `tasks/` has a module for each task."""

    loader: Loader
    callbacks: Sequence[Callback]
    steps_per_epoch: int | None

    def validate(self, params: Any, step: int, n_batches: int | None = None) -> dict[str, float]:
        """Figures of the state after `step` updates, "val_loss" among them, on the first batches or on all."""
        ...

    def line(self, report: dict[str, Any], n_steps: int) -> str:
        """A report as a line for a person."""
        ...

    def finish(self, params: Any) -> tuple[dict[str, Any], str]:
        """The result of the run: figures for summary.json, and text for a person."""
        ...


def run_training(
    run: RunDir,
    executor: Executor,
    make_task: Callable[[], Task],
    first_state: Callable[[], TrainState],
    callbacks: Sequence[Callback],
    say: Callable[[str], None],
    started: float,
) -> int:
    """Trains to the end, or until a stop signal; a run resumes from its last checkpoint.

    Args:
        first_state: the state of a run that has no checkpoint yet.
        callbacks: beside those of the task.
        say: takes lines for a person.
        started: `time.perf_counter()` at the command's start, for the time to the first step.

    Returns:
        The command's exit code: 0, or 128 + the signal that stopped the run.

    Raises:
        UserError: the disk is full or the memory exhausted.
        LossNotFinite: a loss or gradient norm is not finite; the checkpoints hold earlier states.
    """
    checkpoints = checkpoint.open_checkpoints(run.checkpoints, run.config.keep_checkpoints)
    task = None
    try:
        with _reported_as_user_error(run):
            with stop_signals() as stop:
                task = make_task()
                trainer = Trainer(run, executor, checkpoints, task, first_state, callbacks, say, started)
                trainer.train(stop)
            if trainer.complete:  # all is saved: from here on a signal ends the process at once
                trainer.finish()
                return 0
    finally:
        for callback in callbacks:
            callback.close()
        if task is not None:
            task.loader.close()
        with contextlib.suppress(Exception):  # a failed save has raised its error already
            checkpoints.close()
    say(
        f"stopped after {trainer.done} of {run.config.steps} steps, all saved; "
        f"the same command with --out-dir {run.path} goes on"
    )
    return 128 + stop[0]


@contextlib.contextmanager
def _reported_as_user_error(run: RunDir) -> Iterator[None]:
    """Turns a full disk and exhausted memory into a `UserError`; discards a run that did not make its first step."""
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
    """One run in this process, from its last checkpoint (or the seed) to its end.

    Args:
        as `run_training`.
    """

    def __init__(
        self,
        run: RunDir,
        executor: Executor,
        checkpoints: checkpoint.Manager,
        task: Task,
        first_state: Callable[[], TrainState],
        callbacks: Sequence[Callback],
        say: Callable[[str], None],
        started: float,
    ):
        self.run, self.config, self.executor, self.say = run, run.config, executor, say
        self.task, self._first_state = task, first_state
        self.callbacks = [*callbacks, *task.callbacks]
        self._periodic = [callback for callback in self.callbacks if callback.every]
        self.checkpoints = checkpoints
        self.state = self._restored_state()
        self.done = int(self.state.step)  # updates done
        run.rewind(self.done)
        reports = run.read_metrics()
        self.val_losses = [report["val_loss"] for report in reports]
        self.tokens_per_s = reports[-1]["tokens_per_s"] if reports else 0.0
        self.started = started - (reports[-1]["elapsed_s"] if reports else 0.0)
        self.first_step_s: float | None = None
        self._process_started = started
        self._steps_per_dispatch = 1

    @property
    def complete(self) -> bool:
        """Whether there is nothing left to train."""
        return self.done == self.config.steps or self.stopped_early

    @property
    def stopped_early(self) -> bool:
        """Whether the last --patience reports have not improved on the best before them, with steps still to come."""
        patience, to_come = self.config.patience, self.done < self.config.steps
        return bool(patience and to_come) and reports_without_gain(self.val_losses, self.config.min_delta) >= patience

    def train(self, stop: list[int]) -> None:
        """Dispatches steps until the last one, or until `stop` holds a signal; saves before it returns."""
        config = self.config
        if not self.complete:
            self.state, _ = self.executor.train_steps(self.state, self.task.loader.take(self.done, 0), 0)  # compiles
        self._call("on_train_begin", self.done, config.steps)
        seconds_all = seconds = 0.0  # of dispatches: in this process, and since the last report
        done_first = done_reported = self.done
        while not self.complete and not stop:
            self._call_periodic()
            n_steps = self._next_dispatch()
            begun = time.perf_counter()
            source = self.task.loader.take(self.done, n_steps)
            self.state, metrics = self.executor.train_steps(self.state, source, n_steps)
            elapsed = time.perf_counter() - begun
            self.first_step_s = self.first_step_s or time.perf_counter() - self._process_started
            in_time = round(DISPATCH_SECONDS * n_steps / elapsed)
            self._steps_per_dispatch = max(1, min(self.task.loader.max_steps, in_time))
            seconds, seconds_all = seconds + elapsed, seconds_all + elapsed
            self._record(metrics)
            self.tokens_per_s = self._tokens(self.done - done_first) / seconds_all
            self._call("on_dispatch", self.done, float(metrics[-1, 0]), self._tokens(n_steps) / elapsed)
            val_loss, best = math.inf, min(self.val_losses, default=math.inf)
            if self._report_is_due():
                val_loss = self._report(metrics[-1], self._tokens(self.done - done_reported) / seconds)
                seconds, done_reported = 0.0, self.done
            # The state at an early stop is saved too: a run killed after it has nothing to train again.
            if self._is_due(config.checkpoint_every) or val_loss < best or self.stopped_early:
                self._save(val_loss)
        if stop and self.done > done_first:
            self._save()
        for callback in self._periodic:
            if callback.at_end and self.complete:
                callback.on_step(self.state, self.done)
        checkpoint.wait(self.checkpoints)
        self._call("on_train_end", self.done)

    def finish(self) -> None:
        """Evaluates the result and writes summary.json, last of all: its presence says that the run is complete."""
        config, run = self.config, self.run
        early = {"stopped_early": self._restore_best()} if self.stopped_early else {}
        figures, text = self.task.finish(self.state.params)
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
        run_dir.write_json(run.path / "summary.json", summary)
        self.say(text)
        self.say(
            f"{summary['params']:,} parameters, {self.done} steps in {summary['wall_s']:.0f} s "
            f"({self.tokens_per_s:,.0f} tokens/s; first step after {self.first_step_s or 0:.1f} s); all in {run.path}"
        )

    def _call(self, hook: str, *args: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(*args)

    def _call_periodic(self) -> None:
        """Calls `on_step` where it is due. Its time is no part of the time to the first step."""
        begun = time.perf_counter()
        for callback in self._periodic:
            if self.done % callback.every == 0:
                callback.on_step(self.state, self.done)
        self._process_started += time.perf_counter() - begun

    def _restored_state(self) -> TrainState:
        """The last checkpoint's state, else the initial one, on the devices."""
        step = checkpoint.pick_step(self.checkpoints, "last")
        if step is None:
            # Only here: a restore may find that there is nothing left to train, or nothing it can read.
            self.executor.compile_ahead(self.task.loader.take(0, 0))
            return self._first_state()
        self.say(f"resuming after {step} of {self.config.steps} steps")
        remedy = "remove this folder to go on from the one before it"
        return checkpoint.restore(self.checkpoints, self.executor.abstract_state(), step, remedy)

    def _restore_best(self) -> dict[str, Any]:
        """Makes the best checkpoint's state the run's result; returns what summary.json says of the early stop."""
        config = self.config
        best = checkpoint.pick_step(self.checkpoints, "best")
        assert best is not None, "every improvement was saved"
        self.state = checkpoint.restore(self.checkpoints, self.executor.abstract_state(), best, "start again")
        by = f" by more than {config.min_delta:g}" if config.min_delta else ""
        self.say(
            f"stopped early after {self.done} of {config.steps} steps: validation loss has not fallen{by} for "
            f"{config.patience} reports; the result is the best, {min(self.val_losses):.4f} after {best} steps"
        )
        return {"patience": config.patience, "min_delta": config.min_delta, "best_step": best}

    def _next_dispatch(self) -> int:
        """How many steps to dispatch: what fits a dispatch, up to the next report, checkpoint, callback or the end."""
        to_checkpoint = self._steps_to(self.config.checkpoint_every)
        to_report = self._steps_to(*self._report_period)
        to_callback = [callback.every - self.done % callback.every for callback in self._periodic]
        to_end = self.config.steps - self.done
        return min(self._steps_per_dispatch, to_report, to_checkpoint, to_end, *to_callback)

    @property
    def _report_period(self) -> tuple[int, bool]:
        """The steps between reports, and whether those are epochs."""
        if self.config.eval_every:
            return self.config.eval_every, False
        assert self.task.steps_per_epoch, "only data with epochs may report after each"
        return self.task.steps_per_epoch, True

    def _report_is_due(self) -> bool:
        return self._is_due(*self._report_period)

    def _is_due(self, every: int, by_epoch: bool = False) -> bool:
        """Whether the step just done is a multiple of `every`, counted from 0, or ends an epoch, or is the last."""
        return self._steps_to(every, by_epoch) == every or self.done == self.config.steps

    def _steps_to(self, every: int, by_epoch: bool = False) -> int:
        """How many steps from now on until one is due."""
        return every - (self.done - (not by_epoch)) % every

    def _record(self, metrics: np.ndarray) -> None:
        """Counts and records the steps of a dispatch. Raises `LossNotFinite` at the first loss that is not finite."""
        rows = []
        for loss, grad_norm in metrics.tolist():
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                self.run.append_steps(rows)
                raise self._not_finite(f"step {self.done}: loss {loss}, gradient norm {grad_norm}")
            rows.append((self.done, loss, grad_norm, learning_rate(self.config, self.done)))
            self.done += 1
        self.run.append_steps(rows)

    def _report(self, metrics: np.ndarray, tokens_per_s: float) -> float:
        """Validates, and reports the step just done; returns the validation loss."""
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
        self._call("on_report", report, self.task.line(report, self.config.steps))
        return figures["val_loss"]

    def _validated(self, n_batches: int | None = None) -> dict[str, float]:
        """The task's figures of the present state. Raises `LossNotFinite`."""
        figures = self.task.validate(self.state.params, self.done, n_batches)
        if not math.isfinite(figures["val_loss"]):
            raise self._not_finite(f"step {self.done - 1}: validation loss {figures['val_loss']} after the update")
        return figures

    def _save(self, val_loss: float = math.inf) -> None:
        """Saves the state, with its validation loss if it was just measured."""
        if val_loss == math.inf:
            self._validated(1)  # an update can overflow after a finite loss: such a state is never saved
        self.run.flush()
        checkpoint.save(self.checkpoints, self.state, val_loss if val_loss < math.inf else None)

    def _not_finite(self, what: str) -> LossNotFinite:
        checkpoint.wait(self.checkpoints)
        step = checkpoint.pick_step(self.checkpoints, "last")
        kept = f"the state after {step} steps is kept in {self.run.checkpoints}" if step else "no checkpoint yet"
        return LossNotFinite(f"{what}; {kept}; try a lower --lr or --clip 1 in another --out-dir")

    def _tokens(self, steps: int) -> int:
        return steps * self.config.tokens_per_step


def reports_without_gain(val_losses: Sequence[float], min_delta: float) -> int:
    """How many of the last reports in a row have not improved on the best before them by more than `min_delta` nats."""
    best, waited = math.inf, 0
    for val_loss in val_losses:
        best, waited = (val_loss, 0) if val_loss < best - min_delta else (best, waited + 1)
    return waited
