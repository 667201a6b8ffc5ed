"""Plants a fault, compares, and says what the comparison made of it."""

import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from jaxgpt.parity.comparison import Comparison, compare
from tests.parity_pairs.planted import PLANTED
from tests.parity_pairs.planting import Planted

PAIRS = Path(__file__).resolve().parents[2] / "examples" / "pairs"


@dataclass(frozen=True)
class Verdict:
    """What the comparison of a faulty pair found.

    Attributes:
        level: the first that failed; "" if none did.
        cause, layer, left: the first finding's; "" and None if there is none.
        right: whether the level, the cause and the layer are those of the fault.
    """

    level: str
    cause: str
    layer: str
    detail: str
    error: float | None
    left: float | None
    right: bool

    @property
    def caught(self) -> bool:
        return bool(self.level)


def verdict_on(name: str) -> Verdict:
    """The verdict on the fault of a name: faults hold functions, which do not travel between processes."""
    return verdict(next(fault for fault in PLANTED if fault.name == name))


def verdict(fault: Planted) -> Verdict:
    """The verdict on one planted fault."""
    with fault.plant(example(fault.pair)) as pair:
        comparison = compare(pair, mutants=False)
    level = first_level(comparison)
    if not comparison.diagnosis.findings:
        return Verdict(level, "", "", "", None, None, False)
    first = comparison.diagnosis.findings[0]
    layers = [layer.replace("*", "0") for layer in first.layer.split(", ")]
    is_place = any(re.fullmatch(fault.layer, layer) for layer in layers)
    right = level == fault.level and first.cause == fault.cause and is_place
    return Verdict(level, first.cause, first.layer, first.detail, first.error, first.left, right)


def first_level(comparison: Comparison) -> str:
    """The level of the first float64 row that failed: "gradients" of "gradients that are 0"."""
    failed = [row.check for row in comparison.rows if row.status == "FAILED" and row.precision in ("any", "float64")]
    return re.split(r"[, ]", failed[0])[0] if failed else ""


_EXAMPLES: dict[str, ModuleType] = {}


def example(name: str) -> ModuleType:
    """A file of examples/pairs, loaded once."""
    if name not in _EXAMPLES:
        spec = importlib.util.spec_from_file_location(f"pairs_{name}", PAIRS / f"{name}.py")
        assert spec and spec.loader, "a Python file"
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        _EXAMPLES[name] = module
    return _EXAMPLES[name]
