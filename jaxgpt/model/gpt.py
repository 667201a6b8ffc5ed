"""The tutorials' GPT in Flax NNX; the only module that imports Flax.

Axes: B batch, T time (queries), S time (keys), N = B*T tokens, C n_embd, H heads, D head size (C = H*D), V vocabulary.

Dtypes: parameters and the residual stream x are float32 (float64 in a float64 model). Matrix products compute in the
compute dtype (bfloat16 on accelerators); every cast is a line with a comment "cast". LayerNorm, softmax, GELU and
logits compute in the dtype of the residual stream.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxgpt.config import ModelConfig
from jaxgpt.model import fused_ops
from jaxgpt.model.attention import AttentionImplementation, attention_weights, causal_attention, weighted_values
from jaxgpt.model.fused_ops import gelu, recomputed
from jaxgpt.versions import require_sound_jaxlib

require_sound_jaxlib()

Params = Mapping[str, Array]  # "blocks.0.attn.Wq.kernel" -> array: flat, so that names select, convert and save
Cache = list[tuple[Array, Array]]  # per block: keys and values, [B, S, H, D] each

# A parameter's name, this device's shard of it, and a dtype -> the whole parameter in that dtype.
Gather = Callable[[str, Array, Any], Array]


def _all_but_gathered(primitive: Any, *_: Any, **params: Any) -> bool:
    """A policy of `jax.checkpoint` that saves all but gathered parameters: the backward pass gathers them again.

    A `Gather` is an all-gather, or a custom VJP of one; fused projections concatenate what it gives.
    """
    call = params.get("call_jaxpr")
    calls_gather = call is not None and any(e.primitive is jax.lax.all_gather_p for e in call.jaxpr.eqns)
    return primitive not in (jax.lax.all_gather_p, jax.lax.concatenate_p) and not calls_gather


REMAT_POLICIES = {  # what the backward pass finds saved of a block, beside its input
    "none": _all_but_gathered,  # only for a sharded state
    "block": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

weight_init = nnx.initializers.normal(stddev=0.02)


def linear_bias_init(config: ModelConfig, fan_in: int) -> Callable[..., Array]:
    """The initializer of a Linear's bias.

    documented: PyTorch's default, uniform in +-1/sqrt(fan_in). gpt2: zeros.
    """

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32, **_: Any) -> Array:
        if config.init == "gpt2":
            return jnp.zeros(shape, dtype)
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def residual_init(config: ModelConfig) -> Callable[..., Array]:
    """The initializer of a kernel that writes to the residual stream.

    documented: N(0, 0.02). gpt2: divided by sqrt(2 n_layer), so that the sum of all branches keeps its variance.
    """
    return nnx.initializers.normal(stddev=0.02 * (2 * config.n_layer) ** -0.5) if config.init == "gpt2" else weight_init


@dataclass(frozen=True)
class Numerics:
    """How a model computes: dtypes, and choices that change no parameter and no result but for rounding."""

    param_dtype: Any = jnp.float32
    """Of parameters, the residual stream, logits and the loss."""
    compute_dtype: Any = jnp.float32
    """Of the operands of matrix products."""
    attention: AttentionImplementation = "xla"
    """Which attention a training step uses; see `attention.causal_attention`."""
    chunk_logits: int = 2**24
    """About how many logits the loss computes at a time."""
    fused_qkv: bool = False
    """One product for query, key and value."""
    head_multiple: int = 1
    """The loss pads the head's width to a multiple of this."""
    remat: Literal["none", "block", "dots"] = "none"
    """What the backward pass recomputes of each block; see `RunConfig.remat`."""


class Linear(nnx.Linear):
    """A Linear that multiplies in the compute dtype and adds its bias in the parameters' dtype.

    `nnx.Linear` adds the bias in bfloat16, so its backward pass sums the bias' gradient over all tokens in bfloat16,
    where each addition loses digits.
    """

    def __call__(self, x: Array) -> Array:
        return affine(x, self.kernel[...], None if self.bias is None else self.bias[...], self.dtype)


def affine(x: Array, kernel: Array, bias: Array | None, dtype: Any) -> Array:
    """x kernel + bias, the product and the result in `dtype`."""
    product = jnp.dot(x.astype(dtype), kernel.astype(dtype))  # cast: input and kernel
    if bias is None:
        return product
    return (product.astype(bias.dtype) + bias).astype(dtype)  # cast: the sum back to the compute dtype


def linear(
    n_in: int, n_out: int, config: ModelConfig, numerics: Numerics, rngs: nnx.Rngs, kernel_init: Any = weight_init
) -> Linear:
    """A Linear of the blocks, with a bias if the configuration has them; its kernel is [n_in, n_out]."""
    return Linear(
        n_in,
        n_out,
        use_bias=config.bias,
        kernel_init=kernel_init,
        bias_init=linear_bias_init(config, n_in),
        param_dtype=numerics.param_dtype,
        dtype=numerics.compute_dtype,
        rngs=rngs,
    )


class LayerNorm(nnx.LayerNorm):
    """PyTorch's LayerNorm, by `fused_ops.layer_norm`."""

    def __call__(self, x: Array) -> Array:
        assert self.scale is not None
        bias_C = None if self.bias is None else self.bias[...]
        return fused_ops.layer_norm(x, self.scale[...], bias_C, self.epsilon)


def layer_norm(config: ModelConfig, numerics: Numerics, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """A LayerNorm over the residual stream, with scale 1 and, if the configuration has biases, bias 0."""
    return LayerNorm(
        config.n_embd,
        epsilon=config.layer_norm_eps,
        use_bias=config.bias,
        dtype=numerics.param_dtype,
        param_dtype=numerics.param_dtype,
        rngs=rngs,
    )


def keep_mask(row_key_B: Array, site: int, shape_TC: tuple[int, int], rate: float) -> Array:
    """Dropout's mask: which elements it keeps, bool [B, T, C], each with probability 1 - rate.

    Each row of the batch draws from its own key, so the masks do not depend on how rows are sharded over devices.

    Args:
        site: the number of the dropout within the model: 0 after the embedding sum, then two for each block, then one
            for each block's attention weights.
    """
    keep_rate = jnp.float32(1 - rate)  # draws in float32 for every dtype, so a float64 model has the same masks
    return jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, site), keep_rate, shape_TC))(row_key_B)


def dropout(x: Array, rate: float, row_key_B: Array | None, site: int) -> Array:
    """Zeroes elements with probability `rate` and scales the rest by 1/(1 - rate); the identity without keys.

    Args:
        x: the batch's rows one after the other, as [N, C] or [B, H, T, S].
    """
    if row_key_B is None or rate == 0:
        return x
    shape_TC = (x.size // (row_key_B.shape[0] * x.shape[-1]), x.shape[-1])
    keep_BTC = keep_mask(row_key_B, site, shape_TC, rate)
    return jnp.where(keep_BTC.reshape(x.shape), x / (1 - rate), 0)


class Attention(nnx.Module):
    """Causal self-attention with separate query, key, value and output projections."""

    def __init__(self, config: ModelConfig, numerics: Numerics, rngs: nnx.Rngs, index: int):
        self.n_head, self.fused = config.n_head, numerics.fused_qkv
        self.dropout, self.dropout_site = config.attention_dropout, 2 * config.n_layer + 1 + index
        self.implementation: AttentionImplementation = numerics.attention
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
        row_key_B: Array | None = None,
    ):
        """The attention's output [N, C], and the cache with this call's keys and values written at `start`."""
        q, k, v = self._heads(x_NC, n_rows, self.Wq, self.Wk, self.Wv)
        if cache is not None:
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis=1)
                for old, new in zip(cache, (k, v), strict=True)
            )
            cache = (k, v)
        if self.dropout and row_key_B is not None:
            att_BHTS = attention_weights(q, k, start, document_BT)
            out_BTHD = weighted_values(dropout(att_BHTS, self.dropout, row_key_B, self.dropout_site), v)
        else:
            out_BTHD = causal_attention(q, k, v, start, self.implementation, document_BT)
        return self.Wo(out_BTHD.reshape(x_NC.shape)), cache

    def weights(self, x_NC: Array, n_rows: int) -> Array:
        """The attention weights of each query over the keys of its row, [B, H, T, S]."""
        return attention_weights(*self._heads(x_NC, n_rows, self.Wq, self.Wk))

    def _heads(self, x_NC: Array, n_rows: int, *projections: Linear) -> list[Array]:
        """The projections of x, [B, T, H, D] each; if fused, by one product with their concatenated kernels."""
        if self.fused:
            kernel = jnp.concatenate([W.kernel[...] for W in projections], axis=-1)
            biases = [W.bias[...] for W in projections if W.bias is not None]
            bias = jnp.concatenate(biases, axis=-1) if biases else None
            projected = jnp.split(affine(x_NC, kernel, bias, projections[0].dtype), len(projections), axis=-1)
        else:
            projected = [W(x_NC) for W in projections]
        return [y_NC.reshape(n_rows, -1, self.n_head, x_NC.shape[-1] // self.n_head) for y_NC in projected]


class MLP(nnx.Module):
    """C -> 4C -> C with GELU: exact (erf), or GPT-2's tanh approximation."""

    def __init__(self, config: ModelConfig, numerics: Numerics, rngs: nnx.Rngs):
        self.gelu = config.gelu
        self.fc = linear(config.n_embd, 4 * config.n_embd, config, numerics, rngs)
        self.proj = linear(4 * config.n_embd, config.n_embd, config, numerics, rngs, residual_init(config))

    def __call__(self, x_NC: Array) -> Array:
        def activation(hidden_NF: Array) -> Array:
            return gelu(hidden_NF.astype(x_NC.dtype), self.gelu)  # cast: GELU in the residual stream's dtype

        hidden_NF = self.fc(x_NC)
        if hidden_NF.dtype == x_NC.dtype:
            return self.proj(activation(hidden_NF))
        return self.proj(recomputed(activation, hidden_NF))  # saves bfloat16: a third of a block's saved bytes less


class Block(nnx.Module):
    """Pre-norm: x += attn(ln1(x)); x += mlp(ln2(x))."""

    def __init__(self, config: ModelConfig, numerics: Numerics, rngs: nnx.Rngs, index: int):
        self.dropout, self.index = config.dropout, index
        self.ln1 = layer_norm(config, numerics, rngs)
        self.attn = Attention(config, numerics, rngs, index)
        self.ln2 = layer_norm(config, numerics, rngs)
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
        branch, cache = self.attn(self.ln1(x_NC), n_rows, cache, start, document_BT, row_key_B)
        branch = branch.astype(x_NC.dtype)  # cast: back to the residual stream's dtype
        x_NC = x_NC + dropout(branch, self.dropout, row_key_B, 2 * self.index + 1)
        branch = self.mlp(self.ln2(x_NC)).astype(x_NC.dtype)  # cast: back to the residual stream's dtype
        return x_NC + dropout(branch, self.dropout, row_key_B, 2 * self.index + 2), cache


def head_logits(x: Array, head_CV: Array, compute_dtype: Any) -> Array:
    """The logits [..., V] of hidden states x [..., C], in the head's dtype."""
    operands = (a.astype(compute_dtype) for a in (x, head_CV))  # cast: operands to the compute dtype
    return jnp.dot(*operands, preferred_element_type=head_CV.dtype)  # accumulates in the parameters' dtype


class GPT(nnx.Module):
    """The language model: token and position embeddings, blocks, a final norm, a head without bias.

    A tied head is the transpose of the token embedding.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, numerics: Numerics, rngs: nnx.Rngs):
        self.dropout = config.dropout
        dtype = numerics.param_dtype
        self.token_emb = nnx.Embed(vocab_size, config.n_embd, embedding_init=weight_init, param_dtype=dtype, rngs=rngs)
        self.pos_emb = nnx.Embed(
            config.block_size, config.n_embd, embedding_init=weight_init, param_dtype=dtype, rngs=rngs
        )
        self.blocks = nnx.List([Block(config, numerics, rngs, index) for index in range(config.n_layer)])
        self.ln_f = layer_norm(config, numerics, rngs)
        self.compute_dtype, self.remat = numerics.compute_dtype, numerics.remat
        self.gather: Gather | None = None  # set by `bind`
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

        Between attentions the tokens are one axis N: plain [N, C] matrix products, also in the backward pass, make the
        step fast on a CPU (docs/speed-log.md).

        Args:
            idx_BT: int token ids; an id outside the vocabulary gives NaN (the host checks text before).
            row_key_B: dropout keys, one per row; None for evaluation.
            cache: keys and values of positions before `start`; None to attend to this call's tokens alone.
            start: the position of the first token.
            document_BT, position_BT: with packed documents, as from `data.sampler.documents`.

        Returns:
            The hidden states in the parameters' dtype, and the cache with this call's keys and values, or None.
        """
        n_rows, n_time = idx_BT.shape
        position_T = start + jnp.arange(n_time, dtype=jnp.int32)
        x_BTC = self.embedded(idx_BT, position_T if position_BT is None else position_BT)
        x_NC = dropout(x_BTC.reshape(n_rows * n_time, -1), self.dropout, row_key_B, 0)
        new_cache = []
        for block, block_cache in zip(self.blocks, cache or [None] * len(self.blocks), strict=True):
            apply = partial(
                self._apply_block,
                block,
                n_rows=n_rows,
                row_key_B=row_key_B,
                cache=block_cache,
                start=start,
                document_BT=document_BT,
            )
            if self.remat != "none" or self.gather is not None:
                apply = jax.checkpoint(apply, policy=REMAT_POLICIES[self.remat])
            x_NC, block_cache = apply(x_NC)
            new_cache.append(block_cache)
        return self.ln_f(x_NC).reshape(x_BTC.shape), new_cache if cache is not None else None

    def _apply_block(self, block: Block, x_NC: Array, **arguments: Any) -> Any:
        """A block's result; of sharded parameters, those of the block are gathered for it alone."""
        if self.gather is not None:
            gather, prefix = self.gather, f"blocks.{block.index}."
            graphdef, shards = nnx.split(block)

            def whole(path: tuple[Any, ...], p: Any) -> Any:
                dtype = self.compute_dtype if p.ndim > 1 else p.dtype  # cast: a kernel before it is gathered
                return p.replace(gather(prefix + _dotted(path), p[...], dtype))

            block = nnx.merge(graphdef, nnx.map_state(whole, shards))
        return block(x_NC, **arguments)

    def attention_maps(self, idx_BT: Array) -> Array:
        """The attention weights of every layer and head, [B, L, H, T, S].

        Args:
            idx_BT: token ids, T at most a block.
        """
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
        """The head's kernel, in the parameters' dtype."""
        return self.token_emb.embedding[...].T if self.lm_head is None else self.lm_head.kernel[...]

    def logits(self, x: Array) -> Array:
        """The logits [..., V] of hidden states x [..., C], in the parameters' dtype."""
        return head_logits(x, self.head_CV, self.compute_dtype)

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


class GPTClassifier(GPT):
    """A GPT with a classification head in place of the language-modeling head."""

    def __init__(self, config: ModelConfig, vocab_size: int, numerics: Numerics, rngs: nnx.Rngs, n_classes: int):
        super().__init__(dataclasses.replace(config, tied_head=True), vocab_size, numerics, rngs)  # no head over tokens
        exact = Numerics(numerics.param_dtype, numerics.param_dtype)
        with_bias = dataclasses.replace(config, bias=True)
        self.classifier = linear(config.n_embd, n_classes, with_bias, exact, rngs)

    def __call__(self, idx_BT: Array, length_B: Array, pool: str, row_key_B: Array | None = None) -> Array:
        """Logits [B, classes] of texts that are padded on the right, in the parameters' dtype.

        Args:
            idx_BT: token ids; the padding is an id of the vocabulary.
            length_B: how many tokens are not padding, at least one.
            pool: as in `FinetuneConfig.pool`.
            row_key_B: dropout keys, one per row; None for evaluation.
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


def build_model(config: ModelConfig, vocab_size: int, numerics: Numerics, rngs: nnx.Rngs, n_classes: int | None) -> GPT:
    """A `GPT`, or with `n_classes` a `GPTClassifier`."""
    if n_classes is None:
        return GPT(config, vocab_size, numerics, rngs)
    return GPTClassifier(config, vocab_size, numerics, rngs, n_classes)


def abstract_model(config: ModelConfig, vocab_size: int, numerics: Numerics, n_classes: int | None = None):
    """The graph definition and the parameters' paths, without computing anything."""
    graphdef, state = nnx.split(
        nnx.eval_shape(lambda: build_model(config, vocab_size, numerics, nnx.Rngs(0), n_classes))
    )
    return graphdef, [path for path, _ in nnx.to_flat_state(state)]


def init_params(
    key: Array, config: ModelConfig, vocab_size: int, numerics: Numerics, n_classes: int | None = None
) -> dict[str, Array]:
    """The initial parameters by dotted name, as `config.init` says; a norm's scale is 1 and its bias 0.

    It draws in float32 for every dtype, so a float64 model starts from the same weights.
    """
    _, state = nnx.split(build_model(config, vocab_size, Numerics(), nnx.Rngs(key), n_classes))
    return {_dotted(path): variable[...].astype(numerics.param_dtype) for path, variable in nnx.to_flat_state(state)}


def bind(config: ModelConfig, vocab_size: int, numerics: Numerics, n_classes: int | None = None) -> Callable[..., Any]:
    """A function from parameters to the model that has them, for use inside jit.

    It splits the module once (`nnx.split`) and merges it while tracing (`nnx.merge`). The function's second argument
    `gather` is for sharded parameters: the model gathers each block's when it computes the block, in the backward pass
    again, and all others at once.
    """
    graphdef, paths = abstract_model(config, vocab_size, numerics, n_classes)

    def model(params: Params, gather: Gather | None = None) -> Any:
        assert len(params) == len(paths), "parameters of another model"
        if gather is not None:
            rest = (name for name in params if not name.startswith("blocks."))
            params = {**params, **{name: gather(name, params[name], params[name].dtype) for name in rest}}
        merged = nnx.merge(graphdef, nnx.from_flat_state([(path, params[_dotted(path)]) for path in paths]))
        merged.gather = gather
        return merged

    return model


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
