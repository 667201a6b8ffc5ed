"""LayerNorm and GELU with custom VJPs that make few passes over memory."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import erf, optimization_barrier, platform_dependent, rsqrt


def fusion_barrier(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    """On a CPU, materialises the arrays before any operation that uses them; elsewhere returns them as they are.

    The platform is the one that the program is compiled for, not that of the process. XLA's CPU backend emits one loop
    for each array that it keeps, and recomputes in each loop what several of them share: a row's mean and variance,
    even erf. That costs a tenth of a step (docs/speed-log.md). XLA's backends for accelerators fuse such expressions
    into one kernel.
    """
    return platform_dependent(*arrays, cpu=lambda *arrays: optimization_barrier(arrays), default=lambda *arrays: arrays)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: Array, scale_C: Array, bias_C: Array | None, epsilon: float) -> Array:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis of x [..., C], in x's dtype.

    As `torch.nn.functional.layer_norm` does, the variance divides by C, not C - 1, and takes two passes
    (E[x^2] - E[x]^2 cancels).

    Args:
        bias_C: None for a norm without one.
    """
    return _layer_norm_fwd(x, scale_C, bias_C, epsilon)[0]


def _layer_norm_fwd(x: Array, scale_C: Array, bias_C: Array | None, epsilon: float) -> tuple[Array, tuple[Any, ...]]:
    (mean,) = fusion_barrier((x.mean(-1, keepdims=True),))
    mean, rstd = fusion_barrier((mean, rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + epsilon)))
    scaled = (x - mean) * rstd * scale_C
    return scaled if bias_C is None else scaled + bias_C, (x, mean, rstd, scale_C, bias_C)


def _layer_norm_bwd(epsilon: float, residuals: tuple[Any, ...], grad: Array) -> tuple[Array, Array, Array | None]:
    """With n = (x - mean) * rstd and g = grad * scale: rstd (g - mean(g) - n mean(g n)), and the sums over rows."""
    x, mean, rstd, scale_C, bias_C = residuals
    normal = (x - mean) * rstd
    g = grad * scale_C
    mean_g, mean_gn = fusion_barrier((g.mean(-1, keepdims=True), (g * normal).mean(-1, keepdims=True)))
    rows = tuple(range(grad.ndim - 1))
    grad_bias = None if bias_C is None else grad.sum(rows)
    return rstd * (g - mean_g - normal * mean_gn), (grad * normal).sum(rows), grad_bias


layer_norm.defvjp(_layer_norm_fwd, _layer_norm_bwd)


def gelu(x: Array, kind: str) -> Array:
    """GELU of x, elementwise, in x's dtype.

    Args:
        kind: "erf" for the exact x Phi(x), "tanh" for GPT-2's approximation.
    """
    return jax.nn.gelu(x, approximate=True) if kind == "tanh" else _exact_gelu(x)


@jax.custom_vjp
def _exact_gelu(x: Array) -> Array:
    """x Phi(x), computed from erf as PyTorch does; its derivative is Phi(x) + x phi(x).

    `jax.nn.gelu` takes erfc, whose tail costs a second polynomial, and the derivative of JAX's erf splits its
    exponential in two, for digits that the sum drops. Both cost a tenth of the MLP's time on a CPU (docs/speed-log.md).
    """
    return x * _normal_cdf(x)


def _normal_cdf(x: Array) -> Array:
    return 0.5 * (1 + erf(x * math.sqrt(0.5)))


def _exact_gelu_fwd(x: Array) -> Any:
    """The value, and as residual the derivative."""
    cdf = _normal_cdf(x)
    return fusion_barrier((x * cdf, cdf + x * jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)))


_exact_gelu.defvjp(_exact_gelu_fwd, lambda slope, grad: (slope * grad,))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def recomputed(function: Callable[[Array], Array], x: Array) -> Array:
    """function(x), elementwise, of which the backward pass saves x alone and recomputes the rest.

    It pays where x is narrower than what the function computes with. `jax.checkpoint` would also put a barrier before
    the incoming gradient, which then takes one more pass over memory.
    """
    return function(x)


def _recomputed_bwd(function: Callable[[Array], Array], x: Array, grad: Array) -> tuple[Array]:
    (x,) = optimization_barrier((x,))  # else XLA finds the forward pass's values, and keeps them
    return jax.vjp(function, x)[1](grad)


recomputed.defvjp(lambda function, x: (function(x), x), _recomputed_bwd)
