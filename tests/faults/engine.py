"""Faults, their cases and their outcomes; and the harness in which cases are run.

A `Fault` makes cases from a seed. A case is a function of the `Harness` that does its damage, runs real commands, and
returns a `Finding`. Nothing passes or fails by time, but for a command that does not end (HANG).
"""

import random
import shutil
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from tests.faults import snapshots
from tests.faults.calls import Plan
from tests.faults.processes import Done, Warm, environment, run_fresh


class Outcome(StrEnum):
    """What became of a case, from good to bad."""

    SKIPPED = "skipped"  # this machine cannot make the fault
    EQUAL = "equal"  # the end is that of a run without the fault, bit for bit
    NO_EFFECT = "without effect"  # outputs and files are those without the fault
    TOLD = "told"  # one line names what is wrong; nothing sound was lost
    LOST = "lost"  # work was lost that the disk held, or a file was changed that is not the run's
    SILENT = "silent"  # another result, and no word about it
    TRACEBACK = "tracebacks"
    HANG = "hangs"


# Dropout, so that random numbers are compared as well; and every file that a run can write.
EVERYTHING = ("--model.dropout=0.1", "--diagnose-every=20", "--sample-every=20", "--attention-every=30")
PROGRESS = 25  # cases between two lines
GOOD = (Outcome.SKIPPED, Outcome.EQUAL, Outcome.NO_EFFECT, Outcome.TOLD)
BAD = (Outcome.LOST, Outcome.SILENT, Outcome.TRACEBACK, Outcome.HANG)


@dataclass(frozen=True)
class Finding:
    """The outcome of a case, and for a bad one the command and what happened.

    Args:
        counts: how many times, if it is not that of the case.
    """

    outcome: Outcome
    command: str = ""
    what: str = ""
    counts: int | None = None


def worst(findings: Sequence[Finding]) -> Finding:
    """The worst of the findings of a case's commands."""
    order = list(Outcome)
    return max(findings, key=lambda finding: order.index(finding.outcome))


# Gets an empty folder for the case; most cases have one finding.
Check = Callable[["Harness", Path], Finding | list[Finding]]


@dataclass(frozen=True)
class Case:
    """One way of making a fault.

    Args:
        name: tells it from the other cases of its fault.
        check: does the damage, runs the commands and judges them.
        counts: how many times the fault is made in it.
    """

    name: str
    check: Check
    counts: int = 1


@dataclass(frozen=True)
class Fault:
    """A kind of fault.

    Args:
        name: its line in docs/reliability.md.
        how: how it is made.
        then: what is run after it.
        cases: its cases, from random numbers; it may ask the harness for prepared runs.
        sample: how many of the cases `--quick` runs.
    """

    name: str
    how: str
    then: str
    cases: Callable[[random.Random, "Harness"], list[Case]]
    sample: int = 3


@dataclass
class Result:
    """The findings of a fault's cases."""

    fault: Fault
    findings: list[tuple[Case, Finding]] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        """A line for each bad finding."""
        bad = [(case, finding) for case, finding in self.findings if finding.outcome in BAD]
        return [f"{case.name}: {finding.command}: {finding.outcome}: {finding.what}" for case, finding in bad]

    def to_json(self) -> dict[str, Any]:
        counts: Counter = Counter()
        for case, finding in self.findings:
            counts[finding.outcome] += case.counts if finding.counts is None else finding.counts
        whys = sorted({finding.what for _, finding in self.findings if finding.outcome == Outcome.SKIPPED})
        return {
            "how": self.fault.how,
            "then": self.fault.then,
            "tried": counts.total() - counts[Outcome.SKIPPED],
            **{outcome.value: counts[outcome] for outcome in Outcome},
            "why skipped": whys,
            "failures": self.failures,
        }


class Harness:
    """What cases share: a folder, the environment of a user, warm processes, and runs that are prepared once.

    Args:
        work: an empty folder.
        flags: of all trainings, besides those that make them small.
        warm: what runs commands in place of warm processes.
        given: what is prepared already, by name.
    """

    def __init__(
        self, work: Path, flags: Sequence[str] = EVERYTHING, warm: Any = None, given: dict[str, Any] | None = None
    ):
        self.work, self.flags, self._given_warm = work, flags, warm
        self.env = environment(work / "home")
        self._local, self._warm = threading.local(), []
        self._lock = threading.Lock()
        self._prepared: dict[str, Any] = dict(given or {})
        self._locks: dict[str, threading.Lock] = {}

    @property
    def warm(self) -> Any:
        """The warm process of this thread."""
        if self._given_warm is not None:
            return self._given_warm
        if not hasattr(self._local, "warm"):
            self._local.warm = Warm(self.env, self.work / "warm.log")
            self._warm.append(self._local.warm)
        return self._local.warm

    def fresh(self, args: list[str], plan: Plan | None = None, **how: Any) -> Done:
        """Runs a command in a fresh process."""
        return run_fresh(args, self.env, plan, **how)

    def prepared(self, name: str, make: Callable[["Harness", Path], Any]) -> Any:
        """What `make(harness, folder)` returned the first time that `name` was asked for."""
        with self._lock:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            if name not in self._prepared:
                folder = self.work / "prepared" / name
                folder.mkdir(parents=True)
                self._prepared[name] = make(self, folder)
            return self._prepared[name]

    def close(self) -> None:
        for warm in self._warm:
            warm.close()


def run_case(harness: Harness, fault: Fault, case: Case) -> list[Finding]:
    """Runs a case in a folder of its own, which is removed if the outcome is good."""
    folder = harness.work / "cases" / f"{zlib.crc32(f'{fault.name} {case.name}'.encode()):08x}"
    folder.mkdir(parents=True)
    try:
        found = case.check(harness, folder)
    except Exception as e:
        raise RuntimeError(f"{fault.name}, {case.name}: the case itself failed: {e}") from e
    findings = found if isinstance(found, list) else [found]
    if worst(findings).outcome in GOOD:
        shutil.rmtree(folder, ignore_errors=True)
    return findings


def run(
    faults: Sequence[Fault],
    harness: Harness,
    seed: int = 0,
    share: tuple[int, int] = (0, 1),
    quick: bool = False,
    jobs: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> list[Result]:
    """Runs the cases of faults.

    Args:
        share: (K, N): only every N-th case, from the K-th on.
        quick: only a sample of the cases.
        jobs: how many cases run at a time.
        say: takes a line for each bad finding, and one for each fault.
    """
    results = [Result(fault) for fault in faults]
    with ThreadPoolExecutor(jobs) as pool:
        for result in results:
            # In the pool's threads too, which have the warm processes.
            cases = pool.submit(result.fault.cases, random.Random(seed), harness).result()
            assert len({case.name for case in cases}) == len(cases), f"{result.fault.name}: two cases of one name"
            chosen = cases[: result.fault.sample] if quick else cases[share[0] :: share[1]]
            running = [pool.submit(run_case, harness, result.fault, case) for case in chosen]
            for number, (case, future) in enumerate(zip(chosen, running, strict=True), 1):
                try:
                    findings = future.result()
                except RuntimeError:
                    pool.shutdown(cancel_futures=True)
                    raise
                for finding in findings:
                    result.findings.append((case, finding))
                    if finding.outcome in BAD:
                        say(f"{result.fault.name}: {result.failures[-1]}")
                if number % PROGRESS == 0:
                    say(f"{result.fault.name}: {number} of {len(chosen)} cases")
            counts = Counter(finding.outcome.value for _, finding in result.findings)
            say(f"{result.fault.name}: {len(chosen)} cases: {dict(counts)}")
    return results


# ------------------------------------------------------------------------------------------ judgements that cases share


def judge_failure(done: Done, command: str, good_codes: Sequence[int] = (2, 4)) -> Finding:
    """The finding for a command that ended with a code other than 0: told in one line, or not."""
    if done.hung:
        return Finding(Outcome.HANG, command, "does not end")
    if done.traceback:
        return Finding(Outcome.TRACEBACK, command, f"exit {done.code}: {done.message}")
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    if done.code not in good_codes or len(errors) != 1:
        return Finding(Outcome.SILENT, command, f"exit {done.code} with {len(errors)} error lines: {done.message}")
    return Finding(Outcome.TOLD, command, errors[0])


def judge_end(harness: Harness, done: Done, run: Path, reference: dict[str, str], command: str = "resume") -> Finding:
    """Whether a command that trains a run to its end has left the run that the reference is, bit for bit."""
    if done.code != 0 or done.hung or done.traceback:
        found = judge_failure(done, command, ())
        return found if found.outcome != Outcome.SILENT else Finding(Outcome.LOST, command, found.what)
    different = snapshots.differences(harness.warm.snapshot(run), reference)
    if different:
        return Finding(Outcome.LOST, command, f"the end differs in {', '.join(different[:6])}")
    return Finding(Outcome.EQUAL)
