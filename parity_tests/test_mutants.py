"""Each planted fault is caught, by the rung that it names, with a signal of at least ten gates."""

import pytest

from jaxgpt.errors import UserError
from parity_tests.ladder import RAISED
from parity_tests.mutants import ENOUGH, MUTANTS, find
from parity_tests.probes import PROBES, probe


def test_there_are_enough_and_all_differ():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 25
    assert all(rung in PROBES for mutant in MUTANTS for rung in mutant.rungs)


@pytest.mark.parametrize("rung", sorted({mutant.rungs[0] for mutant in MUTANTS}))
def test_without_a_fault_the_rung_passes(rung):
    """Else the signals below would mean nothing."""
    row = probe(rung)
    assert row.status == "passed", row


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_caught(mutant):
    with mutant.patch():
        row = probe(mutant.rungs[0])
    assert row.signal >= ENOUGH, row
    assert row.rung != RAISED, "caught by accident: something else broke"


def test_find():
    assert find("TOP-P LEFT").name == "top-p left out"
    assert all(find(mutant.name) is mutant for mutant in MUTANTS)
    for name in ("no such fault", "dropout"):
        with pytest.raises(UserError, match="--mutant"):
            find(name)
