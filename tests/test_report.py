"""Pictures of runs: whatever a run, a file or a class is called."""

import matplotlib.image
import numpy as np

from jaxgpt.report import comparison_curves, confusion_matrix, learning_curves


def test_every_character_can_be_drawn():
    """What no font has comes as its number; `$` and backslashes stay what they are."""
    from matplotlib import font_manager

    from jaxgpt.report import drawable
    from jaxgpt.tokenizer import ByteTokenizer, CharTokenizer, visible

    tokenizer = CharTokenizer("\n\r $A\\\u0301\u65e5")
    texts = [visible(tokenizer, i) for i in range(tokenizer.vocab_size)]
    assert texts[:3] == ["\u21b5", "U+000D", "\u2423"]
    with drawable(texts) as shown:
        assert shown[:6] == texts[:6]
        fonts = [f for f in font_manager.fontManager.ttflist if not f.name.startswith("Last Resort")]
        covered = any(0x65E5 in font_manager.get_font(f.fname).get_charmap() for f in fonts)
        assert shown[-1] == ("\u65e5" if covered else "U+65E5")
    assert visible(ByteTokenizer(), 0xC3) == "\\xc3" and visible(ByteTokenizer(), 0x20) == "\u2423"


def test_a_picture_of_whatever_name(tmp_path):
    """Half a formula, which a renderer of formulas refuses; a character that few fonts have; a byte that is none."""
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
