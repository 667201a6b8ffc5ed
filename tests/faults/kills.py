"""Interruptions of a training: kills and signals at random moments, and processes with other hash seeds.

A chain starts one run again and again, and interrupts each start at a random moment; the last start ends it. Its state
and its records must be those of a run without interruptions, bit for bit.
"""

import random
import signal
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests.faults import snapshots
from tests.faults.calls import KILL, Plan
from tests.faults.engine import Case, Fault, Finding, Harness, Outcome, judge_end
from tests.faults.processes import command
from tests.faults.runs import Interrupted, train_args

STEPS = 400
LENGTH = 5  # interruptions of a chain
N_KILLS, N_IN_SAVE, N_SIGNALS, N_HASH_SEEDS = 50, 15, 30, 5
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
EXIT_CODES = {signal.SIGUSR1: 0}  # a warning before the end: saved, and nothing is wrong. The others: 128 + n
CALLS_OF_A_SAVE = 60  # file-system calls of a save, about


class Interruption(NamedTuple):
    """What ends a start, and when.

    Args:
        number: the signal.
        steps: after so many recorded steps; with 0, after the first line of output, before the first step; or, without:
        call: at this file-system call in the folder of the checkpoints.
        delay: seconds after that.
    """

    number: int
    steps: int | None = None
    call: int | None = None
    delay: float = 0.0


def _chains(name: str, interruptions: list[Interruption]) -> list[Case]:
    """Cases of a few interruptions each, at later and later steps."""
    cases = []
    for number, at in enumerate(range(0, len(interruptions), LENGTH)):
        part = interruptions[at : at + LENGTH]
        check = partial(_check_chain, interruptions=part)
        cases.append(Case(f"{name}, chain {number}", check, counts=len(part)))
    return cases


def _at_steps(draw: random.Random, numbers: list[int], at_start: bool = False) -> list[Interruption]:
    """Interruptions at random moments; each chain of them goes through the whole run.

    Args:
        at_start: the first of each chain is before its first step.
    """
    found = []
    for at in range(0, len(numbers), LENGTH):
        part = numbers[at : at + LENGTH]
        if at_start:
            found.append(Interruption(part.pop(), steps=0, delay=draw.uniform(0, 3)))
        for step, number in zip(sorted(draw.sample(range(1, STEPS - 50), len(part))), part, strict=True):
            found.append(Interruption(number, steps=step, delay=draw.uniform(0, 0.05)))
    return found


def kill_cases(draw: random.Random, harness: Harness) -> list[Case]:
    return _chains("kill", _at_steps(draw, [signal.SIGKILL] * N_KILLS, at_start=True))


def save_cases(draw: random.Random, harness: Harness) -> list[Case]:
    found = [Interruption(signal.SIGKILL, call=draw.randint(1, 2 * CALLS_OF_A_SAVE)) for _ in range(N_IN_SAVE)]
    return _chains("kill inside a save", found)


def signal_cases(draw: random.Random, harness: Harness) -> list[Case]:
    numbers = [SIGNALS[at % len(SIGNALS)] for at in range(N_SIGNALS)]
    draw.shuffle(numbers)
    return _chains("signals", _at_steps(draw, numbers))


def hash_seed_cases(draw: random.Random, harness: Harness) -> list[Case]:
    seeds = draw.sample(range(1, 2**32), N_HASH_SEEDS)
    return [Case(f"PYTHONHASHSEED={seed}", partial(_check_hash_seed, seed=seed)) for seed in seeds]


def _args(harness: Harness) -> list[str]:
    return train_args(harness, steps=STEPS)


def uninterrupted(harness: Harness) -> dict[str, str]:
    """What a run without interruptions leaves; made in a fresh process, as all runs of the chains are."""

    def make(harness: Harness, folder: Path) -> dict[str, str]:
        run = folder / "run"
        done = harness.fresh([*_args(harness), "--out-dir", str(run)])
        if done.code != 0:
            raise RuntimeError(f"a run without faults ended with {done.code}: {done.err}")
        return harness.warm.snapshot(run)

    return harness.prepared("uninterrupted", make)


def _check_chain(harness: Harness, folder: Path, interruptions: list[Interruption]) -> Finding:
    reference = uninterrupted(harness)
    run = folder / "run"
    args = [*_args(harness), "--out-dir", str(run)]
    for number, interruption in enumerate(interruptions):
        before = snapshots.checkpoint_steps(run)
        plan = None
        if interruption.call:
            plan = Plan(str(run / "checkpoints"), nth=interruption.call, action=KILL)
        started = Interrupted(harness, command(args, plan), folder / f"log-{number}")
        if interruption.steps is not None:
            started.wait_for_steps(run, interruption.steps) if interruption.steps else started.wait_for_output()
            time.sleep(interruption.delay)
        done = started.end(interruption.number if plan is None else None)
        what = f"start {number}"
        if done.hung:
            return Finding(Outcome.HANG, what, "does not end")
        if done.traceback:
            return Finding(Outcome.TRACEBACK, what, done.message)
        saved = EXIT_CODES.get(interruption.number, 128 + interruption.number)
        if done.code not in (0, saved, -interruption.number):
            return Finding(Outcome.LOST, what, f"exit {done.code} after signal {interruption.number}: {done.message}")
        if done.code == -interruption.number != -signal.SIGKILL:
            # The signal itself ended the process: before the training or after its end, when all is saved.
            recorded, after = snapshots.recorded_steps(run), snapshots.checkpoint_steps(run)
            if recorded > max(after, default=0):
                return Finding(Outcome.LOST, what, f"ended by signal {interruption.number} after {recorded} steps")
            continue
        if "finished already" in done.out:
            continue
        if "resuming after " not in done.out and before and done.code != -signal.SIGKILL:
            return Finding(Outcome.LOST, what, f"did not resume after {max(before)} steps")
        resumed = int(done.out.split("resuming after ")[1].split()[0]) if "resuming after " in done.out else 0
        if resumed and before and resumed < max(before):
            return Finding(Outcome.LOST, what, f"resumed after {resumed} steps, though {max(before)} were saved")
        if done.code not in (0, -signal.SIGKILL) and "all saved" not in done.out:
            return Finding(Outcome.LOST, what, f"nothing says that all is saved: {done.message}")
    done = harness.fresh(args)
    return judge_end(harness, done, run, reference)


def _check_hash_seed(harness: Harness, folder: Path, seed: int) -> Finding:
    reference = uninterrupted(harness)
    run = folder / "run"
    done = harness.fresh([*_args(harness), "--out-dir", str(run)], more_env={"PYTHONHASHSEED": str(seed)})
    return judge_end(harness, done, run, reference, "train")


_HOW = "with dropout, evaluation, samples, gradient records and a checkpoint every 10 of 400 steps"
_THEN = "the same command until the run ends; its state and records against an uninterrupted run's"
FAULTS = [
    Fault("kill -9 at a random moment", f"SIGKILL after a random number of steps, {_HOW}", _THEN, kill_cases, 1),
    Fault(
        "kill -9 inside a save",
        "SIGKILL at the n-th file-system call in the folder of the checkpoints, n drawn from the first two saves",
        _THEN,
        save_cases,
        1,
    ),
    Fault(
        "a signal at a random moment",
        f"SIGTERM, SIGINT, SIGHUP or SIGUSR1 after a random number of steps, {_HOW}",
        f"all is saved, and told; {_THEN}",
        signal_cases,
        1,
    ),
    Fault("another hash seed", "a fresh process with another PYTHONHASHSEED", "the whole run", hash_seed_cases, 1),
]
