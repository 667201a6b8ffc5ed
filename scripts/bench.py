"""Time a training step against PyTorch on this machine, alternately in one run: python scripts/bench.py

Every side is a process of its own with the same weights and batches; they take turns, and while one computes the others
wait. Their losses are compared, so that a wrong fast answer cannot win.
"""

import argparse
import json
import math
import sys
from pathlib import Path

from jaxgpt.cli import run_command
from jaxgpt.errors import UserError
from jaxgpt.presets import BENCHMARKS, PRESETS

SIDES = {
    "ours": "this project's trainer step",
    "eager": "PyTorch eager, the documented loop",
    "sdpa": "PyTorch eager with SDPA",
    "compile": "torch.compile with SDPA",
    "cudnn": "torch.compile with cuDNN's attention (GPU)",
    "graphs": "torch.compile with cuDNN's attention and CUDA graphs (GPU)",
}


def flags_of(arguments: list[str]) -> argparse.Namespace:
    """The flags. argparse, not tyro, which machines that only measure may not have."""
    p = argparse.ArgumentParser(prog="bench.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--preset", default="minigpt", help=f"one or more of {', '.join(BENCHMARKS)}, with commas between")
    p.add_argument("--growth", action="store_true", help="the step with T, C and L halved and doubled")
    p.add_argument("--loop", type=int, default=None, metavar="N", help="N steps of scripts/train.py over its bare step")
    p.add_argument(
        "--sides",
        default=None,
        help=f"some of {', '.join(SIDES)} (default: all that this machine has; with --growth ours and sdpa)",
    )
    p.add_argument("--rounds", type=int, default=None, help="turns of each side (12); the median turn counts")
    p.add_argument("--turn-seconds", type=float, default=1.0, help="about how long a turn is")
    p.add_argument("--batch-size", type=int, default=None, help="other than the preset's")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the products")
    p.add_argument("--torch-python", type=Path, default=None, help="interpreter that has PyTorch, if not this one")
    p.add_argument("--json", type=Path, default=None, help="also write the figures to this file")
    p.add_argument("--picture", type=Path, default=None, help="also draw them (.png)")
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
    if flags.loop is not None:
        given = [f"--{name}" for name in ("growth", "sides", "rounds", "picture") if getattr(flags, name)]
        if given:
            raise UserError(f"{given[0]}: has no meaning with --loop; leave one of them out")
        for preset in flags.preset:
            if preset not in PRESETS:
                raise UserError(
                    f"--preset {preset}: only timed, not trained; with --loop choose of {', '.join(PRESETS)}"
                )
        if flags.loop < 1:
            raise UserError(f"--loop {flags.loop}: give a number of steps above 0")
    flags.rounds = 12 if flags.rounds is None else flags.rounds
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


def main() -> None:
    flags = flags_of(sys.argv[1:])
    from benchmarks import growth, loop, page, steps, turns

    flags.torch_python, flags.known = flags.torch_python or Path(sys.executable), SIDES
    flags.torch = turns.torch_version(flags.torch_python)
    if flags.sides and len(flags.sides) > 1 and not flags.torch:
        raise UserError(
            f"--sides {','.join(flags.sides)}: PyTorch is not installed for {flags.torch_python}; see --torch-python"
        )
    if not flags.torch and not flags.loop:
        turns.say("PyTorch is not installed: one side only (--torch-python names another interpreter)")
    mode = loop if flags.loop else growth if flags.growth else steps
    results = []
    for preset in flags.preset:
        results.append(mode.measure(preset, flags))
        mode.show(results[-1])
        if flags.json:
            flags.json.write_text(json.dumps(results, indent=1) + "\n")
        if flags.picture:
            (page.draw_growth if flags.growth else page.draw)(results, flags.picture)
        if flags.docs:
            page.record(results)


if __name__ == "__main__":
    run_command(main)
