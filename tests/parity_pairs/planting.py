"""Faults of the kind that ports really have, planted in the JAX side, the converter or the optax side of each example.

Each names the level that must catch it, the torch module that the diagnosis must point to, and its cause.
"""

import dataclasses
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal
from unittest.mock import patch

import jax
import jax.numpy as jnp
import optax

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

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state[0], updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state[1], updates)
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
