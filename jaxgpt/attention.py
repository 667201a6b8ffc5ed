"""Causal attention: written out for any dtype and cache, in blocks with its own way back for training, or cuDNN's.

Axes: B batch, H heads, G = B*H, T time of queries, S time of keys, D head size.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import optimization_barrier

AttentionImplementation = Literal["xla", "cudnn"]

BLOCK, MOST_BLOCKS = 64, 8  # queries of a block, at least; and how many blocks at most


def causal_attention(
    q_BTHD: Array,
    k_BSHD: Array,
    v_BSHD: Array,
    start: Array | int,
    implementation: AttentionImplementation,
    document_BT: Array | None = None,
) -> Array:
    """softmax(q k' / sqrt(D)) v, where the query at time start + t sees the keys at times 0..start + t.

    Args:
        document_BT: of packed documents the number of each token's; a query then sees the keys of its own only.

    Returns:
        [B, T, H, D] in the inputs' dtype.
    """
    if implementation == "cudnn":  # bfloat16, and T = S with start 0: `parallel.numerics` chooses it for training only
        return jax.nn.dot_product_attention(q_BTHD, k_BSHD, v_BSHD, is_causal=True, implementation="cudnn")
    # Written out rather than jax.nn.dot_product_attention(implementation="xla"): that takes its softmax in float32 even
    # for float64 inputs, which would end the proof of equality at 1e-7, and it is slower on CPU (docs/benchmarks.md).
    n_rows, n_queries, n_head, head_size = q_BTHD.shape
    n_keys = k_BSHD.shape[1]
    from_the_first = isinstance(start, int) and start == 0 and n_queries == n_keys
    if from_the_first and document_BT is None and q_BTHD.dtype in (jnp.float32, jnp.float64):
        q_GTD, k_GTD, v_GTD = (
            x.transpose(0, 2, 1, 3).reshape(n_rows * n_head, n_queries, head_size) for x in (q_BTHD, k_BSHD, v_BSHD)
        )
        out_GTD = _blocked(q_GTD, k_GTD, v_GTD)
        return out_GTD.reshape(n_rows, n_head, n_queries, head_size).transpose(0, 2, 1, 3)
    att_BHTS = attention_weights(q_BTHD, k_BSHD, start, document_BT)
    att_BHTS = att_BHTS.astype(v_BSHD.dtype)  # cast: probabilities to the compute dtype
    return jnp.einsum("BHTS,BSHD->BTHD", att_BHTS, v_BSHD)


def attention_weights(q_BTHD: Array, k_BSHD: Array, start: Array | int = 0, document_BT: Array | None = None) -> Array:
    """softmax(q k' / sqrt(D)) over the keys that each query sees, as in `causal_attention`.

    Returns:
        [B, H, T, S] in float32, or float64 of float64 inputs; exactly 0 where a query does not see.
    """
    stream_dtype = jnp.promote_types(q_BTHD.dtype, jnp.float32)
    score_BHTS = jnp.einsum("BTHD,BSHD->BHTS", q_BTHD, k_BSHD, preferred_element_type=stream_dtype)
    seen_TS = jnp.arange(k_BSHD.shape[1]) <= start + jnp.arange(q_BTHD.shape[1])[:, None]
    seen = (
        seen_TS if document_BT is None else seen_TS & (document_BT[:, None, :, None] == document_BT[:, None, None, :])
    )
    return jax.nn.softmax(jnp.where(seen, score_BHTS * q_BTHD.shape[-1] ** -0.5, -jnp.inf), axis=-1)


@jax.custom_vjp
def _blocked(q_GTD: Array, k_GTD: Array, v_GTD: Array) -> Array:
    """Attention of whole texts, a block of queries at a time, with the keys up to its end alone."""
    return _forward(q_GTD, k_GTD, v_GTD)[0]


def _spans(n_time: int) -> list[tuple[int, int]]:
    """The blocks' first query and the end of each."""
    n_blocks = min(max(n_time // BLOCK, 1), MOST_BLOCKS)
    width = -(-n_time // n_blocks)
    return [(begin, min(begin + width, n_time)) for begin in range(0, n_time, width)]


def _forward(q_GTD: Array, k_GTD: Array, v_GTD: Array) -> tuple[Array, tuple]:
    """The result, and what the way back needs: e = exp(score - its row's maximum) by block, and the rows' sums.

    The weights e / sum are never formed: it is the narrow e v that is divided.
    """
    scaled_GTD = q_GTD * q_GTD.shape[-1] ** -0.5
    weights, sums, outs = [], [], []
    for begin, end in _spans(q_GTD.shape[1]):
        score_GTS = jnp.einsum("GTD,GSD->GTS", scaled_GTD[:, begin:end], k_GTD[:, :end])
        seen_TS = jnp.arange(end) <= jnp.arange(begin, end)[:, None]
        score_GTS = jnp.where(seen_TS, score_GTS, -jnp.inf)
        weights.append(jnp.exp(score_GTS - score_GTS.max(axis=-1, keepdims=True)))
        sums.append(weights[-1].sum(axis=-1, keepdims=True))
        outs.append(jnp.einsum("GTS,GSD->GTD", weights[-1], v_GTD[:, :end]) / sums[-1])
    out_GTD, sum_GT1 = jnp.concatenate(outs, axis=1), jnp.concatenate(sums, axis=1)
    return out_GTD, (scaled_GTD, k_GTD, v_GTD, weights, sum_GT1, out_GTD)


def _backward(kept: tuple, grad_GTD: Array) -> tuple[Array, Array, Array]:
    """The gradients by q, k and v; with P the weights, dS = P (dP - the row's sum of P dP).

    That sum is the row's sum of grad * out. Products that add up over queries are formed transposed, from transposed
    copies of the narrow operand: XLA's CPU backend has a slow path for a transposed wide one, three times as long.
    """
    scaled_GTD, k_GTD, v_GTD, weights, sum_GT1, out_GTD = kept
    grad_GTD = grad_GTD / sum_GT1  # in place of dividing e
    row_GT1 = (grad_GTD * out_GTD).sum(axis=-1, keepdims=True)
    turned = partial(jnp.swapaxes, axis1=1, axis2=2)
    scaled_GDT, grad_GDT = optimization_barrier((turned(scaled_GTD), turned(grad_GTD)))  # else it folds them away
    grad_k_GDS, grad_v_GDS, grad_q = jnp.zeros_like(scaled_GDT), jnp.zeros_like(scaled_GDT), []
    for (begin, end), e_GTS in zip(_spans(k_GTD.shape[1]), weights, strict=True):
        grad_e_GTS = jnp.einsum("GTD,GSD->GTS", grad_GTD[:, begin:end], v_GTD[:, :end])
        grad_score_GTS = e_GTS * (grad_e_GTS - row_GT1[:, begin:end])
        grad_q.append(jnp.einsum("GTS,GSD->GTD", grad_score_GTS, k_GTD[:, :end]))
        unseen = ((0, 0), (0, 0), (0, k_GTD.shape[1] - end))
        grad_k_GDS += jnp.pad(jnp.einsum("GDT,GTS->GDS", scaled_GDT[:, :, begin:end], grad_score_GTS), unseen)
        grad_v_GDS += jnp.pad(jnp.einsum("GDT,GTS->GDS", grad_GDT[:, :, begin:end], e_GTS), unseen)
    grad_k_GDS, grad_v_GDS = optimization_barrier((grad_k_GDS, grad_v_GDS))
    return jnp.concatenate(grad_q, axis=1) * k_GTD.shape[-1] ** -0.5, turned(grad_k_GDS), turned(grad_v_GDS)


_blocked.defvjp(_forward, _backward)
