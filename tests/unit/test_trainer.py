"""The trainer's own arithmetic."""

import math

import numpy as np
import pytest

from jaxgpt.trainer import _all_finite


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_values_that_are_not_finite_are_found(dtype):
    values = np.random.default_rng(0).standard_normal((30, 40)).astype(dtype)
    assert _all_finite(values)
    for bad in (math.nan, math.inf, -math.inf):
        spoilt = values.copy()
        spoilt[17, 5] = bad
        assert not _all_finite(spoilt), bad


def test_infinities_that_cancel_are_found():
    assert not _all_finite(np.array([math.inf, 1.0, -math.inf]))


def test_a_sum_that_overflows_is_no_infinity():
    assert _all_finite(np.full(10, np.finfo(np.float32).max))
    assert _all_finite(np.int32(7))
