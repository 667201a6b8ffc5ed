"""Whole documented runs in both frameworks: the same initial weights and batches, the validation loss at the end."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from jaxgpt import parallel
from jaxgpt.data.corpora import load_corpus
from jaxgpt.data.files import NotAvailable
from jaxgpt.data.loader import DeviceLoader
from jaxgpt.data.sampler import BatchSampler
from jaxgpt.data.token_cache import tokenize_corpus
from jaxgpt.interop.torch_names import to_torch
from jaxgpt.objective import LanguageModelingObjective
from jaxgpt.parity.harness import Row
from jaxgpt.presets import PRESETS
from jaxgpt.tasks.language_modeling import whole_split_loss
from parity_tests.cases import masks_of
from parity_tests.tolerances import row
from torch_ref.model import GPT
from torch_ref.train import train
from torch_ref.train import whole_split_loss as torch_whole_split
from torch_ref.train_step import make_optimizer

SEEDS = 5


class WholeRun:
    """One seed of a preset, in both frameworks.

    Args:
        steps: None for the documented number.

    Raises:
        UserError: the preset's text cannot be had.
    """

    def __init__(
        self, preset: str, seed: int, data_dir: Path | None, say: Callable[[str], None], steps: int | None = None
    ):
        config = dataclasses.replace(PRESETS[preset], seed=seed)
        config = dataclasses.replace(config, steps=steps or config.steps)
        self.say, self.name = say, f"{preset}, seed {seed}"
        config, data = tokenize_corpus(config, load_corpus(config.dataset, data_dir, say), data_dir, say)
        self.config, self.data = config, data
        self.order = BatchSampler(config, len(data.train_N))
        objective = LanguageModelingObjective(
            config, data.tokenizer.vocab_size, parallel.numerics(config), data.tokenizer.end_of_text
        )
        self.executor = parallel.Executor(objective)  # over the devices that the trainer would take

    def side(self, name: str) -> tuple[float, float]:
        """The validation loss of "ours" or "torch", and the seconds that it took."""
        begun = time.perf_counter()
        loss = self.ours() if name == "ours" else self.torch()
        seconds = time.perf_counter() - begun
        self.say(f"{self.name}: {'jaxgpt' if name == 'ours' else 'PyTorch'} {loss:.5f} after {seconds:.0f} s")
        return loss, seconds

    def ours(self) -> float:
        """The loss over the whole validation split after training in JAX."""
        config, executor = self.config, self.executor
        state = executor.init_state()
        loader = DeviceLoader(self.data.train_N, self.order, executor.put)
        part = min(250, -(-config.steps // 5))
        for at in range(0, config.steps, part):
            n_steps = min(part, config.steps - at)
            state, _ = executor.train_steps(state, loader.take(at, n_steps), n_steps)
            self.say(f"{self.name}: jaxgpt at step {at + n_steps} of {config.steps}")
        return whole_split_loss(executor, state.params, self.data.val_N, self.data.tokenizer).loss

    def torch(self) -> float:
        """The same after training with PyTorch, from our initial weights, on our batches and with our dropout masks."""
        config = self.config
        weights = to_torch(self.executor.init_state().params)
        model = GPT(config.model, self.data.tokenizer.vocab_size)
        model.load_state_dict({name: torch.tensor(np.array(p)) for name, p in weights.items()})
        end_of_text = self.data.tokenizer.end_of_text if config.packing == "documents" else None

        def keep_of(step: int) -> list[torch.Tensor] | None:
            masks = masks_of(config, step)
            return masks and [torch.from_numpy(mask) for mask in masks]

        def batch_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
            start_B = self.order.starts(step, 1)[0]
            window = self.data.train_N[start_B[:, None] + np.arange(config.model.block_size + 1)].astype(np.int64)
            return torch.from_numpy(window[:, :-1]), torch.from_numpy(window[:, 1:])

        optimizer = make_optimizer(model, config)
        for step, _ in train(model, optimizer, config, batch_of, range(config.steps), keep_of, end_of_text=end_of_text):
            if (step + 1) % (config.steps // 5) == 0:
                self.say(f"{self.name}: PyTorch at step {step + 1} of {config.steps}")
        val_N = torch.from_numpy(self.data.val_N.astype(np.int64))
        return torch_whole_split(model, val_N, config.batch_size, end_of_text)[0]


Results = dict[str, dict[str, float]]  # seed -> {"ours", "torch", "ours_s", "torch_s"}


def run_seeds(
    preset: str,
    data_dir: Path | None,
    say: Callable[[str], None],
    kept: Results,
    save: Callable[[Results], None],
    n_seeds: int = SEEDS,
) -> Results:
    """Seeds 0, 1, ... in both frameworks; what `kept` holds is not computed again, and `save` is called after each."""
    for seed in range(n_seeds):
        for side in ("ours", "torch"):
            found = kept.setdefault(str(seed), {})
            if side not in found:
                found[side], found[f"{side}_s"] = WholeRun(preset, seed, data_dir, say).side(side)
                save(kept)
    return {str(seed): kept[str(seed)] for seed in range(n_seeds)}


def mean_row(label: str, results: Results) -> Row:
    """The difference of the mean losses, in standard errors of PyTorch's mean over its seeds; of one seed in nats."""
    ours, theirs = ([found[side] for found in results.values()] for side in ("ours", "torch"))
    if len(results) == 1:
        note = f"loss {ours[0]:.5f}, PyTorch {theirs[0]:.5f}; from the same start, on the same batches and masks"
        return row("end to end, one seed", "float32", label, abs(ours[0] - theirs[0]), note=note)
    spread = statistics.stdev(theirs)
    difference = abs(statistics.mean(ours) - statistics.mean(theirs))
    note = (
        f"mean loss {statistics.mean(ours):.5f}, PyTorch {statistics.mean(theirs):.5f} with a spread of {spread:.4f} "
        f"over seeds; the largest difference of one seed is "
        f"{max(abs(a - b) for a, b in zip(ours, theirs, strict=True)):.1e}"
    )
    return row("end to end", "float32", label, difference / (spread / len(results) ** 0.5), note=note)


def check_end_to_end(quick: bool) -> Iterator[Row]:
    """The beginning of `tinygpt` on its real text, five seeds: the loss over the whole validation split."""
    preset, steps = "tinygpt", 100
    label = f"{preset}, {steps} of {PRESETS[preset].steps} steps, {SEEDS} seeds"
    try:
        if quick:
            raise NotAvailable("half a minute: left out with --quick")
        runs = {str(seed): WholeRun(preset, seed, None, lambda line: None, steps) for seed in range(SEEDS)}
        results = {seed: {"ours": run.ours(), "torch": run.torch()} for seed, run in runs.items()}
    except NotAvailable as e:
        yield row("end to end", "float32", label, note=str(e), not_run=True)
        return
    yield mean_row(label, results)
