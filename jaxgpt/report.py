"""Pictures of a run."""

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

from jaxgpt.data_files import replacing

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
    set_title(figure, title)
    at = [step + 1 for step, *_ in steps]
    loss = [row[1] for row in steps]
    left.plot(at, loss, color="tab:blue", alpha=0.25, linewidth=0.7, label="train, each batch")
    if span := min(50, len(loss) // 10):
        left.plot(at[span - 1 :], _running_mean(loss, span), color="tab:blue", label=f"train, mean of {span} batches")
    reported_at = [report["step"] + 1 for report in reports]
    marker = dict(color="tab:orange", marker="o", markersize=3.5)
    left.plot(reported_at, [report["val_loss"] for report in reports], label="validation", **marker)
    left.set(xlabel="updates", ylabel="cross-entropy, nats")
    left.legend()
    by_epoch = all("epoch" in report for report in reports)
    at = [report["epoch"] for report in reports] if by_epoch else reported_at
    figure_of = "val_accuracy" if any("val_accuracy" in report for report in reports) else "val_ppl"
    finite = [(x, r[figure_of]) for x, r in zip(at, reports, strict=True) if math.isfinite(r[figure_of])]
    right.plot([x for x, _ in finite], [y for _, y in finite], **marker)
    right.set(xlabel="epochs" if by_epoch else "updates")
    if by_epoch:
        right.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    if figure_of == "val_accuracy":
        right.set(ylabel="test accuracy")
    else:
        right.set(ylabel="validation perplexity", yscale="log")
        right.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        right.yaxis.set_minor_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def comparison_curves(
    path: Path,
    title: str,
    runs: Sequence[tuple[str, list[tuple[int, float, float, float]], list[dict[str, Any]]]],
) -> None:
    """Draws the train losses of several runs, and their validation losses, over the updates done.

    Losses far above those at the start, as of a run that diverged, leave the picture: they would press all others flat.

    Args:
        path: the PNG to write.
        runs: of each its label, (step, train loss, ...) of every update, and the lines of metrics.jsonl.
    """
    n_columns = max(1, min(4, 110 // (8 + max(len(label) for label, _, _ in runs))))
    size = (11, 4.4 + 0.21 * math.ceil(len(runs) / n_columns))
    figure, (left, right) = plt.subplots(1, 2, figsize=size, sharex=True, sharey=True, layout="constrained")
    set_title(figure, title)
    colours = plt.get_cmap("tab10").colors if len(runs) <= 10 else plt.get_cmap("turbo")(np.linspace(0, 1, len(runs)))
    span = max(1, min(50, max(len(steps) for _, steps, _ in runs) // 10))
    shown: list[float] = []
    for colour, (_, steps, reports) in zip(colours, runs, strict=False):
        loss = [row[1] for row in steps]
        mean = _running_mean(loss, span) if len(loss) >= span else loss
        at = [step + 1 for step, *_ in steps][len(loss) - len(mean) :]
        left.plot(at, mean, color=colour, linewidth=1.2, marker="o" if len(mean) == 1 else None, markersize=3.5)
        val_loss = [report["val_loss"] for report in reports]
        at = [report["step"] + 1 for report in reports]
        right.plot(at, val_loss, color=colour, linewidth=1.2, marker="o", markersize=3.5)
        shown += mean + val_loss
    if shown:
        top = min(max(shown), 1.1 * max(steps[0][1] for _, steps, _ in runs if steps))
        margin = 0.04 * (top - min(shown)) or 1.0
        left.set_ylim(min(shown) - margin, top + margin)
    left.set(xlabel="updates", ylabel="cross-entropy, nats")
    left.set_title("train" if span == 1 else f"train, mean of {span} batches", fontsize="medium")
    right.set(xlabel="updates", ylabel="cross-entropy, nats")
    right.set_title("validation", fontsize="medium")
    right.yaxis.set_tick_params(labelleft=True)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    with drawable([label for label, _, _ in runs]) as labels:
        legend = figure.legend(right.lines, labels, loc="outside lower center", ncols=n_columns, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    save_figure(figure, path)


def confusion_matrix(path: Path, title: str, confusion_KK: np.ndarray, labels: Sequence[str], accuracy: float) -> None:
    """Draws how many texts of each class were taken for which; the colour is the share of the row.

    Args:
        path: the PNG to write.
        confusion_KK: [class, predicted].
    """
    n_classes = len(labels)
    size = min(12, 3.5 + 0.8 * n_classes)
    figure, axes = plt.subplots(figsize=(size + 0.8, size), layout="constrained")
    share_KK = confusion_KK / np.maximum(confusion_KK.sum(1, keepdims=True), 1)
    image = axes.imshow(share_KK, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the class", fraction=0.046)
    if n_classes <= 20:
        for row in range(n_classes):
            for column in range(n_classes):
                colour = "white" if share_KK[row, column] > 0.5 else "black"
                axes.text(column, row, f"{confusion_KK[row, column]:.0f}", ha="center", va="center", color=colour)
    shown = [label if len(label) <= 18 else label[:17] + "\u2026" for label in labels]
    turned = dict(rotation=90, ha="center") if n_classes > 8 else dict(rotation=30, ha="right")
    with drawable(shown) as shown:
        axes.set_xticks(range(n_classes), shown, parse_math=False, **turned)
        axes.set_yticks(range(n_classes), shown, parse_math=False)
    axes.set(xlabel="predicted", ylabel="class")
    with drawable([title]) as (title,):
        axes.set_title(f"{title}: accuracy {accuracy:.3f}", parse_math=False)
    save_figure(figure, path)


@contextlib.contextmanager
def drawable(texts: Sequence[str], family: str = "DejaVu Sans") -> Iterator[list[str]]:
    """The texts as they can be drawn inside: with installed fonts beside matplotlib's own where it lacks a character;
    what no font has as its number."""
    families, missing = [family], {ord(c) for text in texts for c in text}
    missing -= _characters(font_manager.findfont(family))
    if missing and family != "DejaVu Sans":
        families.append("DejaVu Sans")
        missing -= _characters(font_manager.findfont("DejaVu Sans"))
    for font in font_manager.fontManager.ttflist:
        if not missing:
            break
        found = missing & _characters(font.fname) if font.name not in families else set()
        if found and not font.name.startswith("Last Resort"):  # it has a box for everything
            families.append(font.name)
            missing -= found
    with plt.rc_context({"font.family": families}):
        yield ["".join(f"U+{ord(c):04X}" if ord(c) in missing else c for c in text) for text in texts]


def _characters(font: str) -> set[int]:
    try:
        return set(FT2Font(font).get_charmap())
    except (OSError, RuntimeError):  # a font of another kind, or gone
        return set()


def set_title(figure: Any, title: str) -> None:
    """A figure's title, whatever its characters."""
    with drawable([title]) as (shown,):  # a text keeps the fonts that it was made with
        figure.suptitle(shown, parse_math=False)


def save_figure(figure: Any, path: Path) -> None:
    """Writes a PNG whole or not at all."""
    with replacing(path) as partial, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a layout that long labels leave no room
        # tight: the square of a confusion matrix moves its labels over the figure's edge
        figure.savefig(partial, dpi=120, format="png", bbox_inches="tight", pad_inches=0.1)
    plt.close(figure)


def _running_mean(values: list[float], span: int) -> list[float]:
    total = sum(values[:span])
    means = [total / span]
    for old, new in zip(values, values[span:], strict=False):
        total += new - old
        means.append(total / span)
    return means
