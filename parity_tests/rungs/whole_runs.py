"""Whole documented runs in both frameworks: the same initial weights and batches, the validation loss at the end."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import torch

from jaxgpt import batches, parallel
from jaxgpt.config import PRESETS
from jaxgpt.convert import to_torch
from jaxgpt.datasets import NotAvailable, load_corpus, split_tokens
from jaxgpt.tokenizer import make_tokenizer
from jaxgpt.train_step import Program
from parity_tests.harness import Row
from torch_ref.model import GPT
from torch_ref.train import train, whole_split_loss
from torch_ref.train_step import make_optimizer

SEEDS = 5


class WholeRun:
    """One seed of a preset, for both sides.

    Args:
        steps: None for the documented number.

    Raises:
        UserError: the preset's text cannot be had.
    """

    def __init__(
        self, preset: str, seed: int, data_dir: Path | None, say: Callable[[str], None], steps: int | None = None
    ):
        config = dataclasses.replace(PRESETS[preset], seed=seed)
        self.config = config = dataclasses.replace(config, steps=steps or config.steps)
        self.say, self.name = say, f"{preset}, seed {seed}"
        corpus = load_corpus(config.dataset, data_dir, say)
        tokenizer = make_tokenizer(config.tokenizer, corpus.text)
        self.tokens, self.val_tokens = split_tokens(corpus, tokenizer, config.model.block_size)
        self.vocab_size = tokenizer.vocab_size
        program = Program(config, self.vocab_size, parallel.numerics(config))
        self.executor = parallel.Executor(program, parallel.one_device())

    def side(self, name: str) -> tuple[float, float]:
        """The validation loss of "ours" or "torch", and the seconds that it took."""
        begun = time.perf_counter()
        loss = self.ours() if name == "ours" else self.torch()
        seconds = time.perf_counter() - begun
        self.say(f"{self.name}: {'jaxgpt' if name == 'ours' else 'PyTorch'} {loss:.5f} after {seconds:.0f} s")
        return loss, seconds

    def ours(self) -> float:
        """The loss over the whole validation split after training with our program."""
        config, executor = self.config, self.executor
        state = executor.init_state()
        tokens_N = executor.put(batches.device_tokens(self.tokens, self.vocab_size))
        for _ in range(0, config.steps, 250):
            state, _ = executor.updates(state, tokens_N, min(250, config.steps - int(state.step)))
        val_N = executor.put(batches.device_tokens(self.val_tokens, self.vocab_size))
        return executor.whole_split_loss(state.params, val_N)[0]

    def torch(self) -> float:
        """The same after training with PyTorch, from our initial weights and on our batches."""
        config = self.config
        weights = to_torch(self.executor.init_state().params)
        model = GPT(config.model, self.vocab_size)
        model.load_state_dict({name: torch.tensor(np.array(p)) for name, p in weights.items()})
        train_key, block_size = batches.stream_key(config.seed, batches.TRAIN), config.model.block_size
        draw = jax.jit(batches.window_starts, static_argnums=(2, 3, 4))

        def batch_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
            start_B = np.asarray(draw(train_key, np.int32(step), len(self.tokens), config.batch_size, block_size))
            window = self.tokens[start_B[:, None] + np.arange(block_size + 1)]
            return torch.from_numpy(window[:, :-1]).long(), torch.from_numpy(window[:, 1:]).long()

        for step, _ in train(model, make_optimizer(model, config), config, batch_of, range(config.steps)):
            if step % 1000 == 999:
                self.say(f"{self.name}: PyTorch at step {step + 1} of {config.steps}")
        return whole_split_loss(model, torch.from_numpy(self.val_tokens).long(), config.batch_size)[0]


Results = dict[str, dict[str, float]]  # seed -> {"ours", "torch", "ours_s", "torch_s"}


def run_seeds(
    preset: str,
    data_dir: Path | None,
    say: Callable[[str], None],
    kept: Results,
    save: Callable[[Results], None],
    n_seeds: int = SEEDS,
) -> Results:
    """Seeds 0, 1, ... and both sides; what `kept` holds is not computed again, and `save` is told after each."""
    for seed in range(n_seeds):
        for side in ("ours", "torch"):
            found = kept.setdefault(str(seed), {})
            if side not in found:
                found[side], found[f"{side}_s"] = WholeRun(preset, seed, data_dir, say).side(side)
                save(kept)
    return {str(seed): kept[str(seed)] for seed in range(n_seeds)}


def row(label: str, results: Results) -> Row:
    """The difference of the mean losses, in standard errors of PyTorch's mean over its seeds."""
    ours, theirs = ([found[side] for found in results.values()] for side in ("ours", "torch"))
    spread = statistics.stdev(theirs)
    difference = abs(statistics.mean(ours) - statistics.mean(theirs))
    note = (
        f"mean loss {statistics.mean(ours):.5f}, PyTorch {statistics.mean(theirs):.5f} with a spread of {spread:.4f} "
        f"over seeds; of one seed at most {max(abs(a - b) for a, b in zip(ours, theirs, strict=True)):.1e} apart"
    )
    return Row("end to end", "float32", label, difference / (spread / len(results) ** 0.5), note=note)


def rung_end_to_end(quick: bool) -> Iterator[Row]:
    """The beginning of `tinygpt` on its real text, five seeds: the loss over the whole validation split."""
    preset, steps = "tinygpt", 100
    label = f"{preset}, {steps} of {PRESETS[preset].steps} steps, {SEEDS} seeds"
    try:
        if quick:
            raise NotAvailable("half a minute: left out with --quick")
        runs = {str(seed): WholeRun(preset, seed, None, lambda line: None, steps) for seed in range(SEEDS)}
        results = {seed: {"ours": run.ours(), "torch": run.torch()} for seed, run in runs.items()}
    except NotAvailable as e:
        yield Row("end to end", "float32", label, note=str(e), not_run=True)
        return
    yield row(label, results)
