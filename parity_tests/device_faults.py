"""Faults in how a batch is divided over devices and parts, by what they are called."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxgpt import parallel
from jaxgpt.train_step import Shards
from parity_tests.faults import Patch, wrap


def clipped_before(real: Callable[..., Any]) -> Callable[..., Any]:
    def mutated(function: Any, tree: Any) -> Any:
        (loss, count), *grads = tree
        if grads:
            scale = jnp.minimum(1, 0.1 * count / optax.tree.norm(grads))
            tree = (loss, count), *jax.tree.map(lambda g: g * scale, grads)
        return real(function, tree)

    return mutated


def summed_of(choose: Callable[[Any, int], Any]) -> Patch:
    """The sums over other arrays than a program's rows, given the rows and how many are a part."""

    def wrapper(real: Callable[..., Any]) -> Callable[..., Any]:
        def mutated(self: Shards, sums: Any, *batch: Any) -> Any:
            return real(self, sums, *choose(batch, self.rows_at_once(*batch[0].shape)))

        return mutated

    return wrap(Shards, "summed", wrapper)


def first_keys(batch: Any, n: int) -> Any:
    *arrays, last = batch
    if last is not None and jax.dtypes.issubdtype(last.dtype, jax.dtypes.prng_key):
        last = jnp.concatenate([last[:n]] * (len(last) // n))
    return *arrays, last


FAULTS: dict[str, Patch] = {
    "each device keeps its own gradient": wrap(parallel, "_as_one", lambda real: lambda function, tree: tree),
    "the same rows on every device": wrap(parallel, "_shards", lambda real: lambda mesh, index: real(mesh, index * 0)),
    "clipped before the sum over devices": wrap(parallel, "_as_one", clipped_before),
    "a part's sums for those of all": summed_of(lambda batch, n: jax.tree.map(lambda x: x[-n:], batch)),
    "the last part left out": summed_of(lambda batch, n: jax.tree.map(lambda x: x[:-n], batch)),
    "one part's dropout masks for all parts": summed_of(first_keys),
}
