"""Loss of power: what a disk may hold after it, if it keeps only what was forced to it.

A recorder watches a real training in its own process. Before each call that changes files it notes two states in which
the power could fail there:

- strict: a file holds what it held at its last fsync, and a folder the names that it held at its own. What was never
  forced is not there.
- names only: the folders are as they are now, but the files hold what was forced, or nothing. So file systems behave
  that write names before contents.

Each distinct state becomes a folder, in which the same command must end the run as if nothing had been; work since the
checkpoint before the last may be lost, as the last may not have been complete.
"""

import hashlib
import json
import os
import random
import resource
import stat
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults import calls, snapshots
from tests.faults.engine import Case, Fault, Finding, Harness, Outcome, judge_end, judge_failure
from tests.faults.processes import run_line
from tests.faults.runs import text_file

State = tuple[tuple[str, str], ...]  # paths in order, each with the digest of its content; "" for a folder


class Recorder:
    """What is durable of the files below a folder, and the states that a loss of power may leave.

    Args:
        folder: it exists; nothing below it does.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.contents: dict[str, bytes] = {hashlib.sha256(b"").hexdigest(): b""}
        self.states: dict[State, int] = {}  # and from how many steps on a run must go on in it
        self._files: dict[int, str] = {}  # by inode: the digest of the durable content
        self._names: dict[int, dict[str, int]] = {folder.stat().st_ino: {}}  # of folders: the durable names
        self._held: dict[int, int] = {}  # a descriptor of each inode, so that its number is not used again
        self._lock = threading.Lock()

    def before(self, call: str, path: str) -> None:
        """Notes the states in which the power could fail before a call, and what a fsync makes durable."""
        with self._lock:
            self.note()
            if call == "fsync":
                self._force(path)

    def note(self) -> None:
        entries = self._entries()
        steps = sorted(int(name.rpartition("/")[2]) for name in entries if _is_checkpoint(name))
        required = steps[-2] if len(steps) > 1 else 0
        names_only = [(name, self._content(entry)) for name, entry in entries.items()]
        for state in (tuple(sorted(names_only)), tuple(sorted(self._strict(self.folder.stat().st_ino, "")))):
            self.states[state] = max(required, self.states.get(state, 0))

    def _force(self, path: str) -> None:
        try:
            found = os.stat(path)
            if stat.S_ISDIR(found.st_mode):
                self._names[found.st_ino] = {entry.name: self._hold(entry.path) for entry in os.scandir(path)}
            else:
                content = Path(path).read_bytes()
                digest = hashlib.sha256(content).hexdigest()
                self.contents[digest] = content
                self._files[self._hold(path)] = digest
        except FileNotFoundError:
            pass  # another thread has removed it

    def _hold(self, path: str) -> int:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        number = os.fstat(descriptor).st_ino
        if number in self._held:
            os.close(descriptor)
        else:
            self._held[number] = descriptor
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                self._names.setdefault(number, {})
        return number

    def _entries(self) -> dict[str, os.stat_result]:
        """All entries below the folder, seen twice the same: other threads go on meanwhile."""
        before: dict[str, os.stat_result] | None = None
        while True:
            try:
                paths = snapshots.walk(self.folder)
                entries = {path.relative_to(self.folder).as_posix(): path.lstat() for path in paths}
                for path in paths:
                    self._hold(str(path))
            except FileNotFoundError:
                continue
            if before is not None and entries.keys() == before.keys():
                return entries
            before = entries

    def _content(self, entry: os.stat_result) -> str:
        if stat.S_ISDIR(entry.st_mode):
            return ""
        return self._files.get(entry.st_ino, hashlib.sha256(b"").hexdigest())

    def _strict(self, folder: int, prefix: str) -> list[tuple[str, str]]:
        found = []
        for name, number in self._names[folder].items():
            if number in self._names:
                found.append((prefix + name, ""))
                found += self._strict(number, f"{prefix}{name}/")
            else:
                found.append((prefix + name, self._files.get(number, hashlib.sha256(b"").hexdigest())))
        return found

    def write(self, out: Path) -> None:
        """Writes the states and the contents that they name."""
        for digest, content in self.contents.items():
            (out / digest).write_bytes(content)
        (out / "states.json").write_text(json.dumps(list(self.states.items())))


def _is_checkpoint(name: str) -> bool:
    folder, _, step = name.rpartition("/")
    return folder.endswith("/checkpoints") and step.isdigit()


def main() -> None:
    """Records a command: python -m tests.faults.power_loss FOLDER OUT ARG ..."""
    from jaxgpt.cli import main as cli

    folder, out, *args = sys.argv[1:]
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    recorder = Recorder(Path(folder))
    with calls.listening(folder, recorder.before):
        code = cli.run(args)
        recorder.note()
    recorder.write(Path(out))
    sys.exit(code)


# ------------------------------------------------------------------------------------------------------------ the cases


def _args(harness: Harness) -> list[str]:
    small = "--model.n-layer=1 --model.n-head=2 --model.n-embd=16 --model.block-size=16 --batch-size=8 --lr=0.01 "
    small += "--model.dropout=0.1 --eval-every=8 --eval-batches=2 --checkpoint-every=6 --keep-checkpoints=2 "
    small += "--sample-every=10 --sample-tokens=5 --diagnose-every=10 --steps=24"
    return ["train", "--dataset", f"file:{text_file(harness)}", *small.split()]


def _recorded(harness: Harness) -> Any:
    """A recorded run's snapshot, its states, and the folder of their contents."""

    def make(harness: Harness, folder: Path) -> Any:
        below, out = folder / "disk", folder / "contents"
        below.mkdir()
        out.mkdir()
        args = [str(below), str(out), *_args(harness), "--out-dir", str(below / "run")]
        done = run_line([sys.executable, "-m", "tests.faults.power_loss", *args], harness.env)
        if done.code != 0:
            raise RuntimeError(f"a recorded run ended with {done.code}: {done.err}")
        states = json.loads((out / "states.json").read_text())
        return harness.warm.snapshot(below / "run"), states, out

    return harness.prepared("power", make)


def power_cases(draw: random.Random, harness: Harness) -> list[Case]:
    """A case for each distinct state, in random order."""
    _, states, _ = _recorded(harness)
    numbers = list(range(len(states)))
    draw.shuffle(numbers)
    return [Case(f"state {number} of {len(states)}", partial(_check, number=number)) for number in numbers]


def _check(harness: Harness, folder: Path, number: int) -> Finding:
    reference, states, contents = _recorded(harness)
    entries, required = states[number]
    for name, content in entries:
        path = folder / name
        if content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((contents / content).read_bytes())
        else:
            path.mkdir(parents=True, exist_ok=True)
    run = folder / "run"
    there = snapshots.checkpoint_steps(run)
    done = harness.warm.run([*_args(harness), "--out-dir", str(run)])
    if done.code != 0 and not done.hung and not required:
        return judge_failure(done, "resume")  # nothing that was trained is lost; but it must be told
    found = judge_end(harness, done, run, reference)
    if found.outcome != Outcome.EQUAL or "finished already" in done.out:
        return found
    resumed = int(done.out.split("resuming after ")[1].split()[0]) if "resuming after " in done.out else 0
    if resumed < required:
        what = f"goes on from {resumed} steps, though {required} were saved before; the disk held {there}"
        return Finding(Outcome.LOST, "resume", what)
    return found


FAULTS = [
    Fault(
        "a loss of power",
        "every state that a disk may hold after it, before each call of a training that changes files: only what was "
        "forced to the disk; or all names, with contents that were forced",
        "the same command; at most the work since the checkpoint before the last is lost, and the end is equal",
        power_cases,
        4,
    )
]

if __name__ == "__main__":
    main()
