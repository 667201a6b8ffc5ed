"""The runs that cases damage: prepared once, and copied for each case."""

import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.conftest import SMALL, make_text, write_labeled
from tests.faults.engine import Harness
from tests.faults.processes import ROOT, TIMEOUT, Done, command

STEPS = 60
HALF_WAY = 35
TEXTS = ["la ti la", "mo ru mo ru", "ha la"]


@dataclass(frozen=True)
class Prepared:
    """A run, and what its commands do while it is undamaged.

    Args:
        path: its folder; cases copy it.
        train: the arguments that trained it, and resume it, but for --out-dir.
        ends: what `snapshots.snapshot` finds after each command.
        done: what each command printed.
        exported: the bytes that the export wrote.
    """

    path: Path
    train: list[str]
    reads: str = "evaluate"
    done: dict[str, Done] = field(default_factory=dict)
    ends: dict[str, dict[str, str]] = field(default_factory=dict)
    exported: bytes = b""

    def commands(self, run: Path, out: Path) -> dict[str, list[str]]:
        """What is run after a corruption of a copy in `run`; files go to `out`."""
        use = ["evaluate", str(run), "--json"] if self.reads == "evaluate" else ["classify", str(run), *TEXTS, "--json"]
        return {
            self.reads: use,
            "export": ["convert", "export", str(run), "--out", str(out / "weights.safetensors"), "--overwrite"],
            "resume": [*self.train, "--out-dir", str(run)],
        }


def text_file(harness: Harness) -> Path:
    def make(harness: Harness, folder: Path) -> Path:
        path = folder / "words.txt"
        path.write_text(make_text(), encoding="utf-8")
        return path

    return harness.prepared("text", make)


def train_args(harness: Harness, *more: str, steps: int = STEPS) -> list[str]:
    return ["train", "--dataset", f"file:{text_file(harness)}", "--steps", str(steps), *SMALL, *harness.flags, *more]


class Whole(NamedTuple):
    """A run without faults, and its snapshot."""

    path: Path
    snapshot: dict[str, str]


def whole(harness: Harness) -> Whole:
    """The run of `train_args` that ran through."""

    def make(harness: Harness, folder: Path) -> Whole:
        run = folder / "run"
        _require(harness.warm.run([*train_args(harness), "--out-dir", str(run)]))
        return Whole(run, harness.warm.snapshot(run))

    return harness.prepared("whole", make)


def finished(harness: Harness) -> Prepared:
    """A run that has ended; `inspect` has written into it as well."""

    def make(harness: Harness, folder: Path) -> Prepared:
        run = Prepared(folder / "run", train_args(harness))
        shutil.copytree(whole(harness).path, run.path)
        _require(harness.warm.run(["inspect", str(run.path), "--gradients"]))
        return with_references(harness, run, folder)

    return harness.prepared("finished", make)


def half_way(harness: Harness) -> Prepared:
    """A run that was killed between two checkpoints."""

    def make(harness: Harness, folder: Path) -> Prepared:
        run = Prepared(folder / "run", train_args(harness))
        line = command([*run.train, "--out-dir", str(run.path)])
        killed = Interrupted(harness, line, folder / "log")
        killed.wait_for_steps(run.path, HALF_WAY)
        killed.end(signal.SIGKILL)
        return with_references(harness, run, folder)

    return harness.prepared("half-way", make)


def early_stopped(harness: Harness) -> Prepared:
    """A run that stopped early: its result is its best checkpoint, not its last."""

    def make(harness: Harness, folder: Path) -> Prepared:
        run = Prepared(folder / "run", train_args(harness, "--patience=2", "--lr=0.5", steps=400))
        _require(harness.warm.run([*run.train, "--out-dir", str(run.path)]))
        return with_references(harness, run, folder)

    return harness.prepared("early-stopped", make)


def classifier(harness: Harness) -> Prepared:
    """A classifier's run that has ended."""

    def make(harness: Harness, folder: Path) -> Prepared:
        base = folder / "base"
        _require(harness.warm.run([*train_args(harness, steps=20), "--out-dir", str(base)]))
        table = write_labeled(folder / "labeled.csv")
        flags = f"--dataset=file:{table} --epochs=4 --batch-size=8 --max-tokens=16 --lr=0.01 --checkpoint-every=20"
        run = Prepared(folder / "run", ["finetune", str(base), *flags.split()], reads="classify")
        _require(harness.warm.run([*run.train, "--out-dir", str(run.path)]))
        return with_references(harness, run, folder)

    return harness.prepared("classifier", make)


ALL: dict[str, Callable[[Harness], Prepared]] = {
    "finished": finished,
    "half-way": half_way,
    "early-stopped": early_stopped,
    "classifier": classifier,
}


def with_references(harness: Harness, run: Prepared, folder: Path) -> Prepared:
    """A run, with what its commands do while it is undamaged; `folder` is for their files."""
    copy = folder / "copy"
    shutil.copytree(run.path, copy, symlinks=True)
    for name, args in run.commands(copy, folder).items():
        run.done[name] = harness.warm.run(args)
        run.ends[name] = harness.warm.snapshot(copy)
    weights = folder / "weights.safetensors"
    object.__setattr__(run, "exported", weights.read_bytes() if weights.exists() else b"")
    shutil.rmtree(copy)
    return run


def _require(done: Done) -> None:
    if done.code != 0:
        raise RuntimeError(f"a run without faults ended with {done.code}: {done.err or done.out}")


class Interrupted:
    """A command in a process of its own, to be interrupted. Its output goes to a file."""

    def __init__(self, harness: Harness, line: list[str], log: Path):
        self.log = log
        with log.open("wb") as f:
            self.process = subprocess.Popen(line, cwd=ROOT, env=harness.env, stdout=f, stderr=subprocess.STDOUT)

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for_steps(self, run: Path, n_steps: int) -> bool:
        """Waits until so many steps are recorded; False if the process ended before."""
        steps = run / "steps.csv"
        return self._wait(lambda: steps.exists() and steps.read_bytes().count(b"\n") > n_steps)

    def wait_for_output(self) -> bool:
        """Waits for the first line; False if the process ended before."""
        return self._wait(lambda: self.log.stat().st_size > 0)

    def end(self, number: int | None) -> Done:
        """Sends a signal, if one is given, and waits for the end."""
        if number is not None and self.process.poll() is None:
            self.process.send_signal(number)
        try:
            code = self.process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return Done(-9, self.output, "", hung=True)
        return Done(code, self.output, self.output)

    def _wait(self, ready: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + TIMEOUT
        while self.process.poll() is None and time.monotonic() < deadline:
            if ready():
                return True
            time.sleep(0.005)
        return ready()
