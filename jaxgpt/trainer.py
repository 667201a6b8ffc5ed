"""The training loop: dispatches of K steps, reports, checkpoints, and the result in the run folder at the end."""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from jaxgpt import distributed, parallel
from jaxgpt.callbacks import Callback
from jaxgpt.config import FaultPolicy
from jaxgpt.data.loader import Loader
from jaxgpt.errors import LossNotFinite, OutputError, UserError
from jaxgpt.optimizer import SkipState, learning_rate
from jaxgpt.parallel import Executor
from jaxgpt.runs import files
from jaxgpt.runs.checkpoint import Checkpoints
from jaxgpt.runs.run_dir import RunDir
from jaxgpt.runtime import long_step_note
from jaxgpt.signals import exit_code, stop_signals, warning_signals
from jaxgpt.train_step import TrainState
from jaxgpt.versions import versions

MAX_SKIPPED = 5  # updates skipped in a row; then training stops
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
    headline: str,
    make_task: Callable[[], Task],
    first_state: Callable[[], TrainState],
    callbacks: Sequence[Callback],
    say: Callable[[str], None],
    started: float,
    policy: FaultPolicy = FaultPolicy(),  # noqa: B008  (frozen)
) -> int:
    """Trains to the end, or until a signal stops it or standard output is lost; saves before it returns or raises.

    A run resumes from its last checkpoint; a finished one is left as it is.

    Args:
        headline: what is trained on what, for a person.
        first_state: the state of a run that has no checkpoint yet.
        callbacks: beside those of the task.
        say: takes lines for a person.
        started: `time.perf_counter()` at the command's start, for the time to the first step.
        policy: what to do about warning signals and failed saves.

    Returns:
        The command's exit code: 0, also if a warning signal stopped the run, or 128 + the signal that did.

    Raises:
        UserError: the disk is full, the memory exhausted, or standard output cannot be written (`OutputError`).
        BrokenPipeError: nobody reads standard output any more.
        LossNotFinite: a loss, a gradient norm or the state is not finite; the checkpoints hold earlier states.
    """
    if run.finished:
        say(f"{run.path}: finished already; --overwrite starts again")
        return 0
    if run.problem:
        say(f"{run.path}: {run.problem}; making it anew")
    say(headline)
    say(f"run folder: {run.path}")
    if note := long_step_note(executor):
        say(note)
    checkpoints = Checkpoints(run, run.config.keep_checkpoints)
    task = None
    try:
        with _reported_as_user_error(run), warning_signals() as warnings:
            with stop_signals() as stop:
                task = make_task()
                trainer = Trainer(run, executor, checkpoints, task, first_state, callbacks, say, started, policy)
                trainer.train(stop, warnings)
            if trainer.lost_output is not None:
                raise trainer.lost_output
            if trainer.complete:  # all is saved: a stop signal ends the process at once, a warning changes nothing
                trainer.finish()
                return 0
    finally:
        for callback in callbacks:
            callback.close()
        if task is not None:
            task.loader.close()
        checkpoints.close()
    say(
        f"stopped after {trainer.done} of {run.config.steps} steps, all saved; "
        f"the same command with --out-dir {run.path} goes on"
    )
    return exit_code([*trainer.stopped_by, *stop, *warnings])


@contextlib.contextmanager
def _reported_as_user_error(run: RunDir) -> Iterator[None]:
    """Turns a full disk and exhausted memory into a `UserError`; discards a run that did not make its first step."""
    try:
        yield
    except BrokenPipeError:  # of standard output: no file is a pipe
        raise
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
            f"--batch-size {run.config.batch_size}: out of memory; divide it with --grad-accum, or lower it or "
            "--model.block-size"
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
        checkpoints: Checkpoints,
        task: Task,
        first_state: Callable[[], TrainState],
        callbacks: Sequence[Callback],
        say: Callable[[str], None],
        started: float,
        policy: FaultPolicy = FaultPolicy(),  # noqa: B008  (frozen)
    ):
        self.run, self.config, self.executor, self.say = run, run.config, executor, say
        self.policy = policy
        self.lost_output: BrokenPipeError | OutputError | None = None  # the error, once a line could not be printed
        self.stopped_by: list[int] = []  # the signals for which training has stopped
        self.task, self._first_state = task, first_state
        self.callbacks = [*callbacks, *task.callbacks]
        self._periodic = [callback for callback in self.callbacks if callback.every]
        self.checkpoints = checkpoints
        self.state = self._restored_state()
        self.done = int(self.state.step)  # steps done, skipped updates included
        skips = self.state.opt_state if isinstance(self.state.opt_state, SkipState) else None
        self.skipped_steps, self._skipped_in_a_row = (int(skips.skipped), int(skips.in_a_row)) if skips else (0, 0)
        self._learning_rate = math.nan  # of the last step
        self._save_failed = False  # the last one that was tried
        self._measured: float | None = None  # its validation loss
        reports = distributed.broadcast(distributed.on_first(run.read_metrics)) or []
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

    def train(self, stop: list[int], warnings: list[int]) -> None:
        """Dispatches steps until the last one, or until it is to stop; saves before it returns.

        Args:
            stop, warnings: the signals that this process has received so far. The warnings handled are taken out.
        """
        config = self.config
        if not self.complete:
            self.state, _ = self.executor.train_steps(self.state, self.task.loader.take(self.done, 0), 0)  # compiles
        self._call("on_train_begin", self.done, config.steps)
        seconds_all = seconds = 0.0  # of dispatches: in this process, and since the last report
        done_first = done_reported = self.done
        while not self.complete:
            n_warnings = len(warnings)  # one that arrives after this is for the next round
            is_to_stop, warned = self._agree(stop, warnings[:n_warnings])
            if warned and not is_to_stop and self.done > done_first:
                self._save_and_go_on(warned)
                del warnings[:n_warnings]
            if is_to_stop:
                break
            self._call_periodic()
            n_steps = self._next_dispatch()
            begun = time.perf_counter()
            source = self._take(n_steps, self.done > done_first)
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
        if not self.complete and self.done > done_first:
            self._save()
        for callback in self._periodic:
            if callback.at_end and self.complete:
                self._may_print(callback.on_step, self.state, self.done)
        self._finish_saves()
        self._call("on_train_end", self.done)

    def finish(self) -> None:
        """Evaluates the result and writes summary.json and the manifest of the finished run."""
        config, run = self.config, self.run
        early = {"stopped_early": self._restore_best()} if self.stopped_early else {}
        figures, text = self.task.finish(self.state.params)
        summary = {
            "params": sum(p.size for p in self.state.params.values()),
            "steps": self.done,
            **early,
            **self._skipped(),
            **figures,
            "tokens_per_s": self.tokens_per_s,
            "first_step_s": self.first_step_s,
            "wall_s": time.perf_counter() - self.started,
            "device": self.executor.describe_devices(),
            "dtype": config.dtype,
            "versions": versions(),
            "data_sha256": run.data_sha256,
        }
        run.write_text("summary.json", files.json_text(summary))
        run.finish(self.done)
        self.say(text)
        self.say(
            f"{summary['params']:,} parameters, {self.done} steps in {summary['wall_s']:.0f} s "
            f"({self.tokens_per_s:,.0f} tokens/s; first step after {self.first_step_s or 0:.1f} s); all in {run.path}"
        )

    def _take(self, n_steps: int, has_trained: bool) -> Any:
        """The source of the next batches. Saves first, if they cannot be had: a corpus may be out of reach for long."""
        try:
            return self.task.loader.take(self.done, n_steps)
        except UserError:
            # Of several processes the others wait for this one in the next step, and can save nothing.
            if has_trained and not distributed.is_distributed():
                self._save()
                self._finish_saves()
            raise

    def _call(self, hook: str, *args: Any) -> None:
        for callback in self.callbacks:
            self._may_print(getattr(callback, hook), *args)

    def _may_print(self, function: Callable[..., Any], *args: Any) -> None:
        """Calls what may print. Output that is lost stops the training as a signal does: after a save."""
        try:
            function(*args)
        except (BrokenPipeError, OutputError) as e:
            self.lost_output = self.lost_output or e

    def _agree(self, stop: Sequence[int], warnings: Sequence[int]) -> tuple[bool, list[int]]:
        """What all processes do next: whether they stop here, and the warning signals that any has received.

        A signal to one of them is one to all. They dispatch as many steps as the slowest measured.
        """
        received = [sum(1 << number for number in set(signals)) for signals in (stop, warnings)]  # as bits
        rows = distributed.all_gather([*received, self.lost_output is not None, self._steps_per_dispatch])
        of_any = np.bitwise_or.reduce(rows[:, :2]).tolist()
        stopped, warned = ([n for n in range(32) if bits >> n & 1] for bits in of_any)
        self._steps_per_dispatch = int(rows[:, 3].min())
        if self.policy.on_warning_signal == "stop":
            stopped += warned
        self.stopped_by = stopped
        if rows[:, 2].any():
            self.lost_output = self.lost_output or OutputError("process 0 cannot write to its standard output any more")
        return bool(stopped or self.lost_output), warned

    def _save_and_go_on(self, warnings: Sequence[int]) -> None:
        """Saves for warning signals."""
        names = " and ".join(signal.Signals(number).name for number in warnings)
        self._save()
        if not self._save_failed and self._tried(self.checkpoints.wait):
            line = f"{names}: saved after {self.done} of {self.config.steps} steps; training goes on"
            self._may_print(self.say, line)

    def _call_periodic(self) -> None:
        """Calls `on_step` where it is due. Its time is no part of the time to the first step."""
        begun = time.perf_counter()
        for callback in self._periodic:
            if self.done % callback.every == 0:
                self._may_print(callback.on_step, self.state, self.done)
        self._process_started += time.perf_counter() - begun

    def _restored_state(self) -> TrainState:
        """The last sound checkpoint's state, else the initial one, on the devices; the records end where it does."""
        state = self.checkpoints.restore_last(self.executor.abstract_state, self.say, records=True)
        if state is None:
            # Only here: a restore may find that there is nothing left to train, or nothing it can read.
            self.executor.compile_ahead(self.task.loader.take(0, 0))
            distributed.on_first(lambda: self.run.rewind(0, None))
            return self._first_state()
        step = int(state.step)
        self.say(f"resuming after {step} of {self.config.steps} steps")
        distributed.on_first(lambda: self._rewind(step))
        return state

    def _rewind(self, step: int) -> None:
        """Leaves in the run's folder what belongs to the state after `step` updates, and to those before it."""
        self.checkpoints.go_on_from(step, self.say)
        written = self.checkpoints.manifest(step)
        self.run.rewind(step, written.records if written else None)

    def _restore_best(self) -> dict[str, Any]:
        """Makes the best checkpoint's state the run's result; returns what summary.json says of the early stop."""
        config = self.config
        best = distributed.broadcast(distributed.on_first(self.checkpoints.best_step))
        assert best is not None, "every improvement was saved"
        self.state = self.checkpoints.restore(best, self.executor.abstract_state())
        written = self.checkpoints.manifest(best)
        val_loss = min(self.val_losses) if written is None or written.val_loss is None else written.val_loss
        by = f" by more than {config.min_delta:g}" if config.min_delta else ""
        self.say(
            f"stopped early after {self.done} of {config.steps} steps: validation loss has not fallen{by} for "
            f"{config.patience} reports; the result is the best, {val_loss:.4f} after {best} steps"
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
        """Counts and records the steps of a dispatch.

        Raises `LossNotFinite` at the first loss that is not finite, or with --on-nonfinite skip or --skip-spikes at the
        fifth update skipped in a row.
        """
        rows, lines = [], []
        for loss, grad_norm, *skipped in metrics.tolist():
            what = f"step {self.done}: loss {loss}, gradient norm {grad_norm}"
            finite = math.isfinite(loss) and math.isfinite(grad_norm)
            if not finite and self.config.on_nonfinite == "stop":
                self.run.append_steps(rows)
                raise self._not_finite(what)
            # The schedule counts the updates applied: of a skipped one this is the rate that it would have had.
            self._learning_rate = learning_rate(self.config, self.done - self.skipped_steps)
            rows.append((self.done, loss, grad_norm, self._learning_rate))
            self.done += 1
            if any(skipped):
                self.skipped_steps += 1
                self._skipped_in_a_row += 1
                lines.append(f"{what}; update skipped")
            else:
                self._skipped_in_a_row = 0
            if self._skipped_in_a_row == MAX_SKIPPED:
                self.run.append_steps(rows)
                raise self._not_finite(f"{what}, the {MAX_SKIPPED}th update skipped in a row")
        self.run.append_steps(rows)
        for line in lines:
            self._may_print(self.say, line)

    def _skipped(self) -> dict[str, int]:
        """What reports and summary.json say of skipped updates, where there may be any."""
        return {"skipped_steps": self.skipped_steps} if self.config.skips_updates else {}

    def _report(self, metrics: np.ndarray, tokens_per_s: float) -> float:
        """Validates, and reports the step just done; returns the validation loss."""
        loss, grad_norm = metrics.tolist()[:2]
        figures = self._validated()
        epoch = {"epoch": self.done / self.task.steps_per_epoch} if self.task.steps_per_epoch else {}
        report = {
            "step": self.done - 1,
            **epoch,
            "train_loss": loss,
            **figures,
            "lr": self._learning_rate,
            "grad_norm": grad_norm,
            **self._skipped(),
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
        """Saves the state, with its validation loss if it was just measured.

        Raises:
            LossNotFinite: an update can overflow after a finite loss; such a state is never saved.
            UserError: it could not be saved. With --on-save-error continue this is a line instead.
        """
        if val_loss == math.inf:
            self._validated(1)
        self._require_finite_state()
        self._measured = val_loss if val_loss < math.inf else None
        if self.policy.on_save_error == "continue":
            # A save in the background reports its failure at the next call, which would then not save.
            self._tried(self.checkpoints.wait)
        self._save_failed = not self._tried(self._write_checkpoint)

    def _write_checkpoint(self) -> None:
        self.checkpoints.save(self.state, self._measured, stopped_early=self.stopped_early)

    def _finish_saves(self) -> None:
        """Waits for the last save. One that failed is tried once more. Raises `UserError`."""
        waited = self._tried(self.checkpoints.wait)
        if self._save_failed or not waited:
            self._write_checkpoint()
            self.checkpoints.wait()

    def _tried(self, save: Callable[[], None]) -> bool:
        """Whether a part of a save succeeded.

        A failure raises `UserError`, or with --on-save-error continue prints a line. Without any checkpoint there would
        be nothing to resume from, so the first one has to succeed.
        """
        try:
            save()
        except UserError as e:
            if self.policy.on_save_error == "stop" or not self.checkpoints.steps():
                raise
            self._may_print(self.say, f"not saved, training goes on: {e}")
            return False
        return True

    def _require_finite_state(self) -> None:
        """Raises `LossNotFinite` with the first of the state's arrays that holds NaN or infinity."""
        leaves = jax.tree_util.tree_leaves_with_path(self.state)
        # On the host, to which the save copies the state anyway: a program for it would take a second to compile.
        finite = (all(map(_all_finite, parallel.addressable_values(leaf))) for _, leaf in leaves)
        here = next((i for i, all_finite in enumerate(finite) if not all_finite), len(leaves))
        if (first := int(distributed.all_gather([here]).min())) < len(leaves):
            name = jax.tree_util.keystr(leaves[first][0], simple=True, separator=".")
            raise self._not_finite(f"step {self.done - 1}: {name} is not finite after the update")

    def _not_finite(self, what: str) -> LossNotFinite:
        self._tried(self.checkpoints.wait)
        steps = self.checkpoints.steps()
        kept = f"the state after {steps[-1]} steps is kept in {self.run.checkpoints}" if steps else "no checkpoint yet"
        return LossNotFinite(f"{what}; {kept}; try a lower --lr or --clip 1 in another --out-dir")

    def _tokens(self, steps: int) -> int:
        return steps * self.config.tokens_per_step


def _all_finite(values: np.ndarray) -> bool:
    """Whether all values are finite: so they are if their sum is, which is one fast pass without a temporary array."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(values.sum()) or np.isfinite(values).all())


def reports_without_gain(val_losses: Sequence[float], min_delta: float) -> int:
    """How many of the last reports in a row have not improved on the best before them by more than `min_delta` nats."""
    best, waited = math.inf, 0
    for val_loss in val_losses:
        best, waited = (val_loss, 0) if val_loss < best - min_delta else (best, waited + 1)
    return waited
