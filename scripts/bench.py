"""Time a training step against PyTorch on this machine, alternately in one run: python scripts/bench.py

Every side is a process of its own with the same weights and batches; they take turns, and while one computes the others
wait. Their losses are compared, so that a wrong fast answer cannot win.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from jaxgpt.cli import run_command
from jaxgpt.config import to_json
from jaxgpt.errors import UserError
from jaxgpt.presets import BENCHMARKS

ROOT = Path(__file__).resolve().parents[1]
WORKER = ROOT / "scripts" / "benchmarks" / "side.py"
SIDES = {
    "ours": "this project's trainer step",
    "eager": "PyTorch eager, the documented loop",
    "sdpa": "PyTorch eager with SDPA",
    "compile": "torch.compile with SDPA",
    "cudnn": "torch.compile with cuDNN's attention (GPU)",
    "graphs": "torch.compile with cuDNN's attention and CUDA graphs (GPU)",
}
ON_GPU_ONLY = ("cudnn", "graphs")
# Largest relative difference of a step's loss, by the products' dtype: float32 sides are 1e-6 apart at first, which
# training amplifies; bfloat16 rounds each operand by up to 4e-3, and PyTorch's autocast rounds other places than we do.
SAME_LOSS = {"float32": 1e-4, "bfloat16": 1e-2}
COMPARED = 50  # steps, the first


def flags_of(arguments: list[str]) -> argparse.Namespace:
    """The flags. argparse, not tyro, which machines that only measure may not have."""
    p = argparse.ArgumentParser(prog="bench.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--preset", default="minigpt", help=f"one or more of {', '.join(BENCHMARKS)}, with commas between")
    p.add_argument("--sides", default=None, help=f"some of {', '.join(SIDES)} (default: all that this machine has)")
    p.add_argument("--rounds", type=int, default=12, help="turns of each side; the median turn counts")
    p.add_argument("--turn-seconds", type=float, default=1.0, help="about how long a turn is")
    p.add_argument("--batch-size", type=int, default=None, help="other than the preset's")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the products")
    p.add_argument("--torch-python", type=Path, default=None, help="interpreter that has PyTorch, if not this one")
    p.add_argument("--json", type=Path, default=None, help="also write the figures to this file")
    p.add_argument("--picture", type=Path, default=None, help="also draw them as bars (.png)")
    p.add_argument("--docs", action="store_true", help="also put them into docs/benchmarks.md")

    def refuse(message: str) -> None:
        raise UserError(message)

    p.error = refuse  # type: ignore[method-assign,assignment]
    flags = p.parse_args(arguments)
    flags.preset = flags.preset.split(",")
    for preset in flags.preset:
        if preset not in BENCHMARKS:
            raise UserError(f"--preset {preset}: unknown; choose of {', '.join(BENCHMARKS)}")
    if flags.sides is not None:
        flags.sides = flags.sides.split(",")
        if "ours" not in flags.sides or not set(flags.sides) <= set(SIDES):
            raise UserError(f"--sides {','.join(flags.sides)}: give ours and others of {', '.join(SIDES)}")
    if flags.docs and (flags.batch_size or flags.dtype != "auto"):
        raise UserError("--docs: the page holds each configuration as it is; leave out --batch-size and --dtype")
    if flags.rounds < 1 or not 0 < flags.turn_seconds < math.inf or (flags.batch_size or 1) < 1:
        raise UserError("--rounds, --turn-seconds, --batch-size: give numbers above 0")
    for name, suffix in (("json", ".json"), ("picture", ".png")):
        path = getattr(flags, name)
        if path and not path.resolve().parent.is_dir():
            raise UserError(f"--{name} {path}: no such folder; create it first")
        if path and (path.is_dir() or path.suffix != suffix):
            raise UserError(f"--{name} {path}: give the name of a file that ends in {suffix}")
    if flags.torch_python and not flags.torch_python.is_file():
        raise UserError(f"--torch-python {flags.torch_python}: no such file; give the path of a Python interpreter")
    return flags


class Side:
    """One side's process."""

    def __init__(self, side: str, folder: Path, cache: Path, python: Path):
        environment = {
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # else JAX takes three quarters of a GPU that others need too
            **os.environ,
            "JAXGPT_BENCH_CACHE": str(cache),
            "JAXGPT_BENCH_BEGUN": str(time.time()),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),  # every side's first start finds nothing compiled
            "TRITON_CACHE_DIR": str(cache / "triton"),
        }
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
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


def has_torch(python: Path) -> bool:
    try:
        return not subprocess.run([python, "-c", "import torch"], capture_output=True).returncode
    except OSError as e:
        raise UserError(f"--torch-python {python}: cannot be run ({e.strerror}); give a Python interpreter") from None


def main() -> None:
    flags = flags_of(sys.argv[1:])
    python = flags.torch_python or Path(sys.executable)
    torch_here = has_torch(python)
    if flags.sides and len(flags.sides) > 1 and not torch_here:
        raise UserError(f"--sides {','.join(flags.sides)}: PyTorch is not installed for {python}; see --torch-python")
    if not torch_here:
        say("PyTorch is not installed: one side only (--torch-python names another interpreter)")
    from benchmarks import page

    results = []
    for preset in flags.preset:
        results.append(measure(preset, flags, python, torch_here))
        print_result(results[-1])
        print(f"  {page.rates(results[-1])}")
        if flags.json:
            flags.json.write_text(json.dumps(results, indent=1) + "\n")
        if flags.picture:
            page.draw(results, flags.picture)
        if flags.docs:
            page.record(results)


def measure(preset: str, flags: argparse.Namespace, python: Path, torch_here: bool) -> dict[str, Any]:
    """All sides of one configuration: their turns, first steps, memory, and what follows of them."""
    config, vocab_size = BENCHMARKS[preset]
    config = dataclasses.replace(config, batch_size=flags.batch_size or config.batch_size, dtype=flags.dtype)
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        write_plan(folder, config, vocab_size)
        cache = folder / "cache"

        def side_named(name: str) -> contextlib.AbstractContextManager[Side]:
            return side_of(name, folder, cache, Path(sys.executable) if name == "ours" else python)

        say(f"{preset}: the first step, nothing cached")
        with side_named("ours") as first:
            cold_s = first.start(1)["first_step_s"]
        with side_named("ours") as ours:
            machine = ours.start(4096)["machine"]
            on_gpu = machine["platform"] == "gpu"
            if on_gpu < bool(set(ON_GPU_ONLY) & set(flags.sides or ())):
                raise UserError(
                    f"--sides {','.join(flags.sides)}: {' and '.join(ON_GPU_ONLY)} need a GPU; leave them out"
                )
            names = flags.sides or [s for s in SIDES if s == "ours" or torch_here and (on_gpu or s not in ON_GPU_ONLY)]
            others = [name for name in names if name != "ours"]
            # All at once on a CPU; one by one beside ours on a GPU, whose memory would not hold all.
            groups = [[name] for name in others] if on_gpu and others else [others]
            rows: list[dict[str, Any]] = []
            for group in groups:
                with ExitStack() as stack:
                    opened = [stack.enter_context(side_named(name)) for name in group]
                    rows += beside(ours, opened, flags, preset, config)
            for row in rows:
                machine |= row.pop("machine")
            rows.insert(0, row_of(ours, config))
            rows[0]["product"] = ours.ask("probe product")
            rows[0]["generate"], rows[0]["generate_batch"] = (ours.ask(f"probe generate {n}") for n in (1, 32))
        rows[0]["first_step_warm_s"], rows[0]["first_step_s"] = rows[0]["first_step_s"], cold_s
    return {"preset": preset, "machine": machine, "vocab_size": vocab_size, **about(config, vocab_size), "rows": rows}


def beside(ours: Side, others: list[Side], flags: argparse.Namespace, preset: str, config: Any) -> list[dict[str, Any]]:
    """The rows of sides that take turns with ours; one that cannot start is left out unless it was asked for."""
    sides = [ours]
    for side in others:
        say(f"{preset}: starting {SIDES[side.side]}")
        try:
            side.start(0)
        except UserError as e:
            if flags.sides:
                raise
            say(f"{preset}: left out: {e}")
        else:
            sides.append(side)
    begun = len(ours.turns)
    take_turns(sides, flags, preset)
    dtype = ours.started["machine"]["dtype"]
    return [
        row_of(side, config) | compare(ours, begun, side, dtype) | {"machine": side.started["machine"]}
        for side in sides[1:]
    ]


def take_turns(sides: list[Side], flags: argparse.Namespace, preset: str) -> None:
    """Turns of about the time asked for, one side after the other."""
    steps = {}
    for side in sides:
        side.run(2)  # compiled programs settle
        steps[side.side] = max(1, round(flags.turn_seconds / side.run(3)))
    for turn in range(flags.rounds):
        say(f"{preset}: turn {turn + 1} of {flags.rounds}")
        for side in sides:
            side.turns.append(side.run(steps[side.side]))


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


def about(config: Any, vocab_size: int) -> dict[str, Any]:
    """The configuration's sizes, and the floating-point operations of a token, forward and backward, in both counts.

    6 N + 12 L T C, N the parameters without tables that are only looked up (nanoGPT's count, "F12"); and with the
    causal half of attention only, 6 N + 6 L T C ("F6").
    """
    m = config.model
    n_params = m.n_layer * (12 * m.n_embd**2 + 13 * m.n_embd) + 2 * m.n_embd + vocab_size * m.n_embd
    attention = m.n_layer * m.block_size * m.n_embd
    return {
        "model": dataclasses.asdict(m),
        "batch_size": config.batch_size,
        "flop_per_token": {"F12": 6 * n_params + 12 * attention, "F6": 6 * n_params + 6 * attention},
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


def print_result(result: dict[str, Any]) -> None:
    m = result["model"]
    print(
        f"{result['preset']}: {m['n_layer']} layers, {m['n_embd']} wide, {m['n_head']} heads, block {m['block_size']}, "
        f"batch {result['batch_size']}, vocabulary {result['vocab_size']}, {result['machine']['dtype']}; "
        f"{result['machine']['device']}"
    )
    print(f"  {'':<50} {'ms/step':>9} {'tokens/s':>10} {'ratio':>6} {'first step':>11} {'memory':>9}")
    for row in result["rows"]:
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
        print(
            f"  {row['name']:<50} {row['ms_per_step']:9.2f} {row['tokens_s']:10,.0f} {ratio:>6} "
            f"{row['first_step_s']:9.1f} s {row['memory_mib']:5,.0f} MiB"
        )
    if len(result["rows"]) > 1:
        gap = max(row["loss_gap"] for row in result["rows"][1:])
        print(f"  ratio: how many times as long as ours, median of the turns'; losses equal within {gap:.1e}")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main)
