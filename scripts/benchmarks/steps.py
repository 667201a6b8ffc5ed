"""A training step's time, first step and memory, beside PyTorch's: what scripts/bench.py measures by default."""

import argparse
import contextlib
import dataclasses
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.page import rates
from benchmarks.turns import Side, compare, configuration, row_of, say, side_of, take_turns, write_plan

from jaxgpt.errors import UserError

ON_GPU_ONLY = ("cudnn", "graphs")


def measure(preset: str, flags: argparse.Namespace) -> dict[str, Any]:
    """All sides of one configuration: their turns, first steps, memory, and what follows of them."""
    config, vocab_size = configuration(preset, flags)
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        write_plan(folder, config, vocab_size)
        cache = folder / "cache"

        def side_named(name: str) -> contextlib.AbstractContextManager[Side]:
            return side_of(name, folder, cache, Path(sys.executable) if name == "ours" else flags.torch_python)

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
            here = [name for name in flags.known if on_gpu or name not in ON_GPU_ONLY]
            names = flags.sides or (here if flags.torch else ["ours"])
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
        say(f"{preset}: starting {flags.known[side.side]}")
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


def about(config: Any, vocab_size: int) -> dict[str, Any]:
    """The configuration's sizes, and the floating-point operations of a token in both counts."""
    m = config.model
    n_params = m.n_layer * (12 * m.n_embd**2 + 13 * m.n_embd) + 2 * m.n_embd + vocab_size * m.n_embd
    return {
        "model": dataclasses.asdict(m),
        "batch_size": config.batch_size,
        "flop_per_token": m.flop_per_token(n_params),
    }


def show(result: dict[str, Any]) -> None:
    """The same for a person."""
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
    print(f"  {rates(result)}")
