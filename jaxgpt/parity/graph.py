"""The values that a program computes, in order, and the first that the other side never computes.

Both sides give such a list: PyTorch's operations and the equations of a jaxpr. Names play no part: a value of one side
is matched with one of the other if both hold the same numbers, in any layout. So nothing need be named, and a fused
projection, heads on another axis or images with their channels last match what they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

SAME = 1e-9  # relative to the root mean square: far above rounding in float64, far below any fault


@dataclass(frozen=True)
class Value:
    """One array that a program computes.

    Attributes:
        operation: "softmax", or a JAX primitive's name.
        where: the module's path on PyTorch's side, FILE:LINE (FUNCTION) on JAX's.
        inputs: indices of the values it is computed from.
        parameters: names of the parameters that it takes directly.
        array: the numbers; None if they are no floats.
        trained: whether it depends on a parameter: a table of angles or a mask does not.
    """

    index: int
    operation: str
    where: str
    inputs: tuple[int, ...]
    parameters: tuple[str, ...] = ()
    array: np.ndarray | None = field(default=None, repr=False)
    trained: bool = False


def _sorted(array: np.ndarray) -> np.ndarray:
    return np.sort(np.nan_to_num(array, posinf=1e30, neginf=-1e30), axis=None)


def matches(ours: Sequence[Value], theirs: Sequence[Value]) -> dict[int, int]:
    """For the index of each of our values that the other side computes, too: the index of its first equal there."""
    by_size: dict[int, list[tuple[int, np.ndarray, np.ndarray]]] = {}
    for value in theirs:
        if value.array is not None and value.array.size > 1:
            numbers = _sorted(value.array)
            by_size.setdefault(numbers.size, []).append((value.index, numbers, _key(numbers)))
    found = {}
    for value in ours:
        if value.array is None or value.array.size <= 1:
            continue
        numbers = _sorted(value.array)
        key, scale = _key(numbers), _scale(numbers)
        for index, other, other_key in by_size.get(numbers.size, ()):
            if np.abs(key - other_key).max() <= SAME * scale and np.abs(numbers - other).max() <= SAME * scale:
                found[value.index] = index
                break
    return found


def _scale(numbers: np.ndarray) -> float:
    """The root mean square of the numbers that no mask has made large: beside -1e30 all others would be the same."""
    unmasked = numbers[np.abs(numbers) < 1e4]
    return float(np.sqrt(np.mean(np.square(unmasked)))) or 1.0 if unmasked.size else 1.0


def _key(numbers: np.ndarray) -> np.ndarray:
    """Three of the sorted numbers: a cheap first look before all are compared."""
    return numbers[[0, numbers.size // 2, -1]]


def first_departure(values: Sequence[Value], matched: set[int]) -> Value | None:
    """The first value that the other side does not compute, nor anything that follows from it.

    A value without an equal departs only if none of its descendants has one: the two programs may group their
    operations in different ways. Values that depend on no parameter are left out for the same reason, and those that
    nothing takes, such as a GRU's last state beside its outputs.
    """
    taken = {index for value in values for index in value.inputs} | {len(values) - 1}
    rejoined = set(matched)  # values with a matched descendant
    for value in reversed(values):
        if value.index in rejoined:
            rejoined.update(value.inputs)
    for value in values:
        is_array = value.array is not None and value.array.size > 1
        if is_array and value.trained and value.index in taken and value.index not in rejoined:
            return value
    return None
