"""scripts/bench.py through the real command, and the page that it writes."""

import importlib
import importlib.util
import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

HAS_TORCH = importlib.util.find_spec("torch") is not None


def module(name):
    """A file of scripts/ as a module."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


@pytest.mark.slow
def test_sides_take_turns_and_their_losses_are_compared(command, tmp_path):
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
    assert "one side only" in done.stderr and "jaxgpt, jax" in done.stdout


@pytest.mark.parametrize(
    "args, part",
    [
        (["--preset", "gpt9"], "--preset gpt9"),
        (["--sides", "eager"], "--sides eager"),
        (["--sides", "ours,tensorflow"], "--sides ours,tensorflow"),
        (["--rounds", "0"], "--rounds"),
        (["--rounds", "many"], "--rounds"),
        (["--json", "no/where.json"], "--json no/where.json"),
        (["--picture", "no/where.png"], "--picture no/where.png"),
        (["--torch-python", "no/python"], "--torch-python no/python"),
        (["--sides", "ours,eager", "--torch-python", "/bin/false"], "--sides ours,eager"),
        (["--torch-python", "/etc/passwd"], "--torch-python /etc/passwd"),
        (["--turn-seconds", "nan"], "--turn-seconds"),
        (["--json", "."], "--json ."),
        (["--docs", "--batch-size", "2"], "--docs"),
        (["--loop", "0"], "--loop 0"),
        (["--loop", "10", "--growth"], "--growth: has no meaning with --loop"),
        (["--loop", "10", "--rounds", "3"], "--rounds: has no meaning with --loop"),
        (["--loop", "10", "--preset", "gpt2-124m"], "--preset gpt2-124m: only timed"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_refuses(command, args, part):
    done = command("bench.py", *args)
    assert done.returncode == 2 and part in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_the_page_is_what_the_command_writes():
    """The measured part of docs/benchmarks.md is made of docs/benchmarks.json."""
    page_of = module("benchmarks.page")
    kept = json.loads((page_of.FOLDER / "benchmarks.json").read_text(encoding="utf-8"))
    page = (page_of.FOLDER / "benchmarks.md").read_text(encoding="utf-8")
    assert page.split(page_of.BEGIN)[1].split(page_of.END)[0] == "\n" + page_of.tables(kept)


@pytest.mark.slow
def test_growth_takes_each_size_beside_the_presets_own(command, tmp_path):
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
def test_loop_is_the_real_command_in_turns_with_its_bare_step(command, tmp_path):
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


def test_what_the_loop_costs_is_taken_over_the_bare_steps_beside_each_turn():
    """By hand: a machine that halves its speed on the way makes no difference."""
    turns = [
        {"steps": 10, "seconds": 1.0, "parts": {"steps": 1.0}},
        {"steps": 10, "seconds": 3.4, "parts": {"steps": 1.5, "once": 1.4, "evaluation": 0.3}},
        {"steps": 10, "seconds": 2.6, "parts": {"steps": 2.2, "checkpoints": 0.2, "records": 0.1}},
    ]
    found = module("benchmarks.loop").came_to(turns, [0.1, 0.2])  # the bare steps would have taken 1, 1.5 and 2 s
    assert found["overhead"] == pytest.approx((7.0 - 1.4) / 4.5 - 1)
    assert found["shares"] == {
        "evaluation": pytest.approx(0.3 / 4.5),
        "checkpoints": pytest.approx(0.2 / 4.5),
        "records": pytest.approx(0.1 / 4.5),
        "dispatches": pytest.approx(0.2 / 4.5),
        "rest": pytest.approx(0.3 / 4.5),
    }
    assert (found["once_s"], found["bare_ms"], found["turns"]) == (1.4, pytest.approx(150), 3)
    off = np.array([1, 1.5, 2.2]) - 4.7 / 4.5 * np.array([1, 1.5, 2])  # of a step that is slower by the same everywhere
    assert found["error"] == pytest.approx((off @ off * 3 / 2) ** 0.5 / 4.5)


def test_the_page_keeps_what_a_run_does_not_bring(tmp_path, monkeypatch):
    page_of = module("benchmarks.page")
    machine = {"device": "a CPU", "dtype": "float32", "python": "3", "jax": "1"}
    row = {"side": "ours", "name": "jaxgpt", "ms_per_step": 2.0, "ms_min": 1.0, "ms_max": 3.0, "tokens_s": 9.0}
    size = {"what": "T", "factor": 2, "sizes": {"T": 128, "C": 64, "L": 4}, "over_preset": 1.75}
    own = size | {"what": "", "factor": 1, "over_preset": 1.0}
    loop = {"steps": 7, "overhead": 0.03, "shares": {"rest": 0.03}, "error": 0, "bare_ms": 1, "once_s": 1, "end_s": 1}
    parts = {"growth": {"batch_size": 8, "rows": [own | row, size | row]}, "loop": loop}
    monkeypatch.setattr(page_of, "FOLDER", tmp_path)
    (tmp_path / "benchmarks.md").write_text(f"before {page_of.BEGIN}\n{page_of.END} after")
    for name, part in parts.items():
        page_of.record([{"preset": "tinygpt", "machine": machine, name: part}])
    page = (tmp_path / "benchmarks.md").read_text()
    assert page.startswith("before ") and page.endswith(" after") and page.count("## a CPU, float32") == 1
    assert "| `tinygpt`, batch 8 | 128, 64, 4 | jaxgpt |" in page
    assert "|  | **128**, 64, 4 | jaxgpt | 2.00 (1.00 to 3.00) | 9 | 1.75 |  |" in page
    assert "- `tinygpt`: 7 steps cost 3.0 % more" in page and "first step |" not in page


def test_losses_that_differ_or_are_no_numbers_win_nothing():
    bench = module("benchmarks.turns")
    ours, other = SimpleNamespace(losses=[4.0, 3.0], turns=[9.0, 1.0, 2.0]), SimpleNamespace(side="compile")
    other.losses, other.turns = [4.0, 3.00001], [2.0, 3.0]
    assert bench.compare(ours, 1, other, "float32") == {"ratio": 1.75, "loss_gap": pytest.approx(1 / 300_000, rel=1e-3)}
    for losses in ([4.0, 3.01], [4.0, float("nan")]):
        other.losses = losses
        with pytest.raises(bench.UserError, match="--sides compile"):
            bench.compare(ours, 1, other, "float32")
