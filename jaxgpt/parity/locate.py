"""Where two sides depart: the first tensor, in order of computation, whose error is above its tolerance."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from jaxgpt.parity.tolerances import raised_row

Compared = Iterator[tuple[str, float, float]]  # name, error, tolerance


@dataclass(frozen=True)
class Departure:
    """The first tensor that departs, or None for none, and how many were compared."""

    where: str | None
    error: float
    tolerance: float
    compared: int


def first_departure(stages: Iterable[tuple[str, Compared]], say: Callable[[str], None]) -> Departure:
    """Compares tensor after tensor and stops at the first whose error is above its tolerance, or not a number.

    Args:
        stages: names of stages and their tensors, both in order of computation, computed only as far as the walk goes.
        say: takes a line for each stage.
    """
    compared = 0
    for stage, tensors in stages:
        before, last = compared, "the beginning"
        try:
            for name, error, tolerance in tensors:
                compared += 1
                if not error <= tolerance:
                    say(f"{stage}: {name} departs")
                    return Departure(f"{stage} {name}", error, tolerance, compared)
                last = name
        except Exception as e:  # a fault may raise: where it does is the answer
            return Departure(f"{stage}, after {last}: {raised_row(stage, e).note}", math.inf, 0.0, compared)
        say(f"{stage}: {compared - before} tensors agree")
    return Departure(None, 0.0, 0.0, compared)
