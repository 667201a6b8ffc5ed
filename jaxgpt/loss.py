"""Next-token cross-entropy as (sum, count), and perplexity.

Axes: N tokens of a flattened batch, V vocabulary.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn import logsumexp


def cross_entropy(logits_NV: Array, target_N: Array, weight_N: Array | None = None) -> tuple[Array, Array]:
    """Sum over tokens of -log softmax(logits)[target], and the number of tokens, both scalars of the logits' dtype.

    Sum and count, not the mean: over several devices both are summed first and divided once.

    Args:
        logits_NV: [N, V], float32 or float64 (never bfloat16: its eight bits would lose the loss's digits).
        target_N: int [N].
        weight_N: [N], 0 for tokens that do not count; None counts all.
    """
    assert logits_NV.dtype in (jnp.float32, jnp.float64), logits_NV.dtype
    target_logit_N = jnp.take_along_axis(logits_NV, target_N[:, None], axis=-1)[:, 0]
    loss_N = logsumexp(logits_NV, axis=-1) - target_logit_N
    if weight_N is None:
        return loss_N.sum(), jnp.asarray(loss_N.size, loss_N.dtype)
    weight_N = weight_N.astype(loss_N.dtype)
    return (loss_N * weight_N).sum(), weight_N.sum()


def mean_of_batches(sums_J2: np.ndarray) -> float:
    """The mean of batches' mean losses, of their sums and counts [J, 2]: a smaller last batch counts as one, too."""
    return float((sums_J2[:, 0] / sums_J2[:, 1]).mean())


def perplexity(mean_loss: float) -> float:
    """exp(mean loss); infinite where that is beyond a float."""
    try:
        return math.exp(mean_loss)
    except OverflowError:
        return math.inf
