"""What a training does about warning signals, lost output, failed saves, and numbers that are not finite."""

import errno
import json
import math
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, SMALL, read_state

from jaxgpt import progress
from jaxgpt.data.loader import HostLoader
from jaxgpt.errors import UserError
from jaxgpt.objective import LanguageModelingObjective
from jaxgpt.optimizer import learning_rate
from jaxgpt.parallel import Executor
from jaxgpt.runs import checkpoint
from jaxgpt.runs.run_dir import RunDir, open_run


def flags(text_file, out, *more, steps=60):
    return ["--dataset", f"file:{text_file}", "--steps", str(steps), "--out-dir", str(out), *SMALL, *more]


def checkpoints(out):
    return sorted(int(path.name) for path in (out / "checkpoints").iterdir())


def summary(out):
    return strict((out / "summary.json").read_text())


def strict(text):
    """JSON without NaN and Infinity."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def assert_same_state(ours, theirs, step):
    a, b = read_state(ours, step), read_state(theirs, step)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


# -------------------------------------------------------------------------------------------------------------- signals


@pytest.fixture
def signals_at(monkeypatch):
    """Sends this process signals: {step: signal} once the step is recorded, and "finish" while the run finishes."""
    append_steps, finish, due = RunDir.append_steps, RunDir.finish, {}

    def append_and_signal(run, rows):
        append_steps(run, rows)
        for step in [step for step in due if step != "finish" and step <= rows[-1][0]]:
            os.kill(os.getpid(), due.pop(step))

    def signal_and_finish(run, step):
        os.kill(os.getpid(), due.pop("finish"))
        finish(run, step)

    def plan(at):
        due.update(at)
        monkeypatch.setattr(RunDir, "append_steps", append_and_signal)
        if "finish" in due:
            monkeypatch.setattr(RunDir, "finish", signal_and_finish)
        return due

    return plan


def test_a_warning_signal_saves_and_stops_or_goes_on(cli, trained, text_file, tmp_path, signals_at):
    out = tmp_path / "run"
    signals_at({23: signal.SIGUSR1})
    done = cli("train", *flags(text_file, out))
    assert done.returncode == 0, done.stderr
    stopped_at = int(done.stdout.split("stopped after ")[1].split(" of 60 steps, all saved")[0])
    assert 24 <= stopped_at < 60 and str(out) in done.stdout.splitlines()[-1]
    assert checkpoints(out)[-1] == stopped_at and not (out / "summary.json").exists()

    # A dispatch ends at step 40, so that the two arrive in different ones.
    due = signals_at({35: signal.SIGUSR2, 45: signal.SIGUSR1, "finish": signal.SIGUSR1})
    done = cli("train", *flags(text_file, out, "--on-warning-signal=continue"))
    assert done.returncode == 0 and not due, done.stderr
    assert f"resuming after {stopped_at} of 60" in done.stdout and done.stdout.count("; training goes on") == 2
    assert "SIGUSR2: saved after " in done.stdout and "SIGUSR1: saved after " in done.stdout
    for name in ("steps.csv", "sample.txt"):
        assert (out / name).read_bytes() == (trained / name).read_bytes(), name
    assert_same_state(out, trained, 60)


@pytest.mark.slow
def test_where_the_batches_end_it_saves_and_goes_on_later(cli, trained, text_file, tmp_path, monkeypatch):
    out, take = tmp_path / "run", HostLoader.take

    def until_step_33(self, step, n_steps):
        if step + n_steps > 33:
            raise UserError("--dataset hf:far: the file cannot be had; start again: it goes on")
        return take(self, step, n_steps)

    with monkeypatch.context() as patch:
        patch.setattr(HostLoader, "take", until_step_33)
        done = cli("train", *flags(text_file, out, "--loader=host"))
    assert done.returncode == 2 and done.stderr.startswith("error: --dataset hf:far"), done.stderr
    n_done = len((out / "steps.csv").read_text().splitlines()) - 1
    assert 0 < n_done == checkpoints(out)[-1] <= 33
    done = cli("train", *flags(text_file, out, "--loader=host"))
    assert done.returncode == 0 and f"resuming after {n_done} of 60" in done.stdout, done.stderr
    assert_same_state(out, trained, 60)


@pytest.mark.slow
def test_a_warning_signal_stops_a_fine_tuning(cli, trained, tmp_path, signals_at):
    from conftest import write_labeled

    data = write_labeled(tmp_path / "texts.csv")
    signals_at({3: signal.SIGUSR1})
    line = ["finetune", trained, "--dataset", f"file:{data}", "--out-dir", tmp_path / "run", "--max-tokens=16"]
    done = cli(*line)
    assert done.returncode == 0 and "all saved" in done.stdout, done.stderr
    assert not (tmp_path / "run" / "summary.json").exists()
    done = cli(*line)
    assert done.returncode == 0 and "resuming after" in done.stdout and (tmp_path / "run" / "summary.json").exists()


# --------------------------------------------------------------------------------------------------------------- output


def test_the_reader_of_the_output_has_gone(trained, text_file, tmp_path, user_env):
    """As in `train | head -1`."""
    line = [sys.executable, ROOT / "scripts/train.py", *flags(text_file, tmp_path / "run"), "--checkpoint-every=1000"]
    process = subprocess.Popen([*map(str, line)], env=user_env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline().startswith(b"minigpt on ")
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait() == 141 and errors == b""


def full_from(monkeypatch, text):
    """Standard output is full from the line that holds a text on."""

    def full_print(line, **kwargs):
        if text in line:
            raise OSError(errno.ENOSPC, "No space left on device")
        print(line, **kwargs)

    monkeypatch.setattr(progress, "print", full_print, raising=False)


@pytest.mark.slow
def test_a_full_output_is_no_trouble_of_the_run_folder(cli, text_file, tmp_path, monkeypatch):
    out = tmp_path / "run"
    line = flags(text_file, out, "--sample-every=7", "--checkpoint-every=1000", "--eval-every=1000", steps=30)
    with monkeypatch.context() as patch:
        full_from(patch, "sample after 7 steps")
        done = cli("train", *line)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: standard output: cannot be written (No space left on device)")
    n_recorded = len(open_run(out).read_steps())
    assert 8 <= n_recorded <= 14 and checkpoints(out)[-1] == n_recorded
    done = cli("train", *line)
    assert done.returncode == 0 and f"resuming after {n_recorded} of 30 steps" in done.stdout


# ---------------------------------------------------------------------------------------------------------------- saves


@pytest.fixture
def failing_saves(monkeypatch):
    """Makes the checkpoints of some steps fail as on a full disk, each as many times as said."""
    fsync_all = checkpoint._fsync_all

    def plan(times):
        def fail(folder):
            step = int(folder.name.partition(".")[0])
            if times.get(step, 0):
                times[step] -= 1
                raise OSError(errno.ENOSPC, "No space left on device")
            return fsync_all(folder)

        monkeypatch.setattr(checkpoint, "_fsync_all", fail)

    return plan


@pytest.mark.slow
def test_training_goes_on_without_a_checkpoint_that_cannot_be_written(cli, trained, text_file, tmp_path, failing_saves):
    out = tmp_path / "run"
    failing_saves({31: 1, 60: 1})
    done = cli("train", *flags(text_file, out, "--on-save-error=continue"))
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("not saved, training goes on: ")]
    assert len(lines) == 2 and all("No space left" in line for line in lines)
    assert 31 not in checkpoints(out) and checkpoints(out)[-1] == 60
    assert (out / "steps.csv").read_bytes() == (trained / "steps.csv").read_bytes()
    assert_same_state(out, trained, 60)


@pytest.mark.slow
@pytest.mark.parametrize("step, kept", [(1, []), (60, [1, 11, 21, 31, 41, 51])])
def test_the_first_and_the_last_checkpoint_must_succeed(cli, text_file, tmp_path, failing_saves, step, kept):
    out = tmp_path / "run"
    line = flags(text_file, out, "--on-save-error=continue")
    failing_saves({step: 2})
    done = cli("train", *line)
    assert done.returncode == 2 and "No space left" in done.stderr and done.stderr.count("\n") == 1
    assert set(checkpoints(out)) <= set(kept) and bool(checkpoints(out)) == bool(kept)
    failing_saves({})
    assert cli("train", *line).returncode == 0 and checkpoints(out)[-1] == 60


@pytest.mark.slow
def test_a_warning_signal_whose_save_fails_says_so(cli, text_file, tmp_path, failing_saves, signals_at):
    failing_saves({step: 2 for step in range(24, 32)})
    signals_at({23: signal.SIGUSR1})
    more = ["--on-save-error=continue", "--on-warning-signal=continue", "--checkpoint-every=30", "--eval-every=30"]
    done = cli("train", *flags(text_file, tmp_path / "run", *more))
    assert done.returncode == 0, done.stderr
    assert "not saved, training goes on" in done.stdout and "SIGUSR1: saved" not in done.stdout


# -------------------------------------------------------------------------------------------------------------- numbers


@pytest.fixture
def poisoned_text(tmp_path):
    """A text in whose 21 training batches of an epoch a few hold a `!`."""
    words = " ".join(["la", "ti", "mo", "ru"] * 260)[:3000]
    path = tmp_path / "poisoned.txt"
    path.write_text(words[:700] + "!" + words[701:1500] + "!" + words[1501:])
    return path


@pytest.fixture
def poison(monkeypatch):
    """Makes the loss of a batch infinite: of those that hold a `!`, or of all."""
    loss_sum = LanguageModelingObjective.loss_sum

    def plan(every=False):
        def poisoned(objective, params, idx_BT, *rest, **more):
            loss, count = loss_sum(objective, params, idx_BT, *rest, **more)
            bad = jnp.ones((), bool) if every else (idx_BT == 1).any()  # characters are sorted: "!" follows " "
            return loss * jnp.where(bad, jnp.inf, 1.0), count

        monkeypatch.setattr(LanguageModelingObjective, "loss_sum", poisoned)

    return plan


CHUNKS = ["--packing=chunks", "--on-nonfinite=skip", "--schedule=warmup-cosine", "--warmup-steps=10"]


@pytest.mark.slow
def test_a_skipped_update_is_counted_also_over_a_resumption(cli, poisoned_text, tmp_path, poison, signals_at):
    """Interrupted right after a skipped update, the run ends with the same bits as one that ran through."""
    poison()
    whole, out = tmp_path / "whole", tmp_path / "run"
    done = cli("train", *flags(poisoned_text, whole, *CHUNKS, steps=42))
    assert done.returncode == 0, done.stderr
    rows = open_run(whole).read_steps()
    skipped = [step for step, loss, *_ in rows if not math.isfinite(loss)]
    assert 2 <= len(skipped) <= 4 and done.stdout.count("; update skipped") == len(skipped)
    assert summary(whole)["skipped_steps"] == len(skipped)
    config = open_run(whole).config
    before = [sum(s < step for s in skipped) for step in range(42)]
    assert [lr for *_, lr in rows] == [learning_rate(config, step - n) for step, n in enumerate(before)]
    reports = [strict(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [r["skipped_steps"] for r in reports] == [sum(s <= r["step"] for s in skipped) for r in reports]

    signals_at({skipped[0]: signal.SIGUSR1})
    line = flags(poisoned_text, out, *CHUNKS, steps=42)
    assert "stopped after" in cli("train", *line).stdout
    assert cli("train", *line).returncode == 0
    for name in ("steps.csv", "sample.txt"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert summary(out)["skipped_steps"] == len(skipped)
    assert_same_state(out, whole, 42)


@pytest.mark.slow
def test_five_skipped_updates_in_a_row_stop(cli, poisoned_text, tmp_path, poison):
    poison(every=True)
    out = tmp_path / "run"
    done = cli("train", *flags(poisoned_text, out, *CHUNKS))
    assert done.returncode == 3 and done.stderr.count("\n") == 1
    assert "error: step 4: loss inf" in done.stderr and "the 5th update skipped in a row" in done.stderr
    assert len(open_run(out).read_steps()) == 5
    (report,) = [strict(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert report["train_loss"] is None and math.isfinite(report["val_loss"])


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_by_default(cli, poisoned_text, tmp_path, poison):
    poison()
    done = cli("train", *flags(poisoned_text, tmp_path / "run", "--packing=chunks", steps=42))
    assert done.returncode == 3 and "loss inf" in done.stderr


def test_a_state_that_is_not_finite_is_never_saved(cli, text_file, tmp_path, monkeypatch):
    """A moment that has overflowed, while weights and losses are finite."""
    train_steps, out = Executor.train_steps, tmp_path / "run"

    def overflow(path, x):
        name = jax.tree_util.keystr(path)
        return jnp.full_like(x, jnp.inf) if ".nu" in name and "ln_f.bias" in name else x

    def overflowing(executor, state, source, n_steps):
        state, metrics = train_steps(executor, state, source, n_steps)
        overflown = jax.tree_util.tree_map_with_path(overflow, state)
        return overflown if int(state.step) > 8 else state, metrics

    monkeypatch.setattr(Executor, "train_steps", overflowing)
    done = cli("train", *flags(text_file, out, "--clip=1"))
    assert done.returncode == 3 and done.stderr.count("\n") == 1
    assert "nu.ln_f.bias is not finite after the update; the state after 1 steps is kept" in done.stderr
    assert checkpoints(out) == [1]
