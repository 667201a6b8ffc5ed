"""Whole-split loss of a run: what the summary says, by the command, and by hand."""

import json
import math

import pytest


def test_the_command_gives_the_summary_figures(command, trained):
    summary = json.loads((trained / "summary.json").read_text())
    done = command("evaluate.py", trained, "--json")
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    names = {"loss": "val_loss", "ppl": "val_ppl", "tokens": "val_tokens", "bits_per_byte": "val_bits_per_byte"}
    assert got == {name: summary[there] for name, there in names.items()}
    plain = command("evaluate.py", trained).stdout
    assert f"loss {summary['val_loss']:.4f}" in plain and "60 steps" in plain


def test_tokens_are_those_of_whole_windows(command, trained, text):
    n_val = len(text) - int(0.9 * len(text))
    for split, n in (("val", n_val), ("train", len(text) - n_val)):
        got = json.loads(command("evaluate.py", trained, "--json", "--split", split).stdout)
        assert got["tokens"] == (n - 1) // 16 * 16
        assert got["ppl"] == pytest.approx(math.exp(got["loss"]))


def test_data_that_has_changed_is_refused(command, trained, text_file):
    text = text_file.read_bytes()
    try:
        text_file.write_bytes(text + b"la")
        done = command("evaluate.py", trained)
        assert done.returncode == 2 and "another text" in done.stderr
        text_file.unlink()
        done = command("evaluate.py", trained)
        assert done.returncode == 2 and "no such file" in done.stderr
    finally:
        text_file.write_bytes(text)
