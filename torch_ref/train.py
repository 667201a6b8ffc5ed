"""The tutorials' training loop: python -m torch_ref.train --preset minigpt

The presets are the tutorials' configurations (docs/loops.md): `tinygpt`, the toy loop; `minigpt`, TinyShakespeare;
`wikitext2`, the modern recipe. The flags are those of `jaxgpt train`, and the files of weights and optimiser state
those of `jaxgpt convert`. The parity suite gives `train` the batches and dropout masks of the JAX side; the command
draws its own.

Axes: B batch, T time, N tokens of a split, J chunks.
"""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jaxgpt.config import SamplingConfig, TrainConfig, UserError
from jaxgpt.presets import PRESETS
from torch_ref import command
from torch_ref.datasets import Tokenizer, load_corpus
from torch_ref.generate import generate
from torch_ref.model import GPT, exact, mean_loss
from torch_ref.train_step import (
    SkippedUpdates,
    learning_rate,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    update,
)

Batch = tuple[Tensor, Tensor]  # inputs and targets, int64 [B, T] each


# -------------------------------------------------------------------------------------------------------------- batches


def random_batch(tokens_N: Tensor, config: TrainConfig, generator: torch.Generator) -> Batch:
    """Uniform random windows, with replacement; the targets are the inputs shifted by one."""
    block_size = config.model.block_size
    start_B = torch.randint(len(tokens_N) - block_size, (config.batch_size,), generator=generator)
    window_BT = tokens_N[start_B[:, None] + torch.arange(block_size + 1)]
    return window_BT[:, :-1], window_BT[:, 1:]


def random_batches(tokens_N: Tensor, config: TrainConfig, generator: torch.Generator) -> Iterator[Batch]:
    """Batches of random windows, without end."""
    while True:
        yield random_batch(tokens_N, config, generator)


def chunks(tokens_N: Tensor, block_size: int) -> Tensor:
    """Windows of a block plus one at stride a block: start in range(0, N - block_size, block_size), [J, T + 1]."""
    return tokens_N.unfold(0, block_size + 1, block_size)


def epochs(tokens_N: Tensor, config: TrainConfig, generator: torch.Generator) -> Iterator[Batch]:
    """Batches of chunks, shuffled anew in each epoch, without end; a ragged last batch of an epoch is dropped."""
    chunk_JT = chunks(tokens_N, config.model.block_size)
    while True:
        order_J = torch.randperm(len(chunk_JT), generator=generator)
        for at in range(0, len(order_J) - config.batch_size + 1, config.batch_size):
            window_BT = chunk_JT[order_J[at : at + config.batch_size]]
            yield window_BT[:, :-1], window_BT[:, 1:]


def in_order(tokens_N: Tensor, config: TrainConfig) -> Iterator[Batch]:
    """The batches of a whole split, in order; the last one may be smaller."""
    for window_BT in chunks(tokens_N, config.model.block_size).split(config.batch_size):
        yield window_BT[:, :-1], window_BT[:, 1:]


# ------------------------------------------------------------------------------------------------------------ the loop


def train(
    model: GPT,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    batch_of: Callable[[int], Batch],
    steps: Iterable[int],
    keep_of: Callable[[int], Sequence[Tensor] | None] = lambda step: None,
    clip: Callable[[Iterable[Tensor], float], Any] = torch.nn.utils.clip_grad_norm_,
    end_of_text: int | None = None,
    skipped: SkippedUpdates | None = None,
) -> Iterator[tuple[int, float]]:
    """The training loop. Yields each step and its loss, which is the loss before the step's update.

    Args:
        batch_of: the batch of a step.
        keep_of: the dropout masks of a step; None: torch draws them.
        clip, end_of_text: as in `update`.
        skipped: decides which updates to skip; None makes one.
    """
    skipped = skipped or SkippedUpdates(config)
    for step in steps:
        model.train()
        idx_BT, target_BT = batch_of(step)
        lr = learning_rate(config, step - skipped.total)
        yield step, update(model, optimizer, config, lr, idx_BT, target_BT, keep_of(step), clip, end_of_text, skipped)


@torch.no_grad()
def validation_loss(model: GPT, batches: Iterable[Batch], end_of_text: int | None = None) -> float:
    """The mean of the batches' mean losses, in evaluation mode and in the parameters' dtype.

    A smaller last batch counts as much as any other, as in the tutorials.
    """
    with exact(model):
        losses = [mean_loss(model, *batch, end_of_text=end_of_text).item() for batch in batches]
    return sum(losses) / len(losses)


@torch.no_grad()
def whole_split_loss(
    model: GPT, tokens_N: Tensor, batch_size: int, end_of_text: int | None = None
) -> tuple[float, int]:
    """The mean loss over the tokens of all chunks of a split, and the number of these tokens.

    The tokens after the last whole chunk are left out.
    """
    total, count = 0.0, 0
    with exact(model):
        for window_BT in chunks(tokens_N, model.pos_emb.num_embeddings).split(batch_size):
            idx_BT, target_BT = window_BT[:, :-1], window_BT[:, 1:]
            counted = idx_BT.numel() if end_of_text is None else int((idx_BT != end_of_text).sum())
            total += mean_loss(model, idx_BT, target_BT, end_of_text=end_of_text).item() * counted
            count += counted
    return total / count, count


class EarlyStopping:
    """Stops after `patience` validations in a row without an improvement of more than `min_delta`, in nats."""

    def __init__(self, patience: int, min_delta: float = 0.0):
        self.patience, self.min_delta = patience, min_delta
        self.lowest, self.counter = math.inf, 0

    def step(self, val_loss: float) -> bool:
        """Takes a validation loss; returns whether to stop."""
        if val_loss < self.lowest - self.min_delta:
            self.lowest, self.counter = val_loss, 0
        else:
            self.counter += 1
        return self.counter >= self.patience


# --------------------------------------------------------------------------------------------------------- the command


@dataclass(frozen=True)
class ReferenceFlags(TrainConfig):
    """The configuration, and the files that a run reads and writes."""

    data_dir: Path | None = None
    """Folder to look for datasets in first."""
    weights: Path | None = None
    """Start from these weights (safetensors, the tutorials' parameter names)."""
    optimizer_state: Path | None = None
    """Continue with this optimiser state, from its step."""
    out: Path | None = None
    """Write the trained weights to this file (safetensors)."""
    optimizer_state_out: Path | None = None
    """Write the optimiser's state to this file (safetensors)."""
    overwrite: bool = False
    """Replace files that exist."""


def main() -> None:
    flags = _flags()
    config, tokenizer, train_N, val_N = _config_and_data(flags)
    prompt = _prompt(config, tokenizer, train_N)
    end_of_text = tokenizer.end_of_text if config.packing == "documents" else None

    torch.manual_seed(config.seed)
    model = GPT(config.model, tokenizer.vocab_size, torch.bfloat16 if config.dtype == "bfloat16" else None)
    model = model.to(torch.float64 if config.dtype == "float64" else torch.float32)
    optimizer = make_optimizer(model, config)
    start = _load(flags, model, optimizer, config)

    # Two generators, so that validation does not change the training batches.
    train_draw, val_draw = (torch.Generator().manual_seed(config.seed + stream) for stream in (1, 2))
    source = random_batches if config.packing == "windows" else epochs
    batches, val_batches = source(train_N, config, train_draw), random_batches(val_N, config, val_draw)
    for _ in range(start):  # a run that continues skips the batches of its earlier steps
        next(batches)

    per_epoch = len(chunks(train_N, config.model.block_size)) // config.batch_size
    width, begun = len(str(config.steps - 1)), time.perf_counter()
    stopping, best = EarlyStopping(config.patience, config.min_delta), (math.inf, {})
    steps, skipped = range(start, config.steps), SkippedUpdates(config)
    rest = dict(end_of_text=end_of_text, skipped=skipped)
    for step, loss in train(model, optimizer, config, lambda _: next(batches), steps, **rest):
        if reason := skipped.reason_to_stop(loss):
            raise command.LossNotFinite(f"step {step}: {reason}")
        due = step % config.eval_every == 0 if config.eval_every else (step + 1) % per_epoch == 0
        if due or step == config.steps - 1:
            some = islice(val_batches, config.eval_batches) if config.eval_batches else in_order(val_N, config)
            val_loss = validation_loss(model, some, end_of_text)
            if config.eval_every:
                print(f"step {step:0{width}d}  train {loss:.3f}  val {val_loss:.3f}", flush=True)
            else:
                epoch, lr = (step + 1) / per_epoch, optimizer.param_groups[0]["lr"]
                print(
                    f"epoch {epoch:<4.3g} step {step:0{width}d}  lr {lr:.2e}  val_loss {val_loss:.4f}  "
                    f"val_ppl {math.exp(val_loss):.1f}",
                    flush=True,
                )
            if config.patience and val_loss < best[0]:
                best = val_loss, {name: p.detach().clone() for name, p in model.state_dict().items()}
            if config.patience and stopping.step(val_loss) and step < config.steps - 1:
                print(f"stopped early after {step + 1} steps; the result is the best, {best[0]:.4f}")
                model.load_state_dict(best[1])
                break

    loss, count = whole_split_loss(model, val_N, config.batch_size, end_of_text)
    print(f"whole validation split ({count:,} tokens): loss {loss:.4f}  ({time.perf_counter() - begun:.0f} s)")
    sampling = SamplingConfig(config.sample_tokens, config.sample_temperature, config.sample_top_k, seed=config.seed)
    draw = torch.Generator().manual_seed(config.seed)
    with exact(model):
        ids = list(generate(model, tokenizer.encode(prompt), sampling, generator=draw))
    print(f"---\n{prompt}{tokenizer.decode(ids)}\n---")
    _save(flags, model, optimizer, config, config.steps - skipped.total)


def _flags() -> ReferenceFlags:
    """The command line, with the preset's values as defaults. Raises `UserError` for flags without a use here."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", nargs="?", default=TrainConfig.preset)
    name = first.parse_known_args()[0].preset
    preset = PRESETS.get(name, PRESETS[TrainConfig.preset])  # an unknown name fails when all flags are read
    default = ReferenceFlags(**{f.name: getattr(preset, f.name) for f in dataclasses.fields(TrainConfig)})
    flags = command.parse(ReferenceFlags, "torch_ref.train", __doc__, default)
    unused = "parallel checkpoint_every keep_checkpoints diagnose_every attention_every sample_every text_column"
    for name in unused.split():
        if getattr(flags, name) != getattr(default, name):
            raise UserError(f"--{name.replace('_', '-')}: the reference has no use for it; leave it out")
    if flags.optimizer_state and not flags.weights:
        raise UserError(f"--optimizer-state {flags.optimizer_state}: belongs to weights; give --weights as well")
    if flags.patience and flags.optimizer_state_out:
        raise UserError("--optimizer-state-out: not kept for the best weights of --patience; leave one out")
    command.require_new({"--out": flags.out, "--optimizer-state-out": flags.optimizer_state_out}, flags.overwrite)
    return flags


def _config_and_data(flags: ReferenceFlags) -> tuple[TrainConfig, Tokenizer, Tensor, Tensor]:
    """The configuration with dtype and total steps filled in, the tokenizer, and the tokens of both splits."""
    config = TrainConfig(**{f.name: getattr(flags, f.name) for f in dataclasses.fields(TrainConfig)})
    tokenizer, train_N, val_N = load_corpus(config, flags.data_dir)
    block_size, batch_size = config.model.block_size, config.batch_size
    if min(len(train_N), len(val_N)) <= block_size:
        raise UserError(
            f"--dataset {config.dataset}: {len(train_N)} training and {len(val_N)} validation tokens, each must fill a "
            f"block plus one ({block_size + 1}); give a longer text or a smaller --model.block-size"
        )
    per_epoch = len(chunks(train_N, block_size)) // batch_size
    if config.packing != "windows" and not per_epoch:
        raise UserError(f"--batch-size {batch_size}: more than the chunks to train on; lower it, or give more text")
    steps = min(config.steps, config.epochs * per_epoch) if config.epochs else config.steps
    dtype = "float32" if config.dtype == "auto" else config.dtype
    return dataclasses.replace(config, steps=steps, dtype=dtype), tokenizer, train_N, val_N


def _prompt(config: TrainConfig, tokenizer: Tokenizer, train_N: Tensor) -> str:
    """The text that the sample continues: by default `ROMEO:`, or where that has other characters, the text's first."""
    prompt = config.prompt or "ROMEO:"
    try:
        tokenizer.encode(prompt)
        return prompt
    except (KeyError, UnicodeEncodeError) as e:
        if config.prompt:
            raise UserError(f"--prompt: {e} is not in the vocabulary; use only characters of the text") from None
        return tokenizer.decode(train_N[:1].tolist())


def _load(flags: ReferenceFlags, model: GPT, optimizer: torch.optim.Optimizer, config: TrainConfig) -> int:
    """Loads the given weights and optimiser state; returns the first step. Raises `UserError` if they do not fit."""
    if flags.weights:
        weights = command.read_tensors("--weights", flags.weights)
        command.require_same(f"--weights {flags.weights}", weights, model.state_dict())
        model.load_state_dict(weights)
    if not flags.optimizer_state:
        return 0
    named = f"--optimizer-state {flags.optimizer_state}"
    state = command.read_tensors("--optimizer-state", flags.optimizer_state)
    command.require_same(named, state, optimizer_tensors(model, optimizer, config, 0))
    step = state["step"].item()
    if step != int(step) or not 0 <= step <= config.steps:
        raise UserError(f"{named}: {step} updates done; give a whole number of them, up to --steps {config.steps}")
    return load_optimizer_tensors(model, optimizer, config, state)


def _save(
    flags: ReferenceFlags, model: GPT, optimizer: torch.optim.Optimizer, config: TrainConfig, n_updates: int
) -> None:
    files = {}
    if flags.out:
        files["--out"] = flags.out, model.state_dict()
    if flags.optimizer_state_out:
        state = optimizer_tensors(model, optimizer, config, n_updates)
        files["--optimizer-state-out"] = flags.optimizer_state_out, state
    command.write_tensors(files)


if __name__ == "__main__":
    sys.exit(command.exit_code(main))
