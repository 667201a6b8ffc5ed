"""The comparison itself fails where it must."""

import numpy as np
import pytest

from parity_tests.harness import relative_l2

A = np.ones((2, 3))


@pytest.mark.parametrize(
    "ours, reference",
    [(A, A.T), (A.astype(np.float32), A), (A * np.nan, A), (A, A * np.inf), (A * 0, A * 0), (A, A * 1e-9)],
)
def test_refuses(ours, reference):
    with pytest.raises(AssertionError):
        relative_l2(ours, reference)


def test_measures():
    assert relative_l2(A, A) == 0 and relative_l2(A * 1.1, A) == pytest.approx(0.1)
