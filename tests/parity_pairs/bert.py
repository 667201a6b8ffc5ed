"""Faults of a BERT: padding, LayerNorm after the residual, token types, a tied head."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tests.parity_pairs.planting import (
    Level,
    Plant,
    Planted,
    bfloat16_softmax,
    converter,
    cross_entropy,
    function,
    interleaved,
    optimizer,
    patched,
    smoothed,
    value,
    without_bias_correction,
)


def bert_layer_norm(**changes: Any) -> Plant:
    """Builds the norms with other arguments."""
    settings = {"epsilon": 1e-12, "use_fast_variance": False} | changes
    return value("layer_norm", lambda n_features, rngs: nnx.LayerNorm(n_features, rngs=rngs, **settings))


class NormWithoutMean(nnx.LayerNorm):
    """A LayerNorm that does not subtract the mean."""

    def __call__(self, x: Any) -> Any:
        assert self.scale is not None and self.bias is not None, "both are there by default"
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
    linear = model.blocks[1].down
    linear.bias, linear.use_bias = None, False


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


FAULTS = [
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
        "parameters",
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
