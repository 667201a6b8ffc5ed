"""The table of tolerances: what each check is held against, why, and how near to it a machine has come."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from jaxgpt.parity.harness import Refused, Row, ratio

RAISED = "raised an error"  # the check of a row for a check that raised
NOTHING_MAY_RAISE = 0.0


@dataclass(frozen=True)
class Tolerance:
    """The largest value that passes. `measured` is the worst value seen, None where no machine has run it yet."""

    value: float
    measured: float | None
    reason: str

    @property
    def margin(self) -> float | None:
        """How many times the measured value fits into the tolerance; None for 0 or nothing measured."""
        return self.value / self.measured if self.measured else None


class Tolerances(dict[tuple[str, str], Tolerance]):
    """Tolerances by (check, precision); makes the rows that are held against them. An unknown check is a `KeyError`."""

    def row(
        self,
        check: str,
        precision: str,
        case: str,
        error: float | None = None,
        torch_error: float | None = None,
        ratio: float | None = None,
        note: str = "",
        not_run: bool = False,
    ) -> Row:
        """A row of values that are known; arguments as the fields of `Row`."""
        tolerance = self[check, precision].value
        return Row(check, precision, case, tolerance, error, torch_error, ratio, note, not_run)

    def error_row(self, check: str, precision: str, case: str, error: Callable[[], float], note: str = "") -> Row:
        """The row of an error; infinite, with the reason, if the comparison is refused."""
        try:
            return self.row(check, precision, case, float(error()), note=note)
        except Refused as e:
            return self.row(check, precision, case, math.inf, note=f"refused: {e}")

    def ratio_row(
        self, check: str, precision: str, case: str, errors: Callable[[], tuple[float, float]], note: str = ""
    ) -> Row:
        """The row of R, from (our error, PyTorch's own); infinite, with the reason, if the comparison is refused."""
        try:
            ours, torch = errors()
            return self.row(check, precision, case, ours, torch, ratio((ours, torch)), note)
        except Refused as e:
            return self.row(check, precision, case, math.inf, ratio=math.inf, note=f"refused: {e}")


def raised_row(case: str, error: Exception) -> Row:
    """The failed row of what raised instead of giving rows."""
    reason = (str(error).splitlines() or [""])[0][:120]
    return Row(RAISED, "any", case, NOTHING_MAY_RAISE, math.inf, note=f"{type(error).__name__}: {reason}")
