"""The learning-rate schedule, the decay mask, and the update rule, assembled from optax."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxgpt.config import OptimizerConfig
from jaxgpt.model.gpt import Params


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """The learning rate of update `step`, counted from 0, in double precision: the one definition of all schedules.

    constant: lr. cosine: min_lr + (lr - min_lr) (1 + cos(pi step / end)) / 2, as torch's CosineAnnealingLR stepped
    after every update; min_lr after the end. warmup-cosine: lr * step / warmup_steps (0 at step 0), then the cosine
    from there to the end.
    """
    if config.schedule == "constant":
        return config.lr
    warmup = config.warmup_steps if config.schedule == "warmup-cosine" else 0
    if step < warmup:
        return config.lr * step / warmup
    if step >= config.cosine_end:
        return config.min_lr
    progress = (step - warmup) / (config.cosine_end - warmup)
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress))


def optax_schedule(config: OptimizerConfig) -> optax.Schedule:
    """`learning_rate` as an optax schedule: a table, because a float32 cosine on the device would differ from it."""
    if config.schedule == "constant":
        return optax.constant_schedule(config.lr)
    last = min(config.steps, config.cosine_end)
    table = np.array([learning_rate(config, step) for step in range(last + 1)])
    return lambda count: jnp.asarray(table)[jnp.minimum(count, last)]


def decay_mask(params: Params, which: str) -> dict[str, bool]:
    """Which parameters have weight decay, by name.

    Args:
        which: "all", or "matrices" for those of two or more dimensions that belong to no norm.
    """
    return {
        name: which == "all" or (p.ndim >= 2 and not any(part.startswith("ln") for part in name.split(".")))
        for name, p in params.items()
    }


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The optimizer: clipping by global norm, then AdamW, Adam or SGD as torch.optim defines them."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        _update_rule(config, optax_schedule(config)),
    )


def _update_rule(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    def mask(params: Params) -> dict[str, bool]:
        return decay_mask(params, config.decay_mask)

    decay = optax.add_decayed_weights(config.decay, mask)
    if config.optimizer == "sgd":
        return optax.chain(decay, optax.sgd(schedule, config.momentum or None))
    adam = scale_by_adam(config.beta1, config.beta2, config.eps)
    transforms = (adam, decay) if config.optimizer == "adamw" else (decay, adam)
    return optax.chain(*transforms, optax.scale_by_learning_rate(schedule))


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with the bias corrections 1 - b^t to float32's full precision.

    optax rounds b2 = 0.999 to float32 before it subtracts. At t = 1 the correction is off by 1.3e-5 and the update by
    some hundred units in its last place; PyTorch corrects in double precision and is off by two (docs/parity.md). Here
    1 - b^t = -expm1(t log b), with log b computed in double precision.
    """

    def correction(b: float, count: Any) -> Array:
        return -jnp.expm1(count * math.log(b)) if b else jnp.ones(())

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, updates)
        c1, c2 = correction(b1, count), correction(b2, count)
        scaled = jax.tree.map(lambda m, v: (m / c1) / (jnp.sqrt(v / c2) + eps), mu, nu)
        return scaled, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(optax.scale_by_adam(b1, b2, eps).init, update)
