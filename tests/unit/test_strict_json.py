"""JSON that every program can read."""

import json
import math

import pytest

from jaxgpt import strict_json


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def test_numbers_that_are_not_finite_become_null():
    values = {"loss": math.inf, "rows": [1.5, -math.inf, (math.nan, 2)], "name": "NaN", "n": 3, "none": None}
    text = strict_json.dumps(values)
    found = json.loads(text, parse_constant=refuse)
    assert found == {"loss": None, "rows": [1.5, None, [None, 2]], "name": "NaN", "n": 3, "none": None}


def test_finite_values_are_written_as_json_writes_them():
    values = {"a": [1e-05, 0.1, 10**20, True], "b": {"c": "é\ud800"}}
    for indent in (None, 2):
        assert strict_json.dumps(values, indent=indent) == json.dumps(values, indent=indent)
    assert strict_json.loads(strict_json.dumps(values)) == values


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", "-Infinity", "1e999", "{", "[" * 100_000, "1" * 5000, b"\xff"])
def test_what_is_not_strict_json_is_a_value_error(text):
    with pytest.raises(ValueError):
        strict_json.loads(text)
