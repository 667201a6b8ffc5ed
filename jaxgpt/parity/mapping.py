"""Where each PyTorch tensor goes in the JAX parameters, found by sending numbered elements through the converter.

The converter is the user's, of any form. Fed with a `state_dict` whose elements are their own numbers, it shows which
PyTorch element each element of each JAX array holds. So the engine knows what is unmapped or mapped twice, carries
gradients and updated weights back to PyTorch's names and shapes, and names a layer on both sides.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jaxgpt.parity.params import Path

BASE = 2048  # numbers travel digit by digit: a converter may cast to float32 or float16, which hold these exactly
NOWHERE = -1

Convert = Callable[[dict[str, np.ndarray]], dict[Path, np.ndarray]]


@dataclass(frozen=True)
class ElementMap:
    """The elements of the JAX arrays by number of the PyTorch element.

    Attributes:
        shapes: of PyTorch's floating-point tensors, ties once; their elements are numbered in this order.
        elements: by JAX path: for each element the number of the PyTorch element that it holds, or `NOWHERE`.
        scale, offset: by JAX path: an element is its PyTorch element * scale + offset; 1 and 0 nearly always.
        computed: paths whose elements are computed from several of PyTorch's; all of theirs are `NOWHERE`.
    """

    shapes: dict[str, tuple[int, ...]]
    elements: dict[Path, np.ndarray]
    scale: dict[Path, np.ndarray]
    offset: dict[Path, np.ndarray]
    computed: tuple[Path, ...]

    @cached_property
    def starts(self) -> dict[str, int]:
        """The number of each tensor's first element."""
        ends = np.cumsum([_size(shape) for shape in self.shapes.values()], dtype=np.int64)
        return dict(zip(self.shapes, [0, *ends[:-1].tolist()], strict=True))

    @property
    def n_elements(self) -> int:
        return sum(map(_size, self.shapes.values()))

    @cached_property
    def sources(self) -> dict[Path, tuple[str, ...]]:
        """By JAX path the PyTorch tensors that it holds elements of."""
        names, starts = list(self.shapes), np.array(list(self.starts.values()))
        found = {}
        for path, elements in self.elements.items():
            held = np.unique(np.searchsorted(starts, elements[elements != NOWHERE], side="right") - 1)
            found[path] = tuple(names[i] for i in held)
        return found

    def paths(self, name: str) -> list[Path]:
        """The JAX arrays that hold elements of a PyTorch tensor."""
        return [path for path, sources in self.sources.items() if name in sources]

    def times_held(self) -> dict[str, np.ndarray]:
        """By PyTorch tensor: how many JAX elements hold each of its elements."""
        counts = np.zeros(self.n_elements, np.int64)
        for elements in self.elements.values():
            np.add.at(counts, elements[elements != NOWHERE], 1)
        return self.by_name(counts)

    def gradients(self, grads: Mapping[Path, np.ndarray]) -> dict[str, np.ndarray]:
        """JAX gradients as those of PyTorch's tensors: the transposed converter, which sums over every holder."""
        dtype = np.result_type(*[grad.dtype for grad in grads.values()])
        summed = np.zeros(self.n_elements, dtype)
        for path, grad in grads.items():
            held = self.elements[path] != NOWHERE
            np.add.at(summed, self.elements[path][held], (grad * self.scale[path].astype(dtype))[held])
        return self.by_name(summed)

    def weights(self, flat: Mapping[Path, np.ndarray]) -> dict[str, np.ndarray]:
        """JAX arrays as PyTorch's tensors: the inverse of the converter. Of two holders the last one counts."""
        dtype = np.result_type(*[array.dtype for array in flat.values()])
        numbers = np.zeros(self.n_elements, dtype)
        for path, array in flat.items():
            held = self.elements[path] != NOWHERE
            values = (array - self.offset[path].astype(dtype)) / self.scale[path].astype(dtype)
            numbers[self.elements[path][held]] = values[held]
        return self.by_name(numbers)

    def by_name(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        return {
            name: numbers[self.starts[name] : self.starts[name] + _size(shape)].reshape(shape)
            for name, shape in self.shapes.items()
        }


@np.errstate(all="ignore")  # the numbered elements are not the weights that a converter is made for
def map_elements(convert: Convert, state: Mapping[str, np.ndarray], ties: Mapping[str, str]) -> ElementMap:
    """Sends numbered elements through a converter.

    Args:
        convert: `state_dict` -> JAX arrays by path. Its result for `state` is taken to be right.
        state: a `state_dict`; tensors that are no floats are passed on as they are.
        ties: names of tensors that share the memory of another, and the other's name.
    """
    names = [name for name, array in state.items() if array.dtype.kind == "f" and name not in ties]
    shapes = {name: state[name].shape for name in names}
    plain = ElementMap(shapes, {}, {}, {}, ())

    def converted(numbers: np.ndarray) -> dict[Path, np.ndarray]:
        filled = {**state, **plain.by_name(numbers)}
        result = convert({name: np.array(filled[ties.get(name, name)]) for name in state})
        return {path: np.asarray(array, np.float64) for path, array in result.items()}

    real = converted(np.concatenate([np.ravel(state[name]) for name in names]).astype(np.float64))
    offset = converted(np.zeros(plain.n_elements))
    scale = {path: one - offset[path] for path, one in converted(np.ones(plain.n_elements)).items()}
    numbers, place = np.arange(plain.n_elements), 1
    elements = {path: np.zeros(array.shape, np.int64) for path, array in real.items()}
    sound = dict.fromkeys(real, True)
    while place == 1 or place <= plain.n_elements - 1:
        digits = converted((numbers // place % BASE).astype(np.float64))
        for path, digit in digits.items():
            exact = (digit - offset[path]) / np.where(scale[path] == 0, 1, scale[path])
            whole = np.round(np.nan_to_num(exact, nan=-1, posinf=-1, neginf=-1))
            sound[path] &= bool((np.abs(exact - whole) < 1e-3).all() and (whole >= 0).all() and (whole < BASE).all())
            elements[path] += np.clip(whole, -1, BASE).astype(np.int64) * place
        place *= BASE
    values = np.concatenate([np.ravel(state[name]) for name in names]).astype(np.float64)
    computed = []
    for path, array in real.items():
        inside = (scale[path] != 0) & (elements[path] >= 0) & (elements[path] < plain.n_elements)
        elements[path] = np.where(inside, elements[path], NOWHERE)
        again = np.where(inside, values[np.maximum(elements[path], 0)] * scale[path], 0) + offset[path]
        if not sound[path] or not np.allclose(again, array, rtol=1e-5, atol=1e-6, equal_nan=True):
            elements[path] = np.full(array.shape, NOWHERE)
            computed.append(path)
        scale[path] = np.where(elements[path] == NOWHERE, 1.0, scale[path])
    return ElementMap(shapes, elements, scale, offset, tuple(computed))


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))
