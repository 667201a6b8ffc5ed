"""`jaxgpt evaluate`: the loss over a whole split."""

import json
import math

import pytest

from jaxgpt import strict_json


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


def test_a_figure_beyond_a_float_is_null_in_json(cli, trained, monkeypatch):
    from jaxgpt.tasks import language_modeling

    diverged = language_modeling.SplitLoss(loss=1e4, tokens=16, n_bytes=0, batch_mean=1e4)
    monkeypatch.setattr(language_modeling, "whole_split_loss", lambda *_: diverged)
    done = cli("evaluate", trained, "--json")
    assert done.returncode == 0 and "perplexity inf" in cli("evaluate", trained).stdout
    assert strict_json.loads(done.stdout) == {"loss": 1e4, "ppl": None, "tokens": 16, "bits_per_byte": None}


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
