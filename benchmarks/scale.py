"""The tables of docs/scale.md: memory and communication from 124M to 7B parameters on 1 to 1,024 accelerators.

    python -m benchmarks.scale     # writes them anew, in seconds

They are made by formula (`jaxgpt.analysis.scaling`); nothing is compiled or measured.
"""

import dataclasses
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.page import table, write_between
from jaxgpt import parallel
from jaxgpt.analysis.scaling import Footprint, footprint
from jaxgpt.analysis.targets import parse_target
from jaxgpt.config import ModelConfig, TrainConfig, mesh_text
from jaxgpt.model.gpt import Numerics
from jaxgpt.objective import LanguageModelingObjective
from jaxgpt.presets import PRESETS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scale.md"
BEGIN, END = "<!-- scale: written by python -m benchmarks.scale -->", "<!-- end of the scale -->"
ROWS, VOCABULARY, CHIP = 8, 50257, "H100"
SHAPES = {  # layers, heads, channels: GPT-2's four sizes, and Llama's smallest
    "124M": (12, 12, 768),
    "350M": (24, 16, 1024),
    "774M": (36, 20, 1280),
    "1.5B": (48, 25, 1600),
    "7B": (32, 32, 4096),
}
FSDP = (1, 8, 64, 1024)
MESHES = ((8, 1), (1024, 1), (1, 8), (128, 8), (16, 64), (1, 1024))  # data, fsdp
REMAT = ("none", "dots", "block")


def model_of(name: str) -> ModelConfig:
    n_layer, n_head, n_embd = SHAPES[name]
    return dataclasses.replace(PRESETS["gpt2"].model, n_layer=n_layer, n_head=n_head, n_embd=n_embd)


def config_of(name: str, n_devices: int = 1, remat: Any = "none") -> TrainConfig:
    return dataclasses.replace(PRESETS["gpt2"], model=model_of(name), batch_size=ROWS * n_devices, remat=remat)


@cache
def shapes_of(name: str) -> dict[str, Any]:
    """The parameters' shapes: those of one block, as many times as there are layers."""
    config = config_of(name)
    one_layer = dataclasses.replace(config, model=dataclasses.replace(config.model, n_layer=1))
    shapes = LanguageModelingObjective(one_layer, VOCABULARY, numerics_of(config)).param_shapes
    layers = range(config.model.n_layer)
    return {key.replace(".0.", f".{i}.", 1): x for key, x in shapes.items() for i in layers if i == 0 or ".0." in key}


def numerics_of(config: TrainConfig) -> Numerics:
    return parallel.numerics(config, parse_target(CHIP).stand_in)


def footprint_of(name: str, data: int, fsdp: int, remat: str = "none") -> Footprint:
    config = config_of(name, data * fsdp, remat)
    return footprint(config, numerics_of(config), shapes_of(name), data, fsdp)


def tables() -> str:
    """Both tables as Markdown."""
    head = ["model", "`fsdp`", "weights", "moments", "gradients", "gathered"]
    head += [f"activations, `--remat {remat}`" for remat in REMAT] + ["loss"]
    head += [f"peak, `--remat {remat}`" for remat in ("none", "block")]
    memory = table(head, [_memory(name, fsdp) for name in SHAPES for fsdp in FSDP])
    head = ["model", "`--mesh`", "devices", "all-gather", "reduce-scatter", "all-reduce", "sent by a ring"]
    return f"{memory}\n{table(head, list(_communication()))}"


def _memory(name: str, fsdp: int) -> list[str]:
    found = {remat: footprint_of(name, 1, fsdp, remat) for remat in REMAT}
    one = found["none"]
    sizes = [one.weights, one.moments, one.gradients, one.gathered]
    sizes += [found[remat].activations for remat in REMAT] + [one.loss, one.peak, found["block"].peak]
    return [name if fsdp == FSDP[0] else "", f"{fsdp:,}", *map(_size, sizes)]


def _communication() -> Iterator[list[str]]:
    for name in SHAPES:
        for data, fsdp in MESHES:
            found = footprint_of(name, data, fsdp)
            mesh = mesh_text({axis: size for axis, size in (("data", data), ("fsdp", fsdp)) if size > 1})
            sizes = (found.all_gather, found.reduce_scatter, found.all_reduce, found.sent)
            yield [name if (data, fsdp) == MESHES[0] else "", f"`{mesh}`", f"{data * fsdp:,}", *map(_size, sizes)]


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.3g}" if n_bytes else ""


def main() -> None:
    write_between(PAGE, BEGIN, END, f"\n{tables()}\n")


if __name__ == "__main__":
    main()
