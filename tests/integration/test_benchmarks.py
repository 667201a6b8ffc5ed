"""`jaxgpt bench` as a user starts it: the worker processes, the JSON and the pictures. No figure is pass or fail."""

import importlib.util
import json
import os

import pytest
from conftest import ROOT

from jaxgpt.config import ModelConfig

HAS_TORCH = importlib.util.find_spec("torch") is not None


@pytest.mark.slow
def test_implementations_are_measured_alternately_and_their_losses_compared(command, tmp_path):
    out, picture = tmp_path / "b.json", tmp_path / "b.png"
    sides = "ours,eager,sdpa" if HAS_TORCH else "ours"
    done = command(
        "bench.py", "--preset", "tinygpt", "--rounds", "2", "--turn-seconds", "0.05", "--batch-size", "2",
        "--sides", sides, "--json", out, "--picture", picture,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(out.read_text())
    rows = {row["side"]: row for row in result["rows"]}
    assert list(rows) == sides.split(",") and picture.stat().st_size > 5000
    for side, row in rows.items():
        assert 0 < row["ms_min"] <= row["ms_per_step"] <= row["ms_max"] and row["memory_mib"] > 50
        assert row["tokens_s"] == pytest.approx(2 * 64 / row["ms_per_step"] * 1e3)
        assert side == "ours" or 0 < row["loss_gap"] < 1e-5 and row["ratio"] > 0
    ours = rows["ours"]
    assert ours["product"]["flop_s"] > 1e9 and ours["first_step_warm_s"] > 0
    for name, batch in (("generate", 1), ("generate_batch", 32)):
        assert ours[name]["batch"] == batch and ours[name]["tokens_s"] > 1
        assert f"tokens/s, batch {batch}" in done.stdout
    # 4 layers of 12 C^2 + 13 C, the last norm, and the head; the counts differ by half of attention's.
    n_params = 4 * (12 * 64**2 + 13 * 64) + 2 * 64 + 65 * 64
    assert result["flop_per_token"] == {"F12": 6 * n_params + 12 * 4 * 64 * 64, "F6": 6 * n_params + 6 * 4 * 64 * 64}


@pytest.mark.slow
def test_without_tyro_and_datasets_it_measures(command, tmp_path):
    """Machines that are only measured on may have the numerical packages alone."""
    for name in ("tyro", "datasets", "torch"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')\n")
    done = command(
        "bench.py", "--preset", "tinygpt", "--rounds", "1", "--turn-seconds", "0.05", "--batch-size", "1",
        PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "only ours is measured" in done.stderr and "jaxgpt, jax" in done.stdout


@pytest.mark.slow
def test_growth_measures_each_size_beside_the_presets_own(command, tmp_path):
    out, picture = tmp_path / "g.json", tmp_path / "g.png"
    done = command(
        "bench.py", "--growth", "--preset", "tinygpt", "--rounds", "2", "--turn-seconds", "0.05", "--batch-size", "1",
        "--sides", "ours", "--json", out, "--picture", picture,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(out.read_text())
    rows = result["growth"]["rows"]
    assert picture.stat().st_size > 5000 and ("torch" in result["machine"]) == HAS_TORCH
    own = {"T": 64, "C": 64, "L": 4, "H": 4}
    assert {(row["what"], row["factor"]): row["sizes"] for row in rows} == {
        ("", 1): own,
        ("T", 0.5): own | {"T": 32},
        ("T", 2): own | {"T": 128},
        ("C", 0.5): own | {"C": 32, "H": 2},
        ("C", 2): own | {"C": 128, "H": 8},
        ("L", 0.5): own | {"L": 2},
        ("L", 2): own | {"L": 8},
    }
    for row in rows:
        assert row["tokens_s"] == pytest.approx(row["sizes"]["T"] / row["ms_per_step"] * 1e3)
        assert row["over_preset"] == 1 if row["what"] == "" else 0 < row["over_preset"] < 100
        assert row["side"] == "ours"


@pytest.mark.slow
def test_loop_is_the_real_command_alternately_with_its_bare_step(command, tmp_path):
    out = tmp_path / "l.json"
    done = command(
        "bench.py", "--loop", "60", "--preset", "tinygpt", "--turn-seconds", "0.05", "--batch-size", "2", "--json", out
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "tinygpt on " in done.stderr and "60 steps in" in done.stderr and "60 steps cost" in done.stdout
    (result,) = json.loads(out.read_text())
    loop = result["loop"]
    assert (loop["steps"], loop["eval_every"], loop["checkpoint_every"]) == (60, 50, 100) and loop["turns"] > 2
    assert loop["overhead"] == pytest.approx(sum(loop["shares"].values()))
    assert min(loop["shares"][name] for name in ("evaluation", "checkpoints", "records")) > 0
    assert loop["bare_ms"] > 0 and loop["once_s"] > 0 and loop["error"] > 0


@pytest.mark.slow
def test_tune_cpu_measures_compares_losses_and_writes_nothing_else(cli, tmp_path, monkeypatch):
    from benchmarks import tune_cpu
    from jaxgpt.parallel import CPU_TUNING

    model = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16)
    grid = tune_cpu.Grid(models=((model, 50), (model, 500)), batch_sizes=(4,))
    monkeypatch.setattr(tune_cpu, "Grid", lambda: grid)
    out = tmp_path / "t.json"
    done = cli(
        "bench", "--tune-cpu", "--preset", "tinygpt", "--batch-size", "4", "--rounds", "1", "--turn-seconds", "0.01",
        "--json", out, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == [out]
    result = json.loads(out.read_text())
    one_row, two_rows = result["microbatches"]["tinygpt"]  # 2 rows of 64 tokens on each of 2 devices
    assert (one_row["rows"], one_row["microbatch_tokens"]) == (1, [32, 64])
    assert (two_rows["rows"], two_rows["microbatch_tokens"]) == (2, [128, 256, 512, None])
    assert two_rows["over_present"] == 1 and one_row["over_present"] > 0
    assert [(p["batch_size"], p["tokens_per_step"], set(p["relative_time"])) for p in result["devices"]] == [
        (4, 64, {"1", "2"}),
        (4, 64, {"1", "2"}),
    ]
    suggested = str(tune_cpu.CpuTuning(**result["suggested"]))
    assert f"present:   {CPU_TUNING}" in done.stdout and f"suggested: {suggested}" in done.stdout
