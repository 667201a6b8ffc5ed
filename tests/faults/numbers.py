"""Losses, gradients and states that are not finite: none may ever be in a checkpoint."""

import dataclasses
import json
import math
import random
from functools import partial
from pathlib import Path

from tests.conftest import make_text
from tests.faults import runs, snapshots
from tests.faults.engine import Case, Fault, Finding, Harness, Outcome, judge_failure
from tests.faults.poison import MARK, PLACES, Poison

N_MARKS = 12  # of the text's 23,000 characters: some four of sixty batches hold one


def number_cases(draw: random.Random, harness: Harness) -> list[Case]:
    """Each place and value, in some steps or in all, with both policies."""
    found = []
    for place in PLACES:
        for value in ("nan", "inf"):
            for always in (False, True):
                for policy in ("stop", "skip"):
                    when = "always" if always else "at times"
                    check = partial(_check, poison=Poison(place, value, always), policy=policy)
                    found.append(Case(f"{value} in the {place}, {when}, --on-nonfinite {policy}", check))
    draw.shuffle(found)
    return found


def _marked_text(harness: Harness) -> Path:
    def make(harness: Harness, folder: Path) -> Path:
        text = make_text()
        for number in range(N_MARKS):
            at = (number * len(text) * 4 // 5) // N_MARKS
            text = text[:at] + MARK + text[at:]
        path = folder / "marked.txt"
        path.write_text(text, encoding="utf-8")
        return path

    return harness.prepared("marked", make)


def _check(harness: Harness, folder: Path, poison: Poison, policy: str) -> Finding:
    run = folder / "run"
    args = [*runs.train_args(harness), f"--dataset=file:{_marked_text(harness)}", f"--on-nonfinite={policy}"]
    args += ["--out-dir", str(run)]
    done = harness.warm.run(args, poison=dataclasses.asdict(poison))
    if snapshots.NOT_FINITE in " ".join(harness.warm.snapshot(run).values()):
        return Finding(Outcome.LOST, "train", "a checkpoint holds what is not finite")
    may_end = policy == "skip" and poison.place in ("loss", "gradients") and not poison.always
    if done.code == 0 and may_end:
        found = Finding(Outcome.TOLD if "update skipped" in done.out else Outcome.SILENT, "train", done.message)
    else:
        found = judge_failure(done, "train", (3,))
    if found.outcome != Outcome.TOLD:
        return found
    if snapshots.checkpoint_steps(run):
        read = harness.warm.run(["evaluate", str(run), "--json"])
        if read.code != 0 or not math.isfinite(json.loads(read.out)["loss"]):
            return Finding(Outcome.LOST, "evaluate", f"exit {read.code}: {read.message or read.out}")
    again = harness.warm.run(args)
    if again.code != 0:
        return Finding(Outcome.LOST, "resume", f"exit {again.code} without the fault: {again.message}")
    return found


FAULTS = [
    Fault(
        "numbers that are not finite",
        "NaN or infinity in the loss, the gradients, the moments or the weights, in some steps or in all, with "
        "`--on-nonfinite stop` and `skip`",
        "every checkpoint is finite; evaluate; the same command without the fault",
        number_cases,
        3,
    )
]
