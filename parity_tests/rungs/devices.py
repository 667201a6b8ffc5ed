"""A batch divided over a CPU's cores, the rows of each in parts: still the whole loss, gradients and updates."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxgpt import parallel
from jaxgpt.convert import to_torch
from jaxgpt.tokenizer import ByteTokenizer
from jaxgpt.trained import whole_split_loss
from parity_tests.harness import Row, worst_tensor
from parity_tests.rungs.optimizer import without_epsilon
from parity_tests.sides import (
    SIZES,
    Case,
    FlaxTraining,
    TorchTraining,
    flax_params,
    precision_of,
    program_of,
    small,
    torch_model,
    torch_results,
)
from torch_ref.train import whole_split_loss as torch_whole_split

N_DEVICES, STEPS = 2, 20
# 12 rows of 17 tokens on each device: two parts of 6.
CASE = small("two devices, two parts each", model=dataclasses.replace(SIZES, dropout=0.3), batch_size=24, clip=0.1)


def rung_devices(quick: bool) -> Iterator[Row]:
    """One batch, twenty updates with a clip that bites, and a split's evaluation, through `jit` and `pmap`."""
    if len(devices()) < N_DEVICES:
        yield Row("divided batch, loss", "float64", CASE.name, note="JAX has one CPU device here", not_run=True)
        return
    yield from compare_batch("jit", "float64")
    if quick:
        return
    yield from compare_batch("jit", "float32")
    yield from compare_batch("pmap", "float64")
    yield from compare_batch("pmap", "float32")
    for kind in ("jit", "pmap"):
        yield from compare_updates(kind)
        yield from compare_evaluation(kind)


def devices() -> list[Any]:
    """CPU devices, on a machine with a GPU too: parts are what CPUs do."""
    return jax.devices("cpu")[:N_DEVICES]


def compare_batch(kind: str, precision: str) -> Iterator[Row]:
    """Loss and gradients of one batch, with dropout."""
    case = _case(kind)
    program, truth = program_of(case, precision), torch_results(CASE, "float64")
    rows_each = case.config.batch_size // N_DEVICES
    assert parallel.TOKENS_AT_ONCE < rows_each * SIZES.block_size, "one part is no part"

    def step(params: Any, idx_BT: Any, target_BT: Any, shards: Any) -> Any:
        keys = program.dropout_keys(jnp.int32(0), shards)
        return program.loss_and_grads(params, shards.rows(idx_BT), shards.rows(target_BT), keys, shards)

    with precision_of(precision):
        executor = parallel.Executor(program, devices())
        loss, grads = executor.compiled(step)(flax_params(case, program), *case.batch(0))
        ours = to_torch(grads)
    yield Row("divided batch, loss", precision, _label(kind), abs(float(loss) / truth.loss - 1))
    compared = {name: g for name, g in truth.grads.items() if not name.endswith("Wk.bias")}
    error, where = worst_tensor(ours, compared, precision)
    yield Row("divided batch, gradients", precision, _label(kind), error, note=where)


def compare_updates(kind: str) -> Iterator[Row]:
    """Every loss of the first updates, and every parameter after them, in float64."""
    theirs = TorchTraining(CASE, "float64", clip=without_epsilon)
    truth = theirs.run(STEPS)
    with precision_of("float64"):
        side = FlaxTraining(_case(kind), "float64", devices())
        errors = np.abs(np.array(side.run(STEPS)) / np.array(truth) - 1)
        ours = side.params()
    note = f"step {int(errors.argmax())}"
    yield Row("divided batch, every loss", "float64", _label(kind), float(errors.max()), note=note)
    error, where = worst_tensor(ours, theirs.params(), "float64")
    yield Row("divided batch, every parameter", "float64", _label(kind), error, note=where)


def compare_evaluation(kind: str) -> Iterator[Row]:
    """The loss over a split whose last batch is not full."""
    tokens = CASE.tokens[: 17 * 100 + 5]
    truth, count = torch_whole_split(torch_model(CASE, "float64"), torch.from_numpy(tokens.astype(np.int64)), 24)
    with precision_of("float64"):
        side = FlaxTraining(_case(kind), "float64", devices())
        ours, our_count, *_ = whole_split_loss(side.executor, side.state.params, tokens, ByteTokenizer())
    error = abs(ours / truth - 1) if our_count == count == 1700 else float("inf")
    yield Row("divided batch, loss", "float64", f"{_label(kind)}, evaluation", error)


def _case(kind: str) -> Case:
    return dataclasses.replace(CASE, config=dataclasses.replace(CASE.config, parallel=kind))


def _label(kind: str) -> str:
    return f"{CASE.name}, {kind}"
