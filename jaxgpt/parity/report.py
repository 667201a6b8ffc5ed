"""A suite's rows and its mutants as text, Markdown and JSON."""

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

from jaxgpt.parity.harness import Row
from jaxgpt.parity.tolerances import RAISED, Tolerances

COLUMNS = ("check", "precision", "worst case of", "error", "PyTorch's own", "R", "tolerance", "margin", "")
MUTANT_COLUMNS = ("mutant", "caught by", "in the row", "signal", "signal of other probes")
SURVIVES = "SURVIVES"


def environment(packages: Sequence[str]) -> dict[str, str]:
    """The versions of Python and the packages, and the device that JAX takes."""
    import jax

    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found | {"device": str(jax.devices()[0].device_kind), "machine": platform.machine()}


def worst_rows(rows: Iterable[Row]) -> list[tuple[Row, int]]:
    """For each check and precision the row nearest to its tolerance, and how many rows there are; in their order."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.check, row.precision), []).append(row)
    return [(max(group, key=lambda r: (not r.not_run, r.signal)), len(group)) for group in groups.values()]


def cells(row: Row, count: int) -> tuple[str, ...]:
    """A row of the table as text, one cell for each of COLUMNS."""
    case = row.case if count == 1 else f"{count}: {row.case}"
    if row.not_run:
        return (row.check, row.precision, case, "", "", "", _number(row.tolerance), "", f"not run: {row.note}")
    margin = row.to_json()["margin"]
    status = row.status if row.status == "passed" or not row.note else f"{row.status}: {row.note}"
    return (
        row.check,
        row.precision,
        case,
        _number(row.error),
        _number(row.torch_error),
        _number(row.ratio),
        _number(row.tolerance),
        "exact" if margin is None else f"{margin:.3g}x" if row.value < math.inf else "",
        status,
    )


def table(rows: Iterable[Row]) -> str:
    """The table for a terminal: for each check and precision the worst row."""
    return columns([COLUMNS, *(cells(row, count) for row, count in worst_rows(rows))])


def columns(lines: Sequence[tuple[str, ...]]) -> str:
    """Lines of cells, aligned; the last column is not padded."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]) - 1)]
    padded = ([*(text.ljust(width) for text, width in zip(line, widths, strict=False)), line[-1]] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in padded)


def markdown(rows: Iterable[Sequence[str]], columns: Sequence[str]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def mutant_cells(name: str, rows: Mapping[str, Row], is_caught: bool) -> tuple[str, ...]:
    """A mutant's line as text, one cell for each of MUTANT_COLUMNS."""
    (first, row), *others = rows.items()
    also = ", ".join(f"{probe} {_signal(other)}" for probe, other in others)
    return (name, first, f"{row.check} ({row.precision})" if is_caught else SURVIVES, _signal(row), also)


def suite_json(
    rows: Iterable[Row], seconds: float, quick: bool, tolerances: Tolerances, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Everything that one run of a suite found."""
    return {
        "environment": dict(environment),
        "quick": quick,
        "seconds": round(seconds, 1),
        "rows": [row.to_json() for row in rows],
        "reasons": {f"{check}, {precision}": t.reason for (check, precision), t in tolerances.items()},
    }


def _signal(row: Row) -> str:
    if row.signal == math.inf:
        return "raised" if row.check == RAISED else "refused" if "refused" in row.note else "infinite"
    return f"{row.signal:.2g}"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return "refused" if value == math.inf else "0" if value == 0 else f"{value:.2g}"
