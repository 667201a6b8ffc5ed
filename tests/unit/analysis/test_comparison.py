"""Comparisons: what ranks the runs, and the table."""

from pathlib import Path

import pytest

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


def test_the_best_report_is_the_first_of_equals():
    reports = [{"step": step, "val_loss": loss} for step, loss in enumerate((3.0, 2.0, 2.5, 2.0))]
    assert comparison.best_report(reports)["step"] == 1
