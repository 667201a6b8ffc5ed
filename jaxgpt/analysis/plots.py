"""Plots: learning curves, comparisons, confusion matrices, gradient flow, attention maps, token probabilities.

Axes: K classes, L layers, H heads, T time (queries), S time (keys).
"""

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm, PowerNorm, to_hex
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Rectangle
from matplotlib.ticker import FormatStrFormatter, MaxNLocator

from jaxgpt.analysis.diagnostics import EXPLODING, VANISHING, Flow
from jaxgpt.data.files import atomic_replace

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend has to be chosen first)

VERDICT_COLORS = {
    "healthy": "tab:green",
    "vanishing": "tab:blue",
    "exploding": "tab:red",
    "zero by design": "0.6",
}
MASKED_COLOR = "0.92"  # of the keys after a query
MAX_FRAMES = 40  # of an animation
MIN_PROBABILITY = 1e-4  # smaller ones all have the same color
LINE_WIDTH = 56  # characters


def learning_curves(
    path: Path, title: str, steps: list[tuple[int, float, float, float]], reports: list[dict[str, Any]]
) -> None:
    """Draws training and validation loss, and validation perplexity or accuracy, over the updates.

    Args:
        path: the PNG to write.
        steps: (step, training loss, ...) of every update, as `RunDir.read_steps` gives them.
        reports: the lines of metrics.jsonl.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    _set_title(figure, title)
    steps = _finite(steps)
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
    metric = "val_accuracy" if any("val_accuracy" in report for report in reports) else "val_ppl"
    values = [math.inf if report[metric] is None else report[metric] for report in reports]  # null: beyond a float
    finite = [(x, y) for x, y in zip(at, values, strict=True) if math.isfinite(y)]
    right.plot([x for x, _ in finite], [y for _, y in finite], **marker)
    right.set(xlabel="epochs" if by_epoch else "updates")
    if by_epoch:
        right.xaxis.set_major_locator(MaxNLocator(integer=True))
    if metric == "val_accuracy":
        right.set(ylabel="test accuracy")
    else:
        right.set(ylabel="validation perplexity", yscale="log")
        right.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        right.yaxis.set_minor_formatter(FormatStrFormatter("%g"))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    _save_figure(figure, path)


def comparison_curves(
    path: Path,
    title: str,
    runs: Sequence[tuple[str, list[tuple[int, float, float, float]], list[dict[str, Any]]]],
) -> None:
    """Draws the training losses and the validation losses of several runs over the updates.

    Losses far above those at the start, as of a run that diverged, are cut off: they would flatten all others.

    Args:
        path: the PNG to write.
        runs: for each run its label, (step, training loss, ...) of every update, and the lines of metrics.jsonl.
    """
    n_columns = max(1, min(4, 110 // (8 + max(len(label) for label, _, _ in runs))))
    size = (11, 4.4 + 0.21 * math.ceil(len(runs) / n_columns))
    figure, (left, right) = plt.subplots(1, 2, figsize=size, sharex=True, sharey=True, layout="constrained")
    _set_title(figure, title)
    colors = (
        plt.get_cmap("tab10")(range(10)) if len(runs) <= 10 else plt.get_cmap("turbo")(np.linspace(0, 1, len(runs)))
    )
    runs = [(label, _finite(steps), reports) for label, steps, reports in runs]
    span = max(1, min(50, max(len(steps) for _, steps, _ in runs) // 10))
    shown: list[float] = []
    for color, (_, steps, reports) in zip(colors, runs, strict=False):
        loss = [row[1] for row in steps]
        mean = _running_mean(loss, span) if len(loss) >= span else loss
        at = [step + 1 for step, *_ in steps][len(loss) - len(mean) :]
        left.plot(at, mean, color=color, linewidth=1.2, marker="o" if len(mean) == 1 else None, markersize=3.5)
        val_loss = [report["val_loss"] for report in reports]
        at = [report["step"] + 1 for report in reports]
        right.plot(at, val_loss, color=color, linewidth=1.2, marker="o", markersize=3.5)
        shown += mean + val_loss
    if shown:
        top = min(max(shown), 1.1 * max((steps[0][1] for _, steps, _ in runs if steps), default=math.inf))
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
    _save_figure(figure, path)


def confusion_matrix(path: Path, title: str, confusion_KK: np.ndarray, labels: Sequence[str], accuracy: float) -> None:
    """Draws the number of texts of each class by predicted class, colored by the share of the row.

    Args:
        path: the PNG to write.
        confusion_KK: [class, predicted class].
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
                color = "white" if share_KK[row, column] > 0.5 else "black"
                axes.text(column, row, f"{confusion_KK[row, column]:.0f}", ha="center", va="center", color=color)
    shown = [label if len(label) <= 18 else label[:17] + "\u2026" for label in labels]
    rotation, alignment = (90, "center") if n_classes > 8 else (30, "right")
    with drawable(shown) as shown:
        axes.set_xticks(range(n_classes), shown, parse_math=False, rotation=rotation, ha=alignment)
        axes.set_yticks(range(n_classes), shown, parse_math=False)
    axes.set(xlabel="predicted", ylabel="class")
    with drawable([title]) as (title,):
        axes.set_title(f"{title}: accuracy {accuracy:.3f}", parse_math=False)
    _save_figure(figure, path)


def gradient_flow(path: Path, title: str, flows: Sequence[Flow]) -> None:
    """Draws mean |g|, the standard deviation and the update ratio of every tensor, a row each.

    Args:
        path: the PNG to write.
    """
    rows = range(len(flows))
    ratios = [f.update_ratio for f in flows]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 1.6 + 0.17 * len(flows)), sharey=True, layout="constrained", width_ratios=(3, 2)
    )
    _set_title(figure, title)
    limits, ratio_limits = _limits([f.mean_abs for f in flows], 1e-9, 10), _limits(ratios)
    for verdict, color in VERDICT_COLORS.items():
        chosen = [row for row in rows if flows[row].verdict == verdict]
        label = f"mean |g|, {verdict}" if chosen else None
        _points(left, [(flows[row].mean_abs, row) for row in chosen], limits, color, label)
        _points(right, [(ratios[row], row) for row in chosen], ratio_limits, color)
    left.plot([f.std for f in flows], rows, "|", color="0.3", markersize=7, label="standard deviation")
    left.axvspan(1e-30, VANISHING, color="tab:blue", alpha=0.08, linewidth=0)
    left.axvspan(EXPLODING, 1e30, color="tab:red", alpha=0.08, linewidth=0)
    xlabel = f"gradient, nats per unit (vanishing below {VANISHING:g}, exploding above {EXPLODING:g})"
    left.set(xscale="log", xlim=limits, xlabel=xlabel)
    right.set(xscale="log", xlim=ratio_limits, xlabel="norm of the update / norm of the weights")
    left.set_yticks(rows, [f.name for f in flows], fontsize=7)
    left.set_ylim(len(flows) - 0.4, -0.6)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.tick_params(axis="x", top=True, labeltop=len(flows) > 40)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    _save_figure(figure, path)


def _limits(values: Sequence[float], low: float = 1e-4, high: float = 1e-2) -> tuple[float, float]:
    """The limits of a logarithmic axis, with room around the values that are positive and finite."""
    shown = [value for value in values if 0 < value < math.inf]
    return min([low, *(value / 3 for value in shown)]), max([high, *(value * 3 for value in shown)])


def _points(
    axes: Any, points: list[tuple[float, int]], limits: tuple[float, float], color: str, label: str | None = None
) -> None:
    """Draws values as points; 0 as a triangle at the left edge, infinity and NaN as one at the right."""
    style = dict(color=color, markersize=5, zorder=3, linestyle="none", clip_on=False)
    kinds = {
        "o": [(value, row) for value, row in points if 0 < value < math.inf],
        "<": [(limits[0], row) for value, row in points if value == 0],
        ">": [(limits[1], row) for value, row in points if not value < math.inf],
    }
    for marker, drawn in kinds.items():
        # An unclipped line without points would stretch the layout to the figure's corner, and the layout would fail.
        if drawn:
            axes.plot(*zip(*drawn, strict=True), marker=marker, label=label, **style)
            label = None  # one legend entry for all markers


def attention_maps(path: Path, title: str, maps_LHTS: np.ndarray, tokens: Sequence[str]) -> None:
    """Draws an attention map for each layer (a row of maps) and head (a column); in a map, rows are queries.

    Args:
        path: the PNG to write.
        tokens: the T tokens as text.
    """
    with drawable([*tokens, title]) as (*shown, title):
        figure, _ = _attention_figure(title, maps_LHTS, shown)
        _save_figure(figure, path)


def attention_animation(path: Path, title: str, maps: Sequence[tuple[int, Path]], tokens: Sequence[str]) -> None:
    """Draws how the attention maps change during training, with at most MAX_FRAMES evenly spaced frames.

    Args:
        path: the GIF to write.
        maps: the number of updates and the .npy file of the maps [L, H, T, S] after them, in order.
        tokens: the T tokens as text.
    """
    from PIL import Image
    from PIL.Image import Palette

    chosen = [maps[i] for i in np.unique(np.linspace(0, len(maps) - 1, min(MAX_FRAMES, len(maps))).round().astype(int))]
    frames = []
    with drawable([*tokens, title]) as (*shown, title):
        figure, images = _attention_figure(f"{title}, after {chosen[0][0]} steps", np.load(chosen[0][1]), shown)
        for step, file in chosen:
            figure.suptitle(f"{title}, after {step} steps", parse_math=False)
            for image, map_TS in zip(images, _flat(np.load(file)), strict=True):
                image.set_data(_masked(map_TS))
            figure.canvas.draw()
            frame = Image.fromarray(np.asarray(figure.canvas.buffer_rgba()))
            frames.append(frame.convert("P", palette=Palette.ADAPTIVE, colors=128))
        plt.close(figure)
    durations = [400] * (len(frames) - 1) + [2000]
    with atomic_replace(path) as partial:
        frames[0].save(partial, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)


def _attention_figure(title: str, maps_LHTS: np.ndarray, tokens: Sequence[str]) -> tuple[Any, list[Any]]:
    """The figure of all attention maps, and the image of each map."""
    n_layer, n_head, n_time, _ = maps_LHTS.shape
    side = max(0.6, min(9.2 / n_head, 3.2, 0.13 * n_time))  # inches of a map
    every = max(1, math.ceil(n_time * 0.095 / side))  # tokens from one label to the next
    ticks = range(0, n_time, every)
    labels = [tokens[i] for i in ticks]
    longest = max(map(len, labels))
    # Placed by hand: matplotlib's constrained layout takes a minute for the maps of a model of 12 layers.
    gap, left, top, label = 0.08, 0.55 + 0.07 * longest, 0.6, 0.4 + 0.07 * (longest if longest > 1 else 1)
    width = left + n_head * (side + gap) + 0.9
    height = label + n_layer * (side + gap) + top
    figure, grid = plt.subplots(
        n_layer,
        n_head,
        figsize=(width, height),
        sharex=True,
        sharey=True,
        squeeze=False,
        gridspec_kw=dict(
            left=left / width,
            right=1 - 0.9 / width,
            bottom=label / height,
            top=1 - top / height,
            wspace=gap / side,
            hspace=gap / side,
        ),
    )
    figure.suptitle(title, y=1 - 0.05 / height, va="top", parse_math=False)
    images, norm = [], PowerNorm(0.5, 0, 1)
    for axes, map_TS in zip(grid.flat, _flat(maps_LHTS), strict=True):
        axes.set_facecolor(MASKED_COLOR)
        images.append(axes.imshow(_masked(map_TS), cmap="viridis", norm=norm, interpolation="nearest", aspect="auto"))
        axes.tick_params(length=1.5, pad=1)
    for axes in grid[-1]:
        axes.set_xticks(ticks, labels, fontsize=7, rotation=90 if longest > 1 else 0, parse_math=False)
    for layer, axes in enumerate(grid[:, 0]):
        axes.set_yticks(ticks, labels, fontsize=7, parse_math=False)
        figure.text(0.3 / width, _middle(axes), f"layer {layer}", rotation=90, fontsize=9, va="center")
    for head, axes in enumerate(grid[0]):
        axes.set_title(f"head {head}" if side > 0.7 else str(head), fontsize=9, pad=2)
    named = "" if every == 1 else f" (one token in {every} is named)"
    middle = (left + width - 0.9) / 2 / width
    figure.text(middle, 0.02 / height, f"attended to{named}", fontsize=9, ha="center", va="bottom")
    middle = (label + height - top) / 2 / height
    figure.text(0.05 / width, middle, "token that attends", fontsize=9, rotation=90, va="center")
    inches = min(4, height - label - top)
    bar_axes = figure.add_axes((1 - 0.75 / width, middle - inches / 2 / height, 0.15 / width, inches / height))
    bar = figure.colorbar(images[0], cax=bar_axes, ticks=[0, 0.01, 0.1, 0.25, 0.5, 1])
    bar.set_label("weight", fontsize=9)
    bar.ax.tick_params(labelsize=7)
    return figure, images


def _middle(axes: Any) -> float:
    """The height of the axes' center as a share of the figure's height."""
    box = axes.get_position()
    return (box.y0 + box.y1) / 2


def _flat(maps_LHTS: np.ndarray) -> np.ndarray:
    """The maps of all layers and heads, [L * H, T, S]."""
    return maps_LHTS.reshape(-1, *maps_LHTS.shape[2:])


def _masked(map_TS: np.ndarray) -> np.ndarray:
    """The map with NaN, which shows the background, for the keys after a query."""
    return np.where(np.tri(*map_TS.shape, dtype=bool), map_TS, np.nan)


def token_color(probability: float) -> str:
    """The color of a probability, "#rrggbb": from red through yellow to green, by its logarithm."""
    share = 1 - math.log(max(probability, MIN_PROBABILITY)) / math.log(MIN_PROBABILITY)
    return to_hex(matplotlib.colormaps["RdYlGn"](0.08 + 0.84 * share))


def token_probabilities(path: Path, title: str, tokens: Sequence[str], probability_T: np.ndarray) -> None:
    """Draws a text with each token on the color of its probability; the first, which has none, on grey.

    Args:
        path: the PNG to write.
        tokens: the T tokens as text; a line of the picture ends after one that ends a line.
        probability_T: of each token but the first, [T - 1].
    """
    colors = ["0.85", *(token_color(float(p)) for p in probability_T)]
    with drawable([*tokens, title], "DejaVu Sans Mono") as (*shown, title):
        places, row, column = [], 0, 0
        for text in shown:
            if column and column + len(text) > LINE_WIDTH and text != "\u21b5":
                row, column = row + 1, 0
            places.append((row, column))
            column += len(text)
            if text.endswith("\u21b5"):
                row, column = row + 1, 0
        n_rows = places[-1][0] + 1
        longest = max(LINE_WIDTH // 2, *(column + len(text) for (_, column), text in zip(places, shown, strict=True)))
        figure, axes = plt.subplots(figsize=(0.175 * longest + 0.4, 0.36 * n_rows + 1.5), layout="constrained")
        for (row, column), text, color in zip(places, shown, colors, strict=True):
            axes.add_patch(Rectangle((column, row), len(text), 1, facecolor=color, edgecolor="white", linewidth=0.8))
            axes.text(column + len(text) / 2, row + 0.5, text, ha="center", va="center", fontsize=13, parse_math=False)
        axes.set(xlim=(0, longest), ylim=(n_rows, 0))
        axes.set_axis_off()
        axes.set_title(title, fontsize=11, parse_math=False)
        shades = ListedColormap([token_color(p) for p in np.geomspace(MIN_PROBABILITY, 1, 256)])
        scale = ScalarMappable(LogNorm(MIN_PROBABILITY, 1), shades)
        bar = figure.colorbar(scale, ax=axes, orientation="horizontal", fraction=0.12, aspect=40, shrink=0.8, pad=0.02)
        bar.set_label("probability given the tokens before", fontsize=9)
        bar.ax.tick_params(labelsize=8)
        _save_figure(figure, path)


@contextlib.contextmanager
def drawable(texts: Sequence[str], family: str = "DejaVu Sans") -> Iterator[list[str]]:
    """A context in which texts can be drawn whatever their characters; yields the texts to draw.

    Installed fonts complete the family where it lacks a character. A character that no font has becomes its number.
    """
    families, missing = [family], {ord(c) for text in texts for c in text}
    missing -= _characters(font_manager.findfont(family))
    if missing and family != "DejaVu Sans":
        families.append("DejaVu Sans")
        missing -= _characters(font_manager.findfont("DejaVu Sans"))
    for font in font_manager.fontManager.ttflist:
        if not missing:
            break
        covered = missing & _characters(font.fname) if font.name not in families else set()
        if covered and not font.name.startswith("Last Resort"):  # it draws a box for every character
            families.append(font.name)
            missing -= covered
    with plt.rc_context({"font.family": families}):
        yield ["".join(f"U+{ord(c):04X}" if ord(c) in missing else c for c in text) for text in texts]


def _characters(font: str) -> set[int]:
    """The code points that a font file has glyphs for."""
    try:
        return set(FT2Font(font).get_charmap())
    except (OSError, RuntimeError):  # a format that FreeType cannot read, or a font that was removed
        return set()


def _set_title(figure: Any, title: str) -> None:
    """Sets a figure's title, whatever its characters."""
    with drawable([title]) as (shown,):  # a text keeps the fonts it was created with
        figure.suptitle(shown, parse_math=False)


def _save_figure(figure: Any, path: Path) -> None:
    """Writes a figure as PNG, atomically, and closes it."""
    with atomic_replace(path) as partial, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a layout whose long labels leave no room
        # tight: the labels of a square confusion matrix reach over the figure's edge
        figure.savefig(partial, dpi=120, format="png", bbox_inches="tight", pad_inches=0.1)
    plt.close(figure)


def _finite(steps: list[tuple[int, float, float, float]]) -> list[tuple[int, float, float, float]]:
    """The rows of steps.csv without the losses of skipped updates that are not finite."""
    return [row for row in steps if math.isfinite(row[1])]


def _running_mean(values: list[float], span: int) -> list[float]:
    """The means of `span` values in a row."""
    total = sum(values[:span])
    means = [total / span]
    for old, new in zip(values, values[span:], strict=False):
        total += new - old
        means.append(total / span)
    return means
