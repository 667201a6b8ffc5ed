"""Faults of the kind that ports really have, planted in the JAX side, the converter or the optax side of each example.

Each names the level that must catch it, the torch module that the diagnosis must point to, and its cause.
"""

import dataclasses
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Literal
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxgpt.parity import Pair

Level = Literal["parameters", "forward", "loss", "gradients", "updates"]
Plant = Callable[[ModuleType], AbstractContextManager[Pair]]


@dataclass(frozen=True)
class Planted:
    """One fault.

    plant: from the loaded example to a context that gives the faulty pair; within it the example's own `pair` is that.
    layer: a pattern that the whole name of the torch module matches; "loss" or "optimizer" where it is none.
    level: the first level that departs.
    """

    name: str
    pair: str
    plant: Plant
    layer: str
    cause: str
    level: Level = "forward"


# ----------------------------------------------------------------------------------------------------- ways of planting


def patched(changes: Mapping[str, Callable[[ModuleType], Any]], root: ModuleType | None = None) -> Plant:
    """Replaces attributes by dotted name.

    Args:
        changes: the new values, from the loaded example; they are made before any is put in place.
        root: the module whose attributes they are; None for the example.
    """

    @contextmanager
    def plant(module: ModuleType) -> Iterator[Pair]:
        values = {name: change(module) for name, change in changes.items()}
        with ExitStack() as stack:
            for name, value in values.items():
                owner, _, attribute = name.rpartition(".")
                target = root or module
                stack.enter_context(
                    patch.object(operator.attrgetter(owner)(target) if owner else target, attribute, value)
                )
            yield stack.enter_context(own_pair(module))

    return plant


@contextmanager
def own_pair(module: ModuleType, **fields: Any) -> Iterator[Pair]:
    """The example's pair with new functions: `jax.jit` would find the trace of a function that it has seen before."""
    pair = dataclasses.replace(
        module.pair,
        jax_loss=lambda params, batch: module.loss(params, batch),
        jax_logits=lambda params, batch: module.logits(params, batch),
        to_params=getattr(module, "to_params", None),
        **fields,
    )
    with patch.object(module, "pair", pair):
        yield pair


def function(name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]], **more: Any) -> Plant:
    """Replaces a function by wrapper(the original)."""
    return patched({name: lambda module: wrapper(operator.attrgetter(name)(more.get("root") or module))}, **more)


def value(name: str, new: Any, **more: Any) -> Plant:
    """Replaces a function by another."""
    return patched({name: lambda module: new}, **more)


def one_call(index: int, n_calls: int, changed: Callable[..., Any]) -> Callable[[Any], Any]:
    """A wrapper whose call `index` of each `n_calls`, as many as the model makes, goes to changed(original, ...)."""

    def wrapper(original: Callable[..., Any]) -> Callable[..., Any]:
        count = itertools.count()

        def function(*args: Any, **kwargs: Any) -> Any:
            is_it = next(count) % n_calls == index
            return changed(original, *args, **kwargs) if is_it else original(*args, **kwargs)

        return function

    return wrapper


def converter(change: Callable[[Any], Any]) -> Plant:
    """Changes what the converter returns; `change` may do so in place and return None."""

    def wrapper(to_params: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def changed(state_dict: Any) -> Any:
            params = to_params(state_dict)
            new = change(params)
            return params if new is None else new

        return changed

    return function("to_params", wrapper)


def optimizer(make: Callable[[ModuleType], optax.GradientTransformation]) -> Plant:
    """Replaces the optax transformation."""
    return lambda module: own_pair(module, optax_optimizer=make(module))


# ------------------------------------------------------------------------------------------------- faults of any model


def with_gradient(forward: Callable[[Any], Any], scale: float) -> Callable[[Any], Any]:
    """The same function of one array, whose custom VJP scales the gradient."""

    @jax.custom_vjp
    def f(x: Any) -> Any:
        return forward(x)

    f.defvjp(lambda x: jax.vjp(forward, x), lambda vjp, grad: (scale * vjp(grad)[0],))
    return f


def bfloat16_softmax(score: Any) -> Any:
    return jax.nn.softmax(score, axis=-1).astype(jnp.bfloat16).astype(score.dtype)


def interleaved(kernel_CE: Any, n_head: int) -> Any:
    """Outputs [..., H*D], read as [..., D, H]."""
    return kernel_CE.reshape(*kernel_CE.shape[:-1], -1, n_head).swapaxes(-1, -2).reshape(kernel_CE.shape)


def without_bias_correction(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam's m / (sqrt(v) + eps)."""

    def init(params: Any) -> Any:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return zeros, zeros

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state[0], grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state[1], grads)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu), (mu, nu)

    return optax.GradientTransformation(init, update)


def clip_each(limit: float) -> optax.GradientTransformation:
    """Clips each tensor's gradient by its own norm."""

    def clipped(grad: Any) -> Any:
        return grad * jnp.minimum(1, limit / jnp.linalg.norm(grad.ravel()))

    return optax.stateless(lambda grads, params: jax.tree.map(clipped, grads))


def late(schedule: optax.Schedule) -> optax.Schedule:
    return lambda count: schedule(jnp.maximum(count - 1, 0))


def scaled(schedule: optax.Schedule, scale: float) -> optax.Schedule:
    return lambda count: scale * schedule(count)


def adamw(module: ModuleType, clip: Any = None, schedule: Any = None, **changes: Any) -> optax.GradientTransformation:
    """The optimizer of the examples of GPT-2 and Llama, but for the changes."""
    settings = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "mask": module.is_matrix} | changes
    return optax.chain(clip or optax.clip_by_global_norm(1.0), optax.adamw(schedule or module.schedule, **settings))


def coupled_adamw(module: ModuleType) -> optax.GradientTransformation:
    """With the decay added to the gradient, so that Adam divides it by the root of the second moment."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.add_decayed_weights(0.1, module.is_matrix),
        optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-8),
        optax.scale_by_learning_rate(module.schedule),
    )


def cross_entropy(logits: Any, target: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, target)


def smoothed(logits: Any, target: Any) -> Any:
    labels = optax.smooth_labels(jax.nn.one_hot(target, logits.shape[-1], dtype=logits.dtype), 0.1)
    return optax.softmax_cross_entropy(logits, labels)


def token_loss(loss_of: Callable[[Any, Any], Any], shift: int = 1, drop: int = 0) -> Plant:
    """Replaces the loss by `loss_of` the logits and the labels, which are the same tokens as the inputs.

    Args:
        shift: from how many tokens ahead the labels are.
        drop: how many tokens at the end do not count.
    """

    def make(module: ModuleType) -> Callable[[Any, Any], Any]:
        def loss(params: Any, batch: Any) -> Any:
            logits_BTV, label_BT = module.logits(params, batch), batch["labels"]
            n_tokens = label_BT.shape[1] - shift - drop
            return loss_of(logits_BTV[:, :n_tokens], label_BT[:, shift : shift + n_tokens])

        return loss

    return patched({"loss": make})


# -------------------------------------------------------------------------------------------------------------- Llama


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


LLAMA = [
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


# --------------------------------------------------------------------------------------------------------------- BERT


def bert_layer_norm(**changes: Any) -> Plant:
    """Builds the norms with other arguments."""
    settings = {"epsilon": 1e-12, "use_fast_variance": False} | changes
    return value("layer_norm", lambda n_features, rngs: nnx.LayerNorm(n_features, rngs=rngs, **settings))


class NormWithoutMean(nnx.LayerNorm):
    """A LayerNorm that does not subtract the mean."""

    def __call__(self, x: Any) -> Any:
        normal = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return normal * self.scale[...] + self.bias[...]


class Identity(nnx.Module):
    """What stands in place of a module that is missing."""

    def __call__(self, x: Any) -> Any:
        return x


def changed_kernel(linear: Any, change: Callable[[Any], Any]) -> None:
    linear.kernel.set_value(change(linear.kernel.get_value()))


def bert_kernel_transposed(model: Any) -> None:
    changed_kernel(model.blocks[1].attention.value, np.transpose)


def bert_query_and_key_swapped(model: Any) -> None:
    for block in model.blocks:
        a = block.attention
        a.query, a.key = a.key, a.query


def bert_heads_interleaved(model: Any) -> None:
    for block in model.blocks:
        a = block.attention
        for p in (p for linear in (a.query, a.key, a.value) for p in (linear.kernel, linear.bias)):
            p.set_value(interleaved(p.get_value(), a.n_head))


def bert_bias_missing(model: Any) -> None:
    model.blocks[1].down.bias = None


def bert_bias_zero(model: Any) -> None:
    model.blocks[0].attention.out.bias.set_value(np.zeros_like(model.blocks[0].attention.out.bias.get_value()))


def bert_epsilon_of_one(model: Any) -> None:
    model.blocks[1].norm1.epsilon = 1e-5


def bert_norm_missing(model: Any) -> None:
    model.transform_norm = Identity()


def bert_blocks_swapped(model: Any) -> None:
    model.blocks = nnx.List([model.blocks[1], model.blocks[0]])


def with_copy(model: Any) -> Any:
    model.head_VC = nnx.Param(model.tokens.embedding.get_value())
    return model


def bert_block(change: Callable[..., Any]) -> Plant:
    """Replaces the call of every block by change(block, x, mask)."""
    return patched({"Block.__call__": lambda m: lambda self, x_BTC, mask: change(m, self, x_BTC, mask)})


def bert_pre_norm(module: ModuleType, block: Any, x_BTC: Any, mask: Any) -> Any:
    x_BTC = x_BTC + block.attention(block.norm1(x_BTC), mask)
    return x_BTC + block.down(module.gelu(block.up(block.norm2(x_BTC))))


def bert_no_residual(module: ModuleType, block: Any, x_BTC: Any, mask: Any) -> Any:
    x_BTC = block.norm1(x_BTC + block.attention(x_BTC, mask))
    return block.norm2(block.down(module.gelu(block.up(x_BTC))))


def bert_attention(scale: Callable[[int, int], float]) -> Plant:
    """Scales the queries beforehand, as a function of the head size and the number of heads."""
    return function("attention", lambda f: lambda q_BTHD, *args: f(q_BTHD * scale(*q_BTHD.shape[:1:-1]), *args))


def bert_embedded(positions: Callable[[Any], Any], with_types: bool = True) -> Plant:
    def embedded(self: Any, input_ids_BT: Any, token_type_ids_BT: Any) -> Any:
        x_BTC = self.tokens(input_ids_BT) + positions(self)(jnp.arange(input_ids_BT.shape[1]))
        return x_BTC + self.token_types(token_type_ids_BT) if with_types else x_BTC

    return value("Bert.embedded", embedded)


def bert_loss(loss_of: Callable[[Any, Any, Any], Any]) -> Plant:
    """Replaces the loss by `loss_of` the logits, the labels with 0 for ignored ones, and which labels count."""

    def make(module: ModuleType) -> Callable[[Any, Any], Any]:
        def loss(model: Any, batch: Any) -> Any:
            counts_BT = batch["labels"] != module.IGNORED
            return loss_of(module.logits(model, batch), jnp.where(counts_BT, batch["labels"], 0), counts_BT)

        return loss

    return patched({"loss": make})


def bert_adamw(module: ModuleType, **changes: Any) -> optax.GradientTransformation:
    """The example's optimizer, but for the changes."""
    settings = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "mask": module.is_matrix} | changes
    return optax.adamw(module.schedule, **settings)


BERT_ATTENTION = r"bert\.encoder\.layer\.0\.attention\.self(\..*)?"


def bert(name: str, plant: Plant, layer: str, cause: str, level: Level = "forward") -> Planted:
    return Planted(f"BERT: {name}", "bert", plant, layer, cause, level)


BERT = [
    bert("Flax's epsilon 1e-6", bert_layer_norm(epsilon=1e-6), r"bert\.embeddings\.LayerNorm", "epsilon"),
    bert(
        "epsilon 1e-5 in one norm",
        converter(bert_epsilon_of_one),
        r"bert\.encoder\.layer\.1\.attention\.output\.LayerNorm",
        "epsilon",
    ),
    bert(
        "norm without its mean",
        value("layer_norm", lambda n_features, rngs: NormWithoutMean(n_features, epsilon=1e-12, rngs=rngs)),
        r"bert\.embeddings\.LayerNorm",
        "mean not subtracted",
    ),
    bert("tanh GELU", value("gelu", jax.nn.gelu), r"bert\.encoder\.layer\.0\.intermediate(\..*)?", "activation"),
    bert(
        "a square kernel not transposed",
        converter(bert_kernel_transposed),
        r"bert\.encoder\.layer\.1\.attention\.self\.value",
        "kernel transposed",
    ),
    bert(
        "query and key swapped",
        converter(bert_query_and_key_swapped),
        r"bert\.encoder\.layer\.0\.attention\.self(\.query|\.key)?",
        "weights swapped",
    ),
    bert("heads read as [D, H]", converter(bert_heads_interleaved), BERT_ATTENTION, "heads interleaved"),
    bert(
        "scores divided by the root of n_embd",
        bert_attention(lambda head_size, n_head: n_head**-0.5),
        BERT_ATTENTION,
        "attention scale",
    ),
    bert(
        "no padding mask",
        value("padding_mask", lambda attention_mask_BS: jnp.ones((1, 1, 1, attention_mask_BS.shape[1]), bool)),
        BERT_ATTENTION,
        "padding mask missing",
    ),
    bert("softmax rounded", value("softmax", bfloat16_softmax), BERT_ATTENTION, "rounded to bfloat16"),
    bert(
        "a Linear without its bias",
        converter(bert_bias_missing),
        r"bert\.encoder\.layer\.1\.output\.dense",
        "bias missing",
        "parameters",
    ),
    bert(
        "a bias left at zero",
        converter(bert_bias_zero),
        r"bert\.encoder\.layer\.0\.attention\.output\.dense",
        "bias missing",
    ),
    bert(
        "positions from 1",
        bert_embedded(lambda model: lambda position: model.positions(position + 1)),
        r"bert\.embeddings(\.position_embeddings)?",
        "positions shifted",
    ),
    bert(
        "token types ignored",
        bert_embedded(lambda model: model.positions, with_types=False),
        r"bert\.embeddings(\.token_type_embeddings)?",
        "embedding missing",
    ),
    bert(
        "pre-norm",
        bert_block(bert_pre_norm),
        r"bert\.encoder\.layer\.0\.attention(\..*)?",
        "norm placement",
    ),
    bert(
        "the residual past the MLP missing",
        bert_block(bert_no_residual),
        r"bert\.encoder\.layer\.0\.output(\.LayerNorm)?",
        "residual missing",
    ),
    bert(
        "the head's norm missing",
        converter(bert_norm_missing),
        r"cls\.predictions\.transform\.LayerNorm",
        "norm missing",
        "parameters",
    ),
    bert(
        "two blocks swapped",
        converter(bert_blocks_swapped),
        r"bert\.encoder\.layer\.0(\..*)?",
        "layers swapped",
    ),
    bert(
        "the mean over ignored labels too",
        bert_loss(lambda logits, label, counts: (cross_entropy(logits, label) * counts).mean()),
        "loss",
        "ignored labels counted",
        "loss",
    ),
    bert(
        "ignored labels as token 0",
        bert_loss(lambda logits, label, counts: cross_entropy(logits, label).mean()),
        "loss",
        "ignored labels counted",
        "loss",
    ),
    bert(
        "the sum of the losses",
        bert_loss(lambda logits, label, counts: (cross_entropy(logits, label) * counts).sum()),
        "loss",
        "loss reduction",
        "loss",
    ),
    bert(
        "labels smoothed",
        bert_loss(lambda logits, label, counts: (smoothed(logits, label) * counts).sum() / counts.sum()),
        "loss",
        "label smoothing",
        "loss",
    ),
    bert(
        "the head a copy of the embedding",
        patched(
            {
                "to_params": lambda m: lambda state_dict, original=m.to_params: with_copy(original(state_dict)),
                "Bert.head": lambda m: lambda self, x_BTC: x_BTC @ self.head_VC[...].T + self.head_bias[...],
            }
        ),
        r"cls\.predictions\.decoder|bert\.embeddings\.word_embeddings",
        "tie cut",
        "parameters",
    ),
    bert("beta2 0.95", optimizer(lambda m: bert_adamw(m, b2=0.95)), "optimizer", "optimizer betas", "updates"),
    bert(
        "epsilon 1e-6 in Adam",
        optimizer(lambda m: bert_adamw(m, eps=1e-6)),
        "optimizer",
        "optimizer epsilon",
        "updates",
    ),
    bert(
        "no bias correction",
        optimizer(
            lambda m: optax.chain(
                without_bias_correction(0.9, 0.999, 1e-8),
                optax.add_decayed_weights(0.1, m.is_matrix),
                optax.scale_by_learning_rate(m.schedule),
            )
        ),
        "optimizer",
        "bias correction missing",
        "updates",
    ),
    bert(
        "decay of norms and biases", optimizer(lambda m: bert_adamw(m, mask=None)), "optimizer", "decay mask", "updates"
    ),
]

PLANTED = [*LLAMA, *BERT]
