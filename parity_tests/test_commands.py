"""The commands that see both frameworks, run as a user runs them."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxgpt.presets import PRESETS
from parity_tests import docs_page
from parity_tests.ladder import RUNGS

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "--model.n-layer=1 --model.n-head=2 --model.n-embd=16 --model.block-size=16 --batch-size=8 --lr=0.01 "
    "--eval-every=20 --eval-batches=2 --sample-tokens=20 --dtype=float64"
).split()


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(draw.choice(["la", "ti", "mo", "ru", "ha"]) for _ in range(4000)))
    return path


def run(*line: object) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX", "XLA"))}
    line = [sys.executable, *map(str, line)]
    return subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)


def script(name: str, *args: object) -> subprocess.CompletedProcess:
    return run(ROOT / "scripts" / name, *args)


def test_the_reference_imports_no_jax():
    done = run("-c", "import sys, torch_ref.train; assert not {'jax', 'flax', 'optax'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


def test_a_reference_run_becomes_a_run_and_goes_on(text_file, tmp_path):
    """PyTorch trains, its files are imported; evaluation agrees, training goes on, the export starts PyTorch again."""
    weights, state = tmp_path / "w.safetensors", tmp_path / "o.safetensors"
    files = ("--out", weights, "--optimizer-state-out", state)
    done = run("-m", "torch_ref.train", "--dataset", f"file:{text_file}", "--steps=40", *SMALL, *files)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("step 00  train ") and "loss " in lines[3]
    reported = float(lines[3].split("loss ")[1].split()[0])
    flags = ("--dataset", f"file:{text_file}", "--steps=60", *SMALL)
    done = script(
        "convert.py", "import", "--weights", weights, "--optimizer-state", state, "--out", tmp_path / "run", *flags
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(script("evaluate.py", tmp_path / "run", "--json").stdout)
    assert figures["loss"] == pytest.approx(reported, abs=5.1e-5)  # four decimals are printed
    assert figures["tokens"] % 16 == 0
    done = script("parity.py", "--run", tmp_path / "run")
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout + done.stderr
    done = script("train.py", "--out-dir", tmp_path / "run", *flags)
    assert done.returncode == 0 and "resuming after 40 of 60" in done.stdout, done.stderr

    exported = (tmp_path / "w2.safetensors", tmp_path / "o2.safetensors")
    done = script("convert.py", "export", tmp_path / "run", "--out", exported[0], "--optimizer-state", exported[1])
    assert done.returncode == 0, done.stderr
    start = ("--weights", exported[0], "--optimizer-state", exported[1])
    line = ("-m", "torch_ref.train", "--dataset", f"file:{text_file}", "--steps=70", *SMALL, *start, *files)
    done = run(*line)
    assert done.returncode == 2 and "--overwrite" in done.stderr, done.stderr
    done = run(*line, "--overwrite")
    assert done.returncode == 0 and "step 69" in done.stdout and "step 59" not in done.stdout, done.stderr
    assert load_file(state)["step"] == 70 and not np.array_equal(
        *(load_file(w)["ln_f.bias"] for w in (weights, exported[0]))
    )


@pytest.mark.parametrize(
    "args, part",
    [
        (["--parallel=pmap"], "--parallel"),
        (["--optimizer-state=x"], "--weights"),
        (["--weights=nothing"], "--weights nothing"),
        (["--out=no/where"], "--out no/where"),
        (["--out=/dev/null", "--overwrite"], "--out /dev/null"),
        (["--prompt=Zebra"], "--prompt"),
        (["--lr=0"], "--lr"),
    ],
)
def test_the_reference_refuses(text_file, args, part):
    done = run("-m", "torch_ref.train", "--dataset", f"file:{text_file}", "--steps=1", *SMALL, *args)
    assert done.returncode == 2 and part in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.slow
def test_a_planted_fault_fails_the_ladder_and_is_located(tmp_path):
    out = tmp_path / "p.json"
    done = script("parity.py", "--quick", "--json", out, "--mutant", "a missing residual", "--locate")
    assert done.returncode == 1, done.stderr
    assert (
        "first to depart: layer into blocks.1.attn.Wo" in done.stdout
        or "first to depart: layer blocks.0" in done.stdout
    )
    values = json.loads(out.read_text())
    failed = {row["rung"] for row in values["rows"] if row["status"] == "FAILED"}
    assert {"block", "logits", "gradients", "trajectory, every loss"} <= failed
    passed = {row["rung"] for row in values["rows"] if row["status"] == "passed"}
    assert {"clip", "schedule", "decay mask", "initial weights"} <= passed  # the fault is not theirs
    assert all(row["note"] for row in values["rows"] if row["status"] == "not run")
    assert values["environment"]["torch"] and out.with_suffix(".png").stat().st_size > 20_000


@pytest.mark.parametrize(
    "args, part",
    [
        (["--mutant", "no such"], "--mutant no such"),
        (["--mutants", "--quick"], "--quick"),
        (["--mutants", "--run", "x"], "--run and --mutants"),
        (["--json", "no/where.json"], "--json no/where.json"),
        (["--run", "nothing"], "RUN nothing"),
        (["--end-to-end", "gpt5"], "--end-to-end gpt5"),
        (["--docs", "--quick"], "--docs"),
        (["--checkpoint", "best"], "--run"),
    ],
)
def test_parity_refuses(args, part):
    done = script("parity.py", *args)
    assert done.returncode == 2 and part in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_the_page_is_what_the_command_writes():
    """docs/parity.md is made of docs/parity.json; a hand that edits it, or a tolerance changed since, shows here."""
    kept = json.loads((docs_page.FOLDER / "parity.json").read_text(encoding="utf-8"))
    assert (docs_page.FOLDER / "parity.md").read_text(encoding="utf-8") == docs_page.page(kept)
    for ladder in kept["ladder"].values():
        assert not ladder["quick"] and all(row["status"] != "FAILED" for row in ladder["rows"])
    for mutants in kept["mutants"].values():
        assert len(mutants["lines"]) >= 25 and all(line[2] != "SURVIVES" for line in mutants["lines"])
    assert set(kept["end_to_end"]) <= set(PRESETS) and len(RUNGS) > 20


def test_the_reference_stops_early(text_file, tmp_path):
    """At the report that its losses say, and ends with the best weights."""
    flags = ("--dataset", f"file:{text_file}", *SMALL, "--steps=200", "--lr=0.3", "--eval-every=5", "--patience=2")
    done = run("-m", "torch_ref.train", *flags, "--out", tmp_path / "w.safetensors")
    assert done.returncode == 0, done.stderr
    *reports, told, whole = [line for line in done.stdout.splitlines() if "val" in line or "stopped" in line]
    losses = [float(line.split("val ")[1]) for line in reports]
    n = len(losses)
    assert n < 41 and min(losses[:-2]) <= min(losses[-2:]) and losses[-3] == min(losses[:-2])
    assert told.startswith(f"stopped early after {5 * (n - 1) + 1} steps")
    assert abs(float(told.rsplit(" ", 1)[1]) - losses[-3]) <= 5.1e-4  # one has three decimals, one four
    assert (tmp_path / "w.safetensors").exists()
    done = run("-m", "torch_ref.train", *flags, "--optimizer-state-out", tmp_path / "o.safetensors")
    assert done.returncode == 2 and "--optimizer-state-out" in done.stderr
