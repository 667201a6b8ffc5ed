"""jaxgpt's commands in processes of their own: fresh ones, and a warm one that serves many."""

import dataclasses
import json
import os
import resource
import select
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.calls import Plan

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 180.0  # seconds; a command of these tests takes a few
WARM_TIMEOUT = 60.0
WARM_MEMORY = 8 * 2**30  # bytes of address space: a reader of /dev/zero fails before the machine does
RESTART_AT = 2 * 2**30  # bytes: a warm process that holds so much is replaced


@dataclass(frozen=True)
class Done:
    """A command that has ended.

    Args:
        code: its exit code; minus the number of the signal that ended it.
        counts: of the calls that a `Plan` counted.
        hung: it did not end within its time, and was killed.
        resident: the memory of the process after it, bytes; of a warm process.
    """

    code: int
    out: str
    err: str
    hung: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    resident: int = 0

    @property
    def traceback(self) -> bool:
        """Whether it ended with a Python traceback, or by a crash."""
        crashed = self.code in (-4, -6, -7, -8, -11, 134, 139)
        return "Traceback (most recent call last)" in self.out + self.err or crashed

    @property
    def message(self) -> str:
        """The last line of standard error."""
        return (self.err.strip().splitlines() or [""])[-1]


def environment(home: Path) -> dict[str, str]:
    """The environment of a user with an empty home, two CPU devices, and this checkout."""
    home.mkdir(parents=True, exist_ok=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX", "XLA", "HF_", "XDG", "TF_", "PYTHON"))}
    return {**env, "HOME": str(home), "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "2"}


def command(args: list[str], plan: Plan | None = None) -> list[str]:
    """The command line of `jaxgpt ARG ...`, with a fault or without."""
    if plan is None:
        return [sys.executable, "-m", "jaxgpt", *args]
    return [sys.executable, "-m", "tests.faults.worker", json.dumps(dataclasses.asdict(plan)), *args]


def run_fresh(
    args: list[str],
    env: dict[str, str],
    plan: Plan | None = None,
    prefix: tuple[str, ...] = (),
    more_env: dict[str, str] | None = None,
    before: Callable[[], None] | None = None,
) -> Done:
    """Runs a command in a process of its own.

    Args:
        prefix: words before the command line, such as a shell that sets a limit.
        more_env: beside `env`.
        before: what the new process does first.
    """
    return run_line([*prefix, *command(args, plan)], {**env, **(more_env or {})}, before)


def run_line(
    line: list[str], env: dict[str, str], before: Callable[[], None] | None = None, timeout: float = TIMEOUT
) -> Done:
    """Runs a command line to its end; one that takes longer than `timeout` seconds is killed."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        line, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, preexec_fn=before
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
            hung = False
        except subprocess.TimeoutExpired:
            process.kill()
            (out, err), hung = process.communicate(), True
    return Done(process.returncode, out.decode(errors="replace"), err.decode(errors="replace"), hung)


class Warm:
    """A process that runs commands one after another. One that hangs or dies is replaced at the next command."""

    def __init__(self, env: dict[str, str], log: Path):
        self._env, self._log = env, log
        self._process: subprocess.Popen | None = None

    def run(self, args: list[str], plan: Plan | None = None, poison: dict[str, Any] | None = None) -> Done:
        request = {"args": args, "plan": plan and dataclasses.asdict(plan), "poison": poison}
        answer = self._ask({"run": request})
        if isinstance(answer, Done):
            return answer
        if answer["resident"] > RESTART_AT:
            self.close()
        return Done(**answer)

    def snapshot(self, run: Path) -> dict[str, str]:
        """`snapshots.snapshot` of a run folder."""
        answer = self._ask({"snapshot": str(run)})
        return {"": answer.err} if isinstance(answer, Done) else answer

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _ask(self, request: dict[str, Any]) -> Any:
        """The answer; a `Done` if the process hung or died."""
        if self._process is None:
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "tests.faults.worker"],
                    cwd=ROOT,
                    env=self._env,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    preexec_fn=_limit_memory,
                )
        process = self._process
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        answer = b""
        while not answer.endswith(b"\n"):
            if not select.select([process.stdout], [], [], WARM_TIMEOUT)[0]:
                self.close()
                return Done(-9, "", "", hung=True)
            piece = os.read(process.stdout.fileno(), 2**16)
            if not piece:
                code = process.wait()
                self.close()
                return Done(code, "", f"the process ended with {code}")
            answer += piece
        return json.loads(answer)


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (WARM_MEMORY, WARM_MEMORY))
