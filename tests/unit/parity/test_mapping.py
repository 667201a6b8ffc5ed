"""Numbered elements show where a converter puts each tensor, whatever it does."""

import numpy as np
import pytest

from jaxgpt.parity.mapping import NOWHERE, map_elements

DRAW = np.random.default_rng(0)
STATE = {"a": DRAW.standard_normal((4, 6)), "b": DRAW.standard_normal(5), "count": np.array(3)}


def test_transposed_split_and_scaled_elements_are_found():
    def convert(s):
        return {
            ("left",): s["a"].T[:3].astype(np.float32),
            ("right",): 2 * s["a"].T[3:] + 1,
            ("b",): s["b"].astype(np.float16),
        }

    found = map_elements(convert, {k: np.float16(v).astype(np.float64) for k, v in STATE.items() if k != "count"}, {})
    assert found.computed == () and found.sources[("left",)] == ("a",)
    assert (found.elements[("left",)] == np.arange(24).reshape(4, 6).T[:3]).all()
    assert (found.scale[("right",)] == 2).all() and (found.offset[("right",)] == 1).all()
    grads = {path: np.ones(array.shape) for path, array in found.elements.items()}
    torch_grads = found.gradients(grads)
    assert (torch_grads["a"][:, :3] == 1).all() and (torch_grads["a"][:, 3:] == 2).all()
    weights = found.weights(convert(STATE))
    np.testing.assert_allclose(weights["a"], STATE["a"], rtol=1e-6)


def test_an_element_held_twice_and_one_held_nowhere():
    found = map_elements(lambda s: {("x",): s["a"], ("y",): s["a"][:2], ("z",): np.zeros(2)}, STATE, {})
    held = found.times_held()
    assert (held["a"][:2] == 2).all() and (held["a"][2:] == 1).all() and (held["b"] == 0).all()
    assert (found.elements[("z",)] == NOWHERE).all() and found.paths("a") == [("x",), ("y",)]


def test_what_is_computed_from_several_elements_is_said_to_be():
    found = map_elements(lambda s: {("x",): s["a"] @ s["a"].T, ("b",): s["b"]}, STATE, {})
    assert found.computed == (("x",),) and found.paths("b") == [("b",)]


@pytest.mark.parametrize("n", [2048, 2049, 5000])
def test_numbers_of_several_digits(n):
    state = {"w": DRAW.standard_normal(n)}
    order = np.random.default_rng(1).permutation(n)
    found = map_elements(lambda s: {("w",): s["w"][order].astype(np.float32)}, state, {})
    assert (found.elements[("w",)] == order).all()
