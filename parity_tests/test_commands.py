"""`jaxgpt parity`: what it refuses, what a failure looks like, and the page that it writes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import jaxgpt
from jaxgpt.cli import main
from jaxgpt.parity.report import SURVIVES
from jaxgpt.presets import PRESETS
from parity_tests import docs_page
from parity_tests.suite import SUITE

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_a_planted_fault_fails_the_suite_and_is_located(tmp_path):
    out = tmp_path / "p.json"
    line = ("--quick", "--json", out, "--mutant", "a missing residual", "--locate")
    script = [sys.executable, ROOT / "scripts" / "parity.py", *line]
    done = subprocess.run(script, capture_output=True, text=True, timeout=400)
    assert done.returncode == 1, done.stderr
    assert (
        "first to depart: layer into blocks.1.attn.Wo" in done.stdout
        or "first to depart: layer blocks.0" in done.stdout
    )
    values = json.loads(out.read_text())
    failed = {row["check"] for row in values["rows"] if row["status"] == "FAILED"}
    assert {"block", "logits", "gradients", "trajectory, every loss"} <= failed
    passed = {row["check"] for row in values["rows"] if row["status"] == "passed"}
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
def test_parity_refuses(args, part, capfd):
    code, error = main.run(["parity", *args]), capfd.readouterr().err
    assert code == 2 and part in error and error.count("\n") == 1, error


def test_the_page_is_what_the_command_writes():
    """docs/parity.md is made of docs/parity.json; a hand that edits it, or a tolerance changed since, shows here."""
    kept = json.loads((docs_page.FOLDER / "parity.json").read_text(encoding="utf-8"))
    assert (docs_page.FOLDER / "parity.md").read_text(encoding="utf-8") == docs_page.page(kept)
    for suite in kept["suite"].values():
        assert not suite["quick"] and all(row["status"] != "FAILED" for row in suite["rows"])
    for mutants in kept["mutants"].values():
        assert len(mutants["lines"]) >= 25 and all(line[2] != SURVIVES for line in mutants["lines"])
    assert set(kept["end_to_end"]) <= set(PRESETS) and len(SUITE.checks) > 20


def test_outside_a_checkout_parity_says_where_to_run_it(monkeypatch, capfd, tmp_path):
    """As after `pip install jaxgpt`, which brings neither this package nor PyTorch."""
    monkeypatch.setattr(jaxgpt, "__file__", str(tmp_path / "site-packages" / "jaxgpt" / "__init__.py"))
    code, error = main.run(["parity", "--quick"]), capfd.readouterr().err
    assert code == 2 and "checkout" in error and "parity extra" in error and error.count("\n") == 1, error
