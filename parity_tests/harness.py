"""Comparisons that cannot pass by accident: they refuse wrong shapes, wrong dtypes, NaN, and a reference of zeros."""

import numpy as np


def relative_l2(ours: np.ndarray, reference: np.ndarray) -> float:
    """||ours - reference|| / ||reference||, both float64 after the checks.

    Raises:
        AssertionError: other shape or dtype, a value that is not finite, or a reference that is near zero everywhere.
    """
    ours, reference = np.asarray(ours), np.asarray(reference)
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    assert ours.dtype == reference.dtype, (ours.dtype, reference.dtype)
    assert np.isfinite(ours).all() and np.isfinite(reference).all(), "not finite"
    norm = np.linalg.norm(reference.astype(np.float64))
    assert norm > 1e-6 * np.sqrt(reference.size), "the reference is near zero: nothing is compared"
    return float(np.linalg.norm(ours.astype(np.float64) - reference) / norm)
