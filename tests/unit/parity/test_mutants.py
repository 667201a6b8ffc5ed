"""Planting faults, and what counts as caught."""

import math
from types import SimpleNamespace

import pytest

from jaxgpt.parity.harness import Row
from jaxgpt.parity.mutants import Mutant, caught, find, put, run, together, worst_row, wrap
from jaxgpt.parity.tolerances import RAISED


@pytest.fixture
def program():
    return SimpleNamespace(scale=1.0, double=lambda x: 2 * x)


def row(error, check="loss"):
    return Row(check, "float64", "case", 1.0, error)


def test_put_and_wrap_are_taken_back(program):
    with together(put(program, "scale", 3.0), wrap(program, "double", lambda real: lambda x: real(x) + 1))():
        assert (program.scale, program.double(2)) == (3.0, 5)
    assert (program.scale, program.double(2)) == (1.0, 4)


def test_run_gives_the_worst_row_of_each_probe(program):
    probes = {"one": lambda: iter([row(0.0), row(program.scale)]), "two": lambda: iter([row(0.5)])}
    rows = run(Mutant("scaled", put(program, "scale", 30.0), ("one", "two")), probes)
    assert {name: found.error for name, found in rows.items()} == {"one": 30.0, "two": 0.5}
    assert program.scale == 1.0


def test_rows_that_did_not_run_do_not_count():
    not_run = Row("loss", "float64", "case", 1.0, not_run=True)
    assert worst_row("probe", lambda: iter([not_run, row(0.5)])).error == 0.5


@pytest.mark.parametrize(
    "found, expected",
    [(row(9.9), False), (row(10.0), True), (row(math.inf), True), (row(math.inf, RAISED), False)],
    ids=["too near", "ten times", "refused", "raised"],
)
def test_caught(found, expected):
    mutant = Mutant("fault", put(None, "", None), ("probe", "other"))
    assert caught(mutant, {"probe": found, "other": row(1e9)}) == expected


def test_a_probe_that_raises_catches_nothing():
    def probe():
        raise ValueError("broken")
        yield

    found = worst_row("probe", probe)
    assert found.check == RAISED and "broken" in found.note


def test_find():
    mutants = [Mutant(name, put(None, "", None), ("probe",)) for name in ("clip", "clip off", "eps")]
    assert find(mutants, "clip").name == "clip"  # itself, though others hold the name
    assert find(mutants, "EP").name == "eps"
    with pytest.raises(LookupError, match="several match; choose of: clip; clip off"):
        find(mutants, "cli")
    with pytest.raises(LookupError, match="unknown; choose of: clip; clip off; eps"):
        find(mutants, "dropout")
