"""LayerNorm and GELU with ways back of their own, in few passes over memory."""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import erf, optimization_barrier, rsqrt

EPSILON = 1e-5  # PyTorch's default, and the write-ups'


def apart(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    """The arrays, computed once and written down before anything that uses them; on CPU alone.

    There XLA makes one loop of each array that it keeps, and computes again in each what several of them need: a row's
    mean and spread, even erf. It costs a tenth of a step (docs/benchmarks.md). Accelerators make one kernel of it all.
    """
    return optimization_barrier(arrays) if jax.default_backend() == "cpu" else arrays


@jax.custom_vjp
def layer_norm(x: Array, scale_C: Array, bias_C: Array) -> Array:
    """(x - mean) / sqrt(variance + 1e-5) * scale + bias over the last axis of x [..., C], in x's dtype.

    As PyTorch's: the variance over C, not C - 1, and in two passes (E[x^2] - E[x]^2 cancels).
    """
    return _layer_norm(x, scale_C, bias_C)[0]


def _layer_norm(x: Array, scale_C: Array, bias_C: Array) -> tuple[Array, tuple[Array, ...]]:
    (mean,) = apart((x.mean(-1, keepdims=True),))
    mean, factor = apart((mean, rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + EPSILON)))
    return (x - mean) * factor * scale_C + bias_C, (x, mean, factor, scale_C)


def _layer_norm_back(kept: tuple[Array, ...], grad: Array) -> tuple[Array, Array, Array]:
    """With n = (x - mean) * factor and g = grad * scale: factor (g - mean(g) - n mean(g n)), and the sums over rows."""
    x, mean, factor, scale_C = kept
    normal = (x - mean) * factor
    g = grad * scale_C
    mean_g, mean_gn = apart((g.mean(-1, keepdims=True), (g * normal).mean(-1, keepdims=True)))
    rows = tuple(range(grad.ndim - 1))
    return factor * (g - mean_g - normal * mean_gn), (grad * normal).sum(rows), grad.sum(rows)


layer_norm.defvjp(_layer_norm, _layer_norm_back)


def gelu(x: Array, kind: str) -> Array:
    """ "erf": x Phi(x), the exact one. "tanh": GPT-2's approximation."""
    return jax.nn.gelu(x, approximate=True) if kind == "tanh" else _exact_gelu(x)


@jax.custom_vjp
def _exact_gelu(x: Array) -> Array:
    """x Phi(x), computed from erf as in PyTorch; its derivative is Phi(x) + x phi(x).

    `jax.nn.gelu` takes erfc, whose tail costs a second polynomial, and the derivative of JAX's erf an exponential in
    two parts, for digits that are lost in the sum: a tenth of the time of the whole MLP on CPU (docs/benchmarks.md).
    """
    return x * _normal_cdf(x)


def _normal_cdf(x: Array) -> Array:
    return 0.5 * (1 + erf(x * math.sqrt(0.5)))


def _gelu_and_slope(x: Array) -> tuple[Array, Array]:
    cdf = _normal_cdf(x)
    return apart((x * cdf, cdf + x * jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)))


_exact_gelu.defvjp(_gelu_and_slope, lambda slope, grad: (slope * grad,))
