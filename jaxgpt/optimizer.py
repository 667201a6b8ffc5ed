"""The learning-rate schedule, the decay mask, and the update rule, assembled from optax."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxgpt.config import OptimizerConfig
from jaxgpt.model.gpt import Params

NORM_WARMUP = 25  # --skip-spikes: updates whose gradient norms are averaged before any is compared
NORM_DECAY = 0.97  # --skip-spikes: of the exponential moving average of the norms after these


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """The learning rate of update `step`, counted from 0, in double precision: the one definition of all schedules.

    A skipped update is not counted.

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


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """The optimizer: clipping by global norm, then AdamW, Adam or SGD as torch.optim defines them.

    Its `update` takes the loss as `value`, by which --on-nonfinite skip decides, and the gradients' global norm as
    `grad_norm` (default: that of the gradients given, which on a device with shards of them is not the whole one).
    """
    optimizer = optax.chain(
        clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        _update_rule(config, optax_schedule(config)),
    )
    optimizer = optax.with_extra_args_support(optimizer)
    return skip_updates(config, optimizer) if config.skips_updates else optimizer


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm` that takes the norm as `grad_norm`: from `max_norm` on, g / norm * max_norm."""

    def update(
        updates: Any, state: Any, params: Any = None, *, grad_norm: Array | None = None, **_: Any
    ) -> tuple[Any, Any]:
        norm = optax.tree.norm(updates) if grad_norm is None else grad_norm
        clipped = jax.tree.map(lambda g: jnp.where(norm < max_norm, g, g / norm.astype(g.dtype) * max_norm), updates)
        return clipped, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


class SkipState(NamedTuple):
    """The state of `skip_updates`: int32 scalars, the running mean, and the optimizer's own state."""

    applied: Array  # updates applied
    skipped: Array  # updates skipped
    in_a_row: Array  # updates skipped since the last one that was applied
    norm_mean: Array  # running mean of the applied updates' gradient norms, before the clip
    optimizer: Any


def skip_updates(
    config: OptimizerConfig, optimizer: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that skips updates: parameters and the optimizer's state stay as they are, bit for bit.

    So the schedule and Adam's bias correction count only the updates applied, as in `optax.apply_if_finite` and
    Megatron-LM. It skips an update

    - with --on-nonfinite skip: if the loss or the gradients' global norm is NaN or infinite;
    - with --skip-spikes: if that norm exceeds the factor times the running mean of the norms before it. The mean is
      ZClip's (arXiv:2504.02507): the plain mean of the first 25 norms, and from then on an exponential moving average,
      0.97 mean + 0.03 norm. A skipped norm does not enter it, and of the first 25 none is compared.
    """

    def init(params: Any) -> SkipState:
        applied, skipped, in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))
        norm_mean = jnp.zeros((), jnp.result_type(*params.values()))
        return SkipState(applied, skipped, in_a_row, norm_mean, optimizer.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, SkipState]:
        loss, norm = extra_args["value"], extra_args.get("grad_norm")
        norm = optax.tree.norm(updates) if norm is None else norm
        skip = jnp.zeros((), bool)
        if config.on_nonfinite == "skip":
            skip |= ~(jnp.isfinite(loss) & jnp.isfinite(norm))
        if config.skip_spikes:
            skip |= (state.applied >= NORM_WARMUP) & (norm > config.skip_spikes * state.norm_mean)
        in_warmup, n_norms = state.applied < NORM_WARMUP, (state.applied + 1).astype(norm.dtype)
        weight = jnp.where(in_warmup, 1 / n_norms, 1 - NORM_DECAY)
        updates, optimizer_state = optimizer.update(updates, state.optimizer, params, grad_norm=norm)
        applied = SkipState(
            state.applied + 1,
            state.skipped,
            jnp.zeros_like(state.in_a_row),
            state.norm_mean + weight * (norm - state.norm_mean),
            optimizer_state,
        )
        skipped = state._replace(skipped=state.skipped + 1, in_a_row=state.in_a_row + 1)
        # Minus zero: x + -0.0 is x for every x, while -0.0 + 0.0 is 0.0.
        updates = jax.tree.map(lambda u: jnp.where(skip, jnp.full_like(u, -0.0), u), updates)
        return updates, jax.tree.map(lambda new, old: jnp.where(skip, old, new), applied, skipped)

    return optax.GradientTransformationExtraArgs(init, update)


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
