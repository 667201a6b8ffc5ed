"""jaxgpt compare with real trainings: its results, stopping and resuming, runs that diverge or fail."""

import json
import signal
import time

import pytest
from conftest import SMALL, read_state


def line_of(text_file, out, *flags):
    small = [word for word in SMALL if not any(word.startswith(f.split("=")[0] + "=") for f in flags)]
    return ["--dataset", f"file:{text_file}", "--out-dir", str(out), *small, *flags]


def recorded(out):
    found = json.loads((out / "comparison.json").read_text())
    return found, {row["label"]: row for row in found["variants"]}


@pytest.mark.slow
def test_two_optimizers(cli, text_file, tmp_path):
    out, alone = tmp_path / "both", tmp_path / "alone"
    done = cli("compare", *line_of(text_file, out, "--optimizer=sgd,adamw", "--steps=20"))
    assert done.returncode == 0, done.stderr
    assert cli("train", *line_of(text_file, alone, "--optimizer=sgd", "--steps=20")).returncode == 0
    for name in ("steps.csv", "config.json", "data.json", "sample.txt"):
        assert (out / "optimizer=sgd" / name).read_bytes() == (alone / name).read_bytes(), name
    sgd, adamw = (json.loads((out / f"optimizer={name}" / "config.json").read_text()) for name in ("sgd", "adamw"))
    assert adamw == {**sgd, "optimizer": "adamw"}

    found, rows = recorded(out)
    assert found["fields"] == ["optimizer"] and found["ranked_by"] == "val_loss"
    assert list(rows) == ["optimizer=adamw", "optimizer=sgd"]  # the best first: sgd at this rate learns slowly
    row, summary = rows["optimizer=sgd"], json.loads((alone / "summary.json").read_text())
    reports = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
    assert row["values"] == {"optimizer": "sgd"} and row["status"] == "finished" and row["steps"] == 20
    assert [row[name] for name in ("val_loss", "val_ppl", "params")] == [
        summary[name] for name in ("val_loss", "val_ppl", "params")
    ]
    assert row["best_val_loss"] == min(r["val_loss"] for r in reports)
    assert [r["val_loss"] for r in reports if r["step"] == row["best_val_step"]] == [row["best_val_loss"]]
    assert row["tokens_per_s"] > 0 and row["wall_s"] > 0

    table = (out / "comparison.md").read_text()
    assert table in done.stdout and str(out) in done.stdout.splitlines()[-1]
    head, _, first, second = table.splitlines()
    assert head.startswith("| optimizer | val loss |") and len({len(text) for text in table.splitlines()}) == 1
    assert first.startswith("| adamw ") and second.startswith("| sgd ") and f"{row['val_loss']:.4f}" in second
    assert (out / "comparison.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_stopped_and_resumed(start, command, text_file, tmp_path):
    """A run in float64 does not change the precision of the next."""
    out = tmp_path / "compared"
    line = line_of(text_file, out, "--dtype=float64,float32", "--steps=200")
    process = start("compare.py", *line)
    steps = out / "dtype=float32" / "steps.csv"
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline and not (steps.exists() and steps.stat().st_size):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "Traceback" not in output and "all saved" in output
    assert f"after 1 of 2 runs; the same command with --out-dir {out} goes on" in output.splitlines()[-1]
    assert {label: row["status"] for label, row in recorded(out)[1].items()} == {
        "dtype=float64": "finished",
        "dtype=float32": "unfinished",
    }
    first = (out / "dtype=float64" / "summary.json").read_bytes()

    done = command("compare.py", *line)  # what the runs themselves print comes from their processes
    assert done.returncode == 0, done.stderr
    assert "dtype=float64: finished already" in done.stdout and "resuming after " in done.stdout
    assert (out / "dtype=float64" / "summary.json").read_bytes() == first
    rows = recorded(out)[1]
    assert all(row["status"] == "finished" and row["steps"] == 200 for row in rows.values())
    assert {str(p.dtype) for p in read_state(out / "dtype=float32", 200)["params"].values()} == {"float32"}
    assert abs(rows["dtype=float64"]["val_loss"] - rows["dtype=float32"]["val_loss"]) < 1e-3


@pytest.mark.slow
def test_a_run_that_diverges_stops_no_other(cli, text_file, tmp_path):
    done = cli("compare", *line_of(text_file, tmp_path / "c", "--lr=1e30,0.01", "--steps=5"))
    assert done.returncode == 0 and done.stderr == "", done.stderr
    rows = recorded(tmp_path / "c")[1]
    assert list(rows) == ["lr=0.01", "lr=1e30"] and rows["lr=0.01"]["status"] == "finished"
    bad = rows["lr=1e30"]
    assert bad["status"] == "diverged" and "val_loss" not in bad
    assert bad["steps"] - bad["diverged_at_step"] in (0, 1) and bad["steps"] < 5  # in that step, or validated after it
    table = (tmp_path / "c" / "comparison.md").read_text()
    assert f"diverged at step {bad['diverged_at_step']} " in table.splitlines()[-1]
    assert (tmp_path / "c" / "comparison.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_run_that_is_refused_stops_no_other_unless_it_is_the_first(cli, text_file, tmp_path):
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = cli("compare", *line_of(text_file, tmp_path / "a", "--batch-size=6,8", "--steps=2"), **devices)
    assert done.returncode == 2 and done.stderr.startswith("error: --batch-size 6: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "a").exists()
    done = cli("compare", *line_of(text_file, tmp_path / "b", "--batch-size=8,6", "--steps=2"), **devices)
    assert done.returncode == 2 and done.stderr.startswith("error: batch-size=6: --batch-size 6: ")
    assert done.stderr.count("\n") == 1
    rows = recorded(tmp_path / "b")[1]
    assert rows["batch-size=8"]["status"] == "finished" and rows["batch-size=6"]["status"] == "failed"
    assert "4 devices" in rows["batch-size=6"]["error"] and "failed |" in (tmp_path / "b/comparison.md").read_text()
