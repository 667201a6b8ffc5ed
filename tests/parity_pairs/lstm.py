"""Faults of an LSTM: the order of gates, the biases, the head, Adam and its clip."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from tests.parity_pairs.planting import (
    Level,
    Plant,
    Planted,
    clip_each,
    cross_entropy,
    function,
    optimizer,
    patched,
    smoothed,
    value,
    without_bias_correction,
)


def gates_in_order(order: str) -> Plant:
    """Reads the four parts of the gates in another order than "ifgo"."""

    def split(gates_BG: Any) -> list[Any]:
        parts = dict(zip(order, jnp.split(gates_BG, 4, axis=-1), strict=True))
        return [parts[gate] for gate in "ifgo"]

    return value("split_gates", split)


def forget_bias_of_1(original: Any) -> Any:
    def split(gates_BG: Any) -> list[Any]:
        input_BH, forget_BH, new_BH, output_BH = original(gates_BG)
        return [input_BH, forget_BH + 1, new_BH, output_BH]

    return split


def batch_loss(loss_of: Any, targets: str = "targets") -> Plant:
    """Replaces the loss by `loss_of` the logits and a part of the batch."""
    return patched({"loss": lambda m: lambda variables, b: loss_of(m.logits(variables, b), b[targets])})


class HeadWithoutBias(nn.Module):
    """A Dense layer whose bias is not added."""

    features: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        kernel = self.param("kernel", nn.initializers.normal(), (x.shape[-1], self.features))
        self.param("bias", nn.initializers.zeros, (self.features,))
        return x @ kernel


class Doubled(nn.Module):
    """A Dense layer that doubles the gradient of its input."""

    features: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        kernel = self.param("kernel", nn.initializers.normal(), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return (2 * x - jax.lax.stop_gradient(x)) @ kernel + bias


def adam(clip: Any = None, **changes: Any) -> optax.GradientTransformation:
    """The example's optimizer, but for the changes."""
    settings: dict[str, Any] = {"learning_rate": 1e-3, "b1": 0.9, "b2": 0.99, "eps": 1e-8} | changes
    return optax.chain(clip or optax.clip_by_global_norm(0.1), optax.adam(**settings))


def fault(name: str, plant: Plant, layer: str, cause: str, level: Level = "forward") -> Planted:
    return Planted(f"LSTM: {name}", "lstm", plant, layer, cause, level)


FAULTS = [
    fault("forget and cell gates exchanged", gates_in_order("igfo"), "lstm", "gate order"),
    fault("output gate before the cell's", gates_in_order("ifog"), "lstm", "gate order"),
    fault("1 added to the forget gate", function("split_gates", forget_bias_of_1), "lstm", "forget bias"),
    fault("one of the two biases alone", value("bias_sum", lambda ih_G, hh_G: ih_G), "lstm", "bias missing"),
    fault("the head's bias not added", value("nn.Dense", HeadWithoutBias), "head", "bias missing"),
    fault(
        "a gradient doubled before the head",
        value("nn.Dense", Doubled),
        "lstm|head|embed",
        "gradient scaled",
        "gradients",
    ),
    fault(
        "the inputs as targets",
        batch_loss(lambda *x: cross_entropy(*x).mean(), "inputs"),
        "loss",
        "label shift missing",
        "loss",
    ),
    fault(
        "the sum over time", batch_loss(lambda *x: cross_entropy(*x).sum(1).mean()), "loss", "loss reduction", "loss"
    ),
    fault("labels smoothed", batch_loss(lambda *x: smoothed(*x).mean()), "loss", "label smoothing", "loss"),
    fault("clip missing", optimizer(lambda m: adam(optax.identity())), "optimizer", "clip missing", "updates"),
    fault("each tensor clipped", optimizer(lambda m: adam(clip_each(0.1))), "optimizer", "clip per tensor", "updates"),
    fault("optax's beta2 0.999", optimizer(lambda m: adam(b2=0.999)), "optimizer", "optimizer betas", "updates"),
    fault(
        "epsilon inside the root",
        optimizer(lambda m: adam(eps=0.0, eps_root=1e-8)),
        "optimizer",
        "optimizer epsilon inside the root",
        "updates",
    ),
    fault(
        "no bias correction",
        optimizer(
            lambda m: optax.chain(
                optax.clip_by_global_norm(0.1), without_bias_correction(0.9, 0.99, 1e-8), optax.scale(-1e-3)
            )
        ),
        "optimizer",
        "bias correction missing",
        "updates",
    ),
]
