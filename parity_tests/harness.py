"""Comparisons that cannot pass by accident, and what a comparison leaves behind: a row of the table.

Before anything is compared, shape, dtype and finiteness are checked, and that the reference is not near zero
everywhere. What is refused counts as an infinite error.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from parity_tests.tolerances import TOLERANCES


class Refused(AssertionError):
    """Two arrays that must not be compared; the message says why."""


@dataclass(frozen=True)
class Row:
    """One comparison against its gate."""

    rung: str  # a key of TOLERANCES
    precision: str
    case: str
    error: float | None = None  # ours: against PyTorch in float64 rows, against the float64 truth in rows with R
    torch_error: float | None = None  # PyTorch's own, against the same truth
    ratio: float | None = None  # R = error / torch_error
    note: str = ""
    not_run: bool = False

    @property
    def gate(self) -> float:
        return TOLERANCES[self.rung, self.precision].gate

    @property
    def value(self) -> float:
        """What is held against the gate: R where there is one, else the error."""
        value = self.error if self.ratio is None else self.ratio
        return math.inf if value is None or math.isnan(value) else value

    @property
    def signal(self) -> float:
        """The value in units of its gate: above 1 the row has failed."""
        return 0.0 if self.value == 0 else self.value / self.gate if self.gate else math.inf

    @property
    def status(self) -> str:
        return "not run" if self.not_run else "passed" if self.value <= self.gate else "FAILED"

    def to_json(self) -> dict[str, Any]:
        """The row with its gate, its headroom (gate / value) and its status; infinities as text."""
        headroom = None if self.not_run or self.value == 0 else self.gate / self.value
        row = asdict(self) | {"gate": self.gate, "headroom": headroom, "status": self.status}
        return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


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
    """The root mean square."""
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
    """R; 0 where both are exact, infinite where only PyTorch is."""
    ours, torch = errors
    return 0.0 if ours == 0 else ours / torch if torch else math.inf


def error_row(rung: str, precision: str, case: str, error: Callable[[], float], note: str = "") -> Row:
    """A row of an error against its gate."""
    try:
        return Row(rung, precision, case, float(error()), note=note)
    except Refused as e:
        return Row(rung, precision, case, math.inf, note=f"refused: {e}")


def ratio_row(rung: str, precision: str, case: str, errors: Callable[[], tuple[float, float]], note: str = "") -> Row:
    """A row of R against its gate, from our error and PyTorch's own."""
    try:
        ours, torch = errors()
        return Row(rung, precision, case, ours, torch, ratio((ours, torch)), note)
    except Refused as e:
        return Row(rung, precision, case, math.inf, ratio=math.inf, note=f"refused: {e}")


def worst_tensor(
    ours: Mapping[str, Any], reference: Mapping[str, Any], precision: str, floor: float = 1e-6
) -> tuple[float, str]:
    """The largest relative L2 error over the reference's tensors, and its name with the reason if it was refused.

    Ours must be of the precision's dtype (bfloat16: float32, as its parameters are). The reference may be of higher
    precision: it is rounded to that dtype before it is compared.
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
    """R of each named tensor; infinite for one that is refused."""
    ratios = {}
    for name, tensor in truth.items():
        try:
            ratios[name] = ratio(own_errors(ours[name], torch[name], tensor, floor))
        except Refused:
            ratios[name] = math.inf
    return ratios
