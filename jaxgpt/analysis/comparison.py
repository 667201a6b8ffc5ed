"""The results of several runs that differ in chosen fields: their ranking as a table, as JSON, and as curves."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxgpt.errors import UserError, flag
from jaxgpt.runs.files import read_json, write_json, write_text
from jaxgpt.runs.run_dir import RunDir, open_run

Status = Literal["finished", "diverged", "failed", "unfinished"]
STATUS_ORDER: dict[Status, int] = {"finished": 0, "diverged": 1, "failed": 2, "unfinished": 3}  # in a table


@dataclass
class ComparedRun:
    """One run of a comparison, and how its training ended."""

    label: str  # the compared values as they were given: "lr=1e-4,optimizer=sgd"
    path: Path  # the run folder, which need not exist
    values: dict[str, Any]  # the compared fields' values by dotted name
    tokenizer: str
    status: Status = "unfinished"
    step: int | None = None  # at which it diverged
    error: str = ""

    @property
    def outcome(self) -> str:
        """The status, with the step at which the run diverged."""
        return self.status if self.step is None else f"{self.status} at step {self.step}"

    def open(self) -> RunDir | None:
        """The run folder; None if the run was refused or has not been trained in this comparison yet."""
        if self.status == "unfinished":
            return None
        with contextlib.suppress(UserError):
            return open_run(self.path)
        return None

    def row(self) -> dict[str, Any]:
        """The run's entry in comparison.json."""
        row: dict[str, Any] = {"label": self.label, "folder": self.path.name, "values": self.values}
        row["status"] = self.status
        if self.step is not None:
            row["diverged_at_step"] = self.step
        if self.error:
            row["error"] = self.error
        run = self.open()
        if run is None:
            return row
        row["steps"] = len(run.read_steps())
        if reports := run.read_metrics():
            best = best_report(reports)
            row |= {"best_val_loss": best["val_loss"], "best_val_step": best["step"]}
        if self.status == "finished":
            names = ("val_loss", "val_ppl", "val_bits_per_byte", "params", "tokens_per_s", "wall_s")
            with contextlib.suppress(UserError, OSError, KeyError):  # a summary damaged since the run ended
                summary = read_json(run.path / "summary.json", dict)
                row |= {name: summary[name] for name in names}
        return row


@dataclass
class Comparison:
    """Runs that were trained on the same text and differ in some fields, in one folder."""

    path: Path
    fields: Sequence[str]  # dotted names
    dataset: str
    preset: str  # of all runs, unless it is one of the fields
    runs: Sequence[ComparedRun]

    def record(self) -> None:
        """Writes comparison.json: the results so far."""
        self.path.mkdir(parents=True, exist_ok=True)  # a run that crashed at its start has not made it
        content = {"fields": list(self.fields), "dataset": self.dataset, "ranked_by": ranked_by(self.runs)}
        write_json(self.path / "comparison.json", {**content, "variants": ranked(self.runs)})

    def report(self) -> str:
        """Writes comparison.md and comparison.png; returns the table."""
        rows = ranked(self.runs)
        text = table(rows, self.fields, ranked_by(self.runs))
        write_text(self.path / "comparison.md", text)
        self._plot([row["label"] for row in rows])
        return text

    def _plot(self, labels: list[str]) -> None:
        from jaxgpt.analysis.plots import comparison_curves  # imports matplotlib

        runs = {run.label: run for run in self.runs}
        curves = []
        for label in labels:
            run = runs[label]
            legend = label.replace(",", ", ") + ("" if run.status == "finished" else f": {run.outcome}")
            folder = run.open()
            curves.append((legend, folder.read_steps() if folder else [], folder.read_metrics() if folder else []))
        text = self.dataset.rsplit("/")[-1]
        trained = text if "preset" in self.fields else f"{self.preset} on {text}"
        title = f"{trained}, compared by {', '.join(flag(name)[2:] for name in self.fields)}"
        comparison_curves(self.path / "comparison.png", title, curves)


def ranked(runs: Sequence[ComparedRun]) -> list[dict[str, Any]]:
    """The rows of the runs, the best first; runs that did not finish come last."""
    key = ranked_by(runs)

    def order(row: dict[str, Any]) -> tuple[int, float]:
        figure = row.get(key)
        return STATUS_ORDER[row["status"]], math.inf if figure is None else figure

    return sorted((run.row() for run in runs), key=order)


def ranked_by(runs: Sequence[ComparedRun]) -> str:
    """The figure that ranks the runs: per token, unless their tokenizers differ; losses per byte still compare then."""
    same_tokens = len({run.tokenizer for run in runs}) == 1
    return "val_loss" if same_tokens else "val_bits_per_byte"


def best_report(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """The first report with the lowest validation loss."""
    return min(reports, key=lambda report: report["val_loss"])


def table(rows: Sequence[dict[str, Any]], fields: Sequence[str], ranked_by: str) -> str:
    """A Markdown table of the rows of comparison.json, with aligned columns for a terminal.

    Args:
        fields: the compared fields, which become the first columns.
        ranked_by: "val_bits_per_byte" adds a column with it.
    """
    with_bytes = ranked_by == "val_bits_per_byte"
    header = [*(flag(name)[2:] for name in fields), *(["bits per byte"] if with_bytes else [])]
    header += ["val loss", "perplexity", "best report", "at step", "tokens/s", "seconds"]
    lines = [header]
    for row in rows:
        cells = [part.partition("=")[2] for part in row["label"].split(",")]
        if with_bytes:
            cells.append(_number(row, "val_bits_per_byte", ".4f"))
        status = row["status"]
        if status == "diverged":
            status += f" at step {row['diverged_at_step']}"
        cells.append(_number(row, "val_loss", ".4f") or status)
        for name, form in (("val_ppl", ".3f"), ("best_val_loss", ".4f"), ("best_val_step", "d")):
            cells.append(_number(row, name, form))
        lines.append([*cells, _number(row, "tokens_per_s", ",.0f"), _number(row, "wall_s", ".0f")])
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    n_left = len(fields)  # columns aligned to the left: the others are numbers

    def aligned(line: list[str]) -> str:
        cells = [
            cell.ljust(width) if i < n_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |"

    rule = ["-" * width if i < n_left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join(aligned(line) for line in [header, rule, *lines[1:]]) + "\n"


def _number(row: dict[str, Any], name: str, form: str) -> str:
    """A figure of a row, which may be missing; null stands for one beyond what a float can hold."""
    if name not in row:
        return ""
    return "inf" if row[name] is None else format(row[name], form)
