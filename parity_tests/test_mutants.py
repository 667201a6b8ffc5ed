"""Each planted fault is caught, by its first probe, with a signal of at least ten times the tolerance.

The default tier plants a sample of the faults: which ones, the commit decides, so that a few commits cover all. There,
test_suite.py shows that the probes pass without a fault: nearly every probe is the core of a check, or a part of it.
"""

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from jaxgpt.errors import UserError
from jaxgpt.parity.mutants import caught, worst_row
from parity_tests.mutants import MUTANTS, find
from parity_tests.probes import PROBES

SAMPLE = 5


def sample_seed() -> str:
    """What chooses the sample: JAXGPT_SAMPLE, else the commit, else always the same."""
    if given := os.environ.get("JAXGPT_SAMPLE"):
        return given
    line = ["git", "rev-parse", "HEAD"]
    try:
        return subprocess.run(
            line, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def sampled() -> set[str]:
    """The names of `SAMPLE` mutants, by a hash."""
    seed = sample_seed()
    digests = {mutant.name: hashlib.sha256(f"{seed} {mutant.name}".encode()).digest() for mutant in MUTANTS}
    return set(sorted(digests, key=digests.get)[:SAMPLE])


IN_SAMPLE = sampled()


def test_there_are_enough_and_all_differ():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 25
    assert all(probe in PROBES for mutant in MUTANTS for probe in mutant.probes)


@pytest.mark.slow
@pytest.mark.parametrize("probe", sorted({mutant.probes[0] for mutant in MUTANTS}))
def test_without_a_fault_the_probe_passes(probe):
    """Else the signals below would mean nothing."""
    row = worst_row(probe, PROBES[probe])
    assert row.status == "passed", row


@pytest.mark.parametrize(
    "mutant",
    [pytest.param(m, id=m.name, marks=[] if m.name in IN_SAMPLE else pytest.mark.slow) for m in MUTANTS],
)
def test_mutant_is_caught(mutant):
    probe = mutant.probes[0]
    with mutant.patch():
        row = worst_row(probe, PROBES[probe])
    assert caught(mutant, {probe: row}), row


def test_the_sample_is_a_function_of_the_seed(monkeypatch):
    monkeypatch.setenv("JAXGPT_SAMPLE", "one")
    one = sampled()
    assert one == sampled() and len(one) == SAMPLE
    monkeypatch.setenv("JAXGPT_SAMPLE", "two")
    assert sampled() != one


def test_find():
    assert find("TOP-P LEFT").name == "top-p left out"
    assert all(find(mutant.name) is mutant for mutant in MUTANTS)
    for name in ("no such fault", "dropout"):
        with pytest.raises(UserError, match="--mutant"):
            find(name)
