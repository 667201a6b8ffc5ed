"""Classifying texts: their tokens, and the pure functions of the head's training.

Axes: N texts, B texts of a batch, T tokens, K steps of one dispatch. Padding is -1 until it comes to the model, so that
a text's length needs no array of its own.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxgpt import batches
from jaxgpt.config import FinetuneConfig
from jaxgpt.loss import cross_entropy
from jaxgpt.model import Classifier, Numerics, Params, bind, init_params
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.train_step import Program, Shards

ABSENT = -1


class Rows(NamedTuple):
    """The texts of some steps, chosen out of all on the device."""

    idx_NT: Array
    label_N: Array
    row_KB: Array  # int32; ABSENT where a batch is not full


def encode(texts: Sequence[str], tokenizer: Tokenizer, max_tokens: int) -> np.ndarray:
    """Token ids int32 [N, T], cut after `max_tokens` and filled up with ABSENT on the right."""
    idx_NT = np.full((len(texts), max_tokens), ABSENT, np.int32)
    for row_T, text in zip(idx_NT, texts, strict=True):
        ids = tokenizer.encode(text)[:max_tokens]
        row_T[: len(ids)] = ids
    return idx_NT


def padding(tokenizer: Tokenizer) -> int:
    """The token that fills up short texts: the end of text, as documented, or where there is none the first."""
    return tokenizer.end_of_text or 0


@dataclass(frozen=True)
class ClassifierProgram(Program):
    """The pure functions of a classifier's configuration. `end_of_text` is not used: each row is one text."""

    config: FinetuneConfig
    n_classes: int = 0
    padding: int = 0

    @cached_property
    def model(self) -> Callable[[Params], Classifier]:
        return bind(self.config.model, self.vocab_size, self.numerics, self.n_classes)

    @cached_property
    def exact_model(self) -> Callable[[Params], Classifier]:
        dtype = self.numerics.param_dtype
        return bind(self.config.model, self.vocab_size, Numerics(dtype, dtype), self.n_classes)

    def init_params(self) -> dict[str, Array]:
        key = batches.stream_key(self.config.seed, batches.INIT)
        return init_params(key, self.config.model, self.vocab_size, self.numerics, self.n_classes)

    def logits(self, model: Classifier, idx_BT: Array, row_key_B: Array | None = None) -> Array:
        """[B, classes] of texts padded with ABSENT."""
        length_B = jnp.sum(idx_BT != ABSENT, axis=1)
        return model(jnp.where(idx_BT == ABSENT, self.padding, idx_BT), length_B, self.config.pool, row_key_B)

    def loss_sum(self, params: Params, idx_BT: Array, label_B: Array, row_key_B: Array | None) -> tuple[Array, Array]:
        """The sum of a batch's loss, and its number of texts; those ABSENT count nothing."""
        logits_BK = self.logits(self.model(params), idx_BT, row_key_B)
        return cross_entropy(logits_BK, jnp.maximum(label_B, 0), label_B != ABSENT)

    def batch(self, feed: Rows, k: Array, shards: Shards) -> tuple[Array, Array]:
        row_B = shards.rows(feed.row_KB[k])
        return feed.idx_NT[row_B], jnp.where(row_B == ABSENT, ABSENT, feed.label_N[row_B])

    def evaluate(self, params: Params, idx_BT: Array, label_B: Array, shards: Shards) -> Any:
        """Sum of the loss over the texts that are not ABSENT, their number, and the confusion [class, predicted]."""
        model = self.exact_model(params)

        def sums(idx_BT: Array, label_B: Array) -> tuple[Array, Array, Array]:
            logits_BK = self.logits(model, idx_BT)
            loss, count = cross_entropy(logits_BK, jnp.maximum(label_B, 0), label_B != ABSENT)
            true_BK = jax.nn.one_hot(label_B, self.n_classes)  # a row of zeros for ABSENT
            predicted_BK = jax.nn.one_hot(jnp.argmax(logits_BK, -1), self.n_classes)
            return loss, count, true_BK.T @ predicted_BK

        return shards.summed(sums, shards.rows(idx_BT), shards.rows(label_B))


class EpochOrder:
    """Which texts each step takes: all in an order of its own in each epoch, a function of (seed, epoch)."""

    def __init__(self, seed: int, n_texts: int, batch_size: int):
        self.batch_size, self.steps_per_epoch = batch_size, -(-n_texts // batch_size)
        self._order_N = batches.epoch_orders(seed, n_texts)

    def rows(self, step: int) -> np.ndarray:
        """int32 [B]; of an epoch's last batch those that are left, the others ABSENT."""
        epoch, at = divmod(step, self.steps_per_epoch)
        row_B = np.full(self.batch_size, ABSENT, np.int32)
        taken = self._order_N(epoch)[at * self.batch_size : (at + 1) * self.batch_size]
        row_B[: len(taken)] = taken
        return row_B


class RowLoader:
    """The loader (`loader.py`) of a classifier: all texts on the devices, a dispatch brings the numbers of its rows."""

    max_steps = 256

    def __init__(self, idx_NT: np.ndarray, label_N: np.ndarray, order: EpochOrder, put: Callable[[Any], Any]):
        self._idx_NT, self._label_N, self._order, self._put = put(idx_NT), put(label_N), order, put

    def take(self, step: int, n_steps: int) -> Rows:
        """The rows of `n_steps` steps from `step` on; always of the same shape."""
        row_KB = np.full((self.max_steps, self._order.batch_size), ABSENT, np.int32)
        for k in range(n_steps):
            row_KB[k] = self._order.rows(step + k)
        return Rows(self._idx_NT, self._label_N, self._put(row_KB))

    def close(self) -> None:
        pass


def in_batches(idx_NT: np.ndarray, label_N: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All texts in order, the last batch filled up with ABSENT labels."""
    for at in range(0, len(idx_NT), batch_size):
        idx_BT, label_B = idx_NT[at : at + batch_size], label_N[at : at + batch_size]
        missing = batch_size - len(idx_BT)
        yield np.pad(idx_BT, ((0, missing), (0, 0)), mode="edge"), np.pad(label_B, (0, missing), constant_values=ABSENT)


class Scores(NamedTuple):
    """What a confusion matrix [class, predicted] tells."""

    accuracy: float
    precision: list[float]  # of each class; NaN where none was predicted so
    recall: list[float]
    f1: list[float]
    support: list[int]


def scores(confusion_KK: np.ndarray) -> Scores:
    """Accuracy, and of each class precision, recall, their harmonic mean and the number of its texts."""
    hits_K, predicted_K, true_K = np.diag(confusion_KK), confusion_KK.sum(0), confusion_KK.sum(1)
    with np.errstate(invalid="ignore"):
        precision_K, recall_K, f1_K = hits_K / predicted_K, hits_K / true_K, 2 * hits_K / (predicted_K + true_K)
    accuracy = float(hits_K.sum() / confusion_KK.sum())
    return Scores(accuracy, precision_K.tolist(), recall_K.tolist(), f1_K.tolist(), true_K.astype(int).tolist())
