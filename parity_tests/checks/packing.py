"""Packed chunks, documents and strides, against the tutorial's loop and plain sliding windows, written out here."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch.nn import functional as F

from jaxgpt.data import sampler
from jaxgpt.data.tokenizer import ByteTokenizer
from jaxgpt.model import loss
from jaxgpt.parity.harness import Row
from jaxgpt.parity.jax_side import precision_of
from jaxgpt.tasks.language_modeling import whole_split_loss
from parity_tests.cases import SIZES, Case, FlaxTraining, small, torch_model
from parity_tests.tolerances import row
from torch_ref.train import in_order, validation_loss
from torch_ref.train import whole_split_loss as torch_whole_split

STRIDES = (1, 5, 16, 17)


def documents_case() -> Case:
    """Of 29 tokens one ends a text: most windows of 17 hold an end."""
    model = dataclasses.replace(SIZES, dropout=0.1)
    return small("packed documents", "wikitext2", model, packing="documents", warmup_steps=10)


def check_packing(quick: bool) -> Iterator[Row]:
    """Which windows an epoch takes; the loss over a split by batches, by tokens, and at strides."""
    yield from compare_chunks(small("chunks", "wikitext2", SIZES, epochs=3))
    yield from compare_validation(small("chunks", "wikitext2", SIZES))
    yield from compare_validation(documents_case())
    for stride in STRIDES[1:2] if quick else STRIDES:
        yield from compare_stride(small(f"stride {stride} of {SIZES.block_size}"), stride)


def compare_chunks(case: Case) -> Iterator[Row]:
    """The windows of three epochs as the trainer's step takes them, against the tutorial's list of chunks."""
    block_size, tokens = case.config.model.block_size, case.tokens.tolist()
    chunks = []
    for start in range(0, len(tokens) - block_size, block_size):
        chunk = tokens[start : start + block_size + 1]
        if len(chunk) == block_size + 1:
            chunks.append((tuple(chunk[:-1]), tuple(chunk[1:])))
    per_epoch = len(chunks) // case.config.batch_size
    side = FlaxTraining(case, "float32")
    objective, orders, n_wrong = side.executor.objective, [], 0
    for epoch in range(3):
        taken = []
        source = side.loader.take(epoch * per_epoch, per_epoch)
        for k in range(per_epoch):
            idx_BT, target_BT = objective.batch(source, k)
            taken += zip(map(tuple, idx_BT.tolist()), map(tuple, target_BT.tolist()), strict=True)
        n_wrong += len(taken) - len(set(taken) & set(chunks))  # none twice, none that is not of the list
        n_wrong += len(taken) != per_epoch * case.config.batch_size
        orders.append(taken)
    n_wrong += (orders[0] == orders[1]) + (orders[1] == orders[2]) + (orders[0] == chunks[: len(orders[0])])
    yield row("packing, chunks that differ", "float32", case.name, n_wrong)


def compare_validation(case: Case) -> Iterator[Row]:
    """The documented mean of batch means, the ragged last batch counted as one, and the mean over tokens."""
    tokens = case.tokens[: 17 * 16 + 5]  # 16 windows of 17 in batches of 6, and 4 tokens over
    tokens_N = torch.from_numpy(tokens.astype(np.int64))
    model = torch_model(case, "float64")
    by_batch = validation_loss(model, in_order(tokens_N, case.config), case.end_of_text)
    by_token, count = torch_whole_split(model, tokens_N, case.config.batch_size, case.end_of_text)
    with precision_of("float64"):
        side = FlaxTraining(case, "float64")
        sums_J2 = side.executor.evaluate(side.state.params, sampler.whole_split(tokens, case.config.batch_size, 17))
        ours = whole_split_loss(side.executor, side.state.params, tokens, ByteTokenizer())
    mean = loss.mean_of_batches(sums_J2)
    yield row("validation, mean of batch means", "float64", case.name, abs(mean / by_batch - 1))
    error = abs(ours.loss / by_token - 1) if ours.tokens == count else math.inf
    yield row("validation, mean over tokens", "float64", case.name, error)


def compare_stride(case: Case, stride: int) -> Iterator[Row]:
    """Perplexity at a stride, against sliding windows as they are usually written."""
    block_size, tokens = case.config.model.block_size, case.tokens[:150]
    model, tokens_N = torch_model(case, "float64").eval(), torch.from_numpy(tokens.astype(np.int64))
    total, scored_to = 0.0, 0  # how many targets have been scored
    n_targets = len(tokens) - 1
    for begin in range(0, n_targets, stride):
        end = min(begin + block_size, n_targets)
        begin = end - block_size  # the last window ends with the text
        with torch.no_grad():
            logits_TV = model(tokens_N[None, begin:end])[0]
        losses_T = F.cross_entropy(logits_TV, tokens_N[begin + 1 : end + 1], reduction="none")
        total += losses_T[scored_to - begin :].sum().item()
        scored_to = end
        if end == n_targets:
            break
    with precision_of("float64"):
        side = FlaxTraining(case, "float64")
        ours = whole_split_loss(side.executor, side.state.params, tokens, ByteTokenizer(), stride)
    error = abs(ours.loss / (total / n_targets) - 1) if ours.tokens == n_targets else math.inf
    yield row("perplexity at strides", "float64", case.name, error)
