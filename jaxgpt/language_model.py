"""Training a language model: what `scripts/train.py` does."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgpt import batches, diagnostics, parallel, run_folder
from jaxgpt.batches import Order, Scored
from jaxgpt.config import SamplingConfig, TrainConfig
from jaxgpt.console import Display
from jaxgpt.data_files import cache_folder
from jaxgpt.datasets import Corpus
from jaxgpt.generate import generate
from jaxgpt.loader import make_loader
from jaxgpt.loss import mean_of_batches, perplexity
from jaxgpt.run_folder import RunFolder
from jaxgpt.summary import summary
from jaxgpt.tokenizer import decode, visible
from jaxgpt.tokens import Data, prepare, sample_prompt
from jaxgpt.train_step import Program, TrainState
from jaxgpt.trained import whole_split_loss
from jaxgpt.trainer import Watch, new_folder, run_training

MAP_TOKENS = 32  # of the validation split's first: maps of more are hard to read


def train(
    config: TrainConfig,
    corpus: Corpus,
    out_dir: Path | None,
    overwrite: bool,
    display: Display,
    started: float,
    data_dir: Path | None = None,
    loader: str = "auto",
    summarise: bool = False,
) -> int:
    """Trains a run to its end, or goes on with the one in `out_dir`.

    Args:
        out_dir: the run folder; None makes a new one under runs/.
        started: `time.perf_counter()` at the command's start, for the time to the first step.
        data_dir: a folder to look for GPT-2's vocabulary in first.
        loader: where the tokens are kept: auto, device or host.
        summarise: say first what is trained, and what it costs.

    Returns:
        The command's exit code: 0, or 128 + the signal that stopped the run.

    Raises:
        UserError: before anything is written; or the disk is full or the memory exhausted while it trains.
        LossNotFinite: a loss or gradient norm is not finite; the checkpoints hold states from before it.
    """
    own = run_folder.own_tokenizer(out_dir, config) if not overwrite else None
    config, data = prepare(config, corpus, data_dir, display.line, own)
    prompt = sample_prompt(config.prompt, data.tokenizer, corpus)
    parallel.prepare(config, cache_folder() / "xla")
    numerics = parallel.numerics(config)
    # The run keeps the dtype that "auto" stood for here: it must not change on a machine of another kind.
    config = dataclasses.replace(config, dtype=np.dtype(numerics.compute_dtype).name)
    tokenizer = data.tokenizer
    executor = parallel.Executor(Program(config, tokenizer.vocab_size, numerics, tokenizer.end_of_text))
    run = run_folder.create(out_dir or new_folder(config.dataset, config.preset), config, tokenizer, corpus, overwrite)
    if (run.path / "summary.json").exists():
        display.line(f"{run.path}: finished already; --overwrite starts again")
        return 0
    display.line(
        f"{config.preset} on {corpus.name} ({len(data.train_N):,} training and {len(data.val_N):,} validation "
        f"tokens, vocabulary {tokenizer.vocab_size}) on {executor.describe_devices()} in {config.dtype}, "
        f"--parallel {config.parallel}"
    )
    display.line(f"run folder: {run.path}")

    def task() -> LanguageModel:
        made = LanguageModel(run, executor, data, prompt, loader, display.line)
        if summarise:
            display.line(summary(executor, made.loader.take(0, 1)))
        return made

    return run_training(run, executor, task, executor.init_state, display, started)


class LanguageModel:
    """The task of `trainer.Task`: next tokens of packed or random windows."""

    def __init__(
        self,
        run: RunFolder,
        executor: parallel.Executor,
        data: Data,
        prompt: str,
        loader: str,
        say: Callable[[str], None],
    ):
        config, self.say = run.config, say
        self.run, self.executor, self.prompt, self.val_N = run, executor, prompt, data.val_N
        self.title = f"{config.preset} on {config.dataset.rsplit('/')[-1]}"
        order = Order(config, len(data.train_N))
        self.steps_per_epoch = order.steps_per_epoch
        self.loader = make_loader(data.train_N, order, executor, loader)
        self._val_starts = jax.jit(self._draw_val_starts)
        self._flow = executor.compiled(partial(diagnostics.gradient_flow, executor.program))
        self.map_ids_T = np.asarray(data.val_N[: min(MAP_TOKENS, config.model.block_size)], np.int32)
        if config.within_documents:  # maps are of one text
            ends = np.flatnonzero(self.map_ids_T == data.tokenizer.end_of_text)
            self.map_ids_T = self.map_ids_T[: ends[0] + 1 if len(ends) else None]
        looks = (
            Watch(config.diagnose_every, self._diagnose),
            Watch(config.attention_every, self._map_attention, at_end=True),
            Watch(config.sample_every, self._show_sample),
        )
        self.watches = [watch for watch in looks if watch.every]

    def validate(self, params: Any, step: int, n_batches: int | None = None) -> dict[str, float]:
        """The mean of the batches' mean losses, as documented, its perplexity, and the mean over all tokens.

        The batches are random, a function of the seed and the step; or with --eval-batches 0 the whole split's.
        """
        sums_J2 = self.executor.evaluate(params, self._validation(step, n_batches))
        val_loss = mean_of_batches(sums_J2)
        loss, count = sums_J2.sum(0)
        return {"val_loss": val_loss, "val_ppl": perplexity(val_loss), "val_loss_token_mean": float(loss / count)}

    def line(self, report: dict[str, Any], n_steps: int) -> str:
        """Zero-padded step and three decimals, as the first two write-ups print it; or the third's line per epoch."""
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
        if config.attention_every:
            self._animate()
        whole = whole_split_loss(self.executor, params, self.val_N, run.tokenizer, say=self.say)
        text = self._sample(params)
        run_folder.write_text(run.path / "sample.txt", text + "\n")
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
        """Records the gradient of the update to come; a program of its own, so that the others are as they were."""
        figures = self._flow(state, self.loader.take(step, 1))
        flows = diagnostics.flows(figures, state.params)
        record = diagnostics.record(step, flows)
        self.run.append("diagnostics.jsonl", record)
        for verdict in ("vanishing", "exploding"):
            if names := record[verdict]:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                self.say(f"step {step}  gradients {verdict}: {', '.join(names[:3])}{more}")

    def _map_attention(self, state: TrainState, step: int) -> None:
        maps_LHTS = diagnostics.attention_maps(self.executor.program, jax.device_get(state.params), self.map_ids_T)
        self.run.save_map(step, maps_LHTS)

    def _animate(self) -> None:
        from jaxgpt.diagrams import attention_animation  # imports matplotlib

        tokens = [visible(self.run.tokenizer, int(i)) for i in self.map_ids_T]
        attention_animation(self.run.path / "attention.gif", self.title, self.run.read_maps(), tokens)

    def _show_sample(self, state: TrainState, step: int) -> None:
        text = self._sample(state.params)
        self.run.append("samples.jsonl", {"step": step, "text": text})
        self.say(f"--- a sample after {step} steps ---\n{text}\n---")

    def _validation(self, step: int, n_batches: int | None) -> Iterator[Scored]:
        config = self.run.config
        block_size = config.model.block_size
        if config.eval_batches:
            start_JB = np.asarray(self._val_starts(np.int32(step - 1)))
            scored = batches.cut(self.val_N, start_JB, block_size)
        else:
            scored = batches.whole_split(self.val_N, config.batch_size, block_size)
        return islice(scored, n_batches)

    def _draw_val_starts(self, step: Any) -> Any:
        config = self.run.config
        n_windows = config.eval_batches * config.batch_size
        key = batches.stream_key(config.seed, batches.VALIDATION)
        starts = batches.window_starts(key, step, len(self.val_N), n_windows, config.model.block_size)
        return starts.reshape(config.eval_batches, config.batch_size)

    def _sample(self, params: Any) -> str:
        """The prompt and the configured number of tokens after it."""
        config, tokenizer, program = self.run.config, self.run.tokenizer, self.executor.program
        sampling = SamplingConfig(
            config.sample_tokens, config.sample_temperature, config.sample_top_k, seed=config.seed
        )
        params = parallel.on_one_device(params)
        ids = generate(program.exact_model, params, config.model, tokenizer.encode(self.prompt), sampling)
        return self.prompt + decode(tokenizer, ids)
