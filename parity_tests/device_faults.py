"""Faults in how a batch is divided over devices and microbatches, and in how the state is sharded, by their names."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxgpt import parallel, train_step
from jaxgpt.parity.mutants import Patch, put, wrap


def clipped_before(real: Callable[..., Any]) -> Callable[..., Any]:
    def mutated(sums: Any, axes: Any) -> Any:
        (loss_sum, count), grad_sums = sums
        scale = jnp.minimum(1, 0.1 * count / optax.tree.norm(grad_sums))
        return real(((loss_sum, count), jax.tree.map(lambda g: g * scale, grad_sums)), axes)

    return mutated


def accumulated_over(choose: Callable[[Any, int], Any]) -> Patch:
    """`accumulate` over other rows than the device's, given these and how many make a microbatch."""

    def wrapper(real: Callable[..., Any]) -> Callable[..., Any]:
        def mutated(sums: Any, batch: Any, microbatch_tokens: int | None, grad_accum: int) -> Any:
            n = train_step.microbatch_rows(*jnp.shape(batch[0]), microbatch_tokens)
            return real(sums, choose(batch, n), microbatch_tokens, grad_accum)

        return mutated

    return wrap(train_step, "accumulate", wrapper)


def first_keys(batch: Any, n: int) -> Any:
    *arrays, row_key_B = batch
    return *arrays, jnp.concatenate([row_key_B[:n]] * (len(row_key_B) // n))


def own_shard(grad: Any, axis_name: str, *, scatter_dimension: int, tiled: bool) -> Any:
    size = grad.shape[scatter_dimension] // lax.axis_size(axis_name)
    return lax.dynamic_slice_in_dim(grad, lax.axis_index(axis_name) * size, size, scatter_dimension)


FAULTS: dict[str, Patch] = {
    "each device keeps its own gradient": put(parallel, "_all_reduce_ravelled", lambda sums, axes: sums),
    "the same rows on every device": wrap(
        parallel, "_step_context", lambda real: lambda mesh, index, *rest: real(mesh, index * 0, *rest)
    ),
    "clipped before the sum over devices": wrap(parallel, "_all_reduce_ravelled", clipped_before),
    "a microbatch's sums for those of all": accumulated_over(lambda batch, n: jax.tree.map(lambda x: x[-n:], batch)),
    "the last microbatch left out": accumulated_over(lambda batch, n: jax.tree.map(lambda x: x[:-n], batch)),
    "one microbatch's dropout masks for all": accumulated_over(first_keys),
}

SHARD_FAULTS: dict[str, Patch] = {
    "each device keeps its own gradient of its shard": put(lax, "psum_scatter", own_shard),
    "the shards' gradients added up twice": wrap(
        parallel, "_all_reduce_ravelled", lambda real: lambda sums, axes: real(sums, parallel.ROWS)
    ),
    "clipped by the norm of a device's shards": put(
        parallel, "_global_norm", lambda shards, whole: optax.tree.norm((shards, whole))
    ),
}
