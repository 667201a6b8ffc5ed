"""Damage to the files of a run folder, followed by evaluate or classify, export and resume.

Each damage must be told, or have no effect. A command that refuses must leave every file as it was, and nothing outside
the run folder may ever change.
"""

import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests.faults import runs, snapshots
from tests.faults.engine import Case, Fault, Finding, Harness, Outcome, judge_failure, worst
from tests.faults.processes import Done
from tests.faults.runs import Prepared

N_CASES = 300
FRESH = 25  # every so many cases run their commands in fresh processes


@dataclass
class Damage:
    """What a damage needs and leaves.

    Args:
        run: the folder to damage.
        name: the entry, relative to it.
        draw: random numbers.
        other: the folder of another prepared run, whose files may take the place of this one's.
        beside: a folder outside the run.
        names: what a message may name, besides `name`.
    """

    run: Path
    name: str
    draw: random.Random
    other: Callable[[], Path]
    beside: Path
    names: list[str] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return self.run / self.name

    def remove(self) -> None:
        if self.path.is_dir() and not self.path.is_symlink():
            shutil.rmtree(self.path)
        else:
            self.path.unlink(missing_ok=True)


class Kind(NamedTuple):
    damage: Callable[[Damage], None]
    of: Callable[[Path], bool]  # which entries it can be done to


def flip(d: Damage) -> None:
    """Flips one bit."""
    data = bytearray(d.path.read_bytes())
    at = d.draw.randrange(len(data))
    data[at] ^= 1 << d.draw.randrange(8)
    d.path.write_bytes(data)


def cut(d: Damage) -> None:
    size = d.path.stat().st_size
    os.truncate(d.path, d.draw.randrange(1, size))


def empty(d: Damage) -> None:
    os.truncate(d.path, 0)


def delete(d: Damage) -> None:
    d.remove()


def swap(d: Damage) -> None:
    """Swaps the entry with another of its folder: the next one of its own kind."""
    same = [path for path in sorted(d.path.parent.iterdir()) if path.is_dir() == d.path.is_dir() and path != d.path]
    alike = [path for path in same if path.suffix == d.path.suffix] or same
    other = d.draw.choice(alike)
    aside = d.beside / "aside"
    os.rename(d.path, aside)
    os.rename(other, d.path)
    os.rename(aside, other)
    d.names.append(other.relative_to(d.run).as_posix())


def rename(d: Damage) -> None:
    """Gives the entry another name; a checkpoint the name of another step."""
    new = str(d.draw.randrange(61, 400)) if d.path.name.isdigit() else d.path.name + ".old"
    os.rename(d.path, d.path.with_name(new))
    d.names.append((Path(d.name).parent / new).as_posix())


def replace_by_folder(d: Damage) -> None:
    d.remove()
    d.path.mkdir()


def replace_by_file(d: Damage) -> None:
    d.remove()
    d.path.write_text("not a folder\n")


def replace_by_fifo(d: Damage) -> None:
    d.remove()
    os.mkfifo(d.path)


def replace_by_link(d: Damage) -> None:
    """Replaces the entry by a link to a file or folder outside that holds something else."""
    if d.path.is_dir():
        shutil.copytree(d.path, d.beside / "linked")
        for path in snapshots.walk(d.beside / "linked"):
            if path.is_file():
                path.write_bytes(path.read_bytes() + b"x")
    else:
        (d.beside / "linked").write_text("a file of the user's\n")
    d.remove()
    d.path.symlink_to(d.beside / "linked")


def replace_by_zeros(d: Damage) -> None:
    """Replaces the entry by a link to /dev/zero, a file without end."""
    d.remove()
    d.path.symlink_to("/dev/zero")


def take_other(d: Damage) -> None:
    """Replaces the entry by a like one of another run."""
    other = d.other()
    theirs = [path for path in snapshots.walk(other) if place(path.relative_to(other).as_posix()) == place(d.name)]
    d.remove()
    if not theirs:  # that run has none
        return
    path = d.draw.choice(theirs)
    if path.is_dir():
        shutil.copytree(path, d.path)
    else:
        shutil.copyfile(path, d.path)


def place(name: str) -> str:
    """A name without what is random in it: the same for like entries of all runs."""
    return re.sub(r"^checkpoints/\d+", "checkpoints/N", re.sub(r"[0-9a-f]{32}", "*", name))


def edit(d: Damage) -> None:
    """Replaces one digit by another, as by hand."""
    text = d.path.read_text()
    at = d.draw.choice([m.start() for m in re.finditer("[0-9]", text)])
    digit = d.draw.choice([c for c in "123456789" if c != text[at]])
    d.path.write_text(text[:at] + digit + text[at + 1 :])


def lose_line(d: Damage) -> None:
    lines = d.path.read_text().splitlines(keepends=True)
    del lines[d.draw.randrange(len(lines) - 1)]
    d.path.write_text("".join(lines))


def double_line(d: Damage) -> None:
    lines = d.path.read_text().splitlines(keepends=True)
    at = d.draw.randrange(len(lines))
    d.path.write_text("".join([*lines[:at], lines[at], *lines[at:]]))


def plant_link(d: Damage) -> None:
    """Puts a link to a file outside where the program will write."""
    d.remove()
    (d.beside / "linked").write_text("a file of the user's\n")
    d.path.parent.mkdir(exist_ok=True)
    d.path.symlink_to(d.beside / "linked")


def plant_fifo(d: Damage) -> None:
    """Puts a FIFO where the program will write."""
    d.remove()
    d.path.parent.mkdir(exist_ok=True)
    os.mkfifo(d.path)


def _is_file(path: Path) -> bool:
    return path.is_file()


def _has_bytes(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 1


def _is_text(path: Path) -> bool:
    return path.suffix in (".json", ".jsonl", ".csv") and bool(re.search("[0-9]", path.read_text()))


def _is_record(path: Path) -> bool:
    return path.suffix in (".jsonl", ".csv") and path.read_text().count("\n") > 1


def _has_like(path: Path) -> bool:
    return sum(other.is_dir() == path.is_dir() for other in path.parent.iterdir()) > 1


KINDS = {
    "flip a bit": Kind(flip, _has_bytes),
    "cut": Kind(cut, _has_bytes),
    "empty": Kind(empty, _has_bytes),
    "delete": Kind(delete, Path.exists),
    "swap with another": Kind(swap, _has_like),
    "rename": Kind(rename, Path.exists),
    "replace by a folder": Kind(replace_by_folder, _is_file),
    "replace by a file": Kind(replace_by_file, Path.is_dir),
    "replace by a FIFO": Kind(replace_by_fifo, Path.exists),
    "replace by a link": Kind(replace_by_link, Path.exists),
    "replace by a link to /dev/zero": Kind(replace_by_zeros, _is_file),
    "take another run's": Kind(take_other, Path.exists),
    "change a digit": Kind(edit, _is_text),
    "lose a line": Kind(lose_line, _is_record),
    "double a line": Kind(double_line, _is_record),
}
PLANTED = {"plant a link": plant_link, "plant a FIFO": plant_fifo}
# Where the program writes while it resumes the half-way run; what is there must not be followed or waited for.
TO_BE_WRITTEN = (
    "summary.json",
    "summary.json.partial",
    "config.json.partial",
    "tokenizer.json.partial",
    "steps.csv.partial",
    "metrics.jsonl.partial",
    "sample.txt",
    "learning_curves.png",
    "learning_curves.png.partial",
    "attention.gif",
    "attention/00000060.npy",
    "manifest.json",
    "checkpoints/60.partial",
    "checkpoints/60",
)


class Target(NamedTuple):
    """An entry of a prepared run, or a place where the program will write, and what is done to it."""

    run: str
    name: str
    kind: str


def targets(harness: Harness, names: tuple[str, ...]) -> list[Target]:
    """Every kind of damage on every entry of the prepared runs that it can be done to."""
    found = []
    for run in names:
        path = runs.ALL[run](harness).path
        for entry in snapshots.walk(path):
            name = entry.relative_to(path).as_posix()
            found += [Target(run, name, kind) for kind in KINDS if KINDS[kind].of(entry)]
    planted = [Target("half-way", name, kind) for name in TO_BE_WRITTEN for kind in PLANTED]
    return found + (planted if "half-way" in names else [])


def corruption_cases(
    draw: random.Random, harness: Harness, names: tuple[str, ...] = tuple(runs.ALL), n_cases: int = N_CASES
) -> list[Case]:
    """Cases spread evenly over kinds, runs and entries."""
    left = targets(harness, names)
    draw.shuffle(left)
    seen: Counter = Counter()
    cases = []
    for number in range(n_cases):
        target = min(left, key=lambda t: seen[t.kind] + 3 * seen[t.run, place(t.name)] + seen[t.run] / 20)
        left.remove(target)
        seen.update([target.kind, (target.run, place(target.name)), target.run])
        check = partial(_check, target=target, seed=draw.random(), fresh=number % FRESH == FRESH - 1)
        cases.append(Case(f"{number}: {target.run}: {target.kind}: {target.name}", check))
    return cases


def _check(harness: Harness, folder: Path, target: Target, seed: float, fresh: bool) -> Finding:
    """Damages a copy of a run, and judges each command on it."""
    prepared = runs.ALL[target.run](harness)
    run, beside = folder / "run", folder / "beside"
    shutil.copytree(prepared.path, run, symlinks=True)
    beside.mkdir()
    other = "early-stopped" if target.run != "early-stopped" else "finished"
    damage = Damage(run, target.name, random.Random(seed), lambda: runs.ALL[other](harness).path, beside)
    whole = snapshots.tree(run)
    made = KINDS[target.kind].damage if target.kind in KINDS else PLANTED[target.kind]
    made(damage)
    outside = snapshots.tree(beside)
    hurt = set(snapshots.differences(snapshots.tree(run), whole))
    judge = _Judge(harness, prepared, run, [target.name, *damage.names], hurt)
    findings = []
    for name, args in prepared.commands(run, folder).items():
        before = snapshots.tree(run)
        done = harness.fresh(args) if fresh else harness.warm.run(args)
        findings.append(judge(name, done, before))
        if snapshots.tree(beside) != outside:
            findings.append(Finding(Outcome.LOST, name, "a file outside the run folder was changed"))
            break
    return worst(findings)


class _Judge:
    """What to make of the commands on a damaged copy of a run.

    Args:
        names: the entries that a message may name.
        hurt: the entries that the damage changed.
    """

    def __init__(self, harness: Harness, prepared: Prepared, run: Path, names: list[str], hurt: set[str]):
        self.harness, self.prepared, self.run, self.hurt = harness, prepared, run, hurt
        self.words = [word for name in names for word in _words(name)]

    def __call__(self, command: str, done: Done, before: dict[str, str]) -> Finding:
        """The finding for a command; `before` is the folder as the command found it."""
        undamaged = self.prepared.done[command]
        after = snapshots.tree(self.run)
        if done.hung or done.traceback or done.code not in (0, undamaged.code):
            found = judge_failure(done, command)
            changed = [name for name in snapshots.differences(after, before) if ".partial" not in name]
            if found.outcome == Outcome.TOLD and changed:
                return Finding(Outcome.LOST, command, f"refused, but changed {', '.join(changed[:4])}: {found.what}")
            return found
        different = self._differences(command, done)
        usual = {*undamaged.err.splitlines(), *undamaged.out.splitlines()}
        lines = [line for line in (done.err + done.out).splitlines() if line not in usual]
        told = [line for line in lines if any(re.search(word, line.replace(str(self.run), "")) for word in self.words)]
        told = [line for line in told if not line.startswith("resuming after")]
        if told:
            lost = set(different) & self._result() if command == "resume" else ()
            if lost:
                return Finding(Outcome.LOST, command, f"told, but the end differs in {', '.join(lost)}: {told[0]}")
            return Finding(Outcome.TOLD, command, told[0])
        # What no command reads stays as the damage left it: an older checkpoint, a picture that `inspect` has made.
        untouched = {name for name in self.hurt if after.get(name) == before.get(name)}
        aside = {_top(name) for name in untouched if _top(name).startswith(("checkpoints/", "inspect"))}
        different = [name for name in different if _top(name) not in aside]
        if different:
            return Finding(Outcome.SILENT, command, f"exit {done.code}; differs in {', '.join(different[:5])}")
        return Finding(Outcome.NO_EFFECT, command)

    def _result(self) -> set[str]:
        """The entries that make a run's result: its last checkpoint, its records, its summary."""
        end = self.prepared.ends["resume"]
        steps = sorted((name for name in end if name.startswith("checkpoints/")), key=lambda name: int(name[12:]))
        return {steps[-1], "summary.json", "steps.csv", "metrics.jsonl"}

    def _differences(self, command: str, done: Done) -> list[str]:
        """In what a command's output, and the files that it leaves, differ from those of the undamaged run."""
        if command == "resume":
            return snapshots.differences(self.harness.warm.snapshot(self.run), self.prepared.ends[command])
        if done.code != 0:
            return []
        if command == "export":
            same = (self.run.parent / "weights.safetensors").read_bytes() == self.prepared.exported
            return [] if same else ["the weights"]
        return [] if done.out == self.prepared.done[command].out else ["output"]


def _words(name: str) -> list[str]:
    """What a message about an entry has to name: the file, or the checkpoint that it belongs to."""
    parts = name.removesuffix(".partial").split("/")
    if parts[0] == "checkpoints" and len(parts) > 1:
        return [rf"\b{parts[1]}\b"]
    return [re.escape(part) for part in parts]


def _top(name: str) -> str:
    """The checkpoint that a name belongs to; of other names the name itself."""
    return "/".join(name.split("/")[:2]) if name.startswith("checkpoints/") else name


FAULT = Fault(
    name="damaged files",
    how="a file or folder cut, emptied, deleted, swapped, renamed, edited, a bit of it flipped, replaced by a folder, "
    "a FIFO or a link, or taken from another run; of a finished, a half-way, an early-stopped and a classifier's run",
    then="evaluate or classify, export, resume",
    cases=corruption_cases,
    sample=12,
)
