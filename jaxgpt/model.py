"""The GPT of the write-ups, in Flax NNX; the only file that knows Flax.

Axes: B batch, T time (queries), S time (keys), N = B*T tokens, C n_embd, H heads, D head size (C = H*D), V vocabulary.

Dtypes: parameters and the residual stream x are float32 (float64 in a float64 model). The matrix products take the
compute dtype (bfloat16 on accelerators); every change of dtype is a line with a comment "cast". LayerNorm, softmax,
GELU and logits are computed in the stream's dtype.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxgpt import elementwise
from jaxgpt.attention import AttentionImplementation, attention_weights, causal_attention
from jaxgpt.config import ModelConfig
from jaxgpt.elementwise import gelu
from jaxgpt.versions import require_sound_jaxlib

require_sound_jaxlib()

Params = Mapping[str, Array]  # "blocks.0.attn.Wq.kernel" -> array: flat, so that names select, convert and save
Cache = list[tuple[Array, Array]]  # per block: keys and values, [B, S, H, D] each

weight_init = nnx.initializers.normal(stddev=0.02)


def linear_bias_init(config: ModelConfig, fan_in: int) -> Callable[..., Array]:
    """documented: PyTorch's default for a Linear's bias, uniform in +-1/sqrt(fan_in). gpt2: zeros."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32, **_: Any) -> Array:
        if config.init == "gpt2":
            return jnp.zeros(shape, dtype)
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def residual_init(config: ModelConfig) -> Callable[..., Array]:
    """Of a matrix that writes to the residual stream; gpt2: scaled, so that all branches add up to one's spread."""
    return nnx.initializers.normal(stddev=0.02 * (2 * config.n_layer) ** -0.5) if config.init == "gpt2" else weight_init


@dataclass(frozen=True)
class Numerics:
    """How a model computes; none of it changes the parameters, save `param_dtype`."""

    param_dtype: Any = jnp.float32
    compute_dtype: Any = jnp.float32
    attention: AttentionImplementation = "xla"
    logits_at_once: int = 2**24  # the loss takes the batch in chunks of about so many logits
    fused_qkv: bool = False  # query, key and value of an attention in one product
    head_multiple: int = 1  # within the loss the head is widened to a multiple of this


class Linear(nnx.Linear):
    """A Linear whose product is in the compute dtype and whose bias is added in the parameters'.

    `nnx.Linear` adds it in bfloat16 and so, going backward, sums a bias' gradient over all tokens in bfloat16, where
    each addition loses digits.
    """

    def __call__(self, x: Array) -> Array:
        return affine(x, self.kernel[...], self.bias[...], self.dtype)


def affine(x: Array, kernel: Array, bias: Array, dtype: Any) -> Array:
    """x kernel + bias, in `dtype`."""
    product = jnp.dot(x.astype(dtype), kernel.astype(dtype))  # cast: input and kernel
    return (product.astype(bias.dtype) + bias).astype(dtype)  # cast: the sum back to the compute dtype


def linear(
    n_in: int, n_out: int, config: ModelConfig, numerics: Numerics, rngs: nnx.Rngs, kernel_init: Any = weight_init
) -> Linear:
    """A Linear with bias; its kernel is [n_in, n_out]."""
    return Linear(
        n_in,
        n_out,
        kernel_init=kernel_init,
        bias_init=linear_bias_init(config, n_in),
        param_dtype=numerics.param_dtype,
        dtype=numerics.compute_dtype,
        rngs=rngs,
    )


class LayerNorm(nnx.LayerNorm):
    """A LayerNorm as in PyTorch; computed by `elementwise.layer_norm`."""

    def __call__(self, x: Array) -> Array:
        return elementwise.layer_norm(x, self.scale[...], self.bias[...])


def layer_norm(n_embd: int, numerics: Numerics, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return LayerNorm(
        n_embd, epsilon=elementwise.EPSILON, dtype=numerics.param_dtype, param_dtype=numerics.param_dtype, rngs=rngs
    )


def keep_mask(row_key_B: Array, site: int, shape_TC: tuple[int, int], rate: float) -> Array:
    """Which elements dropout keeps, bool [B, T, C], each with probability 1 - rate.

    Each row of the batch draws from its own key, so the masks do not depend on how rows are spread over devices.
    `site` tells the places within the model apart: 0 after the embedding sum, then two for each block.
    """
    kept = jnp.float32(1 - rate)  # drawn in float32 for every dtype, so that a float64 model has the same masks
    return jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, site), kept, shape_TC))(row_key_B)


def dropout(x_NC: Array, rate: float, row_key_B: Array | None, site: int) -> Array:
    """Zeroes elements with probability `rate` and scales the rest by 1/(1 - rate); the identity without keys."""
    if row_key_B is None or rate == 0:
        return x_NC
    shape_TC = (x_NC.shape[0] // row_key_B.shape[0], x_NC.shape[-1])
    keep_BTC = keep_mask(row_key_B, site, shape_TC, rate)
    return jnp.where(keep_BTC.reshape(x_NC.shape), x_NC / (1 - rate), 0)


class Attention(nnx.Module):
    """Causal self-attention with separate query, key, value and output projections, each with bias."""

    def __init__(self, config: ModelConfig, numerics: Numerics, rngs: nnx.Rngs):
        self.n_head, self.implementation, self.fused = config.n_head, numerics.attention, numerics.fused_qkv
        n_embd = config.n_embd
        self.Wq = linear(n_embd, n_embd, config, numerics, rngs)
        self.Wk = linear(n_embd, n_embd, config, numerics, rngs)
        self.Wv = linear(n_embd, n_embd, config, numerics, rngs)
        self.Wo = linear(n_embd, n_embd, config, numerics, rngs, residual_init(config))

    def __call__(
        self,
        x_NC: Array,
        n_rows: int,
        cache: tuple[Array, Array] | None,
        start: Array | int,
        document_BT: Array | None = None,
    ):
        """The branch's output [N, C], and the cache with this call's keys and values written at `start`."""
        q, k, v = self._heads(x_NC, n_rows, self.Wq, self.Wk, self.Wv)
        if cache is not None:
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis=1)
                for old, new in zip(cache, (k, v), strict=True)
            )
            cache = (k, v)
        out_BTHD = causal_attention(q, k, v, start, self.implementation, document_BT)
        return self.Wo(out_BTHD.reshape(x_NC.shape)), cache

    def weights(self, x_NC: Array, n_rows: int) -> Array:
        """How much each query attends to each key of its row, [B, H, T, S]: what the output is made with."""
        return attention_weights(*self._heads(x_NC, n_rows, self.Wq, self.Wk))

    def _heads(self, x_NC: Array, n_rows: int, *projections: Linear) -> list[Array]:
        """What each projection makes of x, [B, T, H, D]; as one product of their kernels side by side, if fused."""
        if self.fused:
            kernel, bias = (
                jnp.concatenate([getattr(W, name)[...] for W in projections], axis=-1) for name in ("kernel", "bias")
            )
            parts = jnp.split(affine(x_NC, kernel, bias, projections[0].dtype), len(projections), axis=-1)
        else:
            parts = [W(x_NC) for W in projections]
        return [part.reshape(n_rows, -1, self.n_head, x_NC.shape[-1] // self.n_head) for part in parts]


class MLP(nnx.Module):
    """C -> 4C -> C with GELU: exact (erf), or GPT-2's tanh approximation."""

    def __init__(self, config: ModelConfig, numerics: Numerics, rngs: nnx.Rngs):
        self.gelu = config.gelu
        self.fc = linear(config.n_embd, 4 * config.n_embd, config, numerics, rngs)
        self.proj = linear(4 * config.n_embd, config.n_embd, config, numerics, rngs, residual_init(config))

    def __call__(self, x_NC: Array) -> Array:
        hidden_NF = self.fc(x_NC).astype(x_NC.dtype)  # cast: GELU in the stream's dtype
        return self.proj(gelu(hidden_NF, self.gelu))


class Block(nnx.Module):
    """Pre-norm: x += attn(ln1(x)); x += mlp(ln2(x))."""

    def __init__(self, config: ModelConfig, numerics: Numerics, rngs: nnx.Rngs, index: int):
        self.dropout, self.index = config.dropout, index
        self.ln1 = layer_norm(config.n_embd, numerics, rngs)
        self.attn = Attention(config, numerics, rngs)
        self.ln2 = layer_norm(config.n_embd, numerics, rngs)
        self.mlp = MLP(config, numerics, rngs)

    def __call__(
        self,
        x_NC: Array,
        n_rows: int,
        row_key_B: Array | None,
        cache: tuple[Array, Array] | None,
        start: Array | int,
        document_BT: Array | None = None,
    ):
        branch, cache = self.attn(self.ln1(x_NC), n_rows, cache, start, document_BT)
        branch = branch.astype(x_NC.dtype)  # cast: back to the stream's dtype
        x_NC = x_NC + dropout(branch, self.dropout, row_key_B, 2 * self.index + 1)
        branch = self.mlp(self.ln2(x_NC)).astype(x_NC.dtype)  # cast: back to the stream's dtype
        return x_NC + dropout(branch, self.dropout, row_key_B, 2 * self.index + 2), cache


def head_logits(x_BTC: Array, head_CV: Array, compute_dtype: Any) -> Array:
    """The logits [..., V] of hidden states [..., C], in the head's dtype."""
    operands = (a.astype(compute_dtype) for a in (x_BTC, head_CV))  # cast: operands to the compute dtype,
    return jnp.dot(*operands, preferred_element_type=head_CV.dtype)  # sums and logits in the parameters': all digits


class GPT(nnx.Module):
    """Token and position embeddings, blocks, a final norm, a head without bias (tied: the token embedding's matrix)."""

    def __init__(self, config: ModelConfig, vocab_size: int, numerics: Numerics, rngs: nnx.Rngs):
        self.dropout = config.dropout
        embed = dict(embedding_init=weight_init, param_dtype=numerics.param_dtype, rngs=rngs)
        self.token_emb = nnx.Embed(vocab_size, config.n_embd, **embed)
        self.pos_emb = nnx.Embed(config.block_size, config.n_embd, **embed)
        self.blocks = nnx.List([Block(config, numerics, rngs, index) for index in range(config.n_layer)])
        self.ln_f = layer_norm(config.n_embd, numerics, rngs)
        self.compute_dtype = numerics.compute_dtype
        if config.tied_head:
            self.lm_head = None
        else:
            self.lm_head = nnx.Linear(
                config.n_embd,
                vocab_size,
                use_bias=False,
                kernel_init=weight_init,
                param_dtype=numerics.param_dtype,
                rngs=rngs,
            )

    def hidden(
        self,
        idx_BT: Array,
        row_key_B: Array | None = None,
        cache: Cache | None = None,
        start: Array | int = 0,
        document_BT: Array | None = None,
        position_BT: Array | None = None,
    ) -> tuple[Array, Cache | None]:
        """The final-norm hidden states [B, T, C] of tokens at positions start..start + T - 1.

        Tokens are kept as one axis N between attentions: plain [N, C] matrix products, also in the backward pass, are
        what makes the step fast on CPU (docs/benchmarks.md).

        Args:
            idx_BT: token ids; an id outside the vocabulary gives NaN (the host checks text before it comes here).
            row_key_B: dropout keys, one per row; None for evaluation.
            cache: keys and values of positions before `start`; None to see only this call's tokens.
            document_BT, position_BT: of packed documents, as from `batches.documents`.
        """
        n_rows, n_time = idx_BT.shape
        position_T = start + jnp.arange(n_time, dtype=jnp.int32)
        x_BTC = self.embedded(idx_BT, position_T if position_BT is None else position_BT)
        x_NC = dropout(x_BTC.reshape(n_rows * n_time, -1), self.dropout, row_key_B, 0)
        new_cache = []
        for block, block_cache in zip(self.blocks, cache or [None] * len(self.blocks), strict=True):
            x_NC, block_cache = block(x_NC, n_rows, row_key_B, block_cache, start, document_BT)
            new_cache.append(block_cache)
        return self.ln_f(x_NC).reshape(x_BTC.shape), new_cache if cache is not None else None

    def attention_maps(self, idx_BT: Array) -> Array:
        """The attention weights of every layer and head over tokens [B, T], T at most a block: [B, L, H, T, S]."""
        n_rows, n_time = idx_BT.shape
        x_NC = self.embedded(idx_BT, jnp.arange(n_time, dtype=jnp.int32)).reshape(n_rows * n_time, -1)
        maps = []
        for block in self.blocks:
            maps.append(block.attn.weights(block.ln1(x_NC), n_rows))
            x_NC, _ = block(x_NC, n_rows, None, None, 0)
        return jnp.stack(maps, axis=1)

    def embedded(self, idx_BT: Array, position: Array) -> Array:
        """The sum [B, T, C] of the tokens' and the positions' embeddings; positions [T] or [B, T]."""
        return self.token_emb(idx_BT) + self.pos_emb(position)

    @property
    def head_CV(self) -> Array:
        """The head's matrix, in the parameters' dtype."""
        return self.token_emb.embedding[...].T if self.lm_head is None else self.lm_head.kernel[...]

    def logits(self, x_BTC: Array) -> Array:
        """[..., V] in the parameters' dtype, of hidden states [..., C]."""
        return head_logits(x_BTC, self.head_CV, self.compute_dtype)

    def __call__(
        self,
        idx_BT: Array,
        row_key_B: Array | None = None,
        document_BT: Array | None = None,
        position_BT: Array | None = None,
    ) -> Array:
        """Logits [B, T, V] in the parameters' dtype; arguments as in `hidden`."""
        x_BTC, _ = self.hidden(idx_BT, row_key_B, document_BT=document_BT, position_BT=position_BT)
        return self.logits(x_BTC)


class Classifier(GPT):
    """The GPT with a head over classes in place of the one over tokens."""

    def __init__(self, config: ModelConfig, vocab_size: int, numerics: Numerics, rngs: nnx.Rngs, n_classes: int):
        super().__init__(dataclasses.replace(config, tied_head=True), vocab_size, numerics, rngs)  # no head over tokens
        exact = Numerics(numerics.param_dtype, numerics.param_dtype)
        self.classifier = linear(config.n_embd, n_classes, config, exact, rngs)

    def __call__(self, idx_BT: Array, length_B: Array, pool: str, row_key_B: Array | None = None) -> Array:
        """Logits [B, classes] of texts that are padded on the right, in the parameters' dtype.

        Args:
            idx_BT: token ids, the padding an id of the vocabulary.
            length_B: how many are real, at least one.
            pool: as in `FinetuneConfig.pool`.
        """
        x_BTC, _ = self.hidden(idx_BT, row_key_B)
        if pool == "last":
            x_BC = x_BTC[:, -1]
        elif pool == "last_token":
            x_BC = jnp.take_along_axis(x_BTC, (length_B - 1)[:, None, None], axis=1)[:, 0]
        else:
            real_BT1 = (jnp.arange(idx_BT.shape[1]) < length_B[:, None])[..., None]
            x_BC = jnp.sum(x_BTC * real_BT1, axis=1) / length_B[:, None].astype(x_BTC.dtype)
        return self.classifier(x_BC)


def build(config: ModelConfig, vocab_size: int, numerics: Numerics, rngs: nnx.Rngs, n_classes: int | None) -> GPT:
    """The language model, or with `n_classes` the classifier."""
    if n_classes is None:
        return GPT(config, vocab_size, numerics, rngs)
    return Classifier(config, vocab_size, numerics, rngs, n_classes)


def abstract_model(config: ModelConfig, vocab_size: int, numerics: Numerics, n_classes: int | None = None):
    """The graph definition and the parameters' paths, without computing anything."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: build(config, vocab_size, numerics, nnx.Rngs(0), n_classes)))
    return graphdef, [path for path, _ in nnx.to_flat_state(state)]


def init_params(
    key: Array, config: ModelConfig, vocab_size: int, numerics: Numerics, n_classes: int | None = None
) -> dict[str, Array]:
    """The initial parameters by dotted name, as `config.init` says; norms 1 and 0.

    Drawn in float32 for every dtype, so that a float64 model starts from the same weights.
    """
    _, state = nnx.split(build(config, vocab_size, Numerics(), nnx.Rngs(key), n_classes))
    return {_dotted(path): variable[...].astype(numerics.param_dtype) for path, variable in nnx.to_flat_state(state)}


def bind(
    config: ModelConfig, vocab_size: int, numerics: Numerics, n_classes: int | None = None
) -> Callable[[Params], Any]:
    """A function that gives the model over given parameters, for use inside jit: split once, merged while tracing."""
    graphdef, paths = abstract_model(config, vocab_size, numerics, n_classes)

    def model(params: Params) -> Any:
        assert len(params) == len(paths), "parameters of another model"
        return nnx.merge(graphdef, nnx.from_flat_state([(path, params[_dotted(path)]) for path in paths]))

    return model


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
