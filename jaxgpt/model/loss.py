"""Next-token cross-entropy as (sum, count), and perplexity.

Axes: N tokens of a flattened batch, V vocabulary; B rows, T time, C channels; J chunks of S times each.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.nn import logsumexp

from jaxgpt.model.fused_ops import fusion_barrier
from jaxgpt.model.gpt import head_logits


def cross_entropy(logits_NV: Array, target_N: Array, weight_N: Array | None = None) -> tuple[Array, Array]:
    """The sum over tokens of -log softmax(logits)[target], and the number of tokens: scalars of the logits' dtype.

    It returns sum and count rather than the mean so that several devices add up both first and divide once.

    Args:
        logits_NV: [N, V], float32 or float64 (never bfloat16: its eight bits would lose the loss's digits).
        target_N: int [N]; NaN for one outside the vocabulary.
        weight_N: [N], 0 for tokens that do not count; None counts all.
    """
    assert logits_NV.dtype in (jnp.float32, jnp.float64), logits_NV.dtype
    # A comparison, not an index: its gradient is one more term of an elementwise loop, that of an index is a scatter.
    is_target_NV = jnp.arange(logits_NV.shape[-1]) == target_N[:, None]
    target_logit_N = jnp.where(is_target_NV, logits_NV, 0).sum(axis=-1)
    inside_N = (target_N >= 0) & (target_N < logits_NV.shape[-1])
    target_logit_N = jnp.where(inside_N, target_logit_N, jnp.nan)  # an invalid target must not give a plausible loss
    loss_N = logsumexp(logits_NV, axis=-1) - target_logit_N
    if weight_N is None:
        return loss_N.sum(), jnp.asarray(loss_N.size, loss_N.dtype)
    weight_N = weight_N.astype(loss_N.dtype)
    return (loss_N * weight_N).sum(), weight_N.sum()


def head_cross_entropy(
    x_BTC: Array,
    head_CV: Array,
    target_BT: Array,
    weight_BT: Array | None = None,
    *,
    compute_dtype: Any,
    chunk_logits: int,
    head_multiple: int,
) -> tuple[Array, Array]:
    """`cross_entropy` of the logits x head, chunk by chunk: all logits would be the largest array of a training step.

    A scan takes chunks of time one after another. Its custom VJP computes the gradient together with the loss, while a
    chunk's logits are in memory, so nothing large is saved or recomputed; the backward pass only scales it. Chunks
    divide time and not rows, so rows may be sharded over devices.

    Args:
        x_BTC: final-norm hidden states.
        head_CV: the head's kernel, in the dtype of the logits and of all sums: float32 or float64.
        target_BT, weight_BT: as in `cross_entropy`.
        compute_dtype: of the products' operands, the logits' gradient among them.
        chunk_logits: about how many logits a chunk has; it has one time step at least.
        head_multiple: pads the head to a multiple of this width, with columns of probability 0, for the device's
            matrix units.

    Returns:
        The sum of the losses, and the number of tokens that count, as `cross_entropy`.
    """
    n_rows, n_time, n_embd = x_BTC.shape
    n_vocab = head_CV.shape[1]
    weight_BT = jnp.ones(target_BT.shape, head_CV.dtype) if weight_BT is None else weight_BT.astype(head_CV.dtype)
    n_chunks = min(n_time, math.ceil(target_BT.size * n_vocab / chunk_logits))
    chunk_time = math.ceil(n_time / n_chunks)
    n_chunks = math.ceil(n_time / chunk_time)  # rounding up may leave fewer

    def chunks(x: Array) -> Array:  # [B, T, ...] -> [J, B, S, ...], padded with zeros
        padding = [(0, 0), (0, n_chunks * chunk_time - n_time)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, padding).reshape(n_rows, n_chunks, chunk_time, *x.shape[2:]).swapaxes(0, 1)

    padded_CW = jnp.pad(head_CV, [(0, 0), (0, -n_vocab % head_multiple)])
    data = chunks(target_BT), chunks(weight_BT)
    return _chunked_loss(chunks(x_BTC), padded_CW, data, n_vocab, compute_dtype), weight_BT.sum()


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _chunked_loss(x_JBSC: Array, head_CV: Array, data_JBS: Any, n_vocab: int, compute_dtype: Any) -> Array:
    """The sum of the loss over all chunks; `data_JBS` are targets and weights."""

    def add(loss: Array, chunk: Any) -> tuple[Array, None]:
        return loss + _loss_of_logits(head_logits(chunk[0], head_CV, compute_dtype), chunk[1], n_vocab), None

    return lax.scan(add, jnp.zeros((), head_CV.dtype), (x_JBSC, data_JBS))[0]


def _loss_of_logits(logits_BSV: Array, data_BS: tuple[Array, Array], n_vocab: int) -> Array:
    """The sum of the loss of a chunk; logits beyond the vocabulary get probability 0."""
    n_padded = logits_BSV.shape[-1]
    if n_padded > n_vocab:
        logits_BSV = jnp.where(jnp.arange(n_padded) < n_vocab, logits_BSV, -jnp.inf)
    target_BS, weight_BS = data_BS
    return cross_entropy(logits_BSV.reshape(-1, n_padded), target_BS.reshape(-1), weight_BS.reshape(-1))[0]


def _chunked_loss_fwd(x_JBSC: Array, head_CV: Array, data_JBS: Any, n_vocab: int, compute_dtype: Any):
    """The same; the residuals are the gradients with respect to x and to the head."""

    def add(sums: tuple[Array, Array], chunk: Any) -> tuple[tuple[Array, Array], Array]:
        (loss, grad_CV), (x_BSC, data_BS) = sums, chunk
        logits_BSV = head_logits(x_BSC, head_CV, compute_dtype)
        chunk_loss, grad_BSV = jax.value_and_grad(_loss_of_logits)(logits_BSV, data_BS, n_vocab)
        # One axis of tokens: over two, XLA's CPU backend first copies the largest array of the step, transposed.
        grad_NV = grad_BSV.reshape(-1, grad_BSV.shape[-1]).astype(compute_dtype)  # cast: the operands of both products
        x_NC = x_BSC.reshape(-1, x_BSC.shape[-1]).astype(compute_dtype)  # cast: the operands of both products
        # Transpose the narrow operand first: else XLA's CPU backend packs the wide one, into 90 MB that it frees again.
        (x_CN,) = fusion_barrier((x_NC.T,))
        dot = partial(jnp.dot, preferred_element_type=head_CV.dtype)
        grad_x_NC = dot(grad_NV, head_CV.astype(compute_dtype).T)
        return (loss + chunk_loss, grad_CV + dot(x_CN, grad_NV)), grad_x_NC.reshape(x_BSC.shape).astype(x_BSC.dtype)

    zeros = jnp.zeros((), head_CV.dtype), jnp.zeros_like(head_CV)
    (loss, grad_CV), grad_x_JBSC = lax.scan(add, zeros, (x_JBSC, data_JBS))
    return loss, (grad_x_JBSC, grad_CV)


def _chunked_loss_bwd(n_vocab: int, compute_dtype: Any, grads: tuple[Array, Array], scale: Array):
    grad_x_JBSC, grad_CV = grads
    return grad_x_JBSC * scale.astype(grad_x_JBSC.dtype), grad_CV * scale, None


_chunked_loss.defvjp(_chunked_loss_fwd, _chunked_loss_bwd)


def mean_of_batches(sums_J2: np.ndarray) -> float:
    """The mean of the batches' mean losses, from their sums and counts [J, 2]; a smaller last batch counts like any."""
    return float((sums_J2[:, 0] / sums_J2[:, 1]).mean())


def perplexity(mean_loss: float) -> float:
    """exp(mean loss), the loss in nats per token; infinite where a float cannot hold it."""
    try:
        return math.exp(mean_loss)
    except OverflowError:
        return math.inf
