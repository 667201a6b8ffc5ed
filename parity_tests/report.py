"""What the ladder says, as text, JSON, a picture, and docs/parity.md."""

import json
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt import run_folder
from jaxgpt.errors import UserError
from parity_tests.harness import Row
from parity_tests.tolerances import TOLERANCES

COLUMNS = ("rung", "precision", "worst case of", "error", "PyTorch's own", "R", "gate", "headroom", "")


def environment() -> dict[str, str]:
    """Versions and the device."""
    import jax

    names = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "numpy")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found | {"device": str(jax.devices()[0].device_kind), "machine": platform.machine()}


def worst_rows(rows: Iterable[Row]) -> list[tuple[Row, int]]:
    """Of every gate the row nearest to it, and how many there were; in the order of the ladder."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.rung, row.precision), []).append(row)
    return [(max(group, key=lambda r: (not r.not_run, r.signal)), len(group)) for group in groups.values()]


def cells(row: Row, count: int) -> tuple[str, ...]:
    """A row of the table as text, one for each of COLUMNS."""
    value = row.to_json()
    case = row.case if count == 1 else f"{count}: {row.case}"
    if row.not_run:
        return (row.rung, row.precision, case, "", "", "", _number(row.gate), "", f"not run: {row.note}")
    headroom = "exact" if value["headroom"] is None else f"{value['headroom']:.3g}x" if row.value < np.inf else ""
    status = row.status if row.status == "passed" or not row.note else f"{row.status}: {row.note}"
    return (
        row.rung,
        row.precision,
        case,
        _number(row.error),
        _number(row.torch_error),
        _number(row.ratio),
        _number(row.gate),
        headroom,
        status,
    )


def table(rows: Iterable[Row]) -> str:
    """The table for a terminal: of every gate the worst row."""
    lines = [COLUMNS, *(cells(row, count) for row, count in worst_rows(rows))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS) - 1)]
    return "\n".join(
        "  ".join([*(text.ljust(width) for text, width in zip(line, widths, strict=False)), line[-1]]).rstrip()
        for line in lines
    )


def markdown(rows: Iterable[dict[str, Any]] | Iterable[tuple[str, ...]], columns: tuple[str, ...]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def matrix(results: Iterable[tuple[str, dict[str, Row], bool]]) -> list[tuple[str, ...]]:
    """Of every mutant: its name, the rung that catches it, the gate, the signal in gates, what other rungs said."""
    lines = []
    for name, rows, is_caught in results:
        (first, row), *others = rows.items()
        also = ", ".join(f"{rung} {_signal(other)}" for rung, other in others)
        where = f"{row.rung} ({row.precision})" if is_caught else "SURVIVES"
        lines.append((name, first, where, _signal(row), also))
    return lines


MATRIX_COLUMNS = ("mutant", "caught by", "gate", "signal in gates", "other rungs' signals")


def _signal(row: Row) -> str:
    if row.signal == np.inf:
        return "raised" if row.precision == "any" else "refused" if "refused" in row.note else "infinite"
    return f"{row.signal:.2g}"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return "refused" if value == np.inf else "0" if value == 0 else f"{value:.2g}"


def trajectories_picture(path: Path, quick: bool) -> None:
    """Both loss curves above, their distance from float64 below, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from parity_tests.rungs.trajectories import (
        SEEDS,
        cases,
        flax_float64,
        float32_case,
        float32_trajectories,
        torch_trajectory,
    )

    case64 = next(case for case in cases(quick) if quick or case.name == "minigpt")
    ours64, truth64 = flax_float64(case64), torch_trajectory(case64, "float64")
    seeds = range(1 if quick else SEEDS)
    runs = [float32_trajectories(seed, quick) for seed in seeds]
    name = float32_case(0, quick).name
    steps = np.arange(1, len(truth64.losses) + 1)

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 8), sharex=True, layout="constrained")
    ours, theirs, truth = runs[0]
    top.plot(steps, theirs.losses, color="#c0392b", linewidth=5, alpha=0.35, label="PyTorch, float32")
    top.plot(steps, ours.losses, color="#1f4e79", linewidth=1.2, label="jaxgpt, float32")
    top.set_ylabel("train loss (nats per token)")
    top.set_title(f"{name}: 100 updates from the same weights on the same batches")
    top.legend()

    def spread(index: int) -> np.ndarray:
        gaps = [np.abs(np.array(run[index].losses) - np.array(run[2].losses)) for run in runs]
        return np.sqrt(np.mean(np.square(gaps), axis=0))

    floor = 1e-17
    bottom.semilogy(steps, np.maximum(spread(1), floor), color="#c0392b", label="PyTorch in float32 against float64")
    bottom.semilogy(steps, np.maximum(spread(0), floor), color="#1f4e79", label="jaxgpt in float32 against float64")
    gap64 = np.abs(np.array(ours64.losses) - np.array(truth64.losses))
    label = f"jaxgpt against PyTorch, both in float64 ({case64.name})"
    bottom.semilogy(steps, np.maximum(gap64, floor), ".", color="#2e7d32", markersize=4, label=label)
    bottom.axhline(1e-10, color="#555555", linestyle=":", linewidth=1)
    bottom.text(steps[-1], 1.3e-10, "gate in float64", ha="right", va="bottom", fontsize=9, color="#555555")
    bottom.set_ylabel("difference of the loss")
    bottom.set_xlabel(
        f"update (float32: root mean square over {len(runs)} seed{'s' if len(runs) > 1 else ''}; 0 drawn at 1e-17)"
    )
    bottom.set_ylim(floor / 2, 1e-4)
    bottom.legend(loc="center", bbox_to_anchor=(0.5, 0.36), fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes whole or not at all. Raises `UserError` where it cannot."""
    try:
        run_folder.write_text(path, json.dumps(values, indent=1, allow_nan=False) + "\n")
    except OSError as e:
        path.with_name(path.name + ".partial").unlink(missing_ok=True)
        raise UserError(f"--json {path}: cannot be written ({e.strerror}); choose a writable place") from None


def ladder_json(rows: Iterable[Row], seconds: float, quick: bool) -> dict[str, Any]:
    """Everything that one run of the ladder found."""
    reasons = {f"{rung}, {precision}": t.reason for (rung, precision), t in TOLERANCES.items()}
    return {
        "environment": environment(),
        "quick": quick,
        "seconds": round(seconds, 1),
        "rows": [row.to_json() for row in rows],
        "reasons": reasons,
    }
