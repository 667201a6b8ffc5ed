"""Hold this machine's JAX side against PyTorch, rung by rung: python scripts/parity.py"""

import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxgpt.cli import parse_flags, run_command
from jaxgpt.errors import UserError
from jaxgpt.presets import PRESETS


@dataclass(frozen=True)
class ParityFlags:
    quick: bool = False
    """The core of the ladder, in under a minute."""
    json: Path | None = None
    """Write every row to this file, and a picture of the trajectories beside it (.png)."""
    locate: bool = False
    """If a rung fails, walk op, layer, gradient and step, and name the first tensor that departs."""
    run: Path | None = None
    """Instead of the ladder: a run of yours, both frameworks on its own validation split."""
    checkpoint: Literal["result", "last", "best"] = "result"
    """With --run, result: the last, or, of a run that stopped early, the best: the one with the lowest validation
    loss."""
    data_dir: Path | None = None
    """With --run and --end-to-end: folder to look for datasets in first."""
    mutants: bool = False
    """Instead of the ladder: plant each fault in the JAX side, and show the rung that catches it."""
    mutant: str | None = None
    """Plant this fault, then run the ladder: what a failure looks like."""
    end_to_end: str | None = None
    """Instead of the ladder: whole runs of this preset in both frameworks, five seeds (minigpt: about an hour;
    wikitext2: some 45 minutes a seed)."""
    seeds: int = 5
    """With --end-to-end: how many."""
    docs: bool = False
    """Write the result into docs/parity.md."""

    def __post_init__(self):
        modes = {"--run": self.run, "--mutants": self.mutants, "--end-to-end": self.end_to_end}
        given = [name for name, value in modes.items() if value]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)}: each is a run of its own; give one of them")
        ladder_only = {"--quick": self.quick, "--locate": self.locate, "--mutant": self.mutant}
        for name, value in ladder_only.items():
            if given and value:
                raise UserError(f"{name}: has an effect on the ladder only; leave it out, or leave out {given[0]}")
        if self.data_dir and not (self.run or self.end_to_end):
            raise UserError("--data-dir: has an effect only with --run or --end-to-end; add one, or leave it out")
        if self.checkpoint != "result" and not self.run:
            raise UserError("--checkpoint: has an effect only with --run; add it, or leave it out")
        if self.seeds != 5 and not self.end_to_end or self.seeds < 1:
            raise UserError(f"--seeds {self.seeds}: give at least 1, and --end-to-end with it")
        if self.docs and (self.run or self.mutant or self.quick):
            raise UserError(
                "--docs: the page shows the whole ladder, --mutants and --end-to-end; leave out what goes with it"
            )
        if self.json and not self.json.parent.is_dir():
            raise UserError(f"--json {self.json}: no such folder; create it first")
        if self.json and (self.json.is_dir() or not os.access(self.json.parent, os.W_OK)):
            raise UserError(f"--json {self.json}: cannot be written; give a file in a writable folder")
        if self.json and self.json.suffix == ".png":
            raise UserError(f"--json {self.json}: the picture beside it would have the same name; end it in .json")
        if self.end_to_end and self.end_to_end not in PRESETS:
            raise UserError(f"--end-to-end {self.end_to_end}: unknown preset; choose of {', '.join(PRESETS)}")


def main() -> int:
    flags = parse_flags(ParityFlags, sys.argv[1:], __doc__)
    if importlib.util.find_spec("torch") is None:
        raise UserError("PyTorch is not installed, so there is nothing to compare with; run make env")
    from parity_tests.sides import prepare_torch

    prepare_torch()
    if flags.mutants:
        return run_mutants(flags)
    if flags.end_to_end:
        return run_end_to_end(flags)
    if flags.run:
        from parity_tests.trained_run import compare_run

        return finish(list(compare_run(flags.run, flags.checkpoint, flags.data_dir)), flags, 0.0)
    return run_ladder(flags)


def run_ladder(flags: ParityFlags) -> int:
    from parity_tests import ladder
    from parity_tests.docs_page import FOLDER

    if flags.mutant:
        from parity_tests.mutants import find

        find(flags.mutant)
    begun = time.perf_counter()

    def each(done: ladder.Finished) -> None:
        failed = sum(row.status == "FAILED" for row in done.rows)
        say(f"{done.name:<20} {done.seconds:6.1f} s  {len(done.rows):3} rows{f', {failed} FAILED' if failed else ''}")

    picture = flags.json.with_suffix(".png") if flags.json else FOLDER / "parity.png" if flags.docs else None
    if picture:
        picture.unlink(missing_ok=True)  # an old one must not stand beside new figures
    finished = ladder.run_ladder(flags.quick, each, flags.mutant, picture)
    if flags.json and flags.docs and picture.exists():
        shutil.copyfile(picture, FOLDER / "parity.png")
    code = finish([row for done in finished for row in done.rows], flags, time.perf_counter() - begun)
    for done in finished:
        if done.trace:
            say(done.trace)
    if flags.locate:
        locate(code, flags.mutant)
    elif code:
        print("python scripts/parity.py --locate names the first tensor that departs")
    return code


def locate(code: int, mutant: str | None) -> None:
    """Says where a ladder that has failed departs first."""
    from parity_tests.ladder import planted
    from parity_tests.locate import walk

    if not code:
        print("nothing to locate: no rung has failed")
        return
    with planted(mutant):
        departure = walk(say)
    if departure.where:
        print(f"first to depart: {departure.where} (error {departure.error:.2g}, gate {departure.gate:.2g})")
    else:
        print(
            f"no float64 tensor departs between a batch and its updates ({departure.compared} compared): the fault "
            "lies in what only the failed rungs use"
        )


def finish(rows: list[Any], flags: ParityFlags, seconds: float) -> int:
    """Prints the table, writes what was asked for, and returns the exit code."""
    from parity_tests import docs_page, report

    print(report.table(rows))
    failed = [row for row in rows if row.status == "FAILED"]
    not_run = sum(row.not_run for row in rows)
    took = f" in {seconds:.0f} s" if seconds else ""
    print(f"{len(rows) - len(failed) - not_run} passed, {len(failed)} failed, {not_run} not run{took}")
    values = report.ladder_json(rows, seconds, flags.quick)
    if flags.json:
        report.write_json(flags.json, values)
    if flags.docs:
        docs_page.record("ladder", docs_page.versions_line(values["environment"]), values)
    return 1 if failed else 0


def run_mutants(flags: ParityFlags) -> int:
    from parity_tests import docs_page, ladder, mutants, report

    begun, rows_of = time.perf_counter(), {}
    for name, rows in ladder.in_processes(mutants.run_named, [(mutant.name,) for mutant in mutants.MUTANTS]):
        rows_of[name] = rows
        say(f"{len(rows_of):3} of {len(mutants.MUTANTS)}  {name}")
    results = [(m.name, rows_of[m.name], mutants.caught(m, rows_of[m.name])) for m in mutants.MUTANTS]
    lines = report.matrix(results)
    print_columns([report.MATRIX_COLUMNS, *lines])
    survivors = [name for name, _, is_caught in results if not is_caught]
    print(f"{len(results) - len(survivors)} of {len(results)} caught in {time.perf_counter() - begun:.0f} s")
    values = {"environment": report.environment(), "lines": lines}
    if flags.json:
        report.write_json(flags.json, values)
    if flags.docs:
        docs_page.record("mutants", docs_page.versions_line(values["environment"]), values)
    return 1 if survivors else 0


def run_end_to_end(flags: ParityFlags) -> int:
    """An hour's work: with --json every result is kept as it comes, and the same command goes on from there."""
    from parity_tests import docs_page, report
    from parity_tests.rungs import whole_runs

    values = {"preset": flags.end_to_end, "versions": docs_page.versions_line(report.environment()), "results": {}}
    if flags.json and flags.json.exists():
        values = kept_results(flags.json, values)

    def save(results: dict[str, Any]) -> None:
        if flags.json:
            report.write_json(flags.json, {**values, "results": results})

    results = whole_runs.run_seeds(flags.end_to_end, flags.data_dir, say, values["results"], save, flags.seeds)
    row = whole_runs.row(f"{flags.end_to_end}, {len(results)} seed{'s' * (len(results) > 1)}", results)
    print(report.table([row]))
    print(row.note)
    values = {**values, "note": row.note, "results": results}
    if flags.json:
        report.write_json(flags.json, values)
    if flags.docs:
        docs_page.record("end_to_end", flags.end_to_end, values)
    return 0 if row.status == "passed" else 1


def kept_results(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """What an interrupted --end-to-end left. Raises `UserError` if the file holds something else."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        same = all(kept[name] == values[name] for name in ("preset", "versions")) and isinstance(kept["results"], dict)
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise UserError(f"--json {path}: holds other results; give another name")
    say(f"going on from {path}")
    return kept


def print_columns(lines: Iterable[tuple[str, ...]]) -> None:
    lines = list(lines)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def say(line: str) -> None:
    """Progress, beside the result."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main)
