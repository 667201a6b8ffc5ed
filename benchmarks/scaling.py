"""How a step's time scales with the block size T, the width C and the number of layers L: each halved and doubled."""

import argparse
import dataclasses
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.alternating import (
    Worker,
    benchmark_config,
    compare,
    measure_alternately,
    open_worker,
    say,
    worker_figures,
    write_plan,
)
from jaxgpt.config import ModelConfig, TrainConfig
from jaxgpt.errors import UserError

FACTORS = (0.5, 2)


def scaled(model: ModelConfig, axis: str, factor: float) -> ModelConfig:
    """The model with T, C or L times a factor. The number of heads scales with the width, so a head keeps its size."""
    fields = {"T": ["block_size"], "C": ["n_embd", "n_head"], "L": ["n_layer"]}[axis]
    return dataclasses.replace(model, **{name: int(getattr(model, name) * factor) for name in fields})


def measure(preset: str, flags: argparse.Namespace) -> dict[str, Any]:
    """Measures each size alternately with the preset's own."""
    config, vocab_size = benchmark_config(preset, flags)
    names = flags.sides or ["ours", "sdpa"][: 2 if flags.torch else 1]
    with tempfile.TemporaryDirectory() as folder_name, ExitStack() as stack:
        base = _started(stack, names, Path(folder_name) / "preset", config, vocab_size, flags)
        rows: list[dict[str, Any]] = []
        for axis in ("T", "C", "L"):
            for factor in FACTORS:
                label = f"{preset}, {factor:g} {axis}"
                changed = dataclasses.replace(config, model=scaled(config.model, axis, factor))
                try:
                    with ExitStack() as inner:
                        folder = Path(folder_name) / f"{axis}{factor}"
                        workers = _started(inner, names, folder, changed, vocab_size, flags)
                        first_round = len(base[0].step_seconds)
                        measure_alternately(base + workers, flags, label)
                        beside = [worker.step_seconds[first_round:] for worker in base]
                        rows += [{"what": axis, "factor": factor, **row} for row in _rows(changed, workers, beside)]
                except UserError as e:  # twice the size may not fit the memory
                    say(f"{label}: left out: {e}")
        if not rows:
            raise UserError(f"--preset {preset}: none of its sizes could be timed; the lines above say why")
        own = _rows(config, base, [worker.step_seconds for worker in base])
        rows = [{"what": "", "factor": 1, **row} for row in own] + rows
        machine = base[0].started["machine"] | ({"torch": flags.torch} if flags.torch else {})
    return {"preset": preset, "machine": machine, "growth": {"batch_size": config.batch_size, "rows": rows}}


def _started(
    stack: ExitStack, names: list[str], folder: Path, config: TrainConfig, vocab_size: int, flags: argparse.Namespace
) -> list[Worker]:
    """The workers of one size. Ours is the first: it writes the weights that the others start from."""
    folder.mkdir()
    write_plan(folder, config, vocab_size)
    workers = []
    for name in sorted(names, key=lambda name: name != "ours"):
        python = Path(sys.executable) if name == "ours" else flags.torch_python
        workers.append(stack.enter_context(open_worker(name, folder, folder / "cache", python)))
        workers[-1].start(4096)
    return workers


def _rows(config: TrainConfig, workers: list[Worker], beside: list[list[float]]) -> list[dict[str, Any]]:
    """A row for each implementation.

    Args:
        beside: for each implementation, its seconds per step at the preset's own size in the same rounds.
    """
    ours, m = workers[0], config.model
    rows = []
    for worker, base_seconds in zip(workers, beside, strict=True):
        over = statistics.median(s / base for s, base in zip(worker.step_seconds, base_seconds, strict=True))
        against = {} if worker is ours else compare(ours, 0, worker, ours.started["machine"]["dtype"])
        sizes = {"T": m.block_size, "C": m.n_embd, "L": m.n_layer, "H": m.n_head}
        rows.append({"sizes": sizes, **worker_figures(worker, config), "over_preset": over, **against})
    return rows


def show(result: dict[str, Any]) -> None:
    """Prints the result as a table."""
    print(f"{result['preset']}, batch {result['growth']['batch_size']}: T, C and L halved and doubled")
    print(f"  {'':<10} {'implementation':<40} {'ms/step':>9} {'tokens/s':>10} {'over the preset':>16}")
    for row in result["growth"]["rows"]:
        size = f"{row['factor']:g} {row['what']}" if row["what"] else "preset"
        print(
            f"  {size:<10} {row['name']:<40} {row['ms_per_step']:9.2f} {row['tokens_s']:10,.0f} "
            f"{row['over_preset']:16.2f}"
        )
