"""The walk to the first tensor that departs."""

import math

from jaxgpt.parity.locate import Departure, first_departure


def walk(*stages):
    said = []
    return first_departure(stages, said.append), said


def test_nothing_departs():
    departure, said = walk(("layer", iter([("a", 0.0, 0.0), ("b", 1.0, 2.0)])), ("step", iter([("c", 0.0, 1.0)])))
    assert departure == Departure(None, 0.0, 0.0, 3)
    assert said == ["layer: 2 tensors agree", "step: 1 tensors agree"]


def test_it_stops_at_the_first():
    later = iter([("c", 9.0, 1.0)])
    departure, said = walk(("layer", iter([("a", 0.0, 1.0), ("b", 3.0, 2.0), ("never", 9.0, 1.0)])), ("step", later))
    assert departure == Departure("layer b", 3.0, 2.0, 2)
    assert said == ["layer: b departs"]
    assert next(later)  # not even begun


def test_nan_departs():
    assert walk(("layer", iter([("a", math.nan, 1.0)])))[0].where == "layer a"


def test_an_exception_is_located():
    def tensors():
        yield "a", 0.0, 1.0
        raise ValueError("no such axis")

    departure, _ = walk(("layer", tensors()))
    assert departure == Departure("layer, after a: ValueError: no such axis", math.inf, 0.0, 1)
