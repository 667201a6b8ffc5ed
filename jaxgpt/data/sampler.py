"""Samplers: which windows or examples each training step takes, and the batches of a split to evaluate.

A sampler is a pure function of (seed, step), so a resumed run sees the batches that an uninterrupted one would.

Axes: N tokens, or examples; B rows of a batch; T time; K steps of one dispatch; J windows or batches of a split. A
window holds T + 1 tokens: the inputs, and the targets one position later.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import chain, count
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxgpt.config import TrainConfig
from jaxgpt.data.files import drop_mapped_pages
from jaxgpt.data.shards import TokenShards
from jaxgpt.data.token_cache import n_chunks
from jaxgpt.errors import UserError
from jaxgpt.rng import TRAIN, stream_key

PADDING = -1  # pads short texts, and batches that are not full; the model's input has the pad token instead
MAX_STEPS_PER_DISPATCH = 1024
MAX_STARTS_PER_DISPATCH = 2**20  # windows whose starts are drawn, and moved to the device, at a time
# Windows read from a memory-mapped file before its pages are dropped. Each may make 2 MiB around it resident.
MAX_MAPPED_WINDOWS = 64


# -------------------------------------------------------------------------------------------------------- batch sources


class TokenSource(NamedTuple):
    """The batches of K steps, as positions in tokens that lie on the device."""

    tokens_N: Array
    start_KB: Array  # int32


class WindowSource(NamedTuple):
    """The batches of K steps, as windows cut on the host."""

    window_KBT: Array | np.ndarray  # [K, B, T + 1]


class RowSource(NamedTuple):
    """The batches of K steps, as windows of which each device has its own rows alone."""

    window_KBT: Array  # [K, B, T + 1], divided over the devices along B


class ExampleSource(NamedTuple):
    """The batches of K steps, as rows of encoded texts and labels that lie on the device."""

    idx_NT: Array  # int32
    label_N: Array  # int32
    row_KB: Array  # int32; PADDING where a batch is not full


BatchSource = TokenSource | WindowSource | RowSource


# ------------------------------------------------------------------------------------------------------------- training


def window_starts(key: Array, step: Any, n_tokens: int, batch_size: int, block_size: int) -> Array:
    """The starts of a step's windows, int32 [B]: uniform over all windows of the tokens, with replacement.

    Args:
        key: the run's key of the stream TRAIN.
        step: a scalar, traced or not.
        block_size: T; a window holds one token more.
    """
    return jax.random.randint(jax.random.fold_in(key, step), (batch_size,), 0, n_tokens - block_size, dtype=jnp.int32)


def steps_per_dispatch(batch_size: int) -> int:
    """The number of steps whose starts are drawn at a time."""
    return max(1, min(MAX_STEPS_PER_DISPATCH, MAX_STARTS_PER_DISPATCH // batch_size))


def epoch_permutations(seed: int, n: int) -> Callable[[int], np.ndarray]:
    """A function from an epoch to its permutation of n items, int32 [n], which depends on (seed, epoch) only."""
    key = stream_key(seed, TRAIN)
    permute = jax.jit(lambda epoch: jax.random.permutation(jax.random.fold_in(key, epoch), n))
    return lru_cache(2)(lambda epoch: np.asarray(permute(epoch)))


class BatchSampler:
    """The windows of each training step, a function of (seed, step).

    `--packing windows` draws uniform random windows with replacement. The other packings shuffle the chunks of a block
    plus one token that start at multiples of a block: each epoch has its own permutation, and drops the chunks that do
    not fill a batch.

    Args:
        n_tokens: the size of the training split, which must hold a batch.

    Attributes:
        batch_size: B, of the global batch.
        block_size: T.
        steps_per_epoch: None for random windows.
    """

    def __init__(self, config: TrainConfig, n_tokens: int):
        self.batch_size, self.block_size = config.batch_size, config.model.block_size
        self.steps_per_epoch: int | None = None
        if config.packing == "windows":
            assert n_tokens - self.block_size < 2**31, "starts are int32"
            self._drawn_steps = steps_per_dispatch(self.batch_size)
            self._draw = self._drawer(config.seed, n_tokens)
        else:
            chunks = n_chunks(n_tokens, self.block_size)
            self.steps_per_epoch = chunks // self.batch_size
            assert self.steps_per_epoch, "fewer chunks than a batch"
            self._permutation = epoch_permutations(config.seed, chunks)

    def starts(self, step: int, n_steps: int) -> np.ndarray:
        """The starts of the windows of `n_steps` steps from `step` on, int64 [K, B]."""
        starts = [self._starts(s) for s in range(step, step + n_steps)]
        return np.array(starts, np.int64).reshape(n_steps, self.batch_size)

    def _starts(self, step: int) -> np.ndarray:
        if self.steps_per_epoch is None:
            return self._draw(step // self._drawn_steps)[step % self._drawn_steps]
        epoch, k = divmod(step, self.steps_per_epoch)
        chunk_B = self._permutation(epoch)[k * self.batch_size : (k + 1) * self.batch_size]
        return chunk_B.astype(np.int64) * self.block_size

    def _drawer(self, seed: int, n_tokens: int) -> Callable[[int], np.ndarray]:
        """A function from i to the starts [K, B] of the i-th group of K steps, drawn in one call of JAX."""
        key, n_steps = stream_key(seed, TRAIN), self._drawn_steps
        draw = jax.vmap(lambda step: window_starts(key, step, n_tokens, self.batch_size, self.block_size))
        draw = jax.jit(draw)
        return lru_cache(4)(lambda i: np.asarray(draw(n_steps * i + np.arange(n_steps, dtype=np.int32))))


class ShardSampler:
    """The windows of each training step from a corpus in shards, a function of (seed, step).

    Each epoch takes the files in an order of its own, the shards of a file as they follow each other, and the chunks of
    a shard shuffled; the first epoch begins with the first file, of which a part validates. The chunks of a shard are
    those of `BatchSampler`. A batch may go on in the next shard and in the next epoch, so that none is dropped.

    Args:
        shards: of the corpus.
        rows: of each batch, those to cut.

    Attributes:
        batch_size: B, the number of rows to cut.
        block_size: T.
    """

    def __init__(self, config: TrainConfig, shards: TokenShards, rows: slice = slice(None)):  # noqa: B008
        assert config.packing != "windows", "random windows need all tokens at once"
        self.dtype, self.block_size = shards.dtype, config.model.block_size
        self._shards, self._seed, self._global_batch = shards, config.seed, config.batch_size
        self._rows = range(config.batch_size)[rows]
        self.batch_size = len(self._rows)

    def batches(self, step: int) -> Iterator[np.ndarray]:
        """The windows [B, T + 1] of each step from `step` on, without end.

        Raises:
            UserError: no shard holds a window; or what reading a shard raises.
        """
        parts: list[np.ndarray] = []  # of the batch that is being filled
        n_filled = 0
        for tokens_N, start_W in self._chunks(step * self._global_batch):
            while len(start_W):
                take = start_W[: self._global_batch - n_filled]
                cut = take[max(self._rows.start - n_filled, 0) : max(self._rows.stop - n_filled, 0)]
                pieces = np.split(cut, range(MAX_MAPPED_WINDOWS, len(cut), MAX_MAPPED_WINDOWS))
                parts.extend(read_windows(tokens_N, pieces, self.block_size))
                start_W, n_filled = start_W[len(take) :], n_filled + len(take)
                if n_filled == self._global_batch:
                    yield np.concatenate(parts)
                    parts, n_filled = [], 0

    def _chunks(self, first: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The tokens [N] of each shard and the starts of its chunks in their order, from chunk number `first` on."""
        passes, first_shard, first = self._position(first)
        last_used = None
        for epoch, file, number, tokens_N in self._shards.read(passes, first_shard):
            n = n_chunks(len(tokens_N), self.block_size)
            last_used = epoch if n or last_used is None else last_used
            if epoch > last_used + 1:
                raise UserError(f"--model.block-size {self.block_size}: no shard of the corpus holds a block plus one")
            if first < n:
                order = shuffled(n, self._seed, epoch, file, number)
                yield tokens_N, order[first:] * self.block_size
            first = max(0, first - n)

    def _position(self, first: int) -> tuple[Iterator[tuple[int, int]], int, int]:
        """Where to begin to read for chunk number `first`, as far as the counts of the shards are known.

        Returns:
            The epochs and files from there on, the number of the first shard, and the chunks to skip from there.
        """
        n_files = self._shards.n_files
        passes = ((epoch, file) for epoch in count() for file in file_order(n_files, self._seed, epoch))
        begins = first
        for epoch, file in passes:
            counts, complete = self._shards.known_counts(file)
            for number, n_tokens in enumerate(counts):
                n = n_chunks(n_tokens, self.block_size)
                if first < n:
                    return chain([(epoch, file)], passes), number, first
                first -= n
            if not complete or epoch > begins:  # the latter: an epoch had no chunk
                return chain([(epoch, file)], passes), len(counts), first
        raise AssertionError("the epochs have no end")


def file_order(n_files: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch's files. The first epoch begins with the first file."""
    order = shuffled(n_files, seed, epoch).tolist()
    return order if epoch else [0, *(file for file in order if file != 0)]


def shuffled(n: int, *key: int) -> np.ndarray:
    """The numbers below n in an order that depends on the key only, int64 [n].

    The raw output of Philox is the same in all versions of numpy, unlike what its `Generator` makes of it. JAX would
    compile a program for every n.
    """
    return np.argsort(np.random.Philox(np.random.SeedSequence(key)).random_raw(n), kind="stable")


class ExampleSampler:
    """The labeled examples of each step, a function of (seed, step): a permutation of all examples in each epoch.

    Args:
        n_texts: the number of training examples.
        batch_size: B, of the global batch.
    """

    def __init__(self, seed: int, n_texts: int, batch_size: int):
        self.batch_size, self.steps_per_epoch = batch_size, -(-n_texts // batch_size)
        self._permutation = epoch_permutations(seed, n_texts)

    def rows(self, step: int) -> np.ndarray:
        """The numbers of a step's examples, int32 [B]. PADDING fills the last batch of an epoch."""
        epoch, k = divmod(step, self.steps_per_epoch)
        row_B = np.full(self.batch_size, PADDING, np.int32)
        remaining = self._permutation(epoch)[k * self.batch_size : (k + 1) * self.batch_size]
        row_B[: len(remaining)] = remaining
        return row_B


# -------------------------------------------------------------------------------------------------------------- windows


def windows(tokens_N: Any, start_B: Any, block_size: int) -> Any:
    """The windows [B, T + 1] at the starts, of the tokens' type; a numpy array if the starts are, else a JAX array."""
    np_or_jnp = np if isinstance(start_B, np.ndarray) else jnp
    return tokens_N[start_B[:, None] + np_or_jnp.arange(block_size + 1, dtype=start_B.dtype)]


def read_windows(tokens_N: np.ndarray, batch_starts: Iterable[np.ndarray], block_size: int) -> Iterator[np.ndarray]:
    """The windows [B, T + 1] of each batch, of tokens in memory or in a memory-mapped file.

    It drops the pages of a memory-mapped file from time to time, so a file may be larger than the memory.

    Args:
        batch_starts: the starts [B] of each batch.
    """
    n_read = 0
    for start_B in batch_starts:
        window_BT = windows(tokens_N, start_B.astype(np.int64), block_size)
        n_read += len(start_B)
        if n_read >= MAX_MAPPED_WINDOWS:
            drop_mapped_pages(tokens_N)
            n_read = 0
        yield window_BT


def inputs_and_targets(window_BT: Any) -> tuple[Any, Any]:
    """The inputs and the targets of windows, int32 [B, T] each: the targets are the inputs one position later."""
    window_BT = window_BT.astype(jnp.int32)
    return window_BT[:, :-1], window_BT[:, 1:]


def documents(idx_BT: Array, end_of_text: int) -> tuple[Array, Array]:
    """For packed documents, the number of each token's document in its row, and its position in the document.

    The end-of-text token belongs to the document that it ends. A row counts from its own start: a document that begins
    before the window has its position 0 there.

    Args:
        idx_BT: the inputs.

    Returns:
        Document numbers and positions, int32 [B, T] each.
    """
    begins_BT = jnp.pad(idx_BT[:, :-1] == end_of_text, ((0, 0), (1, 0)))
    t_T = jnp.arange(idx_BT.shape[1], dtype=jnp.int32)
    begin_BT = jax.lax.cummax(jnp.where(begins_BT, t_T, 0), axis=1)
    return jnp.cumsum(begins_BT, axis=1, dtype=jnp.int32), t_T - begin_BT


# ----------------------------------------------------------------------------------------------------------- evaluation


class EvalBatch(NamedTuple):
    """A batch to evaluate: windows, and which of their targets count."""

    window_BT: np.ndarray  # [B, T + 1]
    counts_BT: np.ndarray  # bool [B, T]


def eval_windows(tokens_N: np.ndarray, start_JB: np.ndarray, block_size: int) -> Iterator[EvalBatch]:
    """J batches of windows, of which all targets count."""
    for window_BT in read_windows(tokens_N, start_JB, block_size):
        yield EvalBatch(window_BT, np.ones((len(window_BT), block_size), bool))


def whole_split(
    tokens_N: np.ndarray, batch_size: int, block_size: int, stride: int | None = None
) -> Iterator[EvalBatch]:
    """Batches of windows that together count each target of a split once.

    Args:
        stride: the distance between the starts of two windows, 1 to `block_size`. A window counts the targets that no
            window before it counts; each of them has at least block_size - stride tokens of context, and the last
            window ends with the split. None, as documented: windows do not overlap, and the targets after the last
            full window are left out.
    """
    assert stride is None or 1 <= stride <= block_size
    start_J = np.arange(0, len(tokens_N) - block_size, stride or block_size)
    first_counted_J = np.where(start_J == 0, 0, block_size - (stride or block_size))  # of a window's targets
    last_start = len(tokens_N) - 1 - block_size
    if stride and (n_uncounted := last_start - start_J[-1]):
        start_J = np.append(start_J, last_start)
        first_counted_J = np.append(first_counted_J, block_size - n_uncounted)
    n_missing = -len(start_J) % batch_size  # windows that fill the last batch, of which no target counts
    start_JB = np.pad(start_J, (0, n_missing)).reshape(-1, batch_size)
    first_counted_JB = np.pad(first_counted_J, (0, n_missing), constant_values=block_size).reshape(-1, batch_size)
    windows_of_batches = read_windows(tokens_N, start_JB, block_size)
    for window_BT, first_counted_B in zip(windows_of_batches, first_counted_JB, strict=True):
        yield EvalBatch(window_BT, np.arange(block_size) >= first_counted_B[:, None])
