"""What the trainer's loop costs beside its bare step: evaluation, checkpoints, records and dispatches."""

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

from benchmarks.turns import ROOT, environment_of, say, side_of, steps_of_a_turn, write_plan

from jaxgpt import config as configs
from jaxgpt import tokenizer as tokenizers
from jaxgpt.errors import UserError
from jaxgpt.presets import PRESETS

WATCHED = ROOT / "scripts" / "benchmarks" / "watched.py"


def measure(preset: str, flags: argparse.Namespace) -> dict[str, Any]:
    """Trains by the real command, which is stopped while the bare step of the same configuration takes its turns."""
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        run, written = folder / "run", folder / "turns.json"
        arguments = ["--preset", preset, "--steps", flags.loop, "--out-dir", run, "--dtype", flags.dtype]
        if flags.batch_size:
            arguments += ["--batch-size", flags.batch_size]
        if PRESETS[preset].tokenizer == "char":
            arguments += ["--dataset", f"{PRESETS[preset].dataset},pydoc"]  # which every Python has
        line = [sys.executable, WATCHED, written, flags.turn_seconds, *arguments]
        # What happens once is told as of a first start: nothing compiled before.
        environment = {**environment_of(), "JAX_ENABLE_COMPILATION_CACHE": "0"}
        process = subprocess.Popen([str(word) for word in line], stdout=sys.stderr, env=environment)
        try:
            _until_it_stops(process)
            config = configs.from_json(json.loads((run / "config.json").read_text(encoding="utf-8")))
            write_plan(folder, config, tokenizers.load(run / "tokenizer.json").vocab_size)
            with side_of("ours", folder, folder / "cache", Path(sys.executable)) as bare:
                machine = bare.start(1)["machine"]
                n_steps = steps_of_a_turn(bare, flags)
                bare_s = [bare.run(n_steps)]
                say(f"{preset}: {flags.loop} steps of the loop and of the bare step in turns")
                while _goes_on(process, written):
                    bare_s.append(bare.run(n_steps))
            begun = time.monotonic()
            os.kill(process.pid, signal.SIGCONT)
            if process.wait():
                raise _ended(process)
            end_s = time.monotonic() - begun
        finally:
            process.kill()
            process.wait()
        found = came_to(json.loads(written.read_text()), bare_s)
    machine |= {"torch": flags.torch} if flags.torch else {}
    about = {"steps": config.steps, "eval_every": config.eval_every, "eval_batches": config.eval_batches}
    return {
        "preset": preset,
        "machine": machine,
        "loop": {**about, "checkpoint_every": config.checkpoint_every, "end_s": end_s, **found},
    }


def _until_it_stops(process: subprocess.Popen) -> None:
    """Waits for the end of its turn. Raises `UserError` if the process has ended."""
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    if not os.WIFSTOPPED(status):
        process.returncode = os.waitstatus_to_exitcode(status)
        raise _ended(process)


def _goes_on(process: subprocess.Popen, written: Path) -> bool:
    """Gives the loop its turn; False once it has come to its end, where it waits to complete the run."""
    os.kill(process.pid, signal.SIGCONT)
    _until_it_stops(process)
    return not written.exists()


def _ended(process: subprocess.Popen) -> UserError:
    return UserError(f"--loop: scripts/train.py ended with {process.returncode}; its last lines say why")


def came_to(turns: list[dict[str, Any]], bare_s: list[float]) -> dict[str, Any]:
    """The loop's time over the bare step's, as shares of the latter.

    Args:
        turns: the loop's, each with its steps, seconds, and seconds by part.
        bare_s: seconds per bare step, measured after each of the loop's turns but the last.

    Returns:
        "overhead": of the whole, without what is done "once" (seconds); "shares" of it by part. Of these "dispatches"
        is how much longer the steps took in the loop, also for what goes on in the background, and "error" is its
        standard error, by the turns. "rest" is the loop's own Python.
    """
    assert len(bare_s) == len(turns) - 1
    beside = list(zip([bare_s[0], *bare_s], [*bare_s, bare_s[-1]], strict=True))
    bare_I = [turn["steps"] * sum(pair) / 2 for turn, pair in zip(turns, beside, strict=True)]
    bare, seconds = sum(bare_I), sum(turn["seconds"] for turn in turns)
    names = ("evaluation", "checkpoints", "records", "steps", "once")
    parts = {name: sum(turn["parts"].get(name, 0.0) for turn in turns) for name in names}
    slower = parts["steps"] / bare
    off_I = [turn["parts"].get("steps", 0.0) - slower * b for turn, b in zip(turns, bare_I, strict=True)]
    shares = {name: parts[name] / bare for name in ("evaluation", "checkpoints", "records")}
    shares["dispatches"] = slower - 1
    shares["rest"] = (seconds - sum(parts.values())) / bare
    return {
        "overhead": (seconds - parts["once"]) / bare - 1,
        "shares": shares,
        "error": statistics.stdev(off_I) * len(off_I) ** 0.5 / bare,  # of a ratio of sums: turns differ in length
        "once_s": parts["once"],
        "bare_ms": 1e3 * statistics.median(bare_s),
        "turns": len(turns),
    }


def show(result: dict[str, Any]) -> None:
    """The same for a person."""
    from benchmarks.page import loop_line

    print(f"{result['preset']}: {loop_line(result['loop'])}")
