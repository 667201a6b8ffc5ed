"""Several runs that differ in chosen fields, as one command, and what they came to: `scripts/compare.py`.

Every run is a process of its own. Float64 and the devices' memory are settings of a whole process, which one run must
not leave to the next; and a run that crashes or has no memory takes no other with it. It costs each run a start.
"""

import contextlib
import json
import math
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxgpt.checks import flag
from jaxgpt.console import STOP_SIGNALS, handle_stop_signals
from jaxgpt.errors import UserError
from jaxgpt.run_folder import RunFolder, open_run, recorded_choice, write_json, write_text
from jaxgpt.variants import Variant, parse

ORDER = {"finished": 0, "diverged": 1, "failed": 2, "unfinished": 3}  # a table's order of states
# Exit codes of a run that was told to end, or whose output's reader has gone.
STOPPED = {*(128 + number for number in STOP_SIGNALS), 141}


@dataclass
class Outcome:
    """How a variant's process ended."""

    status: str = "unfinished"  # or finished, diverged, failed
    step: int | None = None  # at which it diverged
    error: str = ""

    def __str__(self) -> str:
        return self.status if self.step is None else f"{self.status} at step {self.step}"


def compare(args: list[str], description: str, train_command: list[str]) -> int:
    """Trains all combinations, one after the other, and leaves table, JSON and picture beside the run folders.

    Args:
        args: the command's arguments.
        train_command: what starts scripts/train.py.

    Returns:
        The command's exit code: 0 if at least one finished and none failed, 3 if all diverged, 128 + the signal that
        stopped it, else the exit code of the first that failed.

    Raises:
        UserError: before anything is written; or the first run is refused, as then mostly all are.
    """
    variants = parse(args, description)
    flags = variants[0].flags
    _require_own(flags.out_dir, variants)
    # Before any run, so that a text that cannot be had leaves nothing, and all runs take the same of a list.
    from jaxgpt.datasets import load_corpus

    spec = flags.dataset
    for variant in variants if flags.out_dir else ():
        spec = recorded_choice(flags.out_dir / variant.label, spec)
    dataset = load_corpus(spec, flags.data_dir, print, flags.text_column).name
    if flags.out_dir is None:
        from jaxgpt.trainer import new_folder  # imports jax

        out = new_folder("compare", flags.preset)
    else:
        out = flags.out_dir

    outcomes = {variant.label: Outcome() for variant in variants}
    codes = []
    with Child() as child:
        for number, variant in enumerate(variants, 1):
            print(f"=== {number} of {len(variants)}: {variant.label}", flush=True)
            line = [*train_command, *variant.args, "--dataset", dataset, "--out-dir", str(out / variant.label)]
            code, error = child.run(line)
            if code in STOPPED or child.signals and code:
                break
            if code == 2 and number == 1:
                raise UserError(error or "scripts/train.py was refused; its lines say why")
            outcomes[variant.label] = outcome = _outcome(code, error)
            if outcome.status == "failed":
                print(f"error: {variant.label}: {outcome.error}", file=sys.stderr, flush=True)
                codes.append(code)
            elif outcome.status == "diverged":
                print(f"{variant.label}: {outcome}: {outcome.error}", flush=True)
            rows = _record(out, variants, outcomes, dataset)
            if child.signals and number < len(variants):
                code = 128 + child.signals[0]
                break
        else:
            code = 0
    if code:
        return _stopped(out, variants, outcomes, dataset, code)
    told = table(rows, variants)
    write_text(out / "comparison.md", told)
    _draw(out, rows, outcomes, _title(variants, dataset))
    print(f"\n{told}\nall in {out}", flush=True)
    if codes:
        return codes[0]
    return 0 if any(outcome.status == "finished" for outcome in outcomes.values()) else 3


def _require_own(out: Path | None, variants: list[Variant]) -> None:
    """Raises `UserError` if a folder holds anything else than a comparison."""
    if out is None:
        return
    try:
        names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    except OSError as e:
        raise UserError(f"--out-dir {out}: cannot be read ({e.strerror}); choose another folder") from None
    # Killed in its first run, it has not written comparison.json yet.
    others = {name for name in names if not name.startswith("comparison.")} - {variant.label for variant in variants}
    if "comparison.json" not in names and others:
        raise UserError(f"--out-dir {out}: holds files that are no comparison; choose an empty or new folder")


class Child:
    """The processes that train, one at a time; SIGINT, SIGTERM and SIGHUP are passed on to the one that is running.

    Each has a session of its own: Ctrl-C on a terminal goes to all of a session, and a run that gets it twice, from
    there and from here, would end without saving.
    """

    def __init__(self):
        self.signals: list[int] = []
        self._process: subprocess.Popen | None = None
        self._passed_on = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Child":
        self._before = handle_stop_signals(self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, line: list[str]) -> tuple[int, str]:
        """The exit code of a command, 128 + the signal if one ended it, and its error: the rest is printed."""
        error = ""
        self._process = subprocess.Popen(line, stderr=subprocess.PIPE, start_new_session=True)
        self._pass_on()  # one that came while it was started
        for text in self._process.stderr:
            if text.startswith(b"error: "):
                error = text.decode(errors="replace").removeprefix("error: ").strip()
            else:
                sys.stderr.buffer.write(text)
                sys.stderr.flush()
        code = self._process.wait()
        self._process = None  # a signal from here on is for the next
        return code if code >= 0 else 128 - code, error

    def _handle(self, number: int, _frame: Any) -> None:
        self.signals.append(number)
        self._pass_on()

    def _pass_on(self) -> None:
        if self._process is not None:
            while self._passed_on < len(self.signals):
                self._passed_on += 1
                self._process.send_signal(self.signals[self._passed_on - 1])


def _outcome(code: int, error: str) -> Outcome:
    if code == 0:
        return Outcome("finished")
    if code == 3:
        step, what = re.match(r"step (\d+): ([^;]*)", error).groups()
        return Outcome("diverged", int(step), what)
    return Outcome("failed", None, error or f"ended with exit code {code}")


def _stopped(out: Path, variants: list[Variant], outcomes: dict[str, Outcome], dataset: str, code: int) -> int:
    if out.is_dir():
        _record(out, variants, outcomes, dataset)
    n_done = sum(outcome.status != "unfinished" for outcome in outcomes.values())
    without = " and without --overwrite" if variants[0].flags.overwrite else ""
    print(
        f"comparison stopped after {n_done} of {len(variants)} runs; the same command with --out-dir {out}{without} "
        "goes on",
        flush=True,
    )
    return code


def _record(out: Path, variants: list[Variant], outcomes: dict[str, Outcome], dataset: str) -> list[dict[str, Any]]:
    """Writes comparison.json: what every run came to so far, the best first. Returns its rows."""
    rows = [_row(out, variant, outcomes[variant.label]) for variant in variants]
    by = ranked_by(variants)
    rows.sort(key=lambda row: (ORDER[row["status"]], row.get(by, math.inf)))
    first = variants[0]
    fields = {"fields": first.fields, "dataset": dataset, "ranked_by": by}
    write_json(out / "comparison.json", {**fields, "variants": rows})
    return rows


def ranked_by(variants: list[Variant]) -> str:
    """Which figure tells the best: tokens of several tokenizers are not alike, their bytes are."""
    one = len({variant.config.tokenizer for variant in variants}) == 1
    return "val_loss" if one else "val_bits_per_byte"


def _row(out: Path, variant: Variant, outcome: Outcome) -> dict[str, Any]:
    row: dict[str, Any] = {"label": variant.label, "folder": variant.label, "values": variant.values}
    row["status"] = outcome.status
    if outcome.step is not None:
        row["diverged_at_step"] = outcome.step
    if outcome.error:
        row["error"] = outcome.error
    run = _run_of(out, outcome, variant.label)
    if run is None:
        return row
    row["steps"] = len(run.read_steps())
    if reports := run.read_metrics():
        best = best_report(reports)
        row |= {"best_val_loss": best["val_loss"], "best_val_step": best["step"]}
    if outcome.status == "finished":
        summary = json.loads((run.path / "summary.json").read_text(encoding="utf-8"))
        names = ("val_loss", "val_ppl", "val_bits_per_byte", "params", "tokens_per_s", "wall_s")
        row |= {name: summary[name] for name in names}
    return row


def best_report(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """The first report with the lowest validation loss."""
    return min(reports, key=lambda report: report["val_loss"])


def _run_of(out: Path, outcome: Outcome, label: str) -> RunFolder | None:
    """The run that a variant has left; None if it was refused, or has not begun."""
    if outcome.status == "unfinished":
        return None
    with contextlib.suppress(UserError):
        return open_run(out / label)
    return None


def table(rows: list[dict[str, Any]], variants: list[Variant]) -> str:
    """The rows of comparison.json as Markdown, aligned so that it reads in a terminal too."""
    fields = variants[0].fields
    bytes_too = ranked_by(variants) != "val_loss"
    heads = [*(flag(name)[2:] for name in fields), *(["bits per byte"] if bytes_too else [])]
    heads += ["val loss", "perplexity", "best report", "at step", "tokens/s", "seconds"]
    lines = [heads]
    for row in rows:
        cells = row["label"].split(",")
        shown = [cell.partition("=")[2] for cell in cells]
        if bytes_too:
            shown.append(_number(row, "val_bits_per_byte", ".4f"))
        state = row["status"]
        if state == "diverged":
            state += f" at step {row['diverged_at_step']}"
        shown.append(_number(row, "val_loss", ".4f") or state)
        for name, form in (("val_ppl", ".3f"), ("best_val_loss", ".4f"), ("best_val_step", "d")):
            shown.append(_number(row, name, form))
        lines.append([*shown, _number(row, "tokens_per_s", ",.0f"), _number(row, "wall_s", ".0f")])
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    n_left = len(fields)

    def aligned(line: list[str]) -> str:
        cells = [
            cell.ljust(width) if i < n_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |"

    rule = ["-" * width if i < n_left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join(aligned(line) for line in [heads, rule, *lines[1:]]) + "\n"


def _number(row: dict[str, Any], name: str, form: str) -> str:
    return format(row[name], form) if name in row else ""


def _title(variants: list[Variant], dataset: str) -> str:
    fields, text = variants[0].fields, dataset.rsplit("/")[-1]
    trained = text if "preset" in fields else f"{variants[0].flags.preset} on {text}"
    return f"{trained}, compared by {', '.join(flag(name)[2:] for name in fields)}"


def _draw(out: Path, rows: list[dict[str, Any]], outcomes: dict[str, Outcome], title: str) -> None:
    from jaxgpt.report import comparison_curves  # imports matplotlib

    curves = []
    for row in rows:
        outcome = outcomes[row["label"]]
        label = row["label"].replace(",", ", ") + ("" if outcome.status == "finished" else f": {outcome}")
        run = _run_of(out, outcome, row["label"])
        curves.append((label, run.read_steps() if run else [], run.read_metrics() if run else []))
    comparison_curves(out / "comparison.png", title, curves)
