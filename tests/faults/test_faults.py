"""The fault suite: a sample of each fault in the default tests, all cases in shares as slow ones."""

import dataclasses
import json
import os
import random
from functools import partial
from pathlib import Path
from unittest import mock

import pytest

from tests.faults import calls, corruptions, engine, limits, page, power_loss, runs, snapshots, table, worker
from tests.faults.bad_inputs import time_limit
from tests.faults.engine import Case, Fault, Finding, Harness, Outcome
from tests.faults.processes import Done

SHARES = {"damaged files": 10, "a call fails": 3, "a loss of power": 6}  # of the faults with many cases


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    made = Harness(tmp_path_factory.mktemp("faults"))
    yield made
    made.close()


class Here:
    """What a warm process does, in this one."""

    def __init__(self, cli_env):
        self.env = cli_env

    def run(self, args, plan=None):
        with mock.patch.dict(os.environ, self.env, clear=True), time_limit(120):
            return Done(**worker.run_here(args, plan and dataclasses.asdict(plan)))

    def snapshot(self, run):
        return snapshots.snapshot(run)


@pytest.fixture(scope="module")
def harness_here(trained, text_file, user_env, tmp_path_factory):
    """A harness that runs all commands in this process, and damages copies of the run that many tests share."""
    whole = runs.Whole(trained, snapshots.snapshot(trained))
    given = {"text": text_file, "whole": whole}
    made = Harness(tmp_path_factory.mktemp("faults"), flags=(), warm=Here(user_env), given=given)
    with worker.compiled_once():
        prepared = runs.Prepared(trained, runs.train_args(made))
        made.prepared("finished", lambda harness, folder: runs.with_references(harness, prepared, folder))
        yield made


@pytest.mark.parametrize(
    "make_cases",
    [
        partial(corruptions.corruption_cases, names=("finished",), n_cases=3),
        pytest.param(partial(limits.call_cases, n_cases=1), marks=pytest.mark.slow),
    ],
    ids=["damaged files", "calls that fail"],
)
def test_a_sample(harness_here, make_cases):
    fault = Fault("a sample", "", "", make_cases)
    for case in make_cases(random.Random(1), harness_here):
        (finding,) = engine.run_case(harness_here, fault, case)
        assert finding.outcome in engine.GOOD, (case.name, finding)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault, share",
    [
        pytest.param(fault, (k, n), id=f"{fault.name} {k}/{n}")
        for fault in table.FAULTS
        for n in [SHARES.get(fault.name, 1)]
        for k in range(n)
    ],
)
def test_all_cases(harness, fault, share):
    (result,) = engine.run([fault], harness, share=share)
    assert not result.failures, result.failures


RECORDED = page.FOLDER / "reliability.json"
needs_record = pytest.mark.skipif(not RECORDED.exists(), reason="python -m tests.faults --docs has not been run")


@needs_record
def test_the_page_is_what_the_json_gives():
    kept = json.loads(RECORDED.read_text(encoding="utf-8"))
    assert (page.FOLDER / "reliability.md").read_text(encoding="utf-8") == page.page(kept)
    assert list(kept) == [fault.name for fault in table.ALL if fault.name in kept]


@needs_record
def test_nothing_was_lost_or_silent():
    kept = json.loads(RECORDED.read_text(encoding="utf-8"))
    assert [failure for found in kept.values() for failure in found["failures"]] == []


def test_a_result_replaces_the_older_one_of_its_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "FOLDER", tmp_path)
    environment = {"commit": "c", "python": "3", "jax": "1", "orbax-checkpoint": "2"}
    monkeypatch.setattr(page, "environment", lambda: environment)
    case = Case("a", lambda harness, folder: Finding(Outcome.EQUAL), counts=7)
    first, second = table.FAULTS[:2]
    for fault, outcome in ((second, Outcome.EQUAL), (first, Outcome.SILENT), (first, Outcome.TOLD)):
        page.record([engine.Result(fault, [(case, Finding(outcome))])])
    text = (tmp_path / "reliability.md").read_text()
    assert list(json.loads((tmp_path / "reliability.json").read_text())) == [first.name, second.name]
    assert f"| {first.name} | 7 | 0 | 0 | 7 | 0 | 0 | 0 | 0 |" in text
    assert f"| {second.name} | 7 | 7 | 0 | 0 | 0 | 0 | 0 | 0 |" in text and "14 faults were made; 0 of them" in text


# ------------------------------------------------------------------------------------ the engine: it sees what is wrong


@pytest.mark.parametrize(
    "done, outcome",
    [
        (Done(2, "", "error: config.json is missing; bring it back\n"), Outcome.TOLD),
        (Done(2, "", "error: one\nerror: two\n"), Outcome.SILENT),
        (Done(1, "", "no word"), Outcome.SILENT),
        (Done(-6, "", "terminate called"), Outcome.TRACEBACK),
        (Done(2, "", "Traceback (most recent call last):\nerror: x\n"), Outcome.TRACEBACK),
        (Done(-9, "", "", hung=True), Outcome.HANG),
    ],
)
def test_how_a_failed_command_is_judged(done, outcome):
    assert engine.judge_failure(done, "train").outcome == outcome


def test_bad_cases_are_counted_and_named(harness):
    def check(harness, folder):
        return Finding(Outcome.SILENT, "evaluate", "another loss")

    fault = Fault("f", "how", "then", lambda draw, harness: [Case("one", check), Case("two", check, counts=3)])
    (result,) = engine.run([fault], harness, jobs=2)
    found = result.to_json()
    assert found["tried"] == found["silent"] == 4 and found["told"] == 0
    assert found["failures"] == ["one: evaluate: silent: another loss", "two: evaluate: silent: another loss"]


def test_power_takes_what_was_not_forced(tmp_path):
    recorder = power_loss.Recorder(tmp_path)
    with calls.listening(str(tmp_path), recorder.before):
        for name, forced in (("safe", True), ("hasty", False)):
            with (tmp_path / f"{name}.partial").open("w") as f:
                f.write(name)
                f.flush()
                if forced:
                    os.fsync(f.fileno())
            os.rename(tmp_path / f"{name}.partial", tmp_path / name)
        folder = os.open(tmp_path, os.O_RDONLY)
        recorder.note()
        os.fsync(folder)
        os.close(folder)
        recorder.note()
    contents = [{name: recorder.contents[digest] for name, digest in state} for state in recorder.states]
    assert {} in contents  # before the folder is forced
    assert contents[-1] == {"safe": b"safe", "hasty": b""}
    assert {"safe": b"safe", "hasty.partial": b""} in contents  # names only


def test_the_nth_call_fails(tmp_path):
    with calls.planned(calls.Plan(str(tmp_path), ("rename", "write"), nth=3, action="EIO", lasts=True)) as counts:
        (tmp_path / "a").write_text("x")
        (tmp_path / "a").rename(tmp_path / "b")
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output"):
                (tmp_path / "b").rename(tmp_path / "a")
        Path(tmp_path.parent / "elsewhere").write_text("x")
    assert counts == {"write": 1, "rename": 3}
    (tmp_path / "b").rename(tmp_path / "a")
