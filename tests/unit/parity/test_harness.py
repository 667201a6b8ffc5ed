"""One comparison: what is refused, what is measured, and the row that it leaves."""

import math

import numpy as np
import pytest

from jaxgpt.parity.harness import (
    Refused,
    Row,
    max_abs,
    own_errors,
    ratio,
    relative_l2,
    tensor_ratios,
    worst_tensor,
)

A = np.ones((2, 3))


@pytest.mark.parametrize("measure", [relative_l2, max_abs])
@pytest.mark.parametrize(
    "ours, reference",
    [
        (A, np.ones((3, 2))),
        (A.astype(np.float32), A),
        (A * np.nan, A),
        (A, A * np.inf),
        (A * 0, A * 0),
        (A, A * 1e-9),
    ],
    ids=["shape", "dtype", "NaN", "infinite reference", "zeros", "near zero"],
)
def test_refuses(measure, ours, reference):
    with pytest.raises(Refused):
        measure(ours, reference)


def test_measures():
    assert relative_l2(A, A) == 0
    assert relative_l2(A * 1.1, A) == pytest.approx(0.1)
    assert max_abs(A + [[0, 0, -0.5]], A) == 0.5


def test_own_errors_are_root_mean_squares_against_the_truth():
    ours, torch = A + [[0.2], [0]], A - 0.1
    assert own_errors(ours, torch, A) == pytest.approx((0.2 / 2**0.5, 0.1))


@pytest.mark.parametrize("truth", [A.astype(np.float32), np.ones((3, 2))], ids=["dtype", "shape"])
def test_refuses_another_truth(truth):
    with pytest.raises(Refused):
        own_errors(A, A, truth)


@pytest.mark.parametrize("errors, expected", [((0.0, 0.0), 0.0), ((1.0, 0.0), math.inf), ((1.0, 2.0), 0.5)])
def test_ratio(errors, expected):
    assert ratio(errors) == expected


def test_worst_tensor_is_named():
    ours = {"a": A, "b": A * 1.1, "c": A * 0.5}
    assert worst_tensor(ours, dict.fromkeys("abc", A), "float64") == (0.5, "c")


@pytest.mark.parametrize(
    "ours, why",
    [({}, "a: missing"), ({"a": A.astype(np.float32)}, "a: dtype float32"), ({"a": A * np.nan}, "a: not finite")],
)
def test_worst_tensor_is_infinite_where_one_is_refused(ours, why):
    error, where = worst_tensor(ours, {"a": A}, "float64")
    assert error == math.inf and why in where


def test_the_reference_is_rounded_to_the_precision():
    third = np.full(3, 1 / 3)
    assert worst_tensor({"a": third.astype(np.float32)}, {"a": third}, "float32") == (0.0, "")


def test_tensor_ratios():
    truth = {"a": A, "zero": A * 0}
    found = tensor_ratios({"a": A + 0.1, "zero": A}, {"a": A - 0.2, "zero": A}, truth)
    assert found == {"a": pytest.approx(0.5), "zero": math.inf}


@pytest.mark.parametrize(
    "values, value, signal, status",
    [
        (dict(error=0.5), 0.5, 0.25, "passed"),
        (dict(error=5.0), 5.0, 2.5, "FAILED"),
        (dict(error=5.0, ratio=1.0), 1.0, 0.5, "passed"),
        (dict(error=math.nan), math.inf, math.inf, "FAILED"),
        (dict(error=None, not_run=True), math.inf, math.inf, "not run"),
        (dict(error=0.0), 0.0, 0.0, "passed"),
    ],
)
def test_row(values, value, signal, status):
    row = Row("check", "float64", "case", 2.0, **values)
    assert (row.value, row.signal, row.status) == (value, signal, status)


def test_a_tolerance_of_zero_passes_nothing_but_equality():
    assert Row("check", "float64", "case", 0.0, 0.0).status == "passed"
    assert Row("check", "float64", "case", 0.0, 1e-300).signal == math.inf


@pytest.mark.parametrize(
    "row",
    [
        Row("check", "float64", "case", 2.0, 0.5, note="tensor"),
        Row("check", "float32", "case", 2.0, math.inf, ratio=math.inf, note="refused"),
        Row("check", "float32", "case", 2.0, not_run=True),
    ],
)
def test_a_row_survives_json(row):
    assert Row.from_json(row.to_json()) == row


def test_the_margin_is_the_tolerance_over_the_value():
    assert Row("check", "float64", "case", 2.0, 0.5).to_json()["margin"] == 4
    assert Row("check", "float64", "case", 2.0, 0.0).to_json()["margin"] is None
