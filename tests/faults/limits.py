"""Calls that fail, and limits of the system: full disks, read-only folders, permissions, descriptors, memory.

A command that meets one must end with a message and a code. It must leave the run so that its last checkpoint loads,
and so that the same command without the fault ends it as if nothing had been.
"""

import ctypes
import random
import resource
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults import runs, snapshots
from tests.faults.calls import CALLS, Plan
from tests.faults.engine import Case, Fault, Finding, Harness, Outcome, judge_end, judge_failure, worst
from tests.faults.processes import Done

ERRORS = {
    "open": ("ENOSPC", "EACCES", "EROFS", "EMFILE", "EIO"),
    "write": ("ENOSPC", "EDQUOT", "EIO", "EFBIG"),
    "fsync": ("ENOSPC", "EIO"),
    "rename": ("ENOSPC", "EACCES", "EIO"),
    "mkdir": ("ENOSPC", "EACCES", "EROFS"),
    "remove": ("EACCES", "EROFS", "EIO"),
}
N_CALLS, N_CONTINUED = 60, 10
FILE_SIZES = (100, 300, 700, 1500, 3000, 5000, 9000, 17000, 25000, 40000)  # bytes; the largest file has about 50,000
DESCRIPTORS = (12, 16, 20, 24, 28, 32, 40, 48)
ADDRESS_SPACES = (300, 500, 700, 900, 1100, 1300, 1600, 2000)  # MiB; a training has about 2,000
DISK_SIZES = (20, 60, 100, 160, 240, 320, 400, 500)  # KiB; a run has about 600
CAPABILITIES = (0, 1, 2, 3)  # chown, and what lets root pass permissions: dac_override, dac_read_search, fowner


def _after(harness: Harness, run: Path, done: Done, command: str = "train") -> Finding:
    """The finding for a training that met a fault: its message, its checkpoints, and its end without the fault."""
    reference = runs.whole(harness).snapshot
    if done.code == 0 and not done.hung:
        found = judge_end(harness, done, run, reference, command)
        return found if found.outcome != Outcome.EQUAL else Finding(Outcome.NO_EFFECT)
    findings = [judge_failure(done, command)]
    kept = snapshots.checkpoint_steps(run)
    if kept:
        read = harness.warm.run(["evaluate", str(run), "--json"])
        if read.code != 0:
            findings.append(Finding(Outcome.LOST, "evaluate", f"exit {read.code} after {done.message}: {read.message}"))
    again = harness.warm.run([*runs.train_args(harness), "--out-dir", str(run)])
    end = judge_end(harness, again, run, reference)
    findings.append(end if end.outcome != Outcome.EQUAL else Finding(Outcome.TOLD))
    goes_on = f"resuming after {max(kept, default=0)} of" in again.out or "finished already" in again.out
    if kept and not goes_on:
        findings.append(Finding(Outcome.LOST, "resume", f"does not go on from the {max(kept)} steps that were saved"))
    return worst(findings)


# --------------------------------------------------------------------------------------------------- calls that fail


def call_cases(draw: random.Random, harness: Harness, n_cases: int = N_CALLS) -> list[Case]:
    """Cases in which the n-th call of one sort fails, or all from it on; n up to as many as a training makes."""
    counts = _counts(harness)
    cases = []
    for number in range(n_cases):
        call = CALLS[number % len(CALLS)]
        plan = dict(
            calls=(call,),
            nth=draw.randint(1, counts[call]),
            action=draw.choice(ERRORS[call]),
            lasts=draw.random() < 0.5,
        )
        lasts = " and all after it" if plan["lasts"] else ""
        name = f"{number}: {call} number {plan['nth']}{lasts}: {plan['action']}"
        cases.append(Case(name, partial(_check_call, plan=plan)))
    return cases


def _counts(harness: Harness, below: str = "") -> dict[str, int]:
    """How many calls of each sort a training makes in its folder, or below a part of it."""

    def make(harness: Harness, folder: Path) -> dict[str, int]:
        run = folder / "run"
        return harness.warm.run([*runs.train_args(harness), "--out-dir", str(run)], Plan(str(run / below))).counts

    return harness.prepared(f"counts-{below}", make)


def _check_call(harness: Harness, folder: Path, plan: dict[str, Any]) -> Finding:
    run = folder / "run"
    done = harness.warm.run([*runs.train_args(harness), "--out-dir", str(run)], Plan(str(run), **plan))
    return _after(harness, run, done)


def continued_cases(draw: random.Random, harness: Harness) -> list[Case]:
    """Cases in which one save fails, and the training goes on without it."""
    cases = []
    for number in range(N_CONTINUED):
        call, at = draw.choice(("open", "fsync", "rename", "mkdir", "write")), draw.random()
        cases.append(Case(f"{number}: {call} at {at:.2f}", partial(_check_continued, call=call, at=at)))
    return cases


def _check_continued(harness: Harness, folder: Path, call: str, at: float) -> Finding:
    """One call below checkpoints/ fails, neither in the first save nor in the last."""
    run = folder / "run"
    args = [*runs.train_args(harness), "--out-dir", str(run), "--on-save-error=continue"]
    nth = int(_counts(harness, "checkpoints")[call] * (0.25 + at / 2))
    done = harness.warm.run(args, Plan(str(run / "checkpoints"), (call,), nth, "ENOSPC"))
    if done.code != 0 or done.hung:
        return judge_failure(done, "train --on-save-error continue", ())
    reference = runs.whole(harness).snapshot
    lost = [name for name in snapshots.differences(harness.warm.snapshot(run), reference) if not _may_lack(name)]
    if lost:
        return Finding(Outcome.LOST, "train --on-save-error continue", f"the end differs in {', '.join(lost)}")
    if "training goes on" not in done.out + done.err:
        return Finding(Outcome.SILENT, "train --on-save-error continue", "nothing says that a save failed")
    return Finding(Outcome.TOLD)


def _may_lack(name: str) -> bool:
    """Whether a run without one of its saves may differ there: older checkpoints, and the list of them."""
    return name == "manifest.json" or (name.startswith("checkpoints/") and name != f"checkpoints/{runs.STEPS}")


# ----------------------------------------------------------------------------------------------- limits of the system


def _limit_cases(name: str, limit: int, values: tuple[int, ...], unit: int) -> Callable[..., list[Case]]:
    def cases(draw: random.Random, harness: Harness) -> list[Case]:
        return [
            Case(f"{name} {value}", partial(_check_limit, before=partial(_set_limit, limit, value * unit)))
            for value in values
        ]

    return cases


def _set_limit(limit: int, value: int) -> None:
    resource.setrlimit(limit, (value, value))


def _check_limit(harness: Harness, folder: Path, before: Callable[[], None]) -> Finding:
    run = folder / "run"
    done = harness.fresh([*runs.train_args(harness), "--out-dir", str(run)], before=before)
    return _after(harness, run, done)


def disk_cases(draw: random.Random, harness: Harness) -> list[Case]:
    return [Case(f"a disk of {size} KiB", partial(_check_disk, size=size)) for size in DISK_SIZES]


def _namespace() -> tuple[str, ...] | None:
    """The words before a command that may mount, or None where that is not allowed."""
    for words in (("unshare", "-m"), ("unshare", "-Urm")):
        test = [*words, "sh", "-c", "mount -t tmpfs none /mnt"]
        if shutil.which("unshare") and subprocess.run(test, capture_output=True).returncode == 0:
            return words
    return None


def _check_disk(harness: Harness, folder: Path, size: int) -> Finding:
    """Trains on a file system in memory; what it holds at the end is copied out of it."""
    words = _namespace()
    if words is None:
        return Finding(Outcome.SKIPPED, what="mounting a file system is not allowed")
    disk, run = folder / "disk", folder / "run"
    disk.mkdir()
    script = f'mount -t tmpfs -o size={size}k none {disk} && "$@"; code=$?; cp -a {disk}/run {run}; exit $code'
    args = [*runs.train_args(harness), "--out-dir", str(disk / "run")]
    done = harness.fresh(args, prefix=(*words, "sh", "-c", script, "sh"))
    return _after(harness, run, done)


def read_only_cases(draw: random.Random, harness: Harness) -> list[Case]:
    places = ("the run folder", "the folder of a new run", "the home")
    return [Case(f"read-only: {place}", partial(_check_read_only, place=place)) for place in places]


def _check_read_only(harness: Harness, folder: Path, place: str) -> Finding:
    words = _namespace()
    if words is None:
        return Finding(Outcome.SKIPPED, what="mounting a file system is not allowed")
    run = folder / "parent" / "run"
    run.parent.mkdir()
    if place == "the run folder":
        shutil.copytree(runs.half_way(harness).path, run)
    read_only = {"the run folder": run, "the folder of a new run": run.parent, "the home": harness.work / "home"}[place]
    script = f'mount --bind {read_only} {read_only} && mount -o remount,ro,bind {read_only} && exec "$@"'
    before = snapshots.tree(run) if run.exists() else {}
    done = harness.fresh([*runs.train_args(harness), "--out-dir", str(run)], prefix=(*words, "sh", "-c", script, "sh"))
    if done.code != 0 and run.exists() and snapshots.tree(run) != before:
        raise RuntimeError("the folder was not read-only")
    return _after(harness, run, done)


PERMISSIONS = {
    "the run folder without w": ("", 0o555),
    "the run folder without all": ("", 0),
    "checkpoints/ without w": ("checkpoints", 0o555),
    "checkpoints/ without all": ("checkpoints", 0),
    "the last checkpoint without all": ("checkpoints/LAST", 0),
    "config.json without r": ("config.json", 0),
    "steps.csv without w": ("steps.csv", 0o444),
    "steps.csv without all": ("steps.csv", 0),
    "metrics.jsonl without w": ("metrics.jsonl", 0o444),
    "attention/ without w": ("attention", 0o555),
    "manifest.json without r": ("manifest.json", 0),
    ".lock without all": (".lock", 0),
}


def permission_cases(draw: random.Random, harness: Harness) -> list[Case]:
    return [Case(what, partial(_check_permission, name=name, mode=mode)) for what, (name, mode) in PERMISSIONS.items()]


def _check_permission(harness: Harness, folder: Path, name: str, mode: int) -> Finding:
    run = folder / "run"
    shutil.copytree(runs.half_way(harness).path, run)
    name = name.replace("LAST", str(max(snapshots.checkpoint_steps(run))))
    path = run / name
    was = path.stat().st_mode
    path.chmod(mode)
    done = harness.fresh([*runs.train_args(harness), "--out-dir", str(run)], before=_drop_capabilities)
    if path.exists():
        path.chmod(was)
    if done.code == 0 and name in done.err + done.out:
        end = judge_end(harness, done, run, runs.whole(harness).snapshot, "train")
        return end if end.outcome != Outcome.EQUAL else Finding(Outcome.TOLD)
    return _after(harness, run, done)


def _drop_capabilities() -> None:
    """Makes permissions count for root too, from the next exec on; without effect for other users."""
    for number in CAPABILITIES:
        ctypes.CDLL(None).prctl(24, number, 0, 0, 0)  # PR_CAPBSET_DROP


_THEN = "evaluate; the same command without the fault, whose end is held against a run without faults"
FAULTS = [
    Fault(
        "a call fails",
        "the n-th open, write, fsync, rename, mkdir or remove in the run folder raises ENOSPC, EDQUOT, EFBIG, EROFS, "
        "EACCES, EMFILE or EIO: once, or from there on",
        _THEN,
        call_cases,
        4,
    ),
    Fault(
        "a save fails, --on-save-error continue",
        "the n-th such call below checkpoints/ raises ENOSPC once, in neither the first nor the last save",
        "the training goes on, and ends as if nothing had been, but for the checkpoint that could not be written",
        continued_cases,
        1,
    ),
    Fault("a full disk", "the run folder on a file system of 20 to 500 KiB", _THEN, disk_cases, 1),
    Fault(
        "a limit on the size of files",
        "RLIMIT_FSIZE (ulimit -f) of 100 to 40,000 bytes",
        _THEN,
        _limit_cases("bytes of a file:", resource.RLIMIT_FSIZE, FILE_SIZES, 1),
        1,
    ),
    Fault(
        "a limit on descriptors",
        "RLIMIT_NOFILE (ulimit -n) of 12 to 48",
        _THEN,
        _limit_cases("descriptors:", resource.RLIMIT_NOFILE, DESCRIPTORS, 1),
        1,
    ),
    Fault(
        "a limit on the address space",
        "RLIMIT_AS (ulimit -v) of 300 to 2,000 MiB",
        _THEN,
        _limit_cases("MiB of address space:", resource.RLIMIT_AS, ADDRESS_SPACES, 2**20),
        1,
    ),
    Fault("a read-only file system", "a folder mounted read-only", _THEN, read_only_cases, 1),
    Fault("missing permissions", "chmod of a folder or a file of a half-way run", _THEN, permission_cases, 1),
]
