"""A small pair of models: embedding, LayerNorm, square and other Linear layers, GELU, a residual, AdamW with a clip."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from torch import nn

from jaxgpt.parity import Pair

V, C = 11, 8


class TorchModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(V, C), nn.LayerNorm(C)
        self.inner, self.head = nn.Linear(C, C), nn.Linear(C, V)

    def forward(self, idx_BT):
        x_BTC = self.embed(idx_BT)
        return self.head(x_BTC + nn.functional.gelu(self.inner(self.norm(x_BTC))))


def torch_loss(model, batch):
    return nn.functional.cross_entropy(model(batch["inputs"]).view(-1, V), batch["targets"].view(-1))


def logits(p, idx_BT, epsilon=1e-5, inner=lambda w: w, approximate=False):
    x_BTC = p["embed"][idx_BT]
    centred = x_BTC - x_BTC.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + epsilon) * p["norm"]["scale"] + p["norm"]["bias"]
    hidden = normed @ inner(p["inner"]["kernel"]) + p["inner"]["bias"]
    return (x_BTC + jax.nn.gelu(hidden, approximate=approximate)) @ p["head"]["kernel"] + p["head"]["bias"]


def loss_with(**changes):
    def loss(p, batch):
        of = optax.softmax_cross_entropy_with_integer_labels
        return of(logits(p, batch["inputs"], **changes), batch["targets"]).mean()

    return loss


def to_params(state: dict[str, np.ndarray]) -> Any:
    return {
        "embed": state["embed.weight"],
        "norm": {"scale": state["norm.weight"], "bias": state["norm.bias"]},
        "inner": {"kernel": state["inner.weight"].T, "bias": state["inner.bias"]},
        "head": {"kernel": state["head.weight"].T, "bias": state["head.bias"]},
    }


def optimizer(learning_rate: float = 1e-3) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(learning_rate, weight_decay=0.1))


def batch(rng):
    return {name: rng.integers(0, V, (3, 5)) for name in ("inputs", "targets")}


PAIR = Pair(
    torch_model=TorchModel,
    torch_loss=torch_loss,
    jax_loss=loss_with(),
    batch=batch,
    to_params=to_params,
    torch_logits=lambda model, batch: model(batch["inputs"]),
    jax_logits=lambda p, batch: logits(p, batch["inputs"]),
    torch_optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1),
    optax_optimizer=optimizer(),
    clip=0.1,
    n_updates=4,
    name="small",
)


def changed(**fields: Any) -> Pair:
    """The pair with other fields."""
    return dataclasses.replace(PAIR, **fields)


def without_extras(**fields: Any) -> Pair:
    """The pair without output and optimizers: less to compile."""
    nothing = {"torch_logits": None, "jax_logits": None, "torch_optimizer": None, "optax_optimizer": None, "clip": None}
    return changed(**{**nothing, **fields})
