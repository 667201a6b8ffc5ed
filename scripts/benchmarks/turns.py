"""Sides of a benchmark that take turns: their processes, their plan, and what their turns come to."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxgpt.config import TrainConfig, to_json
from jaxgpt.errors import UserError
from jaxgpt.presets import BENCHMARKS

ROOT = Path(__file__).resolve().parents[2]
WORKER = ROOT / "scripts" / "benchmarks" / "side.py"
# Largest relative difference of a step's loss, by the products' dtype: float32 sides are 1e-6 apart at first, which
# training amplifies; bfloat16 rounds each operand by up to 4e-3, and PyTorch's autocast rounds other places than we do.
SAME_LOSS = {"float32": 1e-4, "bfloat16": 1e-2}
COMPARED = 50  # steps, the first


def environment_of() -> dict[str, str]:
    """Of every process that is measured: this project's own code, whatever is installed; no programs from before."""
    return {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # else JAX takes three quarters of a GPU that others need too
        **{name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"},
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }


class Side:
    """One side's process."""

    def __init__(self, side: str, folder: Path, cache: Path, python: Path):
        environment = {
            **environment_of(),
            "JAXGPT_BENCH_CACHE": str(cache),
            "JAXGPT_BENCH_BEGUN": str(time.time()),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),  # every side's first start finds nothing compiled
            "TRITON_CACHE_DIR": str(cache / "triton"),
        }
        self.side, self.turns, self.losses = side, [], []
        self.process = subprocess.Popen(
            [python, WORKER, side, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )

    def ask(self, line: str) -> dict[str, Any]:
        """The answer to one line. Raises `UserError` if the process has ended."""
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise UserError(
                f"--sides {self.side}: its process ended with {self.process.wait()}; its last lines say why"
            )
        found = json.loads(answer)
        if "error" in found:
            raise UserError(found["error"])
        return found

    def start(self, n_steps: int) -> dict[str, Any]:
        self.started = self.ask(f"start {n_steps}")
        self.losses += self.started["losses"]
        return self.started

    def run(self, n_steps: int) -> float:
        """Seconds per step."""
        answer = self.ask(f"run {n_steps}")
        self.losses += answer["losses"]
        return answer["seconds"] / n_steps

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@contextmanager
def side_of(*arguments: Any) -> Iterator[Side]:
    side = Side(*arguments)
    try:
        yield side
    finally:
        if side.process.poll() is None:
            side.close()


def torch_version(python: Path) -> str | None:
    """The version of PyTorch that an interpreter has. Raises `UserError` for what is no interpreter."""
    try:
        done = subprocess.run([python, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True)
    except OSError as e:
        raise UserError(f"--torch-python {python}: cannot be run ({e.strerror}); give a Python interpreter") from None
    return None if done.returncode else done.stdout.strip()


def take_turns(sides: list[Side], flags: argparse.Namespace, preset: str) -> None:
    """Turns of about the time asked for, one side after the other."""
    steps = [steps_of_a_turn(side, flags) for side in sides]
    for turn in range(flags.rounds):
        say(f"{preset}: turn {turn + 1} of {flags.rounds}")
        for side, n_steps in zip(sides, steps, strict=True):
            side.turns.append(side.run(n_steps))


def steps_of_a_turn(side: Side, flags: argparse.Namespace) -> int:
    side.run(2)  # compiled programs settle
    return max(1, round(flags.turn_seconds / side.run(3)))


def configuration(preset: str, flags: argparse.Namespace) -> tuple[TrainConfig, int]:
    """What is timed, and the vocabulary's size."""
    config, vocab_size = BENCHMARKS[preset]
    return replace(config, batch_size=flags.batch_size or config.batch_size, dtype=flags.dtype), vocab_size


def write_plan(folder: Path, config: Any, vocab_size: int) -> None:
    import numpy as np

    # Half of them follow from the one before, the others are drawn with the frequencies of Zipf's law: there is
    # something to learn, so a side that does not learn it, or sees what it must not, has another loss.
    draw = np.random.default_rng(0)
    tokens = (vocab_size ** draw.random(500_000)).astype(np.int64) - 1
    follows = draw.random(len(tokens)) < 0.5
    for i in np.flatnonzero(follows[1:]) + 1:
        tokens[i] = (7 * tokens[i - 1] + 3) % vocab_size
    np.save(folder / "tokens.npy", tokens.astype(np.uint16))
    (folder / "plan.json").write_text(json.dumps({"config": to_json(config), "vocab_size": vocab_size}))


def row_of(side: Side, config: Any) -> dict[str, Any]:
    ms = [1e3 * s for s in side.turns]
    return {
        "side": side.side,
        "name": side.started["name"],
        "ms_per_step": statistics.median(ms),
        "ms_min": min(ms),
        "ms_max": max(ms),
        "tokens_s": config.batch_size * config.model.block_size / statistics.median(ms) * 1e3,
        "first_step_s": side.started["first_step_s"],
        "memory_mib": side.ask("memory")["mib"],
    }


def compare(ours: Side, begun: int, side: Side, dtype: str) -> dict[str, float]:
    """How many times as long as ours the side's turns took, and how far its first losses are from ours.

    Args:
        begun: where our turns beside this side begin.

    Raises:
        UserError: the losses differ: one of both computes something else, so its time means nothing.
    """
    import numpy as np

    n = min(COMPARED, len(ours.losses), len(side.losses))
    gap = float(np.max(np.abs(np.divide(side.losses[:n], ours.losses[:n]) - 1)))
    if not gap < SAME_LOSS[dtype]:  # nor if it is no number
        raise UserError(
            f"--sides {side.side}: its losses differ from ours by {gap:.1e} of their size, so no time counts"
        )
    turns = zip(side.turns, ours.turns[begun:], strict=True)
    return {"ratio": statistics.median(theirs / mine for theirs, mine in turns), "loss_gap": gap}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
