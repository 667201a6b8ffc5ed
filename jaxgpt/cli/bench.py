"""Time a training step against PyTorch on this machine, alternately in one run: jaxgpt bench

Every implementation is a process of its own with the same weights and batches. In each round they compute one after the
other, and while one computes the others wait. Their losses are compared, so that a wrong fast answer cannot win.
"""

import argparse
import math
import os
import sys
from pathlib import Path
from typing import NoReturn

from jaxgpt import strict_json
from jaxgpt.cli.args import import_from_checkout, integer, number
from jaxgpt.errors import UserError, require_writable
from jaxgpt.presets import BENCHMARKS, PRESETS

IMPLEMENTATIONS = {
    "ours": "this project's trainer step",
    "eager": "PyTorch eager, the documented loop",
    "sdpa": "PyTorch eager with SDPA",
    "compile": "torch.compile with SDPA",
    "cudnn": "torch.compile with cuDNN's attention (GPU)",
    "graphs": "torch.compile with cuDNN's attention and CUDA graphs (GPU)",
}
# What has no meaning with each of the modes.
EXCLUDED = {
    "tune_cpu": ("growth", "loop", "sides", "picture", "docs", "torch_python"),
    "loop": ("growth", "sides", "rounds", "picture"),
}


class ArgumentParser(argparse.ArgumentParser):
    """Raises `UserError` where argparse prints its usage and exits."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse_flags(arguments: list[str]) -> argparse.Namespace:
    """The flags. By argparse: a machine that only measures may not have tyro."""
    p = ArgumentParser(prog="jaxgpt bench", description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    p.add_argument(
        "--preset",
        default=None,
        help=f"one or more of {', '.join(BENCHMARKS)}, with commas between (default: minigpt; with --tune-cpu "
        "minigpt,nanogpt-cpu)",
    )
    p.add_argument("--growth", action="store_true", help="the step with T, C and L halved and doubled")
    p.add_argument(
        "--loop", type=integer, default=None, metavar="N", help="N steps of scripts/train.py over its bare step"
    )
    p.add_argument(
        "--tune-cpu",
        action="store_true",
        help="suggest when to divide a step over this CPU's cores, and into which microbatches (some ten minutes)",
    )
    p.add_argument(
        "--sides",
        default=None,
        help=f"implementations, some of {', '.join(IMPLEMENTATIONS)} (default: all that this machine has; with "
        "--growth ours and sdpa)",
    )
    p.add_argument(
        "--rounds",
        type=integer,
        default=None,
        help="how often each is measured (default: 12; with --tune-cpu 6); the median counts",
    )
    p.add_argument("--turn-seconds", type=number, default=1.0, help="about how long each is measured in a round")
    p.add_argument("--batch-size", type=integer, default=None, help="other than the preset's")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the products")
    p.add_argument("--torch-python", type=Path, default=None, help="interpreter that has PyTorch, if not this one")
    p.add_argument("--json", type=Path, default=None, help="also write the figures to this file")
    p.add_argument("--picture", type=Path, default=None, help="also draw them (.png)")
    p.add_argument("--docs", action="store_true", help="also put them into docs/benchmarks.md")
    flags = p.parse_args(arguments)
    flags.preset = (flags.preset or ("minigpt,nanogpt-cpu" if flags.tune_cpu else "minigpt")).split(",")
    check(flags)
    flags.rounds = (6 if flags.tune_cpu else 12) if flags.rounds is None else flags.rounds
    return flags


def check(flags: argparse.Namespace) -> None:
    """Raises `UserError` for flags that have no meaning, alone or together."""
    for preset in flags.preset:
        if preset not in BENCHMARKS:
            raise UserError(f"--preset {preset}: unknown; choose of {', '.join(BENCHMARKS)}")
    if flags.sides is not None:
        flags.sides = flags.sides.split(",")
        if "ours" not in flags.sides or not set(flags.sides) <= set(IMPLEMENTATIONS):
            raise UserError(f"--sides {','.join(flags.sides)}: give ours and others of {', '.join(IMPLEMENTATIONS)}")
    if flags.docs and (flags.batch_size or flags.dtype != "auto"):
        raise UserError("--docs: the page holds each configuration as it is; leave out --batch-size and --dtype")
    for mode, excluded in EXCLUDED.items():
        given = [_flag(name) for name in excluded if getattr(flags, name)]
        if getattr(flags, mode) and given:
            raise UserError(f"{given[0]}: has no meaning with {_flag(mode)}; leave one of them out")
    if flags.loop is not None:
        for preset in flags.preset:
            if preset not in PRESETS:
                raise UserError(
                    f"--preset {preset}: only timed, not trained; with --loop choose of {', '.join(PRESETS)}"
                )
        if flags.loop < 1:
            raise UserError(f"--loop {flags.loop}: give a number of steps above 0")
    at_least_1 = (flags.rounds, flags.batch_size)
    if any(n is not None and n < 1 for n in at_least_1) or not 0 < flags.turn_seconds < math.inf:
        raise UserError("--rounds, --turn-seconds, --batch-size: give numbers above 0")
    for name, suffix in (("json", ".json"), ("picture", ".png")):
        path = getattr(flags, name)
        if path:
            require_writable(f"--{name}", path)
            if path.suffix != suffix:
                raise UserError(f"--{name} {path}: give the name of a file that ends in {suffix}")
    if flags.torch_python and not os.path.isfile(flags.torch_python):
        raise UserError(f"--torch-python {flags.torch_python}: no such file; give the path of a Python interpreter")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def main(args: list[str]) -> None:
    flags = parse_flags(args)
    import_from_checkout("benchmarks")
    if flags.tune_cpu:
        tune(flags)
    else:
        measure_presets(flags)


def tune(flags: argparse.Namespace) -> None:
    """Measures the thresholds of `parallel.CpuTuning`, and prints those that suit this machine."""
    from benchmarks import tune_cpu

    result = tune_cpu.measure(flags.preset, flags)
    tune_cpu.show(result)
    if flags.json:
        flags.json.write_text(strict_json.dumps(result, indent=1) + "\n")


def measure_presets(flags: argparse.Namespace) -> None:
    """Measures, shows and keeps one configuration after the other."""
    from benchmarks import alternating, loop, page, scaling, steps

    flags.torch_python, flags.known = flags.torch_python or Path(sys.executable), IMPLEMENTATIONS
    flags.torch = alternating.torch_version(flags.torch_python)
    if flags.sides and len(flags.sides) > 1 and not flags.torch:
        raise UserError(
            f"--sides {','.join(flags.sides)}: PyTorch is not installed for {flags.torch_python}; see --torch-python"
        )
    if not flags.torch and not flags.loop:
        alternating.say("PyTorch is not installed: only ours is measured (--torch-python names another interpreter)")
    mode = loop if flags.loop else scaling if flags.growth else steps
    results = []
    for preset in flags.preset:
        results.append(mode.measure(preset, flags))
        mode.show(results[-1])
        if flags.json:
            flags.json.write_text(strict_json.dumps(results, indent=1) + "\n")
        if flags.picture:
            (page.draw_scaling if flags.growth else page.draw_steps)(results, flags.picture)
        if flags.docs:
            page.record(results)
