"""Running checks, in this process and in others. The functions are this module's, so that other processes find them."""

import contextlib
import os
from functools import partial

import pytest

from jaxgpt.parity.harness import Row
from jaxgpt.parity.suite import Suite, in_processes, run_check
from jaxgpt.parity.tolerances import RAISED


def check_good(quick):
    yield Row("good", "float64", "quick" if quick else "whole", 1.0, 0.5)


def check_bad(quick):
    yield Row("bad", "float64", "before", 1.0, 0.5)
    raise ValueError("broken")


def check_planted(quick):
    yield Row("planted", "float64", os.environ.get("PARITY_PLANTED", ""), 1.0, float("PARITY_PLANTED" in os.environ))


@contextlib.contextmanager
def planted(value):
    os.environ["PARITY_PLANTED"] = value
    yield
    del os.environ["PARITY_PLANTED"]


def write_names(folder, names):
    (folder / "-".join(names)).touch()


def prepare(n_threads):
    os.environ["PARITY_THREADS"] = str(n_threads)


def threads_of(number):
    return number, os.environ["PARITY_THREADS"]


def test_a_check_gives_its_rows():
    result = run_check("good", check_good, quick=True)
    assert [row.case for row in result.rows] == ["quick"] and not result.traceback and result.seconds >= 0


def test_a_check_that_raises_keeps_its_rows_and_fails():
    result = run_check("bad", check_bad)
    assert [row.check for row in result.rows] == ["bad", RAISED]
    assert result.rows[1].status == "FAILED" and "broken" in result.traceback


def test_a_check_that_compares_nothing_is_an_error():
    with pytest.raises(AssertionError, match="compares nothing"):
        run_check("empty", lambda quick: iter(()))


@pytest.mark.parametrize(
    "groups, longest", [((("a", "c"),), ()), ((), ("c",)), ((("a",), ("a",)), ()), ((("a",),), ("a",))]
)
def test_groups_name_every_check_at_most_once(groups, longest):
    with pytest.raises(AssertionError):
        Suite({"a": check_good, "b": check_good}, groups, longest)


def test_a_suite_runs_in_processes_and_keeps_its_order(tmp_path):
    """In one process of the pool: a fault is planted in each, what shares results runs together, `after` follows it."""
    checks = {"good": check_good, "bad": check_bad, "planted": check_planted}
    suite, seen = Suite(checks, groups=(("planted", "good"),), longest=("bad",), prepare=prepare), []
    after = partial(write_names, tmp_path)
    results = suite.run(True, seen.append, partial(planted, "fault"), after, processes=1)
    assert [result.name for result in results] == list(checks)
    assert sorted(result.name for result in seen) == sorted(checks)
    assert results[2].rows[0].case == "fault" and "PARITY_PLANTED" not in os.environ
    assert [path.name for path in tmp_path.iterdir()] == ["planted-good"]  # not after a group that raised


def test_every_process_is_prepared():
    found = dict(in_processes(threads_of, [(1,), (2,)], prepare, processes=1))
    assert found == dict.fromkeys((1, 2), str(os.cpu_count() or 1))
