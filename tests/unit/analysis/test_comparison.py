"""Comparisons: what ranks the runs, and the table."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxgpt import strict_json
from jaxgpt.analysis import comparison
from jaxgpt.analysis.comparison import ComparedRun


def runs(*tokenizers):
    return [ComparedRun(f"tokenizer={t}", Path(t), {"tokenizer": t}, t, "finished") for t in tokenizers]


@pytest.mark.parametrize(
    "tokenizers, figure", [(("byte", "bpe:300"), "val_bits_per_byte"), (("byte", "byte"), "val_loss")]
)
def test_tokenizers_are_ranked_by_bits_per_byte(tokenizers, figure):
    """A loss per token is lower where tokens are shorter."""
    assert comparison.ranked_by(runs(*tokenizers)) == figure


def test_the_table_of_tokenizers_has_bits_per_byte():
    labels = [run.label for run in runs("byte", "bpe:300")]
    rows = [{"label": label, "status": "finished", "val_loss": 2.0, "val_bits_per_byte": 2.5} for label in labels]
    head, _, first, second = comparison.table(rows, ["tokenizer"], "val_bits_per_byte").splitlines()
    assert head.startswith("| tokenizer | bits per byte | val loss") and "| byte      |        2.5000 |" in first
    assert second.startswith("| bpe:300 ")


def test_the_table_says_how_a_run_ended():
    rows = [
        {"label": "lr=1", "status": "diverged", "diverged_at_step": 3},
        {"label": "lr=2", "status": "failed"},
    ]
    text = comparison.table(rows, ["lr"], "val_loss")
    assert "| diverged at step 3 |" in text and "|             failed |" in text
    assert len({len(line) for line in text.splitlines()}) == 1


def test_runs_without_a_result_come_last(tmp_path):
    ended = [
        ComparedRun(f"lr={i}", tmp_path / "none", {}, "char", status)
        for i, status in enumerate(("unfinished", "failed", "diverged"))
    ]
    assert [row["status"] for row in comparison.ranked(ended)] == ["diverged", "failed", "unfinished"]


def finished_run(monkeypatch, path, summary):
    """A compared run that has ended with this text as its summary.json."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "summary.json").write_text(summary)
    run = ComparedRun(f"lr={path.name}", path, {}, "char", "finished")
    opened = SimpleNamespace(path=path, read_steps=list, read_metrics=list)
    monkeypatch.setattr(ComparedRun, "open", lambda self: opened)
    return run


def test_a_perplexity_beyond_a_float_is_null_in_comparison_json(monkeypatch, tmp_path):
    figures = dict(val_loss=1e4, val_ppl=math.inf, val_bits_per_byte=2, params=3, tokens_per_s=4, wall_s=5)
    run = finished_run(monkeypatch, tmp_path / "1", strict_json.dumps(figures))
    compared = comparison.Comparison(tmp_path, ["lr"], "text", "minigpt", [run])
    compared.record()
    kept = strict_json.loads((tmp_path / "comparison.json").read_text())
    assert kept["variants"][0]["val_ppl"] is None
    assert "|        inf |" in comparison.table(kept["variants"], ["lr"], "val_loss")


@pytest.mark.parametrize("summary", ["", "null", "[]", "[" * 10**5, '{"val_loss": NaN}', "{}"])
def test_a_damaged_summary_leaves_a_row_without_figures(monkeypatch, tmp_path, summary):
    rows = comparison.ranked([finished_run(monkeypatch, tmp_path, summary)])
    assert rows[0]["status"] == "finished" and "val_loss" not in rows[0]
    assert "finished" in comparison.table(rows, ["lr"], "val_loss")


def test_the_best_report_is_the_first_of_equals():
    reports = [{"step": step, "val_loss": loss} for step, loss in enumerate((3.0, 2.0, 2.5, 2.0))]
    assert comparison.best_report(reports)["step"] == 1
