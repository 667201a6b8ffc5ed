"""Faults of a Llama: grouped heads, rotary positions, RMSNorm, SwiGLU."""

from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tests.parity_pairs.planting import (
    Level,
    Plant,
    Planted,
    adamw,
    bfloat16_softmax,
    converter,
    coupled_adamw,
    cross_entropy,
    function,
    interleaved,
    late,
    one_call,
    optimizer,
    patched,
    smoothed,
    token_loss,
    value,
    with_gradient,
)


def rms_norm_variant(mean: float = 0.0, one: float = 0.0, epsilon: float = 1e-6) -> Callable[..., Any]:
    """The norm with the mean subtracted (1) or not (0), and with 1 + scale or not."""

    def rms_norm(x: Any, scale_C: Any) -> Any:
        x = x - mean * x.mean(-1, keepdims=True)
        return (one + scale_C) * (x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon))

    return rms_norm


def rotary_interleaved(x_BTHD: Any) -> Any:
    """Turns the pair (2d, 2d + 1), as the paper's own code does."""
    n_time, head_size = x_BTHD.shape[1], x_BTHD.shape[-1]
    angle_TE = jnp.arange(n_time)[:, None] / 10000.0 ** (jnp.arange(0, head_size, 2) / head_size)
    cos_T1E, sin_T1E = (f(angle_TE)[:, None].astype(x_BTHD.dtype) for f in (jnp.cos, jnp.sin))
    even, odd = x_BTHD[..., ::2], x_BTHD[..., 1::2]
    return jnp.stack([even * cos_T1E - odd * sin_T1E, odd * cos_T1E + even * sin_T1E], axis=-1).reshape(x_BTHD.shape)


def rotary_from_1(original: Callable[[Any], Any], x_BTHD: Any) -> Any:
    """Positions from 1, of the queries alone: the keys' distances would not change with those of both."""
    return original(jnp.pad(x_BTHD, ((0, 0), (1, 0), (0, 0), (0, 0))))[:, 1:]


def llama_layers(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Plant:
    """Changes the converted weights of each layer."""
    return converter(lambda params: {**params, "layers": [{**p, **change(p)} for p in params["layers"]]})


def llama_block(module: ModuleType, which: str) -> Callable[[Any, Any], Any]:
    """The block with one thing changed."""

    def block(p: Any, x_BTC: Any) -> Any:
        if which == "post-norm":
            x_BTC = module.rms_norm(x_BTC + module.attention(p, x_BTC), p["norm1"])
            return module.rms_norm(x_BTC + module.mlp(p, x_BTC), p["norm2"])
        branch_BTC = module.attention(p, module.rms_norm(x_BTC, p["norm1"]))
        if which == "stop gradient":
            branch_BTC = jax.lax.stop_gradient(branch_BTC)
        x_BTC = branch_BTC if which == "no residual" else x_BTC + branch_BTC
        return x_BTC + module.mlp(p, x_BTC if which == "no norm" else module.rms_norm(x_BTC, p["norm2"]))

    return block


def llama_block_of(layer: int, which: str) -> Plant:
    """The change in one of the three layers."""
    return patched(
        {"block": lambda m: one_call(layer, 3, lambda original, *args: llama_block(m, which)(*args))(m.block)}
    )


def swapped(names: str, p: Mapping[str, Any]) -> dict[str, Any]:
    first, second = names.split()
    return {first: p[second], second: p[first]}


LLAMA_ATTENTION = r"model\.layers\.0\.self_attn(\..*)?"
LLAMA_ROTARY = r"model\.(rotary_emb|layers\.0\.self_attn(\..*)?)"
LLAMA_MLP = r"model\.layers\.0\.mlp(\..*)?"
LLAMA_NORM = r"model\.layers\.0\.input_layernorm"


def llama(name: str, plant: Plant, layer: str, cause: str, level: Level = "forward") -> Planted:
    return Planted(f"Llama: {name}", "llama", plant, layer, cause, level)


FAULTS = [
    llama("epsilon 1e-5", function("rms_norm", lambda f: partial(f, epsilon=1e-5)), LLAMA_NORM, "epsilon"),
    llama(
        "epsilon 1e-5 in one norm",
        function("rms_norm", one_call(3, 7, lambda f, *args: f(*args, epsilon=1e-5))),
        r"model\.layers\.1\.post_attention_layernorm",
        "epsilon",
    ),
    llama("norm subtracts the mean", value("rms_norm", rms_norm_variant(mean=1)), LLAMA_NORM, "mean subtracted"),
    llama("norm with 1 + scale", value("rms_norm", rms_norm_variant(one=1)), LLAMA_NORM, "scale plus one"),
    llama("ReLU for SiLU", value("activation", jax.nn.relu), LLAMA_MLP, "activation"),
    llama("GELU for SiLU", value("activation", jax.nn.gelu), LLAMA_MLP, "activation"),
    llama(
        "key and value swapped",
        llama_layers(partial(swapped, "k v")),
        r"model\.layers\.0\.self_attn(\.[kv]_proj)?",
        "weights swapped",
    ),
    llama(
        "gate and up swapped",
        llama_layers(partial(swapped, "gate up")),
        r"model\.layers\.0\.mlp(\.gate_proj|\.up_proj|\.act_fn)?",
        "weights swapped",
    ),
    llama(
        "heads read as [D, H]",
        llama_layers(
            lambda p: {x: interleaved(p[x].reshape(24, -1), p[x].shape[1]).reshape(p[x].shape) for x in "qkv"}
        ),
        LLAMA_ATTENTION,
        "heads interleaved",
    ),
    llama(
        "keys and values tiled",
        value("repeat_heads", lambda x_BSKD, n_head: jnp.tile(x_BSKD, (1, 1, n_head // x_BSKD.shape[2], 1))),
        LLAMA_ATTENTION,
        "key and value heads tiled",
    ),
    llama(
        "scores divided by D",
        function("scaled_scores", lambda f: lambda q_BTHD, k_BSHD: f(q_BTHD, k_BSHD) * q_BTHD.shape[-1] ** -0.5),
        LLAMA_ATTENTION,
        "attention scale",
    ),
    llama(
        "scores not scaled",
        function("scaled_scores", lambda f: lambda q_BTHD, k_BSHD: f(q_BTHD, k_BSHD) * q_BTHD.shape[-1] ** 0.5),
        LLAMA_ATTENTION,
        "attention scale",
    ),
    llama(
        "no causal mask",
        value("causal_mask", lambda n_time: jnp.ones((n_time, n_time), bool)),
        LLAMA_ATTENTION,
        "causal mask missing",
    ),
    llama(
        "the mask lets the next token through",
        value("causal_mask", lambda n_time: jnp.tril(jnp.ones((n_time, n_time), bool), k=1)),
        LLAMA_ATTENTION,
        "mask off by one",
    ),
    llama("softmax rounded", value("softmax", bfloat16_softmax), LLAMA_ATTENTION, "rounded to bfloat16"),
    llama("rotary pairs interleaved", value("rotary", rotary_interleaved), LLAMA_ROTARY, "rotary layout"),
    llama("rotary base 500000", function("rotary", lambda f: partial(f, base=500000.0)), LLAMA_ROTARY, "rotary base"),
    llama(
        "queries' positions from 1",
        function("rotary", one_call(0, 2, rotary_from_1)),
        LLAMA_ROTARY,
        "positions shifted",
    ),
    llama("a residual missing", llama_block_of(1, "no residual"), r"model\.layers\.1", "residual missing"),
    llama(
        "a norm missing",
        llama_block_of(2, "no norm"),
        r"model\.layers\.2\.post_attention_layernorm",
        "norm missing",
    ),
    llama(
        "post-norm",
        patched({"block": lambda m: llama_block(m, "post-norm")}),
        r"model\.layers\.0\.(input_layernorm|self_attn(\..*)?)",
        "norm placement",
    ),
    llama(
        "two layers swapped",
        converter(lambda params: {**params, "layers": [params["layers"][i] for i in (1, 0, 2)]}),
        r"model\.layers\.0(\..*)?",
        "layers swapped",
    ),
    llama(
        "labels not shifted",
        token_loss(lambda *x: cross_entropy(*x).mean(), shift=0),
        "loss",
        "label shift missing",
        "loss",
    ),
    llama(
        "the sum of the losses",
        token_loss(lambda *x: cross_entropy(*x).sum()),
        "loss",
        "loss reduction",
        "loss",
    ),
    llama(
        "the last token dropped",
        token_loss(lambda *x: cross_entropy(*x).mean(), drop=1),
        "loss",
        "last token dropped",
        "loss",
    ),
    llama(
        "labels smoothed",
        token_loss(lambda *x: smoothed(*x).mean()),
        "loss",
        "label smoothing",
        "loss",
    ),
    llama(
        "no gradient through an attention",
        llama_block_of(1, "stop gradient"),
        r"model\.layers\.1\.(self_attn|input_layernorm)(\..*)?",
        "stop gradient",
        "gradients",
    ),
    llama(
        "the gradient of SiLU doubled",
        value("activation", with_gradient(jax.nn.silu, 2.0)),
        r"model\.layers\.\d\.(mlp|post_attention_layernorm)(\..*)?",
        "gradient scaled",
        "gradients",
    ),
    llama("clip missing", optimizer(lambda m: adamw(m, optax.identity())), "optimizer", "clip missing", "updates"),
    llama(
        "schedule one step late",
        optimizer(lambda m: adamw(m, schedule=late(m.schedule))),
        "optimizer",
        "schedule late",
        "updates",
    ),
    llama("coupled decay", optimizer(coupled_adamw), "optimizer", "coupled decay", "updates"),
]
