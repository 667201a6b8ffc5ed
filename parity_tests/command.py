"""What `jaxgpt parity` does with its flags: the suite, the mutants, whole training runs, or one run of the user's."""

import json
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from jaxgpt.cli.parity import ParityFlags
from jaxgpt.errors import UserError
from jaxgpt.parity import report
from jaxgpt.parity.harness import Row
from jaxgpt.parity.locate import first_departure
from jaxgpt.parity.mutants import caught
from jaxgpt.parity.suite import CheckResult, in_processes
from jaxgpt.parity.torch_side import prepare_torch
from parity_tests import docs_page, locate, mutants
from parity_tests.checks import whole_runs
from parity_tests.suite import prepare_process, run_suite
from parity_tests.tolerances import TOLERANCES
from parity_tests.trained_run import compare_run


def run(flags: ParityFlags) -> int:
    """Does what the flags say; returns the exit code."""
    prepare_torch()
    if flags.mutants:
        return compare_mutants(flags)
    if flags.end_to_end:
        return compare_end_to_end(flags)
    if flags.run:
        return finish(list(compare_run(flags.run, flags.checkpoint, flags.data_dir)), flags, 0.0)
    return compare_all(flags)


def compare_all(flags: ParityFlags) -> int:
    """The suite."""
    if flags.mutant:
        mutants.find(flags.mutant)  # an unknown one is reported before anything runs
    begun = time.perf_counter()

    def on_result(result: CheckResult) -> None:
        failed = sum(row.status == "FAILED" for row in result.rows)
        n_failed = f", {failed} FAILED" if failed else ""
        say(f"{result.name:<20} {result.seconds:6.1f} s  {len(result.rows):3} rows{n_failed}")

    docs_picture = docs_page.FOLDER / "parity.png"
    picture = flags.json.with_suffix(".png") if flags.json else docs_picture if flags.docs else None
    if picture:
        picture.unlink(missing_ok=True)  # an old one must not stand beside new figures
    results = run_suite(flags.quick, on_result, flags.mutant, picture)
    if flags.json and flags.docs and picture.exists():
        shutil.copyfile(picture, docs_picture)
    code = finish([row for result in results for row in result.rows], flags, time.perf_counter() - begun)
    for result in results:
        if result.traceback:
            say(result.traceback)
    if flags.locate:
        print_departure(code, flags.mutant)
    elif code:
        print("python scripts/parity.py --locate names the first tensor that departs")
    return code


def print_departure(code: int, mutant: str | None) -> None:
    """Names the first tensor that departs, if the suite has failed."""
    if not code:
        print("nothing to locate: no check has failed")
        return
    with mutants.planted(mutant) if mutant else nullcontext():
        departure = first_departure(locate.stages(), say)
    if departure.where:
        print(f"first to depart: {departure.where} (error {departure.error:.2g}, tolerance {departure.tolerance:.2g})")
    else:
        print(
            f"no float64 tensor departs between a batch and its updates ({departure.compared} compared): the fault "
            "lies in what only the failed checks use"
        )


def finish(rows: list[Row], flags: ParityFlags, seconds: float) -> int:
    """Prints the table, writes what was asked for, and returns the exit code."""
    print(report.table(rows))
    failed = [row for row in rows if row.status == "FAILED"]
    not_run = sum(row.not_run for row in rows)
    took = f" in {seconds:.0f} s" if seconds else ""
    print(f"{len(rows) - len(failed) - not_run} passed, {len(failed)} failed, {not_run} not run{took}")
    values = report.suite_json(rows, seconds, flags.quick, TOLERANCES, report.environment(docs_page.PACKAGES))
    if flags.json:
        docs_page.write_json(flags.json, values)
    if flags.docs:
        docs_page.record("suite", docs_page.versions_line(values["environment"]), values)
    return 1 if failed else 0


def compare_mutants(flags: ParityFlags) -> int:
    """Every mutant and the probe that catches it."""
    begun, rows_of = time.perf_counter(), {}
    names = [(mutant.name,) for mutant in mutants.MUTANTS]
    for name, rows in in_processes(mutants.run, names, prepare_process):
        rows_of[name] = rows
        say(f"{len(rows_of):3} of {len(names)}  {name}")
    is_caught = {mutant.name: caught(mutant, rows_of[mutant.name]) for mutant in mutants.MUTANTS}
    lines = [report.mutant_cells(name, rows_of[name], is_caught[name]) for name in is_caught]
    print(report.columns([report.MUTANT_COLUMNS, *lines]))
    print(f"{sum(is_caught.values())} of {len(lines)} caught in {time.perf_counter() - begun:.0f} s")
    values = {"environment": report.environment(docs_page.PACKAGES), "lines": lines}
    if flags.json:
        docs_page.write_json(flags.json, values)
    if flags.docs:
        docs_page.record("mutants", docs_page.versions_line(values["environment"]), values)
    return 0 if all(is_caught.values()) else 1


def compare_end_to_end(flags: ParityFlags) -> int:
    """An hour's work: with --json every result is kept as it comes, and the same command goes on from there."""
    versions = docs_page.versions_line(report.environment(docs_page.PACKAGES))
    values = {"preset": flags.end_to_end, "versions": versions, "results": {}}
    if flags.json and flags.json.exists():
        values = kept_results(flags.json, values)

    def save(results: whole_runs.Results) -> None:
        if flags.json:
            docs_page.write_json(flags.json, {**values, "results": results})

    results = whole_runs.run_seeds(flags.end_to_end, flags.data_dir, say, values["results"], save, flags.seeds)
    row = whole_runs.mean_row(f"{flags.end_to_end}, {len(results)} seed{'s' * (len(results) > 1)}", results)
    print(report.table([row]))
    print(row.note)
    values = {**values, "note": row.note, "results": results}
    if flags.json:
        docs_page.write_json(flags.json, values)
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


def say(line: str) -> None:
    """Progress, beside the result."""
    print(line, file=sys.stderr, flush=True)
