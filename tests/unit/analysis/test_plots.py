"""Plots: any characters in titles and labels, and gradients that have no place on a logarithmic axis."""

import warnings

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
from matplotlib import font_manager

from jaxgpt.analysis import plots
from jaxgpt.analysis.diagnostics import Flow
from jaxgpt.analysis.plots import comparison_curves, confusion_matrix, drawable, learning_curves
from jaxgpt.data.tokenizer import ByteTokenizer, CharTokenizer, visible


def test_every_character_can_be_drawn():
    """A character that no font has becomes its number; `$` and backslashes stay as they are."""
    tokenizer = CharTokenizer("\n\r $A\\\u0301\u65e5")
    texts = [visible(tokenizer, i) for i in range(tokenizer.vocab_size)]
    assert texts[:3] == ["\u21b5", "U+000D", "\u2423"]
    with drawable(texts) as shown:
        assert shown[:6] == texts[:6]
        fonts = [f for f in font_manager.fontManager.ttflist if not f.name.startswith("Last Resort")]
        covered = any(0x65E5 in font_manager.get_font(f.fname).get_charmap() for f in fonts)
        assert shown[-1] == ("\u65e5" if covered else "U+65E5")
    assert visible(ByteTokenizer(), 0xC3) == "\\xc3" and visible(ByteTokenizer(), 0x20) == "\u2423"


def test_any_name_can_be_drawn(tmp_path):
    """Half a formula, which mathtext refuses; a character that few fonts have; a lone surrogate."""
    name = "$\\frac$ \u65e5 \udc80"
    steps = [(i, 2.0 - 0.1 * i, 1.0, 1e-3) for i in range(10)]
    reports = [{"step": i, "val_loss": 2.0 - 0.1 * i, "val_ppl": 7.0 - i} for i in (0, 5, 9)]
    learning_curves(tmp_path / "curves.png", name, steps, reports)
    comparison_curves(tmp_path / "comparison.png", name, [(name, steps, reports), ("b", steps, reports)])
    confusion_matrix(tmp_path / "confusion.png", name, np.eye(2), [name, "b"], 1.0)
    for picture in ("curves.png", "comparison.png", "confusion.png"):
        pixels = matplotlib.image.imread(tmp_path / picture)
        assert pixels.std() > 0.01 and min(pixels.shape[:2]) >= 300
    assert len(list(tmp_path.iterdir())) == 3


def test_a_perplexity_that_is_null_has_no_point(tmp_path):
    """In metrics.jsonl null stands for one beyond what a float can hold."""
    reports = [{"step": i, "val_loss": 1e3 - i, "val_ppl": ppl} for i, ppl in enumerate((None, 9.0, 8.0))]
    learning_curves(tmp_path / "curves.png", "t", [(0, 2.0, 1.0, 1e-3)], reports)
    assert matplotlib.image.imread(tmp_path / "curves.png").std() > 0.01


@pytest.fixture(scope="module")
def gradient_plots(tmp_path_factory):
    """Plots of a gradient of 0, a NaN and a healthy one: of all three, of the first two, of the last."""
    folder = tmp_path_factory.mktemp("plots")
    flows = [Flow(f"blocks.{i}.ln1.bias", (3,), g, g, g) for i, g in enumerate((0.0, float("nan"), 1e-3))]
    pixels = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, chosen in {"all": flows, "none": flows[:2], "one": flows[2:]}.items():
            plots.gradient_flow(folder / "g.png", name, chosen)
            pixels[name] = matplotlib.image.imread(folder / "g.png")
    assert not list(folder.glob("*.partial"))
    return pixels


@pytest.mark.parametrize("name", ["all", "none", "one"])
def test_gradients_are_drawn(gradient_plots, name):
    assert gradient_plots[name].std() > 0.01 and gradient_plots[name].shape[1] >= 400


@pytest.mark.parametrize("color", ["tab:blue", "tab:red"])  # the vanishing and the exploding one
def test_gradients_that_have_no_place_on_the_axis(gradient_plots, color):
    rgb = np.array(matplotlib.colors.to_rgb(color))
    n_pixels = {name: (np.abs(p[..., :3] - rgb).max(-1) < 0.02).sum() for name, p in gradient_plots.items()}
    assert n_pixels["all"] > 20 and n_pixels["none"] > 20 and n_pixels["one"] == 0
