"""scripts/bench.py through the real command, and the page that it writes."""

import importlib
import importlib.util
import json
import sys
from types import SimpleNamespace

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


def test_without_tyro_and_datasets_it_measures(command, tmp_path):
    """Machines that are only measured on may have the numerical packages alone."""
    for name in ("tyro", "datasets", "torch"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')\n")
    done = command(
        "bench.py", "--preset", "tinygpt", "--rounds", "1", "--turn-seconds", "0.05", "--batch-size", "1",
        PYTHONPATH=str(tmp_path),
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


def test_losses_that_differ_or_are_no_numbers_win_nothing():
    bench = module("bench")
    ours, other = SimpleNamespace(losses=[4.0, 3.0], turns=[9.0, 1.0, 2.0]), SimpleNamespace(side="compile")
    other.losses, other.turns = [4.0, 3.00001], [2.0, 3.0]
    assert bench.compare(ours, 1, other, "float32") == {"ratio": 1.75, "loss_gap": pytest.approx(1 / 300_000, rel=1e-3)}
    for losses in ([4.0, 3.01], [4.0, float("nan")]):
        other.losses = losses
        with pytest.raises(bench.UserError, match="--sides compile"):
            bench.compare(ours, 1, other, "float32")
