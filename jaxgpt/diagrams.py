"""Pictures of what happens inside a model: gradient flow, attention maps, the probability of each token.

Axes: L layers, H heads, T time (queries), S time (keys).
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Rectangle

from jaxgpt.diagnostics import EXPLODING, VANISHING, Flow, Surprise
from jaxgpt.report import plt, save_figure

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
        if found and font.name != "Last Resort":  # it has a box for everything
            families.append(font.name)
            missing -= found
    with plt.rc_context({"font.family": families}):
        yield ["".join(f"U+{ord(c):04X}" if ord(c) in missing else c for c in text) for text in texts]


def _characters(font: str) -> set[int]:
    try:
        return set(FT2Font(font).get_charmap())
    except (OSError, RuntimeError):  # a font of another kind, or gone
        return set()


def gradient_flow(path: Path, title: str, flows: Sequence[Flow]) -> None:
    """Draws mean |g|, the standard deviation, and update over weight of every tensor, a row each.

    Args:
        path: the PNG to write.
    """
    rows = np.arange(len(flows))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 1.6 + 0.17 * len(flows)), sharey=True, layout="constrained", width_ratios=(3, 2)
    )
    figure.suptitle(title.encode("utf-8", "replace").decode(), parse_math=False)
    for verdict, colour in COLOURS.items():
        chosen = [row for row in rows if flows[row].verdict == verdict]
        label = f"mean |g|, {verdict}" if chosen else None
        left.plot(
            [flows[row].mean_abs for row in chosen], chosen, "o", color=colour, markersize=5, label=label, zorder=3
        )
        right.plot([flows[row].update_ratio for row in chosen], chosen, "o", color=colour, markersize=5)
    left.plot([f.std for f in flows], rows, "|", color="0.3", markersize=7, label="standard deviation")
    left.axvspan(1e-30, VANISHING, color="tab:blue", alpha=0.08, linewidth=0)
    left.axvspan(EXPLODING, 1e30, color="tab:red", alpha=0.08, linewidth=0)
    seen = [f.mean_abs for f in flows if 0 < f.mean_abs < math.inf]
    left.set_xlim(min([1e-9, *(value / 3 for value in seen)]), max([10.0, *(value * 3 for value in seen)]))
    left.set(xscale="log", xlabel=f"gradient, nats per unit (vanishing below {VANISHING:g}, exploding above 1)")
    right.set(xscale="log", xlabel="norm of the update / norm of the weights")
    left.set_yticks(rows, [f.name for f in flows], fontsize=7)
    left.set_ylim(len(flows) - 0.4, -0.6)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.tick_params(axis="x", top=True, labeltop=len(flows) > 40)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    save_figure(figure, path)


def attention_maps(path: Path, title: str, maps_LHTS: np.ndarray, tokens: Sequence[str]) -> None:
    """Draws every layer's (rows) and head's (columns) map; in a map, rows look at columns.

    Args:
        path: the PNG to write.
        tokens: T of them, visible.
    """
    with drawable(tokens) as shown:
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
    with drawable(tokens) as shown:
        figure, images = _attention_figure(f"{title}, after {chosen[0][0]} steps", np.load(chosen[0][1]), shown)
        for step, file in chosen:
            figure.suptitle(f"{title}, after {step} steps".encode("utf-8", "replace").decode(), parse_math=False)
            for image, map_TS in zip(images, _flat(np.load(file)), strict=True):
                image.set_data(_masked(map_TS))
            figure.canvas.draw()
            frames.append(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("P", palette=1, colors=128))
        plt.close(figure)
    partial = path.with_name(path.name + ".partial")
    durations = [400] * (len(frames) - 1) + [2000]
    frames[0].save(partial, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    partial.replace(path)


def _attention_figure(title: str, maps_LHTS: np.ndarray, tokens: Sequence[str]) -> tuple[Any, list[Any]]:
    """The figure, and the image of each map."""
    n_layer, n_head, n_time, _ = maps_LHTS.shape
    side = max(1.0, min(9.5 / n_head, 0.13 * n_time))  # inches of a map
    every = max(1, math.ceil(n_time * 0.095 / side))  # of the tokens those with a label
    ticks = range(0, n_time, every)
    labels = [tokens[i] for i in ticks]
    width, height = n_head * (side + 0.12) + 1.5, n_layer * (side + 0.12) + 1.3
    figure, grid = plt.subplots(
        n_layer,
        n_head,
        figsize=(max(width, 4), max(height, 3)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
    figure.suptitle(title.encode("utf-8", "replace").decode(), parse_math=False)
    images = []
    for axes, map_TS in zip(grid.flat, _flat(maps_LHTS), strict=True):
        axes.set_facecolor(UNSEEN)
        norm = matplotlib.colors.PowerNorm(0.5, 0, 1)
        images.append(axes.imshow(_masked(map_TS), cmap="viridis", norm=norm, interpolation="nearest"))
        axes.tick_params(length=1.5, pad=1)
    turned = 90 if max(map(len, labels)) > 1 else 0
    for axes in grid[-1]:
        axes.set_xticks(ticks, labels, fontsize=7, rotation=turned, parse_math=False)
    for layer, axes in enumerate(grid[:, 0]):
        axes.set_yticks(ticks, labels, fontsize=7, parse_math=False)
        axes.set_ylabel(f"layer {layer}", fontsize=9)
    for head, axes in enumerate(grid[0]):
        axes.set_title(f"head {head}", fontsize=9, pad=2)
    figure.supxlabel("attended to", fontsize=9)
    figure.supylabel("token that attends", fontsize=9)
    bar = figure.colorbar(images[0], ax=grid, fraction=0.03, pad=0.01, ticks=[0, 0.01, 0.1, 0.25, 0.5, 1])
    bar.set_label("weight", fontsize=9)
    bar.ax.tick_params(labelsize=7)
    return figure, images


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
    with drawable(tokens, "DejaVu Sans Mono") as shown:
        places, row, column = [], 0, 0
        for text in shown:
            if column and column + len(text) > LINE:
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
        axes.set_title(title.encode("utf-8", "replace").decode(), fontsize=11, parse_math=False)
        shades = matplotlib.colors.ListedColormap([token_colour(p) for p in np.geomspace(LEAST, 1, 256)])
        scale = matplotlib.cm.ScalarMappable(matplotlib.colors.LogNorm(LEAST, 1), shades)
        bar = figure.colorbar(scale, ax=axes, orientation="horizontal", fraction=0.12, aspect=40, shrink=0.8, pad=0.02)
        bar.set_label("probability given the tokens before", fontsize=9)
        bar.ax.tick_params(labelsize=8)
        save_figure(figure, path)
