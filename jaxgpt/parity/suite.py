"""A suite of checks, and running it in several processes: most of the time goes into compiling, on one core each."""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from jaxgpt.parity.harness import Row
from jaxgpt.parity.tolerances import raised_row

Check = Callable[[bool], Iterator[Row]]  # quick: the core alone -> rows


@dataclass(frozen=True)
class CheckResult:
    """A check's rows, the seconds it took, and the traceback if it raised."""

    name: str
    rows: list[Row]
    seconds: float
    traceback: str = ""


def run_check(name: str, check: Check, quick: bool = False) -> CheckResult:
    """All rows of one check; an exception becomes a row that has failed."""
    begun = time.perf_counter()
    rows, trace = [], ""
    try:
        rows.extend(check(quick))
    except Exception as e:
        trace = traceback.format_exc()
        rows.append(raised_row(name, e))
    assert rows, f"the check {name} compares nothing"
    return CheckResult(name, rows, time.perf_counter() - begun, trace)


@dataclass(frozen=True)
class Suite:
    """Checks by name, from the small to the large: the first that fails is the place to look.

    All functions are passed to other processes, so each must be a module's function, or a `functools.partial` of one.

    Args:
        groups: names of checks that share what they compute: one process runs them one after the other.
        longest: names of the checks to begin before the rest.
        prepare: sets up a process, given the number of threads that it may use.
    """

    checks: Mapping[str, Check]
    groups: tuple[tuple[str, ...], ...] = ()
    longest: tuple[str, ...] = ()
    prepare: Callable[[int], None] | None = None

    def __post_init__(self):
        named = [name for group in self.groups for name in group] + list(self.longest)
        assert set(named) <= set(self.checks) and len(set(named)) == len(named), named

    def run(
        self,
        quick: bool,
        on_result: Callable[[CheckResult], None],
        within: Callable[[], AbstractContextManager[Any]] = nullcontext,
        after: Callable[[tuple[str, ...]], None] | None = None,
        processes: int | None = None,
    ) -> list[CheckResult]:
        """All checks, in the order of the suite.

        Args:
            quick: the core of each check alone.
            on_result: takes every result as it comes.
            within: the context in which every process runs its checks, for example one that plants a fault.
            after: called in the process of a group, with its names, if none of its checks raised.
            processes: how many; by default one for each core, four at most.
        """
        grouped = {name for group in self.groups for name in group}
        alone = [*self.longest, *(n for n in self.checks if n not in grouped and n not in self.longest)]
        groups = [*self.groups, *((name,) for name in alone)]
        arguments = [([(name, self.checks[name]) for name in group], quick, within, after) for group in groups]
        results: dict[str, CheckResult] = {}
        for group_results in in_processes(_run_group, arguments, self.prepare, processes):
            for result in group_results:
                results[result.name] = result
                on_result(result)
        return [results[name] for name in self.checks]


def _run_group(
    checks: list[tuple[str, Check]],
    quick: bool,
    within: Callable[[], AbstractContextManager[Any]],
    after: Callable[[tuple[str, ...]], None] | None,
) -> list[CheckResult]:
    """Runs in a process of the pool."""
    with within():
        results = [run_check(name, check, quick) for name, check in checks]
        if after and not any(result.traceback for result in results):
            after(tuple(name for name, _ in checks))
    return results


def in_processes(
    function: Callable[..., Any],
    arguments: list[tuple[Any, ...]],
    prepare: Callable[[int], None] | None = None,
    processes: int | None = None,
) -> Iterator[Any]:
    """The function's results as they come, computed by several processes; arguments as in `Suite`."""
    processes = processes or max(1, min(4, os.cpu_count() or 1))
    n_threads = max(1, (os.cpu_count() or 1) // processes)
    # The processes share a GPU: none may take all of its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    initializer = {"initializer": prepare, "initargs": (n_threads,)} if prepare else {}
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), **initializer)
    try:
        for future in as_completed([pool.submit(function, *a) for a in arguments]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
