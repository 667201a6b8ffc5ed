"""(tokens, seed, step) -> a batch. Pure, so that the same step sees the same batch whatever came before it.

Axes: N tokens, B windows of a batch, T time, K steps of one dispatch, J batches. A window is [T + 1]:
inputs and targets.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxgpt.config import TrainConfig
from jaxgpt.tokens import n_chunks, release

# What a random stream is for. A stream's key depends on the run's seed and on this number alone.
INIT, TRAIN, VALIDATION, DROPOUT, SAMPLE, EXAMPLES = range(6)
WINDOWS_MAPPED = 64  # of a memory-mapped file, each with up to 2 MiB around it, before all of them are let go
STARTS_AT_ONCE = 2**20  # windows that are drawn by one call, or brought to the device by one dispatch


def stream_key(seed: int, stream: int) -> Array:
    """The key of one random stream. The generator is named so that a change of JAX's default changes no run."""
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), stream)


def window_starts(key: Array, step: Any, n_tokens: int, batch_size: int, block_size: int) -> Array:
    """Uniform random starts of windows of block_size + 1 tokens, with replacement: int32 [B], same for any device."""
    return jax.random.randint(jax.random.fold_in(key, step), (batch_size,), 0, n_tokens - block_size, dtype=jnp.int32)


def steps_at_once(batch_size: int) -> int:
    """How many steps' windows are numbered together: at most 1024, and few of a large batch."""
    return max(1, min(1024, STARTS_AT_ONCE // batch_size))


class Resident(NamedTuple):
    """Batches of some steps that are cut out of tokens on the device."""

    tokens_N: Array
    start_KB: Array  # int32


class Streamed(NamedTuple):
    """Batches of some steps that were cut on the host."""

    window_KBT: Array  # [K, B, T + 1]


Feed = Resident | Streamed


def epoch_orders(seed: int, n: int) -> Callable[[int], np.ndarray]:
    """Epoch -> the order in which it takes n things, int32 [n], a function of (seed, epoch)."""
    key = stream_key(seed, TRAIN)
    shuffled = jax.jit(lambda epoch: jax.random.permutation(jax.random.fold_in(key, epoch), n))
    return lru_cache(2)(lambda epoch: np.asarray(shuffled(epoch)))


class Order:
    """Which windows each step takes, a function of (seed, step).

    windows: uniform random, with replacement. Otherwise chunks of a block plus one at stride a block, all of them in an
    order of its own in each epoch, a function of (seed, epoch); the last that fill no batch are left out.
    """

    def __init__(self, config: TrainConfig, n_tokens: int):
        self.batch_size, self.block_size = config.batch_size, config.model.block_size
        key = stream_key(config.seed, TRAIN)
        if config.packing == "windows":
            self.steps_per_epoch = None
            assert n_tokens - self.block_size < 2**31, "int32 starts"
            draw = jax.vmap(lambda step: window_starts(key, step, n_tokens, self.batch_size, self.block_size))
            draw, self._at_once = jax.jit(draw), steps_at_once(self.batch_size)
            self._drawn = lru_cache(4)(
                lambda i: np.asarray(draw(self._at_once * i + np.arange(self._at_once, dtype=np.int32)))
            )
        else:
            chunks = n_chunks(n_tokens, self.block_size)
            self.steps_per_epoch = chunks // self.batch_size
            assert self.steps_per_epoch, "fewer chunks than a batch"
            self._chunks = epoch_orders(config.seed, chunks)

    def starts(self, step: int, n_steps: int) -> np.ndarray:
        """The starts of the windows of `n_steps` steps from `step` on, int64 [K, B]."""
        starts = [self._starts(s) for s in range(step, step + n_steps)]
        return np.array(starts, np.int64).reshape(n_steps, self.batch_size)

    def _starts(self, step: int) -> np.ndarray:
        if self.steps_per_epoch is None:
            return self._drawn(step // self._at_once)[step % self._at_once]
        epoch, at = divmod(step, self.steps_per_epoch)
        chunk_B = self._chunks(epoch)[at * self.batch_size : (at + 1) * self.batch_size]
        return chunk_B.astype(np.int64) * self.block_size


def windows(tokens_N: Any, start_B: Any, block_size: int) -> Any:
    """The windows [B, T + 1] at the starts, of the tokens' type; jax or numpy, as the starts are."""
    np_or_jnp = np if isinstance(start_B, np.ndarray) else jnp
    return tokens_N[start_B[:, None] + np_or_jnp.arange(block_size + 1, dtype=start_B.dtype)]


def read_windows(tokens_N: np.ndarray, batch_starts: Iterable[np.ndarray], block_size: int) -> Iterator[np.ndarray]:
    """The windows [B, T + 1] at each batch's starts, of tokens in memory or in a file larger than it."""
    read = 0
    for start_B in batch_starts:
        window_BT = windows(tokens_N, start_B.astype(np.int64), block_size)
        read += len(start_B)
        if read >= WINDOWS_MAPPED:
            release(tokens_N)
            read = 0
        yield window_BT


def inputs_and_targets(window_BT: Any) -> tuple[Any, Any]:
    """int32 [B, T] each; the targets are the inputs shifted by one."""
    window_BT = window_BT.astype(jnp.int32)
    return window_BT[:, :-1], window_BT[:, 1:]


class Scored(NamedTuple):
    """A batch to evaluate: windows, and which of their targets count."""

    window_BT: np.ndarray  # [B, T + 1]
    counts_BT: np.ndarray  # bool [B, T]


def cut(tokens_N: np.ndarray, start_JB: np.ndarray, block_size: int) -> Iterator[Scored]:
    """The batches of windows at the starts, all targets counted."""
    for window_BT in read_windows(tokens_N, start_JB, block_size):
        yield Scored(window_BT, np.ones((len(window_BT), block_size), bool))


def whole_split(tokens_N: np.ndarray, batch_size: int, block_size: int, stride: int | None = None) -> Iterator[Scored]:
    """Batches that count every target of a split once.

    Args:
        stride: None: non-overlapping windows of a block, the ragged rest left out, as documented. Else windows begin
            `stride` apart, and each counts the targets that none before it has: with at least block_size - stride
            tokens before them. The last window ends with the split.
    """
    assert stride is None or 1 <= stride <= block_size
    n_tokens = len(tokens_N)
    start_J = np.arange(0, n_tokens - block_size, stride or block_size)
    counted_from_J = np.where(start_J == 0, 0, block_size - (stride or block_size))  # of a window's targets
    if stride and (rest := (n_tokens - 1 - block_size) - start_J[-1]):
        start_J = np.append(start_J, n_tokens - 1 - block_size)
        counted_from_J = np.append(counted_from_J, block_size - rest)
    missing = -len(start_J) % batch_size  # windows that only fill the last batch count nothing
    start_JB = np.pad(start_J, (0, missing)).reshape(-1, batch_size)
    from_JB = np.pad(counted_from_J, (0, missing), constant_values=block_size).reshape(-1, batch_size)
    for window_BT, from_B in zip(read_windows(tokens_N, start_JB, block_size), from_JB, strict=True):
        yield Scored(window_BT, np.arange(block_size) >= from_B[:, None])


def documents(idx_BT: Array, end_of_text: int) -> tuple[Array, Array]:
    """Of packed inputs the document that each token belongs to, and its position within it, int32 [B, T] each.

    A document's end-of-text token is its last. What stands before a window's start counts as no part of its first.
    """
    n_time = idx_BT.shape[1]
    begins_BT = jnp.pad(idx_BT[:, :-1] == end_of_text, ((0, 0), (1, 0)))
    at_T = jnp.arange(n_time, dtype=jnp.int32)
    begun_at_BT = jax.lax.cummax(jnp.where(begins_BT, at_T, 0), axis=1)
    return jnp.cumsum(begins_BT, axis=1, dtype=jnp.int32), at_T - begun_at_BT
