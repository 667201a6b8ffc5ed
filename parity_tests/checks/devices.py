"""Data parallelism over a CPU's cores, each with its rows in microbatches: still the whole loss, gradients, updates."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxgpt import parallel
from jaxgpt.data.tokenizer import ByteTokenizer
from jaxgpt.interop.torch_names import to_torch
from jaxgpt.parity.harness import Row, worst_tensor
from jaxgpt.parity.jax_side import precision_of
from jaxgpt.tasks.language_modeling import whole_split_loss
from jaxgpt.train_step import TrainState, train_step
from parity_tests.cases import (
    SIZES,
    Case,
    FlaxTraining,
    TorchTraining,
    flax_params,
    objective_of,
    small,
    torch_model,
    torch_results,
)
from parity_tests.checks.optimizer import without_epsilon
from parity_tests.tolerances import row
from torch_ref.train import whole_split_loss as torch_whole_split

N_DEVICES, STEPS = 2, 20
FSDP = "fsdp"  # the kind with a sharded state, and with accumulated gradients
# 12 rows of 17 tokens on each device: two microbatches of 6.
CASE = small(
    "two devices, two microbatches each", model=dataclasses.replace(SIZES, dropout=0.3), batch_size=24, clip=0.1
)


def check_devices(quick: bool) -> Iterator[Row]:
    """One batch, twenty updates with an active clip, and a split's evaluation, through `jit` and `pmap`; the last two
    also with a sharded state."""
    if len(devices()) < N_DEVICES:
        yield row("data parallel, loss", "float64", CASE.name, note="JAX has one CPU device here", not_run=True)
        return
    yield from compare_batch("jit", "float64")
    if quick:
        return
    yield from compare_batch("jit", "float32")
    yield from compare_batch("pmap", "float64")
    yield from compare_batch("pmap", "float32")
    for kind in ("jit", "pmap", FSDP):
        yield from compare_updates(kind)
        yield from compare_evaluation(kind)


def devices() -> list[Any]:
    """CPU devices, on a machine with a GPU too: microbatches are for CPUs."""
    return jax.devices("cpu")[:N_DEVICES]


def compare_batch(kind: str, precision: str) -> Iterator[Row]:
    """Loss and gradients of one batch, with dropout."""
    case = _case(kind)
    objective, truth = objective_of(case, precision), torch_results(CASE, "float64")
    rows_each = case.config.batch_size // N_DEVICES
    assert parallel.CPU_TUNING.microbatch_tokens < rows_each * SIZES.block_size, "one microbatch is no accumulation"

    def step(params: Any, idx_BT: Any, target_BT: Any, ctx: Any) -> Any:
        state = TrainState(jnp.int32(0), params, objective.optimizer.init(params))
        _, result = train_step(objective, state, (ctx.local_rows(idx_BT), ctx.local_rows(target_BT)), ctx)
        return result.loss, result.grads

    with precision_of(precision):
        executor = parallel.Executor(objective, devices())
        loss, grads = executor.compiled(step)(flax_params(case, objective), *case.batch(0))
        ours = to_torch(grads)
    yield row("data parallel, loss", precision, _label(kind), abs(float(loss) / truth.loss - 1))
    compared = {name: g for name, g in truth.grads.items() if not name.endswith("Wk.bias")}
    error, where = worst_tensor(ours, compared, precision)
    yield row("data parallel, gradients", precision, _label(kind), error, note=where)


def compare_updates(kind: str) -> Iterator[Row]:
    """Every loss of the first updates, and every parameter after them, in float64."""
    theirs = TorchTraining(CASE, "float64", clip=without_epsilon)
    truth = theirs.run(STEPS)
    with precision_of("float64"):
        side = FlaxTraining(_case(kind), "float64", devices(), _mesh(kind))
        errors = np.abs(np.array(side.run(STEPS)) / np.array(truth) - 1)
        ours = side.params()
    note = f"step {int(errors.argmax())}"
    yield row("data parallel, every loss", "float64", _label(kind), float(errors.max()), note=note)
    error, where = worst_tensor(ours, theirs.params(), "float64")
    yield row("data parallel, every parameter", "float64", _label(kind), error, note=where)


def compare_evaluation(kind: str) -> Iterator[Row]:
    """The loss over a split whose last batch is not full."""
    tokens = CASE.tokens[: 17 * 100 + 5]
    truth, count = torch_whole_split(torch_model(CASE, "float64"), torch.from_numpy(tokens.astype(np.int64)), 24)
    with precision_of("float64"):
        side = FlaxTraining(_case(kind), "float64", devices(), _mesh(kind))
        ours, our_count, *_ = whole_split_loss(side.executor, side.state.params, tokens, ByteTokenizer())
    error = abs(ours / truth - 1) if our_count == count == 1700 else float("inf")
    yield row("data parallel, loss", "float64", f"{_label(kind)}, evaluation", error)


def _case(kind: str) -> Case:
    fields = dict(grad_accum=2) if kind == FSDP else dict(parallel=kind)
    return dataclasses.replace(CASE, config=dataclasses.replace(CASE.config, **fields))


def _mesh(kind: str) -> str:
    return f"fsdp={N_DEVICES}" if kind == FSDP else ""


def _label(kind: str) -> str:
    return f"{CASE.name}, {kind}"
