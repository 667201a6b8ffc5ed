"""The training loop: dispatches of K steps, reports, checkpoints, and what is left in the run folder at the end."""

import contextlib
import dataclasses
import math
import os
import re
import signal
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgpt import batches, checkpoint, parallel, run_folder
from jaxgpt.config import SamplingConfig, TrainConfig
from jaxgpt.console import Display
from jaxgpt.datasets import Corpus, cache_folder, sample_prompt, split_tokens
from jaxgpt.errors import LossNotFinite, UserError
from jaxgpt.generate import generate
from jaxgpt.loss import perplexity
from jaxgpt.optimizer import learning_rate
from jaxgpt.run_folder import RunFolder
from jaxgpt.tokenizer import Tokenizer, decode, make_tokenizer
from jaxgpt.train_step import MAX_STEPS_PER_DISPATCH, Program, TrainState
from jaxgpt.versions import versions

DISPATCH_SECONDS = 0.25  # long against the cost of a dispatch (about 1 ms), short for a progress bar and Ctrl-C


def train(
    config: TrainConfig, corpus: Corpus, out_dir: Path | None, overwrite: bool, display: Display, started: float
) -> int:
    """Trains a run to its end, or goes on with the one in `out_dir`.

    Args:
        out_dir: the run folder; None makes a new one under runs/.
        started: `time.perf_counter()` at the command's start, for the time to the first step.

    Returns:
        The command's exit code: 0, or 128 + the signal that stopped the run.

    Raises:
        UserError: before anything is written; or the disk is full or the memory exhausted while it trains.
        LossNotFinite: a loss or gradient norm is not finite; the checkpoints hold states from before it.
    """
    tokenizer = make_tokenizer(config.tokenizer, corpus.text)
    train_tokens, val_tokens = split_tokens(corpus, tokenizer, config.model.block_size)
    prompt = sample_prompt(config.prompt, tokenizer, corpus)
    parallel.prepare(config, cache_folder() / "xla")
    numerics = parallel.numerics(config)
    # The run keeps the dtype that "auto" stood for here: it must not change on a machine of another kind.
    config = dataclasses.replace(config, dtype=np.dtype(numerics.compute_dtype).name)
    executor = parallel.Executor(Program(config, tokenizer.vocab_size, numerics))
    with stop_signals() as stop:
        run = run_folder.create(out_dir or _new_folder(config), config, tokenizer, corpus, overwrite)
        if (run.path / "summary.json").exists():
            display.line(f"{run.path}: finished already; --overwrite starts again")
            return 0
        display.line(
            f"{config.preset} on {corpus.name} ({len(train_tokens):,} training and {len(val_tokens):,} validation "
            f"tokens, vocabulary {tokenizer.vocab_size}) on {parallel.describe_devices()} in {config.dtype}, "
            f"--parallel {config.parallel}"
        )
        display.line(f"run folder: {run.path}")
        checkpoints = checkpoint.open_checkpoints(run.checkpoints, config.keep_checkpoints)
        try:
            with _told_in_one_line(run):
                trainer = Trainer(run, executor, checkpoints, train_tokens, val_tokens, display, started)
                trainer.train(stop)
                if trainer.done == config.steps:  # a signal from here on finds all saved and the end seconds away
                    trainer.finish(prompt)
                    return 0
        finally:
            display.close()
            with contextlib.suppress(Exception):  # what a failed save still has to say was said
                checkpoints.close()
    display.line(
        f"stopped after {trainer.done} of {config.steps} steps, all saved; "
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
        train_tokens: np.ndarray,
        val_tokens: np.ndarray,
        display: Display,
        started: float,
    ):
        self.run, self.config, self.executor, self.display = run, run.config, executor, display
        vocab_size = run.tokenizer.vocab_size
        self.train_tokens = executor.put(batches.device_tokens(train_tokens, vocab_size))
        self.val_tokens = executor.put(batches.device_tokens(val_tokens, vocab_size))
        self._val_starts = jax.jit(self._validation_starts)
        self.checkpoints = checkpoints
        self.state = self._restored_state()
        self.done = int(self.state.step)  # updates done
        run.rewind(self.done)
        reports = run.read_metrics()
        self.best_val_loss = min((r["val_loss"] for r in reports), default=math.inf)
        self.tokens_per_s = reports[-1]["tokens_per_s"] if reports else 0.0
        self.started = started - (reports[-1]["elapsed_s"] if reports else 0.0)
        self.first_step_s: float | None = None
        self._process_started = started
        self._pace = 1  # steps of the next dispatch

    def train(self, stop: list[int]) -> None:
        """Runs dispatches until the last step, or until `stop` holds a signal; saves before it returns."""
        config = self.config
        if self.done < config.steps:
            self.state, _ = self.executor.updates(self.state, self.train_tokens, 0)  # compiles
        self.display.start(self.done, config.steps)
        seconds_all = seconds = 0.0  # in dispatches: of this process, and since the last report
        done_first = done_reported = self.done
        while self.done < config.steps and not stop:
            n_steps = self._next_dispatch()
            begun = time.perf_counter()
            self.state, metrics = self.executor.updates(self.state, self.train_tokens, n_steps)
            elapsed = time.perf_counter() - begun
            self.first_step_s = self.first_step_s or time.perf_counter() - self._process_started
            self._pace = max(1, min(MAX_STEPS_PER_DISPATCH, round(DISPATCH_SECONDS * n_steps / elapsed)))
            seconds, seconds_all = seconds + elapsed, seconds_all + elapsed
            self._record(metrics)
            self.tokens_per_s = self._tokens(self.done - done_first) / seconds_all
            self.display.progress(self.done, float(metrics[-1, 0]), self._tokens(n_steps) / elapsed)
            val_loss = math.inf
            if self._is_due(config.eval_every):
                val_loss = self._report(metrics[-1], self._tokens(self.done - done_reported) / seconds)
                seconds, done_reported = 0.0, self.done
            if self._is_due(config.checkpoint_every) or val_loss < self.best_val_loss:
                self._save(val_loss)
            self.best_val_loss = min(self.best_val_loss, val_loss)
        if stop and self.done > done_first:
            self._save()
        self.display.close()
        checkpoint.wait(self.checkpoints)
        self._draw()

    def finish(self, prompt: str) -> None:
        """Whole-split loss, a sample, and the summary: last, as it is what tells that the run is complete."""
        config, run = self.config, self.run
        val_loss, count = self.executor.whole_split_loss(self.state.params, self.val_tokens)
        text = sample_text(self.executor.program, self.state, run.tokenizer, prompt)
        run_folder.write_text(run.path / "sample.txt", text + "\n")
        device = parallel.describe_devices()
        summary = {
            "params": sum(p.size for p in self.state.params.values()),
            "steps": self.done,
            "val_loss": val_loss,
            "val_ppl": perplexity(val_loss),
            "tokens_per_s": self.tokens_per_s,
            "first_step_s": self.first_step_s,
            "wall_s": time.perf_counter() - self.started,
            "device": device,
            "dtype": config.dtype,
            "val_tokens": count,
            "versions": versions(),
            "data_sha256": run.data_sha256,
        }
        run_folder.write_json(run.path / "summary.json", summary)
        self.display.line(
            f"whole validation split ({count:,} tokens): loss {val_loss:.4f}  perplexity {perplexity(val_loss):.3f}"
        )
        self.display.line(f"--- a sample of {config.sample_tokens} tokens ---\n{text}\n---")
        self.display.line(
            f"{summary['params']:,} parameters, {self.done} steps in {summary['wall_s']:.0f} s "
            f"({self.tokens_per_s:,.0f} tokens/s; first step after {self.first_step_s or 0:.1f} s); all in {run.path}"
        )

    def _restored_state(self) -> TrainState:
        """The last checkpoint's state, else the initial one, on the devices."""
        step = checkpoint.pick_step(self.checkpoints, "last")
        if step is None:
            return self.executor.init_state()
        self.display.line(f"resuming after {step} of {self.config.steps} steps")
        remedy = "remove this folder to go on from the one before it"
        return checkpoint.restore(self.checkpoints, self.executor.abstract_state(), step, remedy)

    def _next_dispatch(self) -> int:
        """How many steps to run now: what fits the pace, up to the next report, checkpoint or the end."""
        config = self.config
        to_due = min(every - (self.done - 1) % every for every in (config.eval_every, config.checkpoint_every))
        return min(self._pace, to_due, config.steps - self.done)

    def _is_due(self, every: int) -> bool:
        """Whether the step just done is a multiple of `every`, counted from 0, or the last."""
        return (self.done - 1) % every == 0 or self.done == self.config.steps

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
        val_loss = self._validation_loss(self.config.eval_batches)
        report = {
            "step": self.done - 1,
            "train_loss": loss,
            "val_loss": val_loss,
            "val_ppl": perplexity(val_loss),
            "lr": learning_rate(self.config, self.done - 1),
            "grad_norm": grad_norm,
            "tokens_per_s": tokens_per_s,
            "elapsed_s": time.perf_counter() - self.started,
        }
        self.run.append_metrics(report)
        self.display.report(report)
        return val_loss

    def _validation_starts(self, step: Any) -> Any:
        config = self.config
        n_windows = config.eval_batches * config.batch_size
        key = batches.stream_key(config.seed, batches.VALIDATION)
        starts = batches.window_starts(key, step, self.val_tokens.size, n_windows, config.model.block_size)
        return starts.reshape(config.eval_batches, config.batch_size)

    def _validation_loss(self, n_batches: int) -> float:
        """The mean over random batches, a function of the seed and the step. Raises `LossNotFinite`."""
        start_JB = np.asarray(self._val_starts(np.int32(self.done - 1)))[:n_batches]
        loss, count = self.executor.evaluate(
            self.state.params, self.val_tokens, start_JB, np.ones(start_JB.shape, bool)
        )
        if not math.isfinite(loss):
            raise self._not_finite(f"step {self.done - 1}: validation loss {loss / count} after the update")
        return loss / count

    def _save(self, val_loss: float = math.inf) -> None:
        """Keeps the state, with its validation loss if it was just measured."""
        if val_loss == math.inf:
            self._validation_loss(1)  # an update can overflow after a finite loss: never keep such a state
        self.run.flush()
        checkpoint.save(self.checkpoints, self.state, val_loss if val_loss < math.inf else None)

    def _not_finite(self, what: str) -> LossNotFinite:
        checkpoint.wait(self.checkpoints)
        step = checkpoint.pick_step(self.checkpoints, "last")
        kept = f"the state after {step} steps is kept in {self.run.checkpoints}" if step else "no checkpoint yet"
        return LossNotFinite(f"{what}; {kept}; try a lower --lr or --clip 1 in another --out-dir")

    def _tokens(self, steps: int) -> int:
        return steps * self.config.batch_size * self.config.model.block_size

    def _draw(self) -> None:
        from jaxgpt.report import learning_curves  # imports matplotlib, which the first step need not wait for

        title = f"{self.config.preset} on {self.config.dataset.rsplit('/')[-1]}"
        learning_curves(self.run.path / "learning_curves.png", title, self.run.read_steps(), self.run.read_metrics())


def sample_text(program: Program, state: TrainState, tokenizer: Tokenizer, prompt: str) -> str:
    """The prompt and the configured number of tokens after it, sampled at temperature 1 as documented."""
    config = program.config
    sampling = SamplingConfig(max_new_tokens=config.sample_tokens, seed=config.seed)
    ids = generate(program.exact_model, state.params, config.model, tokenizer.encode(prompt), sampling)
    return prompt + decode(tokenizer, ids)


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

    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        before[number] = signal.signal(number, handle)
    try:
        yield received
    finally:
        restore()


def _new_folder(config: TrainConfig) -> Path:
    """runs/<dataset>-<preset>-<time>, one that is not there yet."""
    dataset = re.sub(r"[^\w.-]+", "_", Path(config.dataset).stem if "/" in config.dataset else config.dataset)
    stem = Path("runs") / f"{dataset}-{config.preset}-{datetime.now():%Y%m%d-%H%M%S}"
    for number in range(1000):
        path = stem if not number else stem.with_name(f"{stem.name}-{number}")
        if not os.path.lexists(path):
            return path
    raise UserError(f"--out-dir: {stem} and a thousand others exist; name one")
