"""The documented training loop in PyTorch: python -m torch_ref.train --preset minigpt

It stands beside `scripts/train.py`: the same flags, the same files of weights and optimiser state that
`scripts/convert.py` takes and writes. Batches are drawn by torch here; `train` takes any others.
Axes: B batch, T time.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jaxgpt import tensor_files
from jaxgpt.checks import flag
from jaxgpt.cli import config_of, parse_train_flags, run_command
from jaxgpt.config import SamplingConfig, TrainConfig
from jaxgpt.datasets import load_corpus
from jaxgpt.errors import LossNotFinite, UserError
from jaxgpt.presets import PRESETS
from jaxgpt.tokenizer import decode
from jaxgpt.tokens import prepare, sample_prompt
from torch_ref.generate import generate
from torch_ref.model import GPT, exact, mean_loss
from torch_ref.train_step import learning_rate, load_optimizer_tensors, make_optimizer, optimizer_tensors, update

Batch = tuple[Tensor, Tensor]  # inputs and targets, int64 [B, T] each


@dataclass(frozen=True)
class ReferenceFlags(TrainConfig):
    """The flags of scripts/train.py that this loop has a use for, and files."""

    data_dir: Path | None = None
    """Folder to look for datasets in first."""
    weights: Path | None = None
    """Start from these weights (safetensors, the write-ups' names)."""
    optimizer_state: Path | None = None
    """Go on with this optimiser state, from its step."""
    out: Path | None = None
    """Write the trained weights to this file (safetensors)."""
    optimizer_state_out: Path | None = None
    """Write the optimiser's state to this file (safetensors)."""
    overwrite: bool = False
    """Replace files that exist."""


def train(
    model: GPT,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    batch_of: Callable[[int], Batch],
    steps: Iterable[int],
    keep_of: Callable[[int], Sequence[Tensor] | None] = lambda step: None,
    clip: Callable[[Iterable[Tensor], float], Any] = torch.nn.utils.clip_grad_norm_,
    end_of_text: int | None = None,
) -> Iterator[tuple[int, float]]:
    """The loop: yields each step with its loss before the update.

    Args:
        batch_of: the batch of a step.
        keep_of: the dropout masks of a step; None lets torch draw them.
        clip, end_of_text: as in `update`.
    """
    for step in steps:
        model.train()
        idx_BT, target_BT = batch_of(step)
        lr = learning_rate(config, step)
        yield step, update(model, optimizer, config, lr, idx_BT, target_BT, keep_of(step), clip, end_of_text)


class EarlyStopping:
    """Tells when `patience` validations in a row were not lower by more than `min_delta` than the lowest so far."""

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


def random_batch(tokens_N: Tensor, config: TrainConfig, generator: torch.Generator) -> Batch:
    """Uniform random windows, with replacement; targets are the inputs shifted by one."""
    block_size = config.model.block_size
    start_B = torch.randint(len(tokens_N) - block_size, (config.batch_size,), generator=generator)
    window_BT = tokens_N[start_B[:, None] + torch.arange(block_size + 1)]
    return window_BT[:, :-1], window_BT[:, 1:]


def chunks(tokens_N: Tensor, block_size: int) -> Tensor:
    """Windows of a block plus one at stride a block: start in range(0, N - block_size, block_size), [J, T + 1]."""
    return tokens_N.unfold(0, block_size + 1, block_size)


def epochs(tokens_N: Tensor, config: TrainConfig, generator: torch.Generator) -> Iterator[Batch]:
    """Batches of packed chunks, shuffled anew each epoch; a ragged last batch is left out."""
    chunk_JT = chunks(tokens_N, config.model.block_size)
    while True:
        order_J = torch.randperm(len(chunk_JT), generator=generator)
        for at in range(0, len(order_J) - config.batch_size + 1, config.batch_size):
            window_BT = chunk_JT[order_J[at : at + config.batch_size]]
            yield window_BT[:, :-1], window_BT[:, 1:]


def random_batches(tokens_N: Tensor, config: TrainConfig, generator: torch.Generator) -> Iterator[Batch]:
    """Random windows without end."""
    while True:
        yield random_batch(tokens_N, config, generator)


@torch.no_grad()
def validation_loss(model: GPT, batches: Iterable[Batch], end_of_text: int | None = None) -> float:
    """The mean of the batches' mean losses, in evaluation mode and in the parameters' dtype."""
    with exact(model):
        losses = [mean_loss(model, *batch, end_of_text=end_of_text).item() for batch in batches]
    return sum(losses) / len(losses)


def in_order(tokens_N: Tensor, config: TrainConfig) -> Iterator[Batch]:
    """The batches of a whole split; the ragged last one counts as one."""
    for window_BT in chunks(tokens_N, config.model.block_size).split(config.batch_size):
        yield window_BT[:, :-1], window_BT[:, 1:]


@torch.no_grad()
def whole_split_loss(
    model: GPT, tokens_N: Tensor, batch_size: int, end_of_text: int | None = None
) -> tuple[float, int]:
    """The mean loss over all non-overlapping windows of a block, the ragged rest left out, and the number of tokens."""
    total, count = 0.0, 0
    with exact(model):
        for window_BT in chunks(tokens_N, model.pos_emb.num_embeddings).split(batch_size):
            idx_BT, target_BT = window_BT[:, :-1], window_BT[:, 1:]
            counted = idx_BT.numel() if end_of_text is None else int((idx_BT != end_of_text).sum())
            total += mean_loss(model, idx_BT, target_BT, end_of_text=end_of_text).item() * counted
            count += counted
    return total / count, count


def main() -> None:
    flags = parse_train_flags(sys.argv[1:], __doc__, ReferenceFlags)
    config = _checked(flags)
    corpus = load_corpus(config.dataset, flags.data_dir, print, config.text_column)
    config, data = prepare(config, corpus, flags.data_dir, print)
    tokenizer = data.tokenizer
    train_N, val_N = (torch.from_numpy(tokens.astype(np.int64)) for tokens in (data.train_N, data.val_N))
    prompt = sample_prompt(config.prompt, tokenizer, corpus)
    prompt_ids = tokenizer.encode(prompt).tolist()
    end_of_text = tokenizer.end_of_text if config.packing == "documents" else None

    torch.manual_seed(config.seed)
    model = GPT(config.model, tokenizer.vocab_size, torch.bfloat16 if config.dtype == "bfloat16" else None)
    model = model.to(torch.float64 if config.dtype == "float64" else torch.float32)
    optimizer = make_optimizer(model, config)
    start = _load(flags, model, optimizer, config)
    # Streams of their own, so that evaluating changes no training batch.
    train_draw, val_draw = (torch.Generator().manual_seed(config.seed + stream) for stream in (1, 2))
    source = random_batches if config.packing == "windows" else epochs
    batches, val_batches = source(train_N, config, train_draw), random_batches(val_N, config, val_draw)
    for _ in range(start):  # a run that goes on takes the batches that it would have taken
        next(batches)

    per_epoch = len(chunks(train_N, config.model.block_size)) // config.batch_size
    width, begun = len(str(config.steps - 1)), time.perf_counter()
    stopping, best = EarlyStopping(config.patience, config.min_delta), (math.inf, {})
    steps = range(start, config.steps)
    for step, loss in train(model, optimizer, config, lambda _: next(batches), steps, end_of_text=end_of_text):
        if loss != loss or loss in (float("inf"), -float("inf")):
            raise LossNotFinite(f"step {step}: loss {loss}; try a lower --lr or --clip 1")
        due = step % config.eval_every == 0 if config.eval_every else (step + 1) % per_epoch == 0
        if due or step == config.steps - 1:
            some = islice(val_batches, config.eval_batches) if config.eval_batches else in_order(val_N, config)
            val_loss = validation_loss(model, some, end_of_text)
            if config.eval_every:
                print(f"step {step:0{width}d}  train {loss:.3f}  val {val_loss:.3f}", flush=True)
            else:
                epoch, lr = (step + 1) / per_epoch, learning_rate(config, step)
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
    with exact(model):
        ids = list(generate(model, prompt_ids, sampling, generator=torch.Generator().manual_seed(config.seed)))
    print(f"---\n{prompt}{decode(tokenizer, ids)}\n---")
    _save(flags, model, optimizer, config)


def _checked(flags: ReferenceFlags) -> TrainConfig:
    """The configuration. Raises `UserError` for flags that mean nothing here, and files that cannot be."""
    config, preset = config_of(flags), PRESETS[flags.preset]
    unknown = "parallel checkpoint_every keep_checkpoints diagnose_every attention_every sample_every"
    for name in unknown.split():
        if getattr(config, name) != getattr(preset, name):
            raise UserError(f"{flag(name)}: the reference has one device and keeps no records; leave it out")
    if flags.optimizer_state and not flags.weights:
        raise UserError(f"--optimizer-state {flags.optimizer_state}: belongs to weights; give --weights as well")
    if flags.patience and flags.optimizer_state_out:
        raise UserError("--optimizer-state-out: not kept for the best weights of --patience; leave one out")
    files = {"--out": flags.out, "--optimizer-state-out": flags.optimizer_state_out}
    tensor_files.require_new(files, flags.overwrite)
    return dataclasses.replace(config, dtype="float32" if config.dtype == "auto" else config.dtype)


def _load(flags: ReferenceFlags, model: GPT, optimizer: torch.optim.Optimizer, config: TrainConfig) -> int:
    """Takes over the given files; returns the step to start from. Raises `UserError` if they do not fit."""
    if flags.weights:
        tensors = tensor_files.read(flags.weights, "--weights")
        _require_same(f"--weights {flags.weights}", tensors, dict(model.state_dict()))
        model.load_state_dict({name: torch.from_numpy(p) for name, p in tensors.items()})
    if not flags.optimizer_state:
        return 0
    named = f"--optimizer-state {flags.optimizer_state}"
    tensors = tensor_files.read(flags.optimizer_state, "--optimizer-state")
    _require_same(named, tensors, optimizer_tensors(model, optimizer, config, 0))
    step = tensors["step"].item()
    if step != int(step) or not 0 <= step <= config.steps:
        raise UserError(f"{named}: {step} updates done; give a whole number of them, up to --steps {config.steps}")
    return load_optimizer_tensors(model, optimizer, config, {n: torch.from_numpy(p) for n, p in tensors.items()})


def _require_same(named: str, tensors: dict[str, np.ndarray], like: dict[str, Tensor]) -> None:
    if odd := sorted(set(tensors) ^ set(like)):
        raise UserError(f"{named}: not of this model ({', '.join(odd[:4])} on one side only); give other --model flags")
    for name, p in tensors.items():
        if name == "step":
            if p.size != 1 or p.dtype.kind not in "iuf":
                raise UserError(f"{named}: step is {p.tolist()}; one number of updates is needed")
        elif p.shape != tuple(like[name].shape) or p.dtype != torch.empty(0, dtype=like[name].dtype).numpy().dtype:
            wanted = f"{str(like[name].dtype).removeprefix('torch.')} {list(like[name].shape)}"
            raise UserError(
                f"{named}: {name} is {p.dtype} {list(p.shape)}, not {wanted}; give the --model flags and "
                "the --dtype of its training"
            )


def _save(flags: ReferenceFlags, model: GPT, optimizer: torch.optim.Optimizer, config: TrainConfig) -> None:
    state = optimizer_tensors(model, optimizer, config, config.steps)
    files = (
        ("--out", flags.out, dict(model.state_dict())),
        ("--optimizer-state-out", flags.optimizer_state_out, state),
    )
    tensor_files.write(
        (name, path, {n: t.detach().numpy() for n, t in tensors.items()}) for name, path, tensors in files if path
    )


if __name__ == "__main__":
    run_command(main)
