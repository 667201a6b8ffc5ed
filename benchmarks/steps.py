"""A training step's time, first step and memory beside PyTorch's: what `jaxgpt bench` measures by default."""

import argparse
import contextlib
import dataclasses
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
from benchmarks.page import rates
from jaxgpt.config import TrainConfig
from jaxgpt.errors import UserError

GPU_ONLY = ("cudnn", "graphs")


def measure(preset: str, flags: argparse.Namespace) -> dict[str, Any]:
    """Measures all implementations of one configuration."""
    config, vocab_size = benchmark_config(preset, flags)
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        write_plan(folder, config, vocab_size)
        cache = folder / "cache"

        def worker(name: str) -> contextlib.AbstractContextManager[Worker]:
            return open_worker(name, folder, cache, Path(sys.executable) if name == "ours" else flags.torch_python)

        say(f"{preset}: the first step, nothing cached")
        with worker("ours") as first:
            cold_s = first.start(1)["first_step_s"]
        with worker("ours") as ours:
            machine = ours.start(4096)["machine"]
            on_gpu = machine["platform"] == "gpu"
            if not on_gpu and set(GPU_ONLY) & set(flags.sides or ()):
                raise UserError(f"--sides {','.join(flags.sides)}: {' and '.join(GPU_ONLY)} need a GPU; leave them out")
            here = [name for name in flags.known if on_gpu or name not in GPU_ONLY]
            names = flags.sides or (here if flags.torch else ["ours"])
            others = [name for name in names if name != "ours"]
            # All at once on a CPU; one by one beside ours on a GPU, whose memory would not hold all.
            groups = [[name] for name in others] if on_gpu and others else [others]
            rows: list[dict[str, Any]] = []
            for group in groups:
                with ExitStack() as stack:
                    opened = [stack.enter_context(worker(name)) for name in group]
                    rows += measure_beside(ours, opened, flags, preset, config)
            for row in rows:
                machine |= row.pop("machine")
            rows.insert(0, worker_figures(ours, config))
            rows[0]["product"] = ours.ask("probe product")
            rows[0]["generate"], rows[0]["generate_batch"] = (ours.ask(f"probe generate {n}") for n in (1, 32))
        rows[0]["first_step_warm_s"], rows[0]["first_step_s"] = rows[0]["first_step_s"], cold_s
    return {"preset": preset, "machine": machine, "vocab_size": vocab_size, **sizes(config, vocab_size), "rows": rows}


def measure_beside(
    ours: Worker, others: list[Worker], flags: argparse.Namespace, preset: str, config: TrainConfig
) -> list[dict[str, Any]]:
    """The rows of implementations measured alternately with ours.

    One that cannot start is left out, unless the user asked for it.
    """
    workers = [ours]
    for other in others:
        say(f"{preset}: starting {flags.known[other.implementation]}")
        try:
            other.start(0)
        except UserError as e:
            if flags.sides:
                raise
            say(f"{preset}: left out: {e}")
        else:
            workers.append(other)
    first_round = len(ours.step_seconds)
    measure_alternately(workers, flags, preset)
    dtype = ours.started["machine"]["dtype"]
    return [
        worker_figures(other, config) | compare(ours, first_round, other, dtype) | {"machine": other.started["machine"]}
        for other in workers[1:]
    ]


def sizes(config: TrainConfig, vocab_size: int) -> dict[str, Any]:
    """The configuration's sizes, and the floating-point operations of a token in both counts."""
    m = config.model
    n_params = m.n_layer * (12 * m.n_embd**2 + 13 * m.n_embd) + 2 * m.n_embd + vocab_size * m.n_embd
    return {
        "model": dataclasses.asdict(m),
        "batch_size": config.batch_size,
        "flop_per_token": m.flop_per_token(n_params),
    }


def show(result: dict[str, Any]) -> None:
    """Prints the result as a table."""
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
        print(f"  ratio: time over ours, median of the rounds' ratios; losses equal within {gap:.1e}")
    print(f"  {rates(result)}")
