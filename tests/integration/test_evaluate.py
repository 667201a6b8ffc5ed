"""`jaxgpt evaluate`: the loss over a whole split."""

import json
import math

import pytest


def test_the_command_gives_the_summary_figures(cli, trained):
    summary = json.loads((trained / "summary.json").read_text())
    done = cli("evaluate", trained, "--json")
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    names = {"loss": "val_loss", "ppl": "val_ppl", "tokens": "val_tokens", "bits_per_byte": "val_bits_per_byte"}
    assert got == {name: summary[there] for name, there in names.items()}
    plain = cli("evaluate", trained).stdout
    assert f"loss {summary['val_loss']:.4f}" in plain and "60 steps" in plain


def test_tokens_are_those_of_whole_windows(cli, trained, text):
    n_val = len(text) - int(0.9 * len(text))
    for split, n in (("val", n_val), ("train", len(text) - n_val)):
        got = json.loads(cli("evaluate", trained, "--json", "--split", split).stdout)
        assert got["tokens"] == (n - 1) // 16 * 16
        assert got["ppl"] == pytest.approx(math.exp(got["loss"]))


def test_data_that_has_changed_is_refused(cli, trained, text_file):
    text = text_file.read_bytes()
    try:
        text_file.write_bytes(text + b"la")
        done = cli("evaluate", trained)
        assert done.returncode == 2 and "another text" in done.stderr
        text_file.unlink()
        done = cli("evaluate", trained)
        assert done.returncode == 2 and "no such file" in done.stderr
    finally:
        text_file.write_bytes(text)
