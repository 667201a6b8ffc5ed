"""The table of tolerances makes the rows that are held against it."""

import math

import pytest

from jaxgpt.parity.harness import Refused
from jaxgpt.parity.tolerances import RAISED, Tolerance, Tolerances, raised_row

TABLE = Tolerances(
    {("loss", "float64"): Tolerance(1e-13, 2e-15, "rounding"), ("R", "float32"): Tolerance(2, None, "R")}
)


def refuse():
    raise Refused("shape (2,), reference (3,)")


def test_margin():
    assert TABLE["loss", "float64"].margin == pytest.approx(50)
    assert TABLE["R", "float32"].margin is None


def test_a_row_has_the_tolerance_of_its_check():
    row = TABLE.row("loss", "float64", "case", 1e-14, note="step 3")
    assert (row.tolerance, row.error, row.note) == (1e-13, 1e-14, "step 3")


def test_an_unknown_check_is_an_error():
    with pytest.raises(KeyError):
        TABLE.row("loss", "float32", "case", 0.0)


def test_error_row():
    assert TABLE.error_row("loss", "float64", "case", lambda: 1e-14).error == 1e-14
    row = TABLE.error_row("loss", "float64", "case", refuse)
    assert row.status == "FAILED" and row.note == "refused: shape (2,), reference (3,)"


def test_ratio_row():
    row = TABLE.ratio_row("R", "float32", "case", lambda: (3.0, 2.0))
    assert (row.error, row.torch_error, row.ratio, row.status) == (3.0, 2.0, 1.5, "passed")
    assert TABLE.ratio_row("R", "float32", "case", refuse).ratio == math.inf


def test_what_raises_is_a_failed_row():
    row = raised_row("loss", ValueError("first line\nsecond"))
    assert row.check == RAISED and row.status == "FAILED" and row.note == "ValueError: first line"
