"""Alternating measurements: the contenders' processes, what they train on, their rounds, and the comparison of losses.

In each round every contender computes for about the same time, one after the other, while the others wait. A ratio of
two contenders is taken round by round, so a machine that slows down on the way slows both.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxgpt.config import TrainConfig, to_json
from jaxgpt.errors import UserError
from jaxgpt.presets import BENCHMARKS

ROOT = Path(__file__).resolve().parents[1]
WORKER = ROOT / "benchmarks" / "implementations.py"
# Largest relative difference of a step's loss, by the products' dtype: float32 losses differ by 1e-6 at first, which
# training amplifies; bfloat16 rounds each operand by up to 4e-3, and PyTorch's autocast rounds other places than we do.
SAME_LOSS = {"float32": 1e-4, "bfloat16": 1e-2}
N_COMPARED = 50  # steps, the first


class Contender(Protocol):
    """Something that trains, and whose steps are timed."""

    step_seconds: list[float]  # of each round: seconds per step
    losses: list[float]  # of every step since the first

    def run(self, n_steps: int) -> float:
        """Trains `n_steps` further; returns the seconds per step."""
        ...


class Worker:
    """An implementation in a process of its own, benchmarks/implementations.py.

    Args:
        implementation: one of the names that `--sides` takes.
        folder: holds what `write_plan` wrote.
        cache: a folder for compiled programs; an empty one makes the first step that of a first start.
        python: the interpreter.
    """

    def __init__(self, implementation: str, folder: Path, cache: Path, python: Path):
        environment = {
            **worker_environment(),
            "JAXGPT_BENCH_CACHE": str(cache),
            "JAXGPT_BENCH_BEGUN": str(time.time()),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "TRITON_CACHE_DIR": str(cache / "triton"),
        }
        self.implementation = implementation
        self.step_seconds: list[float] = []
        self.losses: list[float] = []
        self.process = subprocess.Popen(
            [python, WORKER, implementation, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        assert self.process.stdin and self.process.stdout, "both are pipes"
        self._commands, self._answers = self.process.stdin, self.process.stdout

    def ask(self, line: str) -> dict[str, Any]:
        """The answer to one line. Raises `UserError` if the process has ended."""
        try:
            self._commands.write(line + "\n")
            self._commands.flush()
            answer = self._answers.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise UserError(
                f"--sides {self.implementation}: its process ended with {self.process.wait()}; its last lines say why"
            )
        found = json.loads(answer)
        if "error" in found:
            raise UserError(found["error"])
        return found

    def start(self, n_steps: int) -> dict[str, Any]:
        """Builds the model and computes the first step.

        Args:
            n_steps: for how many steps our own implementation writes down the batches, for the others to take.
        """
        self.started = self.ask(f"start {n_steps}")
        self.losses += self.started["losses"]
        return self.started

    def run(self, n_steps: int) -> float:
        answer = self.ask(f"run {n_steps}")
        self.losses += answer["losses"]
        return answer["seconds"] / n_steps

    def close(self) -> None:
        self._commands.close()
        self.process.wait()


@contextmanager
def open_worker(implementation: str, folder: Path, cache: Path, python: Path) -> Iterator[Worker]:
    """A `Worker`, whose process ends with the context."""
    worker = Worker(implementation, folder, cache, python)
    try:
        yield worker
    finally:
        if worker.process.poll() is None:
            worker.close()


def worker_environment() -> dict[str, str]:
    """The environment of every measured process: this checkout's code first, and no compiled programs from before."""
    return {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # else JAX takes three quarters of a GPU that others need too
        **{name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"},
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }


def torch_version(python: Path) -> str | None:
    """The version of PyTorch that an interpreter has. Raises `UserError` for what is no interpreter."""
    try:
        done = subprocess.run([python, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True)
    except OSError as e:
        raise UserError(f"--torch-python {python}: cannot be run ({e.strerror}); give a Python interpreter") from None
    return None if done.returncode else done.stdout.strip()


def measure_alternately(contenders: Sequence[Contender], flags: argparse.Namespace, label: str) -> None:
    """Runs all rounds; appends to each contender's `step_seconds`."""
    n_steps = [steps_per_round(contender, flags.turn_seconds) for contender in contenders]
    for round_ in range(flags.rounds):
        say(f"{label}: round {round_ + 1} of {flags.rounds}")
        for contender, n in zip(contenders, n_steps, strict=True):
            contender.step_seconds.append(contender.run(n))


def steps_per_round(contender: Contender, seconds: float) -> int:
    """How many steps take about `seconds`, after two that warm up."""
    contender.run(2)
    return max(1, round(seconds / contender.run(3)))


def benchmark_config(preset: str, flags: argparse.Namespace) -> tuple[TrainConfig, int]:
    """The configuration that is timed, and the vocabulary's size."""
    config, vocab_size = BENCHMARKS[preset]
    return replace(config, batch_size=flags.batch_size or config.batch_size, dtype=flags.dtype), vocab_size


def random_tokens(vocab_size: int) -> np.ndarray:
    """Tokens to train on, uint16 [500,000].

    Half of them follow from the one before, the others are drawn with the frequencies of Zipf's law: there is something
    to learn, so an implementation that does not learn it, or attends to later tokens, has another loss.
    """
    draw = np.random.default_rng(0)
    tokens_N = (vocab_size ** draw.random(500_000)).astype(np.int64) - 1
    follows_N = draw.random(len(tokens_N)) < 0.5
    for i in np.flatnonzero(follows_N[1:]) + 1:
        tokens_N[i] = (7 * tokens_N[i - 1] + 3) % vocab_size
    return tokens_N.astype(np.uint16)


def write_plan(folder: Path, config: TrainConfig, vocab_size: int) -> None:
    """Writes what the workers of one measurement share: configuration, vocabulary size and tokens."""
    np.save(folder / "tokens.npy", random_tokens(vocab_size))
    (folder / "plan.json").write_text(json.dumps({"config": to_json(config), "vocab_size": vocab_size}))


def worker_figures(worker: Worker, config: TrainConfig) -> dict[str, Any]:
    """One implementation's figures: milliseconds per step (median, least, most), tokens per second, memory."""
    ms = [1e3 * s for s in worker.step_seconds]
    return {
        "side": worker.implementation,
        "name": worker.started["name"],
        "ms_per_step": statistics.median(ms),
        "ms_min": min(ms),
        "ms_max": max(ms),
        "tokens_s": config.tokens_per_step / statistics.median(ms) * 1e3,
        "first_step_s": worker.started["first_step_s"],
        "memory_mib": worker.ask("memory")["mib"],
    }


def compare(ours: Worker, first_round: int, other: Worker, dtype: str) -> dict[str, float]:
    """The time of another implementation over ours, and the largest relative difference of the losses.

    Args:
        first_round: the index of our first round beside the other's.

    Raises:
        UserError: the losses differ. One of the two computes something else, so its time means nothing.
    """
    loss_gap = require_same_losses(f"--sides {other.implementation}", other.losses, ours.losses, dtype)
    rounds = zip(other.step_seconds, ours.step_seconds[first_round:], strict=True)
    return {"ratio": statistics.median(theirs / mine for theirs, mine in rounds), "loss_gap": loss_gap}


def require_same_losses(name: str, losses: list[float], reference: list[float], dtype: str) -> float:
    """The largest relative difference of the first losses. Raises `UserError` if it is more than rounding explains."""
    n = min(N_COMPARED, len(losses), len(reference))
    gap = float(np.max(np.abs(np.divide(losses[:n], reference[:n]) - 1)))
    if not gap < SAME_LOSS[dtype]:  # nor is NaN
        raise UserError(f"{name}: its losses differ from ours by {gap:.1e} of their size, so no time counts")
    return gap


def say(line: str) -> None:
    """Prints a line of progress to standard error."""
    print(line, file=sys.stderr, flush=True)
