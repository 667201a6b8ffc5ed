"""Language modeling: training on next tokens, and the loss over a whole split."""

import contextlib
import math
import time
from collections.abc import Callable, Collection, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgpt import distributed, parallel, rng
from jaxgpt.analysis import diagnostics
from jaxgpt.analysis.callbacks import PlotLearningCurves
from jaxgpt.analysis.model_summary import summary
from jaxgpt.callbacks import Callback, EveryN
from jaxgpt.config import FaultPolicy, SamplingConfig, TrainConfig
from jaxgpt.data import sampler
from jaxgpt.data.corpora import Corpus
from jaxgpt.data.loader import ShardLoader, make_loader
from jaxgpt.data.sampler import BatchSampler, EvalBatch, ShardSampler
from jaxgpt.data.shards import REVISION
from jaxgpt.data.token_cache import Data
from jaxgpt.data.tokenizer import Tokenizer, decode, sample_prompt, visible
from jaxgpt.errors import UserError
from jaxgpt.model.loss import mean_of_batches, perplexity
from jaxgpt.model.sampling import generate
from jaxgpt.objective import LanguageModelingObjective
from jaxgpt.parallel import Executor
from jaxgpt.progress import ProgressDisplay
from jaxgpt.runs import run_dir
from jaxgpt.runs.run_dir import RunDir
from jaxgpt.runtime import build_language_modeling
from jaxgpt.tasks.initial_weights import initial_weights
from jaxgpt.train_step import TrainState
from jaxgpt.trainer import Task, run_training

PROGRESS_SECONDS = 20.0
MAP_TOKENS = 32  # of the validation split's first: maps of more are hard to read


def train(
    config: TrainConfig,
    corpus: Corpus,
    out_dir: Path | None,
    overwrite: bool,
    display: ProgressDisplay,
    started: float,
    data_dir: Path | None = None,
    loader: str = "auto",
    summarise: bool = False,
    policy: FaultPolicy = FaultPolicy(),  # noqa: B008  (frozen)
    mesh: str = "",
    init_from: str | None = None,
    given: Collection[str] = (),
) -> int:
    """Trains a language model to the end, or resumes the run in `out_dir`.

    Args:
        out_dir: the run folder; None makes a new one under runs/.
        started: `time.perf_counter()` at the command's start, for the time to the first step.
        data_dir: a folder to look for GPT-2's vocabulary in first.
        loader: where the tokens are kept: auto, device or host.
        summarise: print first the layers, their parameters, and what a step costs.
        policy: what to do about warning signals and failed saves.
        mesh: how devices share the training, as `config.mesh_shape` reads it.
        init_from: weights to start from, as `interop.pretrained.load_pretrained` takes them; None for random ones.
        given: with `init_from`, the fields whose flags were given, as `interop.pretrained.with_model` takes them.

    Returns:
        The command's exit code, as `run_training` gives it.

    Raises:
        UserError: before anything is written; or as `run_training` does, which raises the other errors too.
    """
    if loader == "device" and corpus.shards:
        raise UserError(f"--loader device: {corpus.name} comes in shards, which the host reads; leave it out")
    distributed.require_same({"mesh": mesh, "loader": loader, "on_warning_signal": policy.on_warning_signal})
    resumed = None if overwrite else out_dir
    weights = None
    if init_from:
        config, own, weights = initial_weights(config, init_from, resumed, data_dir, display.line, given)
    else:
        own = run_dir.own_tokenizer(resumed, config)
    data, executor = build_language_modeling(config, corpus, data_dir, display.line, own, mesh=mesh)
    config, tokenizer = executor.config, data.tokenizer
    if weights:
        weights.require_vocabulary(tokenizer.vocab_size)
    prompt = sample_prompt(config.prompt, tokenizer, corpus)
    n_train = f"{len(data.train_N):,}" if isinstance(data.train_N, np.ndarray) else f"{data.train_N.n_files:,} files of"
    folder = out_dir or run_dir.default_run_dir(config.dataset, config.preset)
    base = weights.record if weights else None
    with contextlib.closing(run_dir.create_together(folder, config, tokenizer, corpus, overwrite, base)) as run:
        headline = (
            f"{init_from or config.preset} on {corpus.name} ({n_train} training and {len(data.val_N):,} validation "
            f"tokens, vocabulary {tokenizer.vocab_size}) on {executor.describe_devices()} in {config.dtype}, "
            f"--parallel {config.parallel}"
        )

        def task() -> LanguageModelingTask:
            made = LanguageModelingTask(run, executor, data, prompt, loader, display.line)
            if summarise:
                display.line(summary(executor, made.loader.take(0, 1)))
            return made

        def first_state() -> TrainState:
            return weights.state(executor) if weights else executor.init_state()

        return run_training(run, executor, headline, task, first_state, [display], display.line, started, policy)


class LanguageModelingTask(Task):
    """The `trainer.Task` of predicting the next tokens of packed or random windows."""

    def __init__(
        self,
        run: RunDir,
        executor: Executor,
        data: Data,
        prompt: str,
        loader: str,
        say: Callable[[str], None],
    ):
        config, self.say = run.config, say
        self.run, self.executor, self.prompt, self.val_N = run, executor, prompt, data.val_N
        self.title = f"{config.preset} on {REVISION.sub('', config.dataset).rsplit('/')[-1]}"
        process_rows = executor.process_rows
        if isinstance(data.train_N, np.ndarray):
            batch_sampler = BatchSampler(config, len(data.train_N))
            self.steps_per_epoch = batch_sampler.steps_per_epoch
            placement = (executor.put, executor.bytes_for_tokens, loader, process_rows)
            self.loader = make_loader(data.train_N, batch_sampler, *placement)
        else:  # how many steps an epoch has is known at its end
            self.steps_per_epoch = None
            rows = process_rows.rows if process_rows else slice(None)
            self.loader = ShardLoader(data.train_N, ShardSampler(config, data.train_N, rows), process_rows)
        self._val_starts = jax.jit(self._draw_val_starts)
        self._flow = executor.compiled(partial(diagnostics.gradient_flow, executor.objective))
        self.map_ids_T = np.asarray(data.val_N[: min(MAP_TOKENS, config.model.block_size)], np.int32)
        if config.within_documents:  # attention stays within one document, and so does a map
            ends = np.flatnonzero(self.map_ids_T == data.tokenizer.end_of_text)
            self.map_ids_T = self.map_ids_T[: ends[0] + 1 if len(ends) else None]
        self.callbacks: list[Callback] = [
            EveryN(config.diagnose_every, self._diagnose),
            EveryN(config.attention_every, self._map_attention, at_end=True),
            EveryN(config.sample_every, self._show_sample),
        ]
        if run.writes:
            self.callbacks.append(PlotLearningCurves(run, self.title))

    def validate(self, params: Any, step: int, n_batches: int | None = None) -> dict[str, float]:
        """The mean of the batches' mean losses, as documented, its perplexity, and the mean over all tokens.

        The batches are random, a function of the seed and the step; with --eval-batches 0 they are the whole split.
        """
        sums_J2 = self.executor.evaluate(params, self._validation(step, n_batches))
        val_loss = mean_of_batches(sums_J2)
        loss, count = sums_J2.sum(0)
        return {"val_loss": val_loss, "val_ppl": perplexity(val_loss), "val_loss_token_mean": float(loss / count)}

    def line(self, report: dict[str, Any], n_steps: int) -> str:
        """Zero-padded step and three decimals, as the first two tutorials print it; or the third's line per epoch."""
        step, speed = str(report["step"]).zfill(len(str(n_steps))), f"{report['tokens_per_s']:,.0f} tokens/s"
        if self.run.config.eval_every:
            return (
                f"step {step}  train loss {report['train_loss']:.3f}  val loss {report['val_loss']:.3f}  "
                f"val ppl {report['val_ppl']:.2f}  {speed}"
            )
        return (
            f"epoch {report['epoch']:<4.3g} step {step}  lr {report['lr']:.2e}  val_loss {report['val_loss']:.4f}  "
            f"val_ppl {report['val_ppl']:.1f}  (of all tokens {report['val_loss_token_mean']:.4f})  {speed}"
        )

    def finish(self, params: Any) -> tuple[dict[str, Any], str]:
        """Whole-split loss and a sample."""
        run, config = self.run, self.run.config
        if config.attention_every and run.writes:
            self._animate()
        whole = whole_split_loss(self.executor, params, self.val_N, run.tokenizer, say=self.say)
        text = self._sample(params)
        run.write_text("sample.txt", text + "\n")
        figures = {
            "val_loss": whole.loss,
            "val_loss_batch_mean": whole.batch_mean,
            "val_ppl": perplexity(whole.loss),
            "val_bits_per_byte": whole.bits_per_byte,
            "val_tokens": whole.tokens,
        }
        return figures, (
            f"whole validation split ({whole.tokens:,} tokens): loss {whole.loss:.4f}  perplexity "
            f"{perplexity(whole.loss):.3f}  bits per byte {whole.bits_per_byte:.4f}\n"
            f"--- a sample of {config.sample_tokens} tokens ---\n{text}\n---"
        )

    def _diagnose(self, state: TrainState, step: int) -> None:
        """Records the gradient of the update to come, by a compiled function beside that of the training."""
        figures = self._flow(state, self.loader.take(step, 1))
        flows = diagnostics.flows(figures, state.params)
        record = diagnostics.record(step, flows)
        self.run.append("diagnostics.jsonl", record)
        for verdict in ("vanishing", "exploding"):
            if names := record[verdict]:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                self.say(f"step {step}  gradients {verdict}: {', '.join(names[:3])}{more}")

    def _map_attention(self, state: TrainState, step: int) -> None:
        params = jax.device_get(parallel.on_host(state.params))
        maps_LHTS = diagnostics.attention_maps(self.executor.objective, params, self.map_ids_T)
        self.run.save_map(step, maps_LHTS)

    def _animate(self) -> None:
        from jaxgpt.analysis.plots import attention_animation  # imports matplotlib

        tokens = [visible(self.run.tokenizer, int(i)) for i in self.map_ids_T]
        attention_animation(self.run.path / "attention.gif", self.title, self.run.read_maps(), tokens)

    def _show_sample(self, state: TrainState, step: int) -> None:
        text = self._sample(state.params)
        self.run.append("samples.jsonl", {"step": step, "text": text})
        self.say(f"--- a sample after {step} steps ---\n{text}\n---")

    def _validation(self, step: int, n_batches: int | None) -> Iterator[EvalBatch]:
        config = self.run.config
        block_size = config.model.block_size
        if config.eval_batches:
            start_JB = np.asarray(self._val_starts(np.int32(step - 1)))
            batches = sampler.eval_windows(self.val_N, start_JB, block_size)
        else:
            batches = sampler.whole_split(self.val_N, config.batch_size, block_size)
        return islice(batches, n_batches)

    def _draw_val_starts(self, step: Any) -> Any:
        config = self.run.config
        n_windows = config.eval_batches * config.batch_size
        key = rng.stream_key(config.seed, rng.VALIDATION)
        starts = sampler.window_starts(key, step, len(self.val_N), n_windows, config.model.block_size)
        return starts.reshape(config.eval_batches, config.batch_size)

    def _sample(self, params: Any) -> str:
        """The prompt and the configured number of tokens after it."""
        config, tokenizer, model = self.run.config, self.run.tokenizer, self.executor.objective.exact_model
        sampling = SamplingConfig(
            config.sample_tokens, config.sample_temperature, config.sample_top_k, seed=config.seed
        )
        params = parallel.on_one_device(params)
        ids = generate(model, params, config.model, tokenizer.encode(self.prompt), sampling)
        return self.prompt + decode(tokenizer, ids)


def require_stride(stride: int, block_size: int) -> None:
    """Raises `UserError` if windows cannot start so many tokens apart."""
    if not 1 <= stride <= block_size:
        raise UserError(f"--stride {stride}: give a whole number from 1 to the run's block of {block_size}")


class SplitLoss(NamedTuple):
    """The loss over a split."""

    loss: float  # mean over the tokens, in nats per token
    tokens: int  # how many
    n_bytes: int  # of UTF-8, that the tokens stand for
    batch_mean: float  # the documented mean of the batches' mean losses

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits per byte of UTF-8, by which tokenizers compare; NaN without bytes."""
        return self.loss * self.tokens / math.log(2) / self.n_bytes if self.n_bytes else math.nan


def whole_split_loss(
    executor: Executor,
    params: Any,
    tokens_N: np.ndarray,
    tokenizer: Tokenizer,
    stride: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> SplitLoss:
    """The loss over the targets of a split, in the batches of `sampler.whole_split`; `say` takes the progress."""
    objective = executor.objective
    assert isinstance(objective, LanguageModelingObjective)
    config, n_bytes, last_said = objective.config, 0, time.monotonic()

    def eval_batches() -> Iterator[EvalBatch]:
        nonlocal n_bytes, last_said
        done = 0
        for batch in sampler.whole_split(tokens_N, config.batch_size, config.model.block_size, stride):
            counts_BT = batch.counts_BT
            if config.within_documents:
                counts_BT = counts_BT & (batch.window_BT[:, :-1] != objective.end_of_text)
            n_bytes += int(tokenizer.n_bytes_V[batch.window_BT[:, 1:][counts_BT]].sum())
            done += int(counts_BT.sum())
            if time.monotonic() - last_said > PROGRESS_SECONDS:
                last_said = time.monotonic()
                say(f"evaluated {done:,} of {len(tokens_N):,} tokens")
            yield batch

    sums_J2 = executor.evaluate(params, eval_batches())
    loss, count = sums_J2.sum(0)
    return SplitLoss(float(loss / count), int(count), n_bytes, mean_of_batches(sums_J2))
