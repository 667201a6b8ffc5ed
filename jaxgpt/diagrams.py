"""Pictures of what happens inside a model: gradient flow, attention maps, the probability of each token.

Axes: L layers, H heads, T time (queries), S time (keys).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.patches import Rectangle

from jaxgpt.data_files import replacing
from jaxgpt.diagnostics import EXPLODING, VANISHING, Flow, Surprise
from jaxgpt.report import drawable, plt, save_figure, set_title

COLOURS = {
    "healthy": "tab:green",
    "vanishing": "tab:blue",
    "exploding": "tab:red",
    "zero by design": "0.6",
}
LEAST = 1e-4  # probabilities below are all of the same colour
UNSEEN = "0.92"
FRAMES = 40  # of an animation, at most
LINE = 56  # characters


def gradient_flow(path: Path, title: str, flows: Sequence[Flow]) -> None:
    """Draws mean |g|, the standard deviation, and update over weight of every tensor, a row each.

    Args:
        path: the PNG to write.
    """
    rows = np.arange(len(flows))
    ratios = [f.update_ratio for f in flows]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 1.6 + 0.17 * len(flows)), sharey=True, layout="constrained", width_ratios=(3, 2)
    )
    set_title(figure, title)
    limits, ratio_limits = _limits([f.mean_abs for f in flows], 1e-9, 10), _limits(ratios)
    for verdict, colour in COLOURS.items():
        chosen = [row for row in rows if flows[row].verdict == verdict]
        label = f"mean |g|, {verdict}" if chosen else None
        _points(left, [(flows[row].mean_abs, row) for row in chosen], limits, colour, label)
        _points(right, [(ratios[row], row) for row in chosen], ratio_limits, colour)
    left.plot([f.std for f in flows], rows, "|", color="0.3", markersize=7, label="standard deviation")
    left.axvspan(1e-30, VANISHING, color="tab:blue", alpha=0.08, linewidth=0)
    left.axvspan(EXPLODING, 1e30, color="tab:red", alpha=0.08, linewidth=0)
    told = f"gradient, nats per unit (vanishing below {VANISHING:g}, exploding above {EXPLODING:g})"
    left.set(xscale="log", xlim=limits, xlabel=told)
    right.set(xscale="log", xlim=ratio_limits, xlabel="norm of the update / norm of the weights")
    left.set_yticks(rows, [f.name for f in flows], fontsize=7)
    left.set_ylim(len(flows) - 0.4, -0.6)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.tick_params(axis="x", top=True, labeltop=len(flows) > 40)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    save_figure(figure, path)


def _limits(values: Sequence[float], low: float = 1e-4, high: float = 1e-2) -> tuple[float, float]:
    """Of a logarithmic axis, with room around the values that have a place on it."""
    seen = [value for value in values if 0 < value < math.inf]
    return min([low, *(value / 3 for value in seen)]), max([high, *(value * 3 for value in seen)])


def _points(
    axes: Any, points: list[tuple[float, int]], limits: tuple[float, float], colour: str, label: str | None = None
) -> None:
    """Values as points; 0 as a triangle at the left edge, what is not finite as one at the right."""
    style = dict(color=colour, markersize=5, zorder=3, linestyle="none", clip_on=False)
    kinds = {
        "o": [(value, row) for value, row in points if 0 < value < math.inf],
        "<": [(limits[0], row) for value, row in points if value == 0],
        ">": [(limits[1], row) for value, row in points if not value < math.inf],
    }
    for marker, drawn in kinds.items():
        # A line of no points that is not clipped would take the figure's corner into the layout, which gives up then.
        if drawn:
            axes.plot(*zip(*drawn, strict=True), marker=marker, label=label, **style)
            label = None  # one entry of the legend


def attention_maps(path: Path, title: str, maps_LHTS: np.ndarray, tokens: Sequence[str]) -> None:
    """Draws every layer's (rows) and head's (columns) map; in a map, rows look at columns.

    Args:
        path: the PNG to write.
        tokens: T of them, visible.
    """
    with drawable([*tokens, title]) as (*shown, title):
        figure, _ = _attention_figure(title, maps_LHTS, shown)
        save_figure(figure, path)


def attention_animation(path: Path, title: str, maps: Sequence[tuple[int, Path]], tokens: Sequence[str]) -> None:
    """Draws how the maps form over training: a frame a step, at most FRAMES of them, evenly chosen.

    Args:
        path: the GIF to write.
        maps: updates done, and the file of the maps [L, H, T, S] then.
    """
    from PIL import Image

    chosen = [maps[i] for i in np.unique(np.linspace(0, len(maps) - 1, min(FRAMES, len(maps))).round().astype(int))]
    frames = []
    with drawable([*tokens, title]) as (*shown, title):
        figure, images = _attention_figure(f"{title}, after {chosen[0][0]} steps", np.load(chosen[0][1]), shown)
        for step, file in chosen:
            figure.suptitle(f"{title}, after {step} steps", parse_math=False)
            for image, map_TS in zip(images, _flat(np.load(file)), strict=True):
                image.set_data(_masked(map_TS))
            figure.canvas.draw()
            frames.append(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("P", palette=1, colors=128))
        plt.close(figure)
    durations = [400] * (len(frames) - 1) + [2000]
    with replacing(path) as partial:
        frames[0].save(partial, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)


def _attention_figure(title: str, maps_LHTS: np.ndarray, tokens: Sequence[str]) -> tuple[Any, list[Any]]:
    """The figure, and the image of each map."""
    n_layer, n_head, n_time, _ = maps_LHTS.shape
    side = max(0.6, min(9.2 / n_head, 3.2, 0.13 * n_time))  # inches of a map
    every = max(1, math.ceil(n_time * 0.095 / side))  # of the tokens those that have a label
    ticks = range(0, n_time, every)
    labels = [tokens[i] for i in ticks]
    longest = max(map(len, labels))
    # Placed by hand: matplotlib's own layout takes a minute for the maps of a model of 12 layers.
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
    images, norm = [], matplotlib.colors.PowerNorm(0.5, 0, 1)
    for axes, map_TS in zip(grid.flat, _flat(maps_LHTS), strict=True):
        axes.set_facecolor(UNSEEN)
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
    """The height of the axes' centre, as a share of the figure's."""
    box = axes.get_position()
    return (box.y0 + box.y1) / 2


def _flat(maps_LHTS: np.ndarray) -> np.ndarray:
    return maps_LHTS.reshape(-1, *maps_LHTS.shape[2:])


def _masked(map_TS: np.ndarray) -> np.ndarray:
    """What a token cannot see as no number, which shows the background."""
    return np.where(np.tri(*map_TS.shape, dtype=bool), map_TS, np.nan)


def token_colour(probability: float) -> str:
    """From red through yellow to green, by the logarithm: "#rrggbb"."""
    share = 1 - math.log(max(probability, LEAST)) / math.log(LEAST)
    return matplotlib.colors.to_hex(matplotlib.colormaps["RdYlGn"](0.08 + 0.84 * share))


def surprise(path: Path, title: str, tokens: Sequence[str], found: Surprise) -> None:
    """Draws the text with each token on the colour of its probability; the first, which nothing foretells, on grey.

    Args:
        path: the PNG to write.
        tokens: T of them, visible; a line ends after one that ends a line.
    """
    colours = ["0.85", *(token_colour(float(p)) for p in found.probability_T)]
    with drawable([*tokens, title], "DejaVu Sans Mono") as (*shown, title):
        places, row, column = [], 0, 0
        for text in shown:
            if column and column + len(text) > LINE and text != "\u21b5":
                row, column = row + 1, 0
            places.append((row, column))
            column += len(text)
            if text.endswith("\u21b5"):
                row, column = row + 1, 0
        n_rows = places[-1][0] + 1
        longest = max(LINE // 2, *(column + len(text) for (_, column), text in zip(places, shown, strict=True)))
        figure, axes = plt.subplots(figsize=(0.175 * longest + 0.4, 0.36 * n_rows + 1.5), layout="constrained")
        for (row, column), text, colour in zip(places, shown, colours, strict=True):
            axes.add_patch(Rectangle((column, row), len(text), 1, facecolor=colour, edgecolor="white", linewidth=0.8))
            axes.text(column + len(text) / 2, row + 0.5, text, ha="center", va="center", fontsize=13, parse_math=False)
        axes.set(xlim=(0, longest), ylim=(n_rows, 0))
        axes.set_axis_off()
        axes.set_title(title, fontsize=11, parse_math=False)
        shades = matplotlib.colors.ListedColormap([token_colour(p) for p in np.geomspace(LEAST, 1, 256)])
        scale = matplotlib.cm.ScalarMappable(matplotlib.colors.LogNorm(LEAST, 1), shades)
        bar = figure.colorbar(scale, ax=axes, orientation="horizontal", fraction=0.12, aspect=40, shrink=0.8, pad=0.02)
        bar.set_label("probability given the tokens before", fontsize=9)
        bar.ax.tick_params(labelsize=8)
        save_figure(figure, path)
