"""Values are matched by their numbers, and the first that only one side computes is found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.parity import jaxprs
from jaxgpt.parity.graph import Value, first_departure, matches
from jaxgpt.parity.jax_side import precision_of

DRAW = np.random.default_rng(0)
A, B, C, D = (DRAW.standard_normal((3, 4)) for _ in range(4))


def values(*arrays, trained=True):
    """A chain: each value is computed from the one before it."""
    return [Value(i, "op", "", (i - 1,) if i else (), (), array, trained) for i, array in enumerate(arrays)]


def test_values_match_in_any_layout():
    assert matches(values(A, B), values(B.T, A.reshape(2, 6))) == {0: 1, 1: 0}
    assert matches(values(A), values(A + 1e-6)) == {}


def test_the_first_value_that_nothing_equal_follows_departs():
    assert first_departure(values(A, B, C), {0, 1, 2}) is None
    assert first_departure(values(A, B, C), {0}).index == 1
    # B has no equal, but what follows from it has: the programs group their operations in different ways.
    assert first_departure(values(A, B, C, D), {0, 2}).index == 3
    assert first_departure(values(A, B, trained=False), {0}) is None


def test_masked_scores_are_compared_by_those_that_are_not_masked():
    masked = np.where(np.tri(3, 4, dtype=bool), A[:3], -1e30)
    other = np.where(np.tri(3, 4, dtype=bool), A[:3] + 1e-3, -1e30)
    assert matches(values(masked), values(masked.T)) == {0: 0}
    assert matches(values(masked), values(other)) == {}


def test_float32_is_lifted_and_constants_are_what_the_source_says():
    def norm(x):
        x32 = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.square(x32).mean() + np.float32(1e-5)).astype(x.dtype)

    with precision_of("float64"):
        x = jnp.asarray(A)
        expected = A / np.sqrt(np.square(A).mean() + 1e-5)
        assert abs(norm(x) - expected).max() > 1e-10
        assert abs(jaxprs.lifted(norm, x)(x) - expected).max() < 1e-15
        found = jaxprs.record(norm, (x,), ["x"])
    assert "(test_float32_is_lifted" not in found[0].where and "(norm)" in found[0].where
    assert all(value.trained for value in found)


def test_loops_and_branches_are_lifted_and_recorded():
    def program(x):
        carry, rows = jax.lax.scan(lambda c, row: (c + row.astype(jnp.float32), c.sum()), x[0] * 0, x)
        carry = jax.lax.fori_loop(0, 3, lambda i, c: c * 1.1, carry)
        return jax.lax.cond(carry.sum() > 0, lambda c: c * 2, lambda c: -c, carry).sum() + rows.sum()

    with precision_of("float64"):
        x = jnp.asarray(A)
        carried = A.sum(0) * 1.1**3
        expected = np.where(carried.sum() > 0, 2 * carried, -carried).sum() + np.cumsum(A.sum(1))[:-1].sum()
        assert abs(jax.jit(jaxprs.lifted(program, x))(x) - expected) < 1e-13
        found = jaxprs.record(program, (x,), ["x"])
    assert abs(found[-1].array - expected) < 1e-13


def fft(x):
    return jnp.abs(jnp.fft.rfft(x.astype(jnp.float32))).sum()


def callback(x):
    host = lambda y: np.tanh(y)  # noqa: E731
    return jax.pure_callback(host, jax.ShapeDtypeStruct(x.shape, jnp.float32), x.astype(jnp.float32)).sum()


def no_steps(x):
    return jax.lax.scan(lambda c, row: (c + row, row), x[0], x[:0].astype(jnp.float32).astype(x.dtype))[0].sum()


def bits(x):
    raised = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32) + 0
    return jax.lax.bitcast_convert_type(raised, jnp.float32).sum()


def reduced(x):
    return jax.lax.reduce(x.astype(jnp.float32), np.float32(0), lambda a, b: a + b, (0, 1))


@pytest.mark.parametrize("function", [fft, callback, no_steps, bits, reduced])
def test_programs_that_cannot_be_lifted_run_as_they_were_traced(function):
    with precision_of("float64"):
        x = jnp.asarray(A)
        assert abs(jax.jit(jaxprs.lifted(function, x))(x) - function(x)) < 1e-5 * abs(function(x))
        assert jaxprs.record(function, (x,), ["x"])[-1].array.shape == ()
