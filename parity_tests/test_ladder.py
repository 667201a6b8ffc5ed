"""Every rung passes at its gates (its core: `scripts/parity.py` runs all), and the tolerances say what they must."""

import pytest

from parity_tests.ladder import LONGEST, RUNGS, SHARING, run_rung
from parity_tests.tolerances import TOLERANCES


@pytest.mark.parametrize("name", RUNGS)
def test_rung(name):
    done = run_rung(name, quick=True)
    assert not done.trace, done.trace
    for row in done.rows:
        assert row.not_run or row.status == "passed", row
        assert not row.not_run or row.note, "a rung that does not run says why"


def test_groups_name_rungs():
    assert set(SHARING + LONGEST) <= set(RUNGS)


@pytest.mark.parametrize("key", TOLERANCES, ids=" ".join)
def test_every_gate_has_a_reason_and_stands_above_what_was_measured(key):
    tolerance = TOLERANCES[key]
    assert len(tolerance.reason) > 4
    if tolerance.measured is not None:
        assert tolerance.gate >= tolerance.measured
        assert tolerance.headroom is None or tolerance.headroom >= 1
