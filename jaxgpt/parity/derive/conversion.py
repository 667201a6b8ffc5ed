"""How each leaf of a JAX parameter tree is made from a PyTorch state dict: array steps, and their printing as code."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from jaxgpt import strict_json
from jaxgpt.parity.params import Path

# Marks around a torch name within an expression, so that the loops of `code` can replace its numbers.
_OPEN, _CLOSE = "\x00", "\x01"
MAX_LINE, MAX_ENTRIES = 110, 3  # of the printed code: what stands on one line
_LOOP_VARIABLES = "ijklmnpq"


class Step(Protocol):
    """One step in making a leaf: from a list of arrays to a list of arrays, as numpy or as numpy code."""

    def apply(self, arrays: list[np.ndarray]) -> list[np.ndarray]: ...

    def code(self, expressions: list[str]) -> list[str]: ...


@dataclass(frozen=True)
class Transpose:
    """The axes of every array in another order, as `numpy.transpose` takes it."""

    axes: tuple[int, ...]

    def apply(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        return [x.transpose(self.axes) for x in arrays]

    def code(self, expressions: list[str]) -> list[str]:
        is_reversed = self.axes == tuple(reversed(range(len(self.axes))))
        suffix = ".T" if is_reversed else f".transpose({', '.join(map(str, self.axes))})"
        return [e + suffix for e in expressions]


@dataclass(frozen=True)
class Reshape:
    """Every array in another shape, in row-major order."""

    shape: tuple[int, ...]

    def apply(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        return [x.reshape(self.shape) for x in arrays]

    def code(self, expressions: list[str]) -> list[str]:
        shape = ", ".join(map(str, self.shape)) or "()"
        return [f"{e}.reshape({shape})" for e in expressions]


@dataclass(frozen=True)
class Slice:
    """The part from `start` to `stop` of one axis of every array."""

    axis: int
    start: int
    stop: int

    def apply(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        return [x[(slice(None),) * self.axis + (slice(self.start, self.stop),)] for x in arrays]

    def code(self, expressions: list[str]) -> list[str]:
        return [f"{e}[{':, ' * self.axis}{self.start}:{self.stop}]" for e in expressions]


@dataclass(frozen=True)
class Index:
    """One index of one axis of every array; the axis is dropped."""

    axis: int
    index: int

    def apply(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        return [x[(slice(None),) * self.axis + (self.index,)] for x in arrays]

    def code(self, expressions: list[str]) -> list[str]:
        return [f"{e}[{':, ' * self.axis}{self.index}]" for e in expressions]


@dataclass(frozen=True)
class Flip:
    """Every array with the order along some axes reversed."""

    axes: tuple[int, ...]

    def apply(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        return [np.flip(x, self.axes) for x in arrays]

    def code(self, expressions: list[str]) -> list[str]:
        return [f"np.flip({e}, {self.axes})" for e in expressions]


@dataclass(frozen=True)
class Concatenate:
    """Every `count` consecutive arrays as one, joined along an axis."""

    axis: int
    count: int

    def apply(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        return [np.concatenate(group, self.axis) for group in _groups(arrays, self.count)]

    def code(self, expressions: list[str]) -> list[str]:
        axis = f", axis={self.axis}" if self.axis else ""
        return [f"np.concatenate({_list_code(group)}{axis})" for group in _groups(expressions, self.count)]


@dataclass(frozen=True)
class Stack:
    """Every `count` consecutive arrays as one, along a new axis."""

    axis: int
    count: int

    def apply(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        return [np.stack(group, self.axis) for group in _groups(arrays, self.count)]

    def code(self, expressions: list[str]) -> list[str]:
        axis = f", axis={self.axis}" if self.axis else ""
        return [f"np.stack({_list_code(group)}{axis})" for group in _groups(expressions, self.count)]


@dataclass(frozen=True)
class Add:
    """Every `count` consecutive arrays as their sum: PyTorch's recurrent layers have two biases that are added."""

    count: int

    def apply(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        return [np.add.reduce(group) for group in _groups(arrays, self.count)]

    def code(self, expressions: list[str]) -> list[str]:
        return [f"({' + '.join(group)})" for group in _groups(expressions, self.count)]


@dataclass(frozen=True)
class AddStart:
    """Of every two consecutive arrays, the first with the start of the second, `stop` elements, added to its own."""

    stop: int

    def apply(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        return [np.concatenate([x[: self.stop] + y[: self.stop], x[self.stop :]]) for x, y in _groups(arrays, 2)]

    def code(self, expressions: list[str]) -> list[str]:
        s = self.stop
        return [f"np.concatenate([{x}[:{s}] + {y}[:{s}], {x}[{s}:]])" for x, y in _groups(expressions, 2)]


def simplified(steps: Sequence[Step]) -> tuple[Step, ...]:
    """The same steps with neighbours joined (a transpose of a transpose) and those that change nothing left out."""
    out: list[Step] = []
    for step in steps:
        last = out[-1] if out else None
        if isinstance(step, Transpose) and isinstance(last, Transpose):
            out[-1] = step = Transpose(tuple(last.axes[a] for a in step.axes))
        elif isinstance(step, Reshape) and isinstance(last, Reshape):
            out[-1] = step
        else:
            out.append(step)
        if isinstance(step, Transpose) and step.axes == tuple(range(len(step.axes))):
            out.pop()
    return tuple(out)


@dataclass(frozen=True)
class Source:
    """How one JAX leaf is made.

    Attributes:
        names: the torch tensors, several where they are fused, or where layers are stacked.
        steps: applied in order, first to the list of these tensors; the last leaves one array.
    """

    names: tuple[str, ...]
    steps: tuple[Step, ...] = ()

    def apply(self, state_dict: Mapping[str, np.ndarray]) -> np.ndarray:
        """The leaf, as a contiguous array of its own."""
        arrays = [np.asarray(state_dict[name]) for name in self.names]
        for step in self.steps:
            arrays = step.apply(arrays)
        assert len(arrays) == 1, f"{self.names}: {len(arrays)} arrays left after {self.steps}"
        return np.array(arrays[0], order="C")

    def code(self) -> str:
        """A numpy expression of `state_dict`, the same as `apply`."""
        return _finished(self._marked())

    def _marked(self) -> str:
        expressions = [f"state_dict[{_OPEN}{name}{_CLOSE}]" for name in self.names]
        for step in self.steps:
            expressions = step.code(expressions)
        (expression,) = expressions
        return expression


def function_code(sources: Mapping[Path, Source], comments: Sequence[str] = ()) -> str:
    """The Python function `to_params(state_dict)` that builds the tree of all leaves with numpy alone.

    A node whose keys are the integers from 0 is a list, any other a dict. Layers of the same form are a loop.
    """
    tree: dict = {}
    for path, source in sources.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        if path:
            node[path[-1]] = source
    root = sources[()] if () in sources else tree
    lines = ["import numpy as np", "", "", "def to_params(state_dict):"]
    lines += ['    """The JAX parameters, from a PyTorch state dict of numpy arrays."""']
    lines += [f"    # {comment}" for comment in comments]
    body = _node_lines(root, _LOOP_VARIABLES)
    lines += _indented([f"return {body[0]}", *body[1:]])
    return "\n".join(_compact(_finished("\n".join(lines)).split("\n"))) + "\n"


def _compact(lines: list[str]) -> list[str]:
    """The lines with every innermost bracket that fits on one line on one line."""
    out: list[str] = []
    for line in lines:
        out.append(line)
        if not re.fullmatch(r"\s*[\]}],?", line):
            continue
        start = len(out) - 2
        while not re.search(r"[\[{]$", out[start]):
            start -= 1
        inner = [text.strip() for text in out[start + 1 : -1]]
        joined = out[start] + " ".join(inner).removesuffix(",") + line.strip()
        if len(joined) <= MAX_LINE and sum(len(re.findall(r": ", text)) for text in inner) <= MAX_ENTRIES:
            out[start:] = [joined]
    return out


def _node_lines(node: "dict | Source", variables: str) -> list[str]:
    """The lines of an expression for a node, with torch names marked."""
    if isinstance(node, Source):
        return [node._marked()]
    keys = sorted(node, key=_natural)
    if keys and keys == list(range(len(keys))):
        children = [_node_lines(node[key], variables[1:]) for key in keys]
        if loop := _loop(children, variables):
            return ["[", *_indented([*loop, f"for {variables[0]} in range({len(keys)})"]), "]"]
        return ["[", *(line for child in children for line in _indented(_with_comma(child))), "]"]
    lines = ["{"]
    for stem, run in _runs(keys):
        children = [_node_lines(node[key], variables[len(run) > 1 :]) for key in run]
        if stem is not None and (loop := _loop(children, variables)):
            key = f'f"{stem[0]}{{{_sum(variables[0], stem[1])}}}{stem[2]}"'
            entry = [f"{key}: {loop[0]}", *loop[1:], f"for {variables[0]} in range({len(run)})"]
            lines += _indented(["**{", *_indented(entry), "},"])
            continue
        for key, child in zip(run, children, strict=True):
            label = strict_json.dumps(key) if isinstance(key, str) else str(key)
            lines += _indented(_with_comma([f"{label}: {child[0]}", *child[1:]]))
    return [*lines, "}"]


def _runs(keys: Sequence[str | int]) -> list[tuple[tuple[str, int, str] | None, list[str | int]]]:
    """The keys in order, those that differ in their first number only (`layers_0`, `layers_1`) together.

    Each run has the text before its first number, that number, and the text after it; None for a key by itself.
    """
    runs: dict[object, tuple[tuple[str, int, str] | None, list[str | int]]] = {}
    for key in keys:
        match = re.fullmatch(r"([^{}\"\\\d]*)(\d+)([^{}\"\\]*)", key) if isinstance(key, str) else None
        if match is None or str(int(match[2])) != match[2]:
            runs[key] = (None, [key])
            continue
        first, run = runs.setdefault((match[1], match[3]), ((match[1], int(match[2]), match[3]), []))
        if first is not None and first[1] + len(run) == int(match[2]):
            run.append(key)
        else:
            runs[key] = (None, [key])
    return list(runs.values())


def _loop(children: list[list[str]], variables: str) -> list[str] | None:
    """The lines of the children as one comprehension's element: torch names with the loop's variable for a number.

    None where the children are fewer than two or not of the same form.
    """
    if len(children) < 2 or len(variables) < 2 or len({len(lines) for lines in children}) > 1:
        return None
    merged = [_merged(lines, variables[0]) for lines in zip(*children, strict=True)]
    return None if any(line is None for line in merged) else [line for line in merged if line is not None]


def _merged(lines: Sequence[str], variable: str) -> str | None:
    """The one line that gives the k-th of these lines for `variable` = k; None if there is none.

    They may differ in the numbers within marked torch names, each growing by the same amount from line to line.
    """
    if len(set(lines)) == 1:
        return lines[0]
    split = [re.split(f"({_OPEN}[^{_CLOSE}]*{_CLOSE})", line) for line in lines]
    if len({len(parts) for parts in split}) > 1:
        return None
    out = ""
    for parts in zip(*split, strict=True):
        if len(set(parts)) == 1:
            out += parts[0]
            continue
        if not parts[0].startswith(_OPEN):
            return None
        pieces = [re.split(r"(\d+)", part) for part in parts]
        if len({len(p) for p in pieces}) > 1:
            return None
        for texts in zip(*pieces, strict=True):
            if len(set(texts)) == 1:
                out += texts[0]
                continue
            if not all(text.isdigit() and str(int(text)) == text for text in texts):
                return None
            first, step = int(texts[0]), int(texts[1]) - int(texts[0])
            if [int(text) for text in texts] != [first + step * k for k in range(len(texts))]:
                return None
            out += "{" + _sum(variable if step == 1 else f"{step} * {variable}", first) + "}"
    return out


def _sum(variable: str, start: int) -> str:
    return f"{variable} + {start}" if start else variable


def _list_code(expressions: list[str]) -> str:
    """The code of a list: a comprehension where its elements are those of successive layers."""
    if len(expressions) > 2 and (merged := _merged(expressions, "layer")) is not None and merged != expressions[0]:
        return f"[{merged} for layer in range({len(expressions)})]"
    return f"[{', '.join(expressions)}]"


def _finished(text: str) -> str:
    """The text with marked names as string literals, or f-strings where a loop's variable is in them."""

    def literal(match: re.Match[str]) -> str:
        text = strict_json.dumps(match[1], ensure_ascii=False)
        return f"f{text}" if "{" in text else text

    return re.sub(f"{_OPEN}([^{_CLOSE}]*){_CLOSE}", literal, text)


def _with_comma(lines: list[str]) -> list[str]:
    return [*lines[:-1], lines[-1] + ","]


def _indented(lines: list[str]) -> list[str]:
    return ["    " + line for line in lines]


def _natural(key: str | int) -> list[tuple[int, int, str]]:
    """A sort key that has numbers within names in the order of their values."""
    if isinstance(key, int):
        return [(0, key, "")]
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", key) if part]


def _groups(items: list, count: int) -> list[list]:
    assert len(items) % count == 0, f"{len(items)} items in groups of {count}"
    return [items[i : i + count] for i in range(0, len(items), count)]
