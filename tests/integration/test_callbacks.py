"""Records, samples and attention maps during training, early stopping, and `--summary`."""

import json
import math

import numpy as np
import pytest
from conftest import SMALL, read_state
from PIL import Image

CALLBACKS = ["--diagnose-every=20", "--attention-every=30", "--sample-every=25"]


def train(cli, text_file, out, *flags):
    done = cli("train", "--dataset", f"file:{text_file}", "--out-dir", out, *SMALL, *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_records_of_all_kinds_change_nothing_else(cli, trained, text_file, tmp_path):
    out = tmp_path / "run"
    output = train(cli, text_file, out, "--steps=60", *CALLBACKS)
    found = records(out / "diagnostics.jsonl")
    assert [r["step"] for r in found] == [0, 20, 40]
    for record in found:
        assert len(record["tensors"]) == 21 and not record["exploding"] and not record["vanishing"]
        assert record["tensors"]["blocks.0.attn.Wk.bias"]["mean_abs"] < 1e-7
        assert 0 < record["tensors"]["lm_head.kernel"]["mean_abs"] < record["tensors"]["lm_head.kernel"]["std"]
        # A LayerNorm's bias starts at 0: no ratio to it.
        missing = {name for name, t in record["tensors"].items() if t["update_ratio"] is None}
        assert missing == ({n for n in record["tensors"] if "ln" in n and "bias" in n} if not record["step"] else set())
    samples = records(out / "samples.jsonl")
    assert [s["step"] for s in samples] == [0, 25, 50] and all(s["text"] in output for s in samples)
    assert len({s["text"] for s in samples}) == 3
    maps = sorted((out / "attention").glob("*.npy"))
    assert [int(p.stem) for p in maps] == [0, 30, 60]
    first, *_, last = (np.load(p) for p in maps)
    assert first.shape == last.shape == (1, 2, 16, 16) and np.abs(first - last).max() > 0.01
    with Image.open(out / "attention.gif") as animation:
        assert animation.n_frames == 3
    # All else equals a run without them.
    assert (out / "steps.csv").read_bytes() == (trained / "steps.csv").read_bytes()
    assert (out / "sample.txt").read_bytes() == (trained / "sample.txt").read_bytes()
    ours, theirs = read_state(out, 60), read_state(trained, 60)
    for name, p in theirs["params"].items():
        np.testing.assert_array_equal(ours["params"][name], p)


@pytest.mark.slow
def test_diagnostics_under_pmap_and_of_chunks(cli, text_file, tmp_path):
    both = {}
    for how in (["--parallel=pmap", "--loader=host"], ["--parallel=jit"]):
        out = tmp_path / how[0]
        train(cli, text_file, out, "--steps=9", "--packing=chunks", "--diagnose-every=4", "--eval-every=9", *how)
        both[how[0]] = records(out / "diagnostics.jsonl")
    for ours, theirs in zip(*both.values(), strict=True):
        for name, figures in theirs["tensors"].items():
            if not name.endswith("Wk.bias"):  # rounding
                assert ours["tensors"][name] == {k: v if v is None else _near(v) for k, v in figures.items()}


def _near(value):
    return pytest.approx(value, rel=1e-4)


def expected_stop(losses, patience, min_delta):
    """By the definition: the number of reports when the last `patience` have not improved on the best before them."""
    for end in range(patience + 1, len(losses) + 1):
        before, best = losses[:end], math.inf
        gains = []
        for loss in before:
            gains.append(loss < best - min_delta)
            best = loss if gains[-1] else best
        if not any(gains[-patience:]):
            return end
    return None


@pytest.mark.slow
def test_early_stopping(cli, text_file, tmp_path):
    out = tmp_path / "run"
    flags = ["--steps=400", "--lr=0.3", "--eval-every=5", "--eval-batches=4", "--patience=3", "--min-delta=0.01"]
    output = train(cli, text_file, out, *flags)
    losses = [r["val_loss"] for r in records(out / "metrics.jsonl")]
    summary = json.loads((out / "summary.json").read_text())
    assert len(losses) == expected_stop(losses, 3, 0.01) and summary["steps"] == 5 * (len(losses) - 1) + 1 < 400
    best = 5 * int(np.argmin(losses)) + 1
    assert summary["stopped_early"] == {"patience": 3, "min_delta": 0.01, "best_step": best} and best < summary["steps"]
    line = next(line for line in output.splitlines() if "stopped early" in line)
    assert f"after {summary['steps']} of 400 steps" in line and f"after {best} steps" in line and "0.01" in line
    # The commands read the best checkpoint.
    got = {
        which: json.loads(cli("evaluate", out, "--json", *(["--checkpoint", which] if which else [])).stdout)
        for which in ("", "best", "last")
    }
    assert got[""] == got["best"] != got["last"] and got[""]["loss"] == summary["val_loss"]
    assert f"after {best} steps" in cli("evaluate", out).stdout
    # Killed after its last step and before its summary, it repeats no step and ends the same.
    (out / "summary.json").unlink()
    (out / "sample.txt").unlink()
    before = (out / "steps.csv").read_bytes(), (out / "metrics.jsonl").read_bytes()
    again = train(cli, text_file, out, *flags)
    assert line in again and "finished already" not in again
    assert ((out / "steps.csv").read_bytes(), (out / "metrics.jsonl").read_bytes()) == before
    anew = json.loads((out / "summary.json").read_text())
    assert {k: anew[k] for k in ("steps", "val_loss", "stopped_early")} == {
        k: summary[k] for k in ("steps", "val_loss", "stopped_early")
    }
    assert "finished already" in train(cli, text_file, out, *flags)


@pytest.mark.slow
def test_no_early_stopping_without_patience(cli, text_file, tmp_path):
    out = tmp_path / "run"
    train(cli, text_file, out, "--steps=41", "--lr=0.3", "--eval-every=5")
    assert "stopped_early" not in json.loads((out / "summary.json").read_text())


@pytest.mark.slow
def test_summary_before_training(cli, trained, text_file, text, tmp_path):
    lines = train(cli, text_file, tmp_path / "run", "--steps=1", "--model.n-layer=3", "--summary").splitlines()
    table = {line.split()[0]: line for line in lines}
    n_chars = len(set(text))
    assert f"8 x 16 x {n_chars}" in table["lm_head"] and f"{16 * n_chars:,}" in table["lm_head"]
    assert "8 x 16 x 64" in table["blocks.0.mlp.fc"] and "16 x 64 + 64" in table["blocks.0.mlp.fc"]
    assert "to blocks.2" in table["blocks.1"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    counted = summary["params"] - 16 * n_chars - 16 * 16
    (line,) = [line for line in lines if "multiplied by" in line]
    assert line == f"{summary['params']:,} parameters, {counted:,} of them multiplied by (N)"
    assert any(f"{6 * counted + 12 * 3 * 16 * 16:,} FLOP per token" in line for line in lines)
    assert any(line.startswith("memory on each device") and "activations" in line for line in lines)
    assert lines.index(line) < next(i for i, line in enumerate(lines) if line.startswith("step "))
