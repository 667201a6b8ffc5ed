"""What the trainer's loop adds to its bare step: evaluation, checkpoints, records and dispatches."""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.alternating import ROOT, open_worker, say, steps_per_round, worker_environment, write_plan
from benchmarks.page import loop_line
from jaxgpt.config import TrainConfig, from_json
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.errors import UserError
from jaxgpt.presets import PRESETS

PROFILED_TRAIN = ROOT / "benchmarks" / "profiled_train.py"


def measure(preset: str, flags: argparse.Namespace) -> dict[str, Any]:
    """Trains by the real command, alternately with the bare step of the same configuration."""
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        run, profile = folder / "run", folder / "profile.json"
        arguments = ["--preset", preset, "--steps", flags.loop, "--out-dir", run, "--dtype", flags.dtype]
        if flags.batch_size:
            arguments += ["--batch-size", flags.batch_size]
        if PRESETS[preset].tokenizer == "char":
            arguments += ["--dataset", f"{PRESETS[preset].dataset},pydoc"]  # which every Python has
        line = [sys.executable, PROFILED_TRAIN, profile, flags.turn_seconds, *arguments]
        # The one-time costs are those of a first start: nothing compiled before.
        environment = {**worker_environment(), "JAX_ENABLE_COMPILATION_CACHE": "0"}
        process = subprocess.Popen([str(word) for word in line], stdout=sys.stderr, env=environment)
        try:
            _wait_until_stopped(process)
            config = from_json(json.loads((run / "config.json").read_text(encoding="utf-8")))
            assert isinstance(config, TrainConfig)
            write_plan(folder, config, tokenizers.load(run / "tokenizer.json").vocab_size)
            with open_worker("ours", folder, folder / "cache", Path(sys.executable)) as bare:
                machine = bare.start(1)["machine"]
                n_steps = steps_per_round(bare, flags.turn_seconds)
                bare_s = [bare.run(n_steps)]
                say(f"{preset}: {flags.loop} steps of the loop, alternately with the bare step")
                while _continue_until_stopped(process, profile):
                    bare_s.append(bare.run(n_steps))
            begun = time.monotonic()
            os.kill(process.pid, signal.SIGCONT)
            if process.wait():
                raise _ended(process)
            end_s = time.monotonic() - begun
        finally:
            process.kill()
            process.wait()
        found = overhead(json.loads(profile.read_text()), bare_s)
    machine |= {"torch": flags.torch} if flags.torch else {}
    about = {"steps": config.steps, "eval_every": config.eval_every, "eval_batches": config.eval_batches}
    return {
        "preset": preset,
        "machine": machine,
        "loop": {**about, "checkpoint_every": config.checkpoint_every, "end_s": end_s, **found},
    }


def _wait_until_stopped(process: subprocess.Popen) -> None:
    """Waits until the process stops itself. Raises `UserError` if it has ended."""
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    if not os.WIFSTOPPED(status):
        process.returncode = os.waitstatus_to_exitcode(status)
        raise _ended(process)


def _continue_until_stopped(process: subprocess.Popen, profile: Path) -> bool:
    """Continues the training for one interval; False after the loop's end, where it waits to complete the run."""
    os.kill(process.pid, signal.SIGCONT)
    _wait_until_stopped(process)
    return not profile.exists()


def _ended(process: subprocess.Popen) -> UserError:
    return UserError(f"--loop: scripts/train.py ended with {process.returncode}; its last lines say why")


def overhead(intervals: list[dict[str, Any]], bare_s: list[float]) -> dict[str, Any]:
    """The loop's time over the bare step's, as shares of the latter.

    Args:
        intervals: of the loop, each with its steps, seconds, and seconds by part.
        bare_s: seconds per bare step, measured after each interval but the last.

    Returns:
        "overhead": the excess of the whole, without what happens "once" (seconds); "shares": the excess by part.
        "dispatches" is how much longer the steps took in the loop, which includes what background threads cost, and
        "error" is its standard error over the intervals. "rest" is the loop's own Python.
    """
    assert len(bare_s) == len(intervals) - 1
    around = list(zip([bare_s[0], *bare_s], [*bare_s, bare_s[-1]], strict=True))
    bare_I = [interval["steps"] * sum(pair) / 2 for interval, pair in zip(intervals, around, strict=True)]
    bare, seconds = sum(bare_I), sum(interval["seconds"] for interval in intervals)
    names = ("evaluation", "checkpoints", "records", "steps", "once")
    parts = {name: sum(interval["parts"].get(name, 0.0) for interval in intervals) for name in names}
    slower = parts["steps"] / bare
    off_I = [interval["parts"].get("steps", 0.0) - slower * b for interval, b in zip(intervals, bare_I, strict=True)]
    shares = {name: parts[name] / bare for name in ("evaluation", "checkpoints", "records")}
    shares["dispatches"] = slower - 1
    shares["rest"] = (seconds - sum(parts.values())) / bare
    return {
        "overhead": (seconds - parts["once"]) / bare - 1,
        "shares": shares,
        "error": statistics.stdev(off_I) * len(off_I) ** 0.5 / bare,  # of a ratio of sums: intervals differ in length
        "once_s": parts["once"],
        "bare_ms": 1e3 * statistics.median(bare_s),
        "turns": len(intervals),
    }


def show(result: dict[str, Any]) -> None:
    """Prints the result as one line."""
    print(f"{result['preset']}: {loop_line(result['loop'])}")
