"""(tokens, seed, step) -> a batch. Pure, so that the same step sees the same batch whatever came before it.

Axes: B windows of a batch, T time, J batches.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

# What a random stream is for. A stream's key depends on the run's seed and on this number alone.
INIT, TRAIN, VALIDATION, DROPOUT, SAMPLE = range(5)


def stream_key(seed: int, stream: int) -> Array:
    """The key of one random stream. The generator is named so that a change of JAX's default changes no run."""
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), stream)


def window_starts(key: Array, step: Any, n_tokens: int, batch_size: int, block_size: int) -> Array:
    """Uniform random starts of windows of block_size + 1 tokens, with replacement: int32 [B], same for any device."""
    return jax.random.randint(jax.random.fold_in(key, step), (batch_size,), 0, n_tokens - block_size, dtype=jnp.int32)


def windows(tokens_N: Array, start_B: Array, block_size: int) -> tuple[Array, Array]:
    """Inputs and targets, int32 [B, T] each; the targets are the inputs shifted by one."""
    at_BT = start_B[:, None] + jnp.arange(block_size + 1, dtype=jnp.int32)
    window_BT = tokens_N[at_BT].astype(jnp.int32)
    return window_BT[:, :-1], window_BT[:, 1:]


def whole_split_starts(n_tokens: int, batch_size: int, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts of the non-overlapping windows that cover a split, the ragged rest left out.

    Returns:
        start_JB, int32 [J, B], and real_JB, bool [J, B]: False for the windows that only fill up the last batch.
    """
    start = np.arange(0, n_tokens - block_size, block_size, dtype=np.int32)
    n_batches = -(-len(start) // batch_size)
    padded = np.zeros(n_batches * batch_size, np.int32)
    padded[: len(start)] = start
    real = np.arange(len(padded)) < len(start)
    return padded.reshape(n_batches, batch_size), real.reshape(n_batches, batch_size)


def device_tokens(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """The tokens in the smallest unsigned type that holds them, to spend little of the device's memory."""
    return tokens.astype(np.uint8 if vocab_size <= 2**8 else np.uint16 if vocab_size <= 2**16 else np.int32)
