"""Causal attention: plain for any dtype and cache, blocked with a custom VJP for training, or a flash attention kernel.

On NVIDIA GPUs the kernel is cuDNN's, on TPUs the splash attention of `jax.experimental.pallas`; both in bfloat16.

Axes: B batch, H heads, G = B*H, T time of queries, S time of keys, D head size.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import optimization_barrier

AttentionImplementation = Literal["xla", "cudnn", "splash"]

MIN_BLOCK, MAX_BLOCKS = 64, 8  # queries of a block, and blocks of a sequence
SPLASH_BLOCKS = 1024, 512, 256, 128  # queries and keys of a block of splash attention: the first that divides T


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
        start: the time of the first query; with a cache, the number of keys before it.
        implementation: "cudnn" or "splash" for a kernel that never stores the weights; T = S and start 0, so it is for
            training only. `parallel.numerics` knows where each may be used.
        document_BT: with packed documents, the number of each token's document; a query sees the keys of its own only.

    Returns:
        [B, T, H, D] in the inputs' dtype.
    """
    if implementation == "cudnn":
        # cuDNN adds the mask to the scores as 0 or a number so low that its exponential is exactly 0.
        mask = None if document_BT is None else _same_document(document_BT)
        return jax.nn.dot_product_attention(q_BTHD, k_BSHD, v_BSHD, mask=mask, is_causal=True, implementation="cudnn")
    if implementation == "splash":
        return splash_attention(q_BTHD, k_BSHD, v_BSHD, document_BT)
    # jax.nn.dot_product_attention(implementation="xla") computes its softmax in float32 even for float64 inputs, so
    # equality with PyTorch could not be shown beyond 1e-7, and it is slower on a CPU (docs/speed-log.md).
    n_rows, n_queries, n_head, head_size = q_BTHD.shape
    n_keys = k_BSHD.shape[1]
    whole_sequence = isinstance(start, int) and start == 0 and n_queries == n_keys
    if whole_sequence and document_BT is None and q_BTHD.dtype in (jnp.float32, jnp.float64):
        q_GTD, k_GTD, v_GTD = (
            x.transpose(0, 2, 1, 3).reshape(n_rows * n_head, n_queries, head_size) for x in (q_BTHD, k_BSHD, v_BSHD)
        )
        out_GTD = _blocked_attention(q_GTD, k_GTD, v_GTD)
        return out_GTD.reshape(n_rows, n_head, n_queries, head_size).transpose(0, 2, 1, 3)
    if n_queries == 1 and document_BT is None:
        return _one_query_attention(q_BTHD, k_BSHD, v_BSHD, start)
    return weighted_values(attention_weights(q_BTHD, k_BSHD, start, document_BT), v_BSHD)


def weighted_values(att_BHTS: Array, v_BSHD: Array) -> Array:
    """The sum of the values, weighted by each query's attention, [B, T, H, D] in the values' dtype."""
    att_BHTS = att_BHTS.astype(v_BSHD.dtype)  # cast: probabilities to the compute dtype
    return jnp.einsum("BHTS,BSHD->BTHD", att_BHTS, v_BSHD)


def _one_query_attention(q_B1HD: Array, k_BSHD: Array, v_BSHD: Array, start: Array | int) -> Array:
    """`causal_attention` of a single query over a cache, as products and sums of arrays.

    XLA's CPU backend computes a matrix product for each row and head one number at a time, which takes three to nine
    times as long as reading the cache once (docs/speed-log.md).
    """
    stream_dtype = jnp.promote_types(q_B1HD.dtype, jnp.float32)
    score_BSH = jnp.sum(q_B1HD.astype(stream_dtype) * k_BSHD, axis=-1)  # cast: sums in the scores' dtype
    seen_S1 = (jnp.arange(k_BSHD.shape[1]) <= start)[:, None]
    att_BSH = jax.nn.softmax(jnp.where(seen_S1, score_BSH * q_B1HD.shape[-1] ** -0.5, -jnp.inf), axis=1)
    return jnp.sum(att_BSH[..., None] * v_BSHD, axis=1, keepdims=True).astype(v_BSHD.dtype)  # cast: back


def attention_weights(q_BTHD: Array, k_BSHD: Array, start: Array | int = 0, document_BT: Array | None = None) -> Array:
    """softmax(q k' / sqrt(D)) over the keys that each query sees, as in `causal_attention`.

    Returns:
        [B, H, T, S] in float32, or float64 for float64 inputs; exactly 0 for masked keys.
    """
    score_BHTS = _scores(q_BTHD, k_BSHD)
    mask_TS = jnp.arange(k_BSHD.shape[1]) <= start + jnp.arange(q_BTHD.shape[1])[:, None]
    mask = mask_TS if document_BT is None else mask_TS & _same_document(document_BT)
    return jax.nn.softmax(jnp.where(mask, score_BHTS * q_BTHD.shape[-1] ** -0.5, -jnp.inf), axis=-1)


def _same_document(document_BT: Array) -> Array:
    """Whether query and key stand in the same document, bool [B, 1, T, T]."""
    return document_BT[:, None, :, None] == document_BT[:, None, None, :]


@jax.custom_vjp
def _scores(q_BTHD: Array, k_BSHD: Array) -> Array:
    """q k', [B, H, T, S] in float32, or float64 for float64 inputs.

    The custom VJP rounds the gradient to the inputs' dtype. Without it the backward pass multiplies float32 by
    bfloat16: at the highest precision, six passes of a matrix unit that is made for bfloat16.
    """
    stream_dtype = jnp.promote_types(q_BTHD.dtype, jnp.float32)
    return jnp.einsum("BTHD,BSHD->BHTS", q_BTHD, k_BSHD, preferred_element_type=stream_dtype)


def _scores_bwd(residuals: tuple[Array, Array], grad_BHTS: Array) -> tuple[Array, Array]:
    q_BTHD, k_BSHD = residuals
    _, product_vjp = jax.vjp(partial(jnp.einsum, "BTHD,BSHD->BHTS"), q_BTHD, k_BSHD)
    return product_vjp(grad_BHTS.astype(q_BTHD.dtype))  # cast: the scores' gradient to the compute dtype


_scores.defvjp(lambda q_BTHD, k_BSHD: (_scores(q_BTHD, k_BSHD), (q_BTHD, k_BSHD)), _scores_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def splash_attention(
    q_BTHD: Array, k_BTHD: Array, v_BTHD: Array, document_BT: Array | None = None, interpret: bool = False
) -> Array:
    """Causal attention of whole sequences by the splash attention kernels of `jax.experimental.pallas`, for TPUs.

    Scores, softmax and sums are float32 in the kernels, whatever the inputs' dtype. The queries are scaled before
    they are rounded to it: exactly where the head size is a power of 4.

    Args:
        q_BTHD, k_BTHD, v_BTHD: T a multiple of 128.
        document_BT: as in `causal_attention`; the kernels skip no block for it.
        interpret: runs the kernels as plain JAX on any platform: slowly, for tests.

    Returns:
        [B, T, H, D] in the inputs' dtype.
    """
    return _splash_attention_fwd(q_BTHD, k_BTHD, v_BTHD, document_BT, interpret)[0]


def _splash_attention_fwd(
    q_BTHD: Array, k_BTHD: Array, v_BTHD: Array, document_BT: Array | None, interpret: bool
) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array]]]:
    """The output, and as residual the kernels' own VJP.

    The kernels' products inherit `jax_default_matmul_precision`, and Mosaic compiles none of bfloat16 operands at
    "highest", which the trainer sets: hence this custom VJP around theirs, which sets the precision of both passes.
    """
    with jax.default_matmul_precision("default"):
        return jax.vjp(lambda q, k, v: _splash_kernels(q, k, v, document_BT, interpret), q_BTHD, k_BTHD, v_BTHD)


def _splash_attention_bwd(
    interpret: bool, kernels_vjp: Callable[[Array], tuple[Array, Array, Array]], grad_BTHD: Array
) -> tuple[Array, Array, Array, None]:
    with jax.default_matmul_precision("default"):
        return *kernels_vjp(grad_BTHD), None


splash_attention.defvjp(_splash_attention_fwd, _splash_attention_bwd)


def _splash_kernels(q_BTHD: Array, k_BTHD: Array, v_BTHD: Array, document_BT: Array | None, interpret: bool) -> Array:
    # Imported here: half a second that only a TPU's program needs.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    n_rows, n_time, n_head, head_size = q_BTHD.shape
    # The largest block: each has the fixed cost of a softmax over blocks, which outweighs the masked half of the
    # diagonal's (docs/accelerators.md). Where one block holds the sequence, the backward pass is one kernel in place of
    # two; with more, its gradients of the queries would be partial sums rounded to bfloat16.
    # Blocks of 1,024 queries of more than 128 channels exceed the fast memory of a TPU v4.
    block = next(size for size in SPLASH_BLOCKS if n_time % size == 0 and size * head_size <= 1024 * 128)
    fused = block == n_time
    # Saved as [B, H, D, T]: a head size below 128 as the last axis would be padded to a register's 128 lanes.
    time_last = splash_attention_kernel.QKVLayout.SEQ_MINOR
    kernel = splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((n_time, n_time))] * n_head),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=None if fused else block,
            block_kv_dq=None if fused else block,
            use_fused_bwd_kernel=fused,
            q_layout=time_last,
            k_layout=time_last,
            v_layout=time_last,
        ),
        interpret=interpret,
    )

    # Transposes of [B, T, C] as a whole: given four axes, XLA copies each array two to three times.
    def split_heads(x_BTHD: Array) -> Array:
        x_BCT = x_BTHD.reshape(n_rows, n_time, -1).swapaxes(1, 2)
        return x_BCT.reshape(n_rows, n_head, head_size, n_time).swapaxes(2, 3)

    def join_heads(x_BHTD: Array) -> Array:
        x_BCT = x_BHTD.swapaxes(2, 3).reshape(n_rows, -1, n_time)
        return x_BCT.swapaxes(1, 2).reshape(n_rows, n_time, n_head, head_size)

    scaled_BTHD = (q_BTHD.astype(jnp.float32) * head_size**-0.5).astype(q_BTHD.dtype)
    heads = [split_heads(x_BTHD) for x_BTHD in (scaled_BTHD, k_BTHD, v_BTHD)]
    segment_ids = None if document_BT is None else splash_attention_kernel.SegmentIds(document_BT, document_BT)
    out_BHTD: Any = jax.vmap(kernel)(*heads, segment_ids)  # an array, as it is asked for no residuals
    return join_heads(out_BHTD)


@jax.custom_vjp
def _blocked_attention(q_GTD: Array, k_GTD: Array, v_GTD: Array) -> Array:
    """Causal attention of whole sequences, one block of queries at a time, with the keys up to the block's end only."""
    return _blocked_attention_fwd(q_GTD, k_GTD, v_GTD)[0]


def _blocks(n_time: int) -> list[tuple[int, int]]:
    """The first query and the end of each block."""
    n_blocks = min(max(n_time // MIN_BLOCK, 1), MAX_BLOCKS)
    width = -(-n_time // n_blocks)
    return [(begin, min(begin + width, n_time)) for begin in range(0, n_time, width)]


def _blocked_attention_fwd(q_GTD: Array, k_GTD: Array, v_GTD: Array) -> tuple[Array, tuple]:
    """The output, and the residuals: e = exp(score - row maximum) of each block, and the row sums.

    The weights e / sum are never formed: the division applies to e v, which is narrower.
    """
    scaled_GTD = q_GTD * q_GTD.shape[-1] ** -0.5
    weights, sums, outs = [], [], []
    for begin, end in _blocks(q_GTD.shape[1]):
        score_GTS = jnp.einsum("GTD,GSD->GTS", scaled_GTD[:, begin:end], k_GTD[:, :end])
        mask_TS = jnp.arange(end) <= jnp.arange(begin, end)[:, None]
        score_GTS = jnp.where(mask_TS, score_GTS, -jnp.inf)
        weights.append(jnp.exp(score_GTS - score_GTS.max(axis=-1, keepdims=True)))
        sums.append(weights[-1].sum(axis=-1, keepdims=True))
        outs.append(jnp.einsum("GTS,GSD->GTD", weights[-1], v_GTD[:, :end]) / sums[-1])
    out_GTD, sum_GT1 = jnp.concatenate(outs, axis=1), jnp.concatenate(sums, axis=1)
    return out_GTD, (scaled_GTD, k_GTD, v_GTD, weights, sum_GT1, out_GTD)


def _blocked_attention_bwd(residuals: tuple, grad_GTD: Array) -> tuple[Array, Array, Array]:
    """The gradients with respect to q, k and v. With P the weights, dS = P (dP - row sum of P dP).

    That row sum equals the row sum of grad * out. Products that contract over queries take transposes of the narrow
    operand: XLA's CPU backend has a slow path for a transposed wide operand, three times as long.
    """
    scaled_GTD, k_GTD, v_GTD, weights, sum_GT1, out_GTD = residuals
    grad_GTD = grad_GTD / sum_GT1  # instead of dividing e
    row_GT1 = (grad_GTD * out_GTD).sum(axis=-1, keepdims=True)
    transposed = partial(jnp.swapaxes, axis1=1, axis2=2)
    # Without the barrier XLA folds the transposes back into the products.
    scaled_GDT, grad_GDT = optimization_barrier((transposed(scaled_GTD), transposed(grad_GTD)))
    grad_k_GDS, grad_v_GDS, grad_q = jnp.zeros_like(scaled_GDT), jnp.zeros_like(scaled_GDT), []
    for (begin, end), e_GTS in zip(_blocks(k_GTD.shape[1]), weights, strict=True):
        grad_e_GTS = jnp.einsum("GTD,GSD->GTS", grad_GTD[:, begin:end], v_GTD[:, :end])
        grad_score_GTS = e_GTS * (grad_e_GTS - row_GT1[:, begin:end])
        grad_q.append(jnp.einsum("GTS,GSD->GTD", grad_score_GTS, k_GTD[:, :end]))
        future = ((0, 0), (0, 0), (0, k_GTD.shape[1] - end))
        grad_k_GDS += jnp.pad(jnp.einsum("GDT,GTS->GDS", scaled_GDT[:, :, begin:end], grad_score_GTS), future)
        grad_v_GDS += jnp.pad(jnp.einsum("GDT,GTS->GDS", grad_GDT[:, :, begin:end], e_GTS), future)
    grad_k_GDS, grad_v_GDS = optimization_barrier((grad_k_GDS, grad_v_GDS))
    return jnp.concatenate(grad_q, axis=1) * k_GTD.shape[-1] ** -0.5, transposed(grad_k_GDS), transposed(grad_v_GDS)


_blocked_attention.defvjp(_blocked_attention_fwd, _blocked_attention_bwd)
