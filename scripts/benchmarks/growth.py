"""How the step grows with the block (T), the width (C) and the layers (L): each halved and doubled around a preset."""

import argparse
import dataclasses
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.turns import Side, compare, configuration, row_of, say, side_of, take_turns, write_plan

from jaxgpt.config import ModelConfig, TrainConfig
from jaxgpt.errors import UserError

FACTORS = (0.5, 2)


def scaled(model: ModelConfig, what: str, factor: float) -> ModelConfig:
    """The model with T, C or L times a factor. The heads grow with the width, so a head's size stays."""
    fields = {"T": ["block_size"], "C": ["n_embd", "n_head"], "L": ["n_layer"]}[what]
    return dataclasses.replace(model, **{name: int(getattr(model, name) * factor) for name in fields})


def measure(preset: str, flags: argparse.Namespace) -> dict[str, Any]:
    """Every size beside the preset's own, which takes its turns with each: so a machine that slows down slows both."""
    config, vocab_size = configuration(preset, flags)
    names = flags.sides or ["ours", "sdpa"][: 2 if flags.torch else 1]
    with tempfile.TemporaryDirectory() as folder_name, ExitStack() as stack:
        own = _started(stack, names, Path(folder_name) / "preset", config, vocab_size, flags)
        rows: list[dict[str, Any]] = []
        for what in ("T", "C", "L"):
            for factor in FACTORS:
                label = f"{preset}, {factor:g} {what}"
                changed = dataclasses.replace(config, model=scaled(config.model, what, factor))
                try:
                    with ExitStack() as inner:
                        folder = Path(folder_name) / f"{what}{factor}"
                        sides = _started(inner, names, folder, changed, vocab_size, flags)
                        begun = len(own[0].turns)
                        take_turns(own + sides, flags, label)
                        rows += [
                            {"what": what, "factor": factor, **row}
                            for row in _rows(changed, sides, [side.turns[begun:] for side in own])
                        ]
                except UserError as e:  # twice the size may not fit the memory
                    say(f"{label}: left out: {e}")
        if not rows:
            raise UserError(f"--preset {preset}: none of its sizes could be timed; the lines above say why")
        rows = [{"what": "", "factor": 1, **row} for row in _rows(config, own, [side.turns for side in own])] + rows
        machine = own[0].started["machine"] | ({"torch": flags.torch} if flags.torch else {})
    return {"preset": preset, "machine": machine, "growth": {"batch_size": config.batch_size, "rows": rows}}


def _started(
    stack: ExitStack, names: list[str], folder: Path, config: TrainConfig, vocab_size: int, flags: argparse.Namespace
) -> list[Side]:
    """The sides of one size, ours first: it writes the weights that the others start from."""
    folder.mkdir()
    write_plan(folder, config, vocab_size)
    sides = []
    for name in sorted(names, key=lambda name: name != "ours"):
        python = Path(sys.executable) if name == "ours" else flags.torch_python
        sides.append(stack.enter_context(side_of(name, folder, folder / "cache", python)))
        sides[-1].start(4096)
    return sides


def _rows(config: TrainConfig, sides: list[Side], own_turns: list[list[float]]) -> list[dict[str, Any]]:
    """A row for each side, its turns over the preset's in the same round, and over ours."""
    ours, m = sides[0], config.model
    rows = []
    for side, turns in zip(sides, own_turns, strict=True):
        over = statistics.median(t / own for t, own in zip(side.turns, turns, strict=True))
        against = {} if side is ours else compare(ours, 0, side, ours.started["machine"]["dtype"])
        sizes = {"T": m.block_size, "C": m.n_embd, "L": m.n_layer, "H": m.n_head}
        rows.append({"sizes": sizes, **row_of(side, config), "over_preset": over, **against})
    return rows


def show(result: dict[str, Any]) -> None:
    """The same for a person."""
    print(f"{result['preset']}, batch {result['growth']['batch_size']}: T, C and L halved and doubled")
    print(f"  {'':<10} {'side':<40} {'ms/step':>9} {'tokens/s':>10} {'over the preset':>16}")
    for row in result["growth"]["rows"]:
        size = f"{row['factor']:g} {row['what']}" if row["what"] else "preset"
        print(
            f"  {size:<10} {row['name']:<40} {row['ms_per_step']:9.2f} {row['tokens_s']:10,.0f} "
            f"{row['over_preset']:16.2f}"
        )
