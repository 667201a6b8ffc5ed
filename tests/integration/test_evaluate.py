"""`jaxgpt evaluate`: the loss over a whole split."""

import json
import math

import numpy as np
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


@pytest.mark.slow
def test_another_dataset_is_encoded_with_the_runs_tokenizer(cli, trained, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(text[:3000])
    got = strict_json.loads(cli("evaluate", trained, "--json", "--dataset", f"file:{other}").stdout)
    assert got["tokens"] == (3000 - int(0.9 * 3000) - 1) // 16 * 16
    same = cli("evaluate", trained, "--json", "--dataset", f"file:{other}", "--split=train", cwd=tmp_path)
    assert strict_json.loads(same.stdout)["tokens"] == (int(0.9 * 3000) - 1) // 16 * 16
    other.write_text(text[:3000] + "\u2603" * 40)
    done = cli("evaluate", trained, "--dataset", f"file:{other}")
    assert done.returncode == 2 and f"--dataset file:{other}: the character" in done.stderr


@pytest.mark.slow
def test_a_model_that_was_imported_without_a_text_is_evaluated_on_any(cli, trained, text_file, tmp_path):
    exported, run = tmp_path / "hf", tmp_path / "run"
    assert cli("convert", "export", trained, "--to=huggingface", "--out", exported).returncode == 0
    assert cli("convert", "import", exported, "--out", run).returncode == 0
    done = cli("evaluate", run)
    assert done.returncode == 2 and "give one with --dataset" in done.stderr
    got = strict_json.loads(cli("evaluate", run, "--json", "--dataset", f"file:{text_file}").stdout)
    own = strict_json.loads(cli("evaluate", trained, "--json").stdout)
    assert got["tokens"] == own["tokens"] and got["loss"] == pytest.approx(own["loss"], rel=1e-6)


@pytest.mark.slow
def test_the_test_split_of_wikitexts_files(cli, trained, text, tmp_path):
    """Each line is a document; this tokenizer has no end of text, so the tokens are the file's characters."""
    folder = tmp_path / "wikitext-2"
    folder.mkdir()
    for name, part in (("train", text[:400]), ("valid", text[400:800]), ("test", text[800:1200])):
        (folder / f"wiki.{name}.raw").write_text(part)
    flags = ("evaluate", trained, "--json", "--dataset=wikitext-2", "--data-dir", tmp_path)
    tested = strict_json.loads(cli(*flags, "--split=test").stdout)
    alone = strict_json.loads(cli(*flags, "--split=val").stdout)
    assert tested["tokens"] == alone["tokens"] == 399 // 16 * 16 and tested["loss"] != alone["loss"]
    (folder / "wiki.test.raw").write_text("la")
    done = cli(*flags, "--split=test")
    assert done.returncode == 2 and "has 2 tokens, fewer than the run's block plus one (17)" in done.stderr


def test_a_benchmark_of_a_file(cli, trained, text, tmp_path):
    """Strides of the window's size score the same tokens as the loss over a split, but for each window's first."""
    path = tmp_path / "wiki.test.raw"
    path.write_text(text[:1000])
    flags = ("evaluate", trained, "--benchmark=wikitext-2", "--file", path)
    got = strict_json.loads(cli(*flags, "--stride=16", "--json").stdout)
    assert got["benchmark"] == "wikitext-2" and got["tokens"] == 1000 - math.ceil(1000 / 16)
    assert got["words"] == len(text[:1000].split()) and got["ppl"] == pytest.approx(math.exp(got["loss"]))
    half = strict_json.loads(cli(*flags, "--json").stdout)
    assert half["stride"] == 8 and half["tokens"] == 999 and np.isfinite(half["word_ppl"])
    assert f"wikitext-2: loss {half['loss']:.4f}" in cli(*flags).stdout


def test_a_benchmark_that_cannot_be_had_names_the_flag_for_its_file(cli, trained):
    for name in ("wikitext-103", "lambada", "hellaswag"):
        done = cli("evaluate", trained, f"--benchmark={name}", HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert done.stderr.startswith(f"error: --benchmark {name}: cannot be had") and "--file PATH" in done.stderr
