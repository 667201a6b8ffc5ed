"""Comparisons that cannot pass by accident, and the row of the table that each leaves.

Before two arrays are compared, their shapes, dtypes and finiteness are checked, and that the reference is not near zero
everywhere. A refused comparison counts as an infinite error.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np


class Refused(AssertionError):
    """Two arrays that must not be compared; the message says why."""


@dataclass(frozen=True)
class Row:
    """One comparison and its tolerance."""

    check: str
    precision: str
    case: str
    tolerance: float
    error: float | None = None  # ours: against PyTorch in float64 rows, against the float64 truth in rows with R
    torch_error: float | None = None  # PyTorch's own, against the same truth
    ratio: float | None = None  # R = error / torch_error
    note: str = ""
    not_run: bool = False

    @property
    def value(self) -> float:
        """What is held against the tolerance: R where there is one, else the error. NaN counts as infinite."""
        value = self.error if self.ratio is None else self.ratio
        return math.inf if value is None or math.isnan(value) else value

    @property
    def signal(self) -> float:
        """The value in units of its tolerance: above 1 the row has failed."""
        return 0.0 if self.value == 0 else self.value / self.tolerance if self.tolerance else math.inf

    @property
    def status(self) -> str:
        """ "passed", "FAILED" or "not run"."""
        return "not run" if self.not_run else "passed" if self.value <= self.tolerance else "FAILED"

    def to_json(self) -> dict[str, Any]:
        """The row with its margin (tolerance / value; None for a value of 0) and its status; infinities as text."""
        margin = None if self.not_run or self.value == 0 else self.tolerance / self.value
        row = asdict(self) | {"margin": margin, "status": self.status}
        return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Row":
        """The inverse of `to_json`."""
        numbers = ("tolerance", "error", "torch_error", "ratio")
        known: dict[str, Any] = {f.name: values[f.name] for f in fields(cls)}
        for name in numbers:
            if isinstance(known[name], str):
                known[name] = float(known[name])
        return cls(**known)


def checked(ours: Any, reference: Any, floor: float = 1e-6) -> tuple[np.ndarray, np.ndarray]:
    """Both arrays in float64.

    Args:
        floor: a reference whose root mean square is not above this is refused: it would test nothing.

    Raises:
        Refused: other shape or dtype, a value that is not finite, or a reference near zero everywhere.
    """
    ours, reference = np.asarray(ours), np.asarray(reference)
    if ours.shape != reference.shape:
        raise Refused(f"shape {ours.shape}, reference {reference.shape}")
    if ours.dtype != reference.dtype:
        raise Refused(f"dtype {ours.dtype}, reference {reference.dtype}")
    ours, reference = ours.astype(np.float64), reference.astype(np.float64)
    if not np.isfinite(ours).all():
        raise Refused("not finite")
    if not np.isfinite(reference).all():
        raise Refused("the reference is not finite")
    if not rms(reference) > floor:
        raise Refused(f"the reference is near zero everywhere (root mean square {rms(reference):.0e})")
    return ours, reference


def rms(a: np.ndarray) -> float:
    """The root mean square; 0 of an empty array."""
    return float(np.sqrt(np.mean(np.square(a)))) if a.size else 0.0


def relative_l2(ours: Any, reference: Any, floor: float = 1e-6) -> float:
    """||ours - reference|| / ||reference||. Raises `Refused`."""
    ours, reference = checked(ours, reference, floor)
    return rms(ours - reference) / rms(reference)


def max_abs(ours: Any, reference: Any, floor: float = 1e-6) -> float:
    """The largest |ours - reference|. Raises `Refused`."""
    ours, reference = checked(ours, reference, floor)
    return float(np.abs(ours - reference).max())


def own_errors(ours: Any, torch: Any, truth: Any, floor: float = 1e-6) -> tuple[float, float]:
    """RMSE of ours and of PyTorch's against a float64 truth, for R = the first / the second. Raises `Refused`."""
    truth = np.asarray(truth)
    if truth.dtype != np.float64:
        raise Refused(f"a truth in {truth.dtype}")
    ours, torch = checked(ours, torch, floor)
    checked(truth, truth, floor)
    if truth.shape != ours.shape:
        raise Refused(f"shape {ours.shape}, truth {truth.shape}")
    return rms(ours - truth), rms(torch - truth)


def ratio(errors: tuple[float, float]) -> float:
    """R of (our error, PyTorch's own); 0 where both are exact, infinite where only PyTorch is."""
    ours, torch = errors
    return 0.0 if ours == 0 else ours / torch if torch else math.inf


def worst_tensor(
    ours: Mapping[str, Any], reference: Mapping[str, Any], precision: str, floor: float = 1e-6
) -> tuple[float, str]:
    """The largest relative L2 error over the reference's tensors, and its name with the reason if it was refused.

    Args:
        ours: tensors of the precision's dtype (bfloat16: float32, as its parameters are).
        reference: tensors of the same or a higher precision; they are rounded to that dtype before the comparison.
    """
    assert reference, "nothing to compare"
    dtype = np.dtype("float64" if precision == "float64" else "float32")
    largest, where = 0.0, ""
    for name, tensor in reference.items():
        try:
            if name not in ours:
                raise Refused("missing")
            if np.asarray(ours[name]).dtype != dtype:
                raise Refused(f"dtype {np.asarray(ours[name]).dtype}, not {dtype}")
            error = relative_l2(ours[name], tensor.astype(dtype), floor)
        except Refused as e:
            return math.inf, f"refused: {name}: {e}"
        if error > largest:
            largest, where = error, name
    return largest, where


def tensor_ratios(
    ours: Mapping[str, Any], torch: Mapping[str, Any], truth: Mapping[str, Any], floor: float = 1e-6
) -> dict[str, float]:
    """R of each tensor of the truth, by name; infinite for a refused one."""
    ratios = {}
    for name, tensor in truth.items():
        try:
            ratios[name] = ratio(own_errors(ours[name], torch[name], tensor, floor))
        except Refused:
            ratios[name] = math.inf
    return ratios
