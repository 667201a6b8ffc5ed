"""`benchmarks.generation`: both sides' texts, the memory's speed, and the table."""

import numpy as np
import pytest

from benchmarks import generation
from jaxgpt.config import ModelConfig


@pytest.mark.slow
def test_both_sides_write_the_same_text_from_the_same_weights(monkeypatch, tmp_path):
    tiny = ModelConfig(2, 2, 8, 40, tied_head=True, gelu="tanh", init="gpt2")
    monkeypatch.setattr(generation, "SHAPES", {"tiny": (tiny, 13)})
    monkeypatch.setattr(generation.os, "sched_setaffinity", lambda *_: None)  # of this process
    texts = [
        side("tiny", 1, tmp_path / "weights.npz")(generation.prompts("tiny", 3))
        for side in (generation.transformers_side, generation.our_side)
    ]
    assert texts[0].shape == (3, 40 - generation.PROMPT) and (texts[0] == texts[1]).all()


def test_the_table_has_a_row_for_each_measurement():
    row = {
        "shape": "gpt2-124m",
        "batch": 1,
        "tokens_s": {"ours": 38.2, "transformers": 25.1},
        "range": {"ours": [36.0, 39.0], "transformers": [24.0, 26.0]},
        "ratio": 1.523,
        "equal_tokens": 127,
        "tokens": 128,
        "memory_gb_s": 29.0,
        "bound_tokens_s": 58.3,
    }
    lines = generation.show([row, {**row, "shape": "minigpt"}]).splitlines()
    assert lines[2] == "| `gpt2-124m` | 1 | 38 (36 to 39) | 25 (24 to 26) | 1.52 | 127 of 128 | 58 |"
    assert lines[3].endswith("| in the cache |")


def test_the_speed_of_memory_counts_every_byte():
    assert generation.read_speed(2, np.ones(2**20, np.float32)) > 1e7
