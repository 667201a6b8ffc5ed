import pytest

from benchmarks.scaling import scaled
from jaxgpt.config import ModelConfig


@pytest.mark.parametrize(
    "axis, factor, changed",
    [
        ("T", 0.5, {"block_size": 32}),
        ("C", 2, {"n_embd": 128, "n_head": 8}),  # a head keeps its size
        ("L", 2, {"n_layer": 8}),
    ],
)
def test_one_axis_is_scaled(axis, factor, changed):
    sizes = dict(n_layer=4, n_head=4, n_embd=64, block_size=64)
    assert scaled(ModelConfig(**sizes), axis, factor) == ModelConfig(**{**sizes, **changed})
