"""Every check's core passes at its tolerances (`scripts/parity.py` runs all), and the table says what it must."""

import pytest

from jaxgpt.parity.suite import run_check
from parity_tests.suite import SUITE
from parity_tests.tolerances import TOLERANCES

# Some ten seconds each; the suite itself, which CI runs whole, holds them too.
SLOW = ("classification", "gradient_report", "gpt2", "resume_across", "trajectory_float32", "devices", "text")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in SUITE.checks])
def test_check(name):
    result = run_check(name, SUITE.checks[name], quick=True)
    assert not result.traceback, result.traceback
    for row in result.rows:
        assert row.not_run or row.status == "passed", row
        assert not row.not_run or row.note, "a check that does not run says why"


@pytest.mark.parametrize("key", TOLERANCES, ids=" ".join)
def test_every_tolerance_has_a_reason_and_stands_above_what_was_measured(key):
    tolerance = TOLERANCES[key]
    assert len(tolerance.reason) > 4
    if tolerance.measured is not None:
        assert tolerance.value >= tolerance.measured
        assert tolerance.margin is None or tolerance.margin >= 1
