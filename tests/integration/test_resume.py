"""A run that is interrupted and resumed equals an uninterrupted one, bit for bit: state and records."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SMALL, assert_same

STEPS = 400

# Runs train.py, and kills it without warning when it has recorded a given step.
KILLED_AT = """
import os, runpy, signal, sys
from jaxgpt.runs.run_dir import RunDir

append_steps, killed_at = RunDir.append_steps, int(sys.argv[1])

def append_steps_and_die(run, rows):
    append_steps(run, rows)
    if rows and rows[-1][0] >= killed_at:
        os.kill(os.getpid(), signal.SIGKILL)

RunDir.append_steps = append_steps_and_die
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def flags(text_file, out, *more, steps=STEPS):
    return ["--dataset", f"file:{text_file}", "--steps", str(steps), "--out-dir", str(out), *SMALL, *more]


@pytest.fixture(scope="module", params=["jit", "pmap"])
def uninterrupted(request, cli, text_file, tmp_path_factory):
    """An uninterrupted run, and its flags. With dropout, so that its random numbers are compared as well."""
    out = tmp_path_factory.mktemp("whole") / "run"
    more = ["--model.dropout=0.1", f"--parallel={request.param}"]
    if request.param == "jit":
        more += ["--diagnose-every=50", "--sample-every=100", "--attention-every=150"]
    done = cli("train", *flags(text_file, out, *more))
    assert done.returncode == 0, done.stderr
    return out, more


def test_killed_and_resumed(cli, trained, text_file, tmp_path, user_env):
    """Killed between two checkpoints: the records after the first are removed, and its steps repeated."""
    out = tmp_path / "run"
    line = flags(text_file, out, steps=60)
    killed = [sys.executable, "-c", KILLED_AT, "35", str(ROOT / "scripts/train.py"), *line]
    env = {**user_env, "PYTHONPATH": os.pathsep.join([str(ROOT), user_env.get("PYTHONPATH", "")])}
    assert subprocess.run(killed, env=env, capture_output=True).returncode == -signal.SIGKILL
    assert (out / "steps.csv").read_text().count("\n") > 35
    with (out / "metrics.jsonl").open("a") as f:
        f.write('{"step": 1')  # cut short by the kill
    done = cli("train", *line)
    assert done.returncode == 0, done.stderr
    resumed_at = int(done.stdout.split("resuming after ")[1].split(" of 60 steps")[0])
    assert resumed_at in (11, 21, 31)  # the last checkpoint that was complete: orbax saves in the background
    assert_same(out, trained, 60)


def train_and_stop(start, line, out, how, after):
    """Starts the command, sends it a signal once `after` steps are recorded, and returns its exit code and output."""
    process = start("train.py", *line)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        steps = out / "steps.csv"
        if steps.exists() and steps.read_bytes().count(b"\n") > after:
            process.send_signal(how)
            break
        time.sleep(0.005)
    output = process.communicate(timeout=120)[0]
    return process.returncode, output


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_moments_and_resumed(start, cli, text_file, tmp_path, uninterrupted, seed):
    whole, more = uninterrupted
    draw = random.Random(seed)
    out = tmp_path / "run"
    line = flags(text_file, out, *more)
    interruptions = 0
    signals = [signal.SIGKILL, signal.SIGINT, signal.SIGTERM]
    draw.shuffle(signals)
    after = 0
    for how in signals:
        after += draw.randint(5, 110)
        code, output = train_and_stop(start, line, out, how, after)
        assert "Traceback" not in output, output
        if code == 0:
            break  # it was done before the signal came
        interruptions += 1
        assert code == (-9 if how == signal.SIGKILL else 128 + how), output
        if how != signal.SIGKILL:
            assert "all saved" in output and str(out) in output
            done = int(output.split("stopped after ")[1].split()[0])
            assert (out / "checkpoints" / str(done)).is_dir()
            assert (out / "steps.csv").read_text().count("\n") == done + 1
    assert interruptions >= 1
    done = cli("train", *line)
    assert done.returncode == 0, done.stderr
    assert "resuming after " in done.stdout
    assert_same(out, whole, STEPS)


@pytest.mark.slow
def test_a_line_cut_short_by_the_kill_is_removed(start, cli, text_file, tmp_path, uninterrupted):
    whole, more = uninterrupted
    out = tmp_path / "run"
    line = flags(text_file, out, *more)
    code, _ = train_and_stop(start, line, out, signal.SIGKILL, 30)
    assert code == -9
    with (out / "steps.csv").open("a") as f:
        f.write("1")
    with (out / "metrics.jsonl").open("a") as f:
        f.write('{"step": 1')
    (out / "summary.json.partial").write_text("{")
    assert cli("train", *line).returncode == 0
    assert_same(out, whole, STEPS)


@pytest.mark.slow
def test_records_lost_before_the_first_checkpoint(cli, text_file, tmp_path, uninterrupted):
    """Killed when the files existed but their first lines were not yet written."""
    whole, more = uninterrupted
    out = tmp_path / "run"
    line = flags(text_file, out, *more)
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns("checkpoints", "summary.json", "sample.txt"))
    (out / "steps.csv").write_text("")
    (out / "metrics.jsonl").write_text("not JSON\n")
    assert cli("train", *line).returncode == 0
    assert_same(out, whole, STEPS)


@pytest.mark.slow
def test_killed_between_the_last_checkpoint_and_the_summary(cli, text_file, tmp_path, uninterrupted):
    whole, more = uninterrupted
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "summary.json").unlink()
    (out / "sample.txt").unlink()
    done = cli("train", *flags(text_file, out, *more))
    assert done.returncode == 0, done.stderr
    assert_same(out, whole, STEPS)
