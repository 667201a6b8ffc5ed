"""Pictures of a run."""

import math
import warnings
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend has to be chosen first)


def learning_curves(
    path: Path, title: str, steps: list[tuple[int, float, float, float]], reports: list[dict[str, Any]]
) -> None:
    """Draws train and validation loss, and validation perplexity, over the updates done.

    Args:
        path: the PNG to write.
        steps: (step, train loss, ...) of every update.
        reports: the lines of metrics.jsonl.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    figure.suptitle(title.encode("utf-8", "replace").decode())
    at = [step + 1 for step, *_ in steps]
    loss = [row[1] for row in steps]
    left.plot(at, loss, color="tab:blue", alpha=0.25, linewidth=0.7, label="train, each batch")
    if span := min(50, len(loss) // 10):
        left.plot(at[span - 1 :], _running_mean(loss, span), color="tab:blue", label=f"train, mean of {span} batches")
    reported_at = [report["step"] + 1 for report in reports]
    marker = dict(color="tab:orange", marker="o", markersize=3.5)
    left.plot(reported_at, [report["val_loss"] for report in reports], label="validation", **marker)
    left.set(xlabel="updates", ylabel="cross-entropy, nats per token")
    left.legend()
    finite = [(x, r["val_ppl"]) for x, r in zip(reported_at, reports, strict=True) if math.isfinite(r["val_ppl"])]
    right.plot([x for x, _ in finite], [y for _, y in finite], **marker)
    right.set(xlabel="updates", ylabel="validation perplexity", yscale="log")
    right.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    right.yaxis.set_minor_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    partial = path.with_name(path.name + ".partial")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a title with characters that the font has not
        figure.savefig(partial, dpi=120, format="png")
    partial.replace(path)
    plt.close(figure)


def _running_mean(values: list[float], span: int) -> list[float]:
    total = sum(values[:span])
    means = [total / span]
    for old, new in zip(values, values[span:], strict=False):
        total += new - old
        means.append(total / span)
    return means
