"""The array steps that can turn a torch tensor of one shape into a JAX leaf of another, likeliest first."""

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from jaxgpt.parity.derive.conversion import Flip, Reshape, Slice, Step, Transpose, simplified

Shape = tuple[int, ...]
AS_IT_IS, TRANSPOSED = "as it is", "transposed"


@dataclass(frozen=True)
class Layout:
    """One way to lay out a tensor.

    Attributes:
        label: in words, or as `einops` writes it: "(h d) i -> i h d".
        penalty: how unlikely it is; 0 is the usual one.
        steps: applied to the torch tensor.
        transposed: inputs come before outputs; None where that says nothing.
    """

    label: str
    penalty: float
    steps: tuple[Step, ...] = ()
    transposed: bool | None = None


@functools.lru_cache(maxsize=100_000)
def layouts(
    kind: str, shape: Shape, leaf: Shape, parts: int = 1, heads: tuple[int, ...] = (), channels: tuple[int, ...] = ()
) -> tuple[Layout, ...]:
    """All layouts from `shape` to `leaf`.

    Args:
        kind: of the torch tensor: "linear" ([out, in], or [out] of a bias), "conv", "conv_transpose", "embedding",
            "norm" or "other".
        parts: how many matrices of the same shape are fused along the first axis (query, key and value: 3).
        heads: numbers of attention heads that the model may have.
        channels: numbers of channels that a flattened feature map may have had.
    """
    if math.prod(shape) != math.prod(leaf):
        grown = kind == "embedding" and shape[1:] == leaf[1:] and shape[0] == leaf[0] + 2
        # OPT, BART and their kin keep two rows before the first position.
        return (Layout("without its first two rows", 0.5, (Slice(0, 2, shape[0]),)),) if grown else ()
    found: dict[tuple[Step, ...], Layout] = {}
    for layout in _all(kind, shape, leaf, parts, heads, channels):
        steps = _without_idle(layout.steps, shape)
        if steps not in found or layout.penalty < found[steps].penalty:
            found[steps] = Layout(layout.label, layout.penalty, steps, layout.transposed)
    return tuple(sorted(found.values(), key=lambda layout: layout.penalty))


def _without_idle(steps: tuple[Step, ...], shape: Shape) -> tuple[Step, ...]:
    """The steps without those to the shape that the tensor has already."""
    kept: list[Step] = []
    for step in steps:
        if isinstance(step, Reshape):
            if step.shape == shape:
                continue
            shape = step.shape
        elif isinstance(step, Transpose):
            shape = _permuted(shape, step.axes)
        kept.append(step)
    return simplified(kept)


def _all(
    kind: str, shape: Shape, leaf: Shape, parts: int, heads: tuple[int, ...], channels: tuple[int, ...]
) -> Iterator[Layout]:
    rank = len(shape)
    if shape == leaf:
        yield Layout(AS_IT_IS, 0.0, (), False if rank > 1 else None)
    elif rank < 2 or len(leaf) < 2 or _squeezed(shape) == _squeezed(leaf):
        if _squeezed(shape) == _squeezed(leaf):
            yield Layout("reshaped", 0.1, (Reshape(leaf),))
    if rank == 2 and kind in ("linear", "embedding", "other"):
        by_kind = {"linear": 0.0, "embedding": 1.0, "other": 0.5}[kind]
        if shape[::-1] == leaf:
            yield Layout(TRANSPOSED, by_kind, (Transpose((1, 0)),), True)
        elif _squeezed(shape[::-1]) == _squeezed(leaf):
            yield Layout("transposed and reshaped", 0.2, (Transpose((1, 0)), Reshape(leaf)), True)
    if kind in ("linear", "other") and rank <= 2:
        yield from _with_heads(shape, leaf, parts, heads)
    if kind == "linear" and rank == 2 and sorted(shape) == sorted(leaf):
        out, inputs = shape
        for c in channels:
            side = math.isqrt(inputs // c) if inputs % c == 0 else 0
            if side > 1 and c > 1 and side * side * c == inputs:
                steps = (Reshape((out, c, side, side)), Transpose((0, 2, 3, 1)), Reshape(shape))
                label = f"inputs from channels, height, width to height, width, channels ({c} channels)"
                if leaf == shape[::-1]:
                    yield Layout(f"{label}, transposed", 2.0, (*steps, Transpose((1, 0))), True)
                if leaf == shape:
                    yield Layout(label, 2.0, steps, False)
    if kind == "conv" and rank >= 3:
        yield from _convolution(shape, leaf)
    if kind == "conv_transpose" and rank >= 3:
        yield from _transposed_convolution(shape, leaf)
    if kind == "other" and 3 <= rank <= 4 and len(leaf) == rank:
        for axes in itertools.permutations(range(rank)):
            if axes != tuple(range(rank)) and _permuted(shape, axes) == leaf:
                yield Layout(f"axes {axes}", 1.0, (Transpose(axes),), True)


def _convolution(shape: Shape, leaf: Shape) -> Iterator[Layout]:
    """Kernels [out, in, *spatial]."""
    spatial = tuple(range(2, len(shape)))
    for label, axes, penalty in (
        ("out in k -> k in out", (*spatial, 1, 0), 0.0),
        ("out in k -> out k in", (0, *spatial, 1), 0.5),
        ("out in k -> k out in", (*spatial, 0, 1), 1.0),
    ):
        if _permuted(shape, axes) == leaf:
            yield Layout(label, penalty, (Transpose(axes),), True)
    out, inputs = shape[0], math.prod(shape[1:])
    if leaf == (inputs, out):  # a patch embedding as a matrix
        yield Layout("out in k -> (k in) out", 0.2, (Transpose((*spatial, 1, 0)), Reshape(leaf)), True)
        yield Layout("out in k -> (in k) out", 0.4, (Reshape((out, inputs)), Transpose((1, 0))), True)
    if leaf == (out, inputs):
        yield Layout("out in k -> out (in k)", 0.2, (Reshape(leaf),), False)
        yield Layout("out in k -> out (k in)", 0.4, (Transpose((0, *spatial, 1)), Reshape(leaf)), False)


def _transposed_convolution(shape: Shape, leaf: Shape) -> Iterator[Layout]:
    """Kernels [in, out, *spatial]. Flax's default applies the kernel without reversing it, PyTorch's reverses it."""
    spatial = tuple(range(2, len(shape)))
    flip = Flip(spatial)
    for label, axes, plain, flipped in (
        ("in out k -> k in out", (*spatial, 0, 1), 0.5, 0.0),
        ("in out k -> k out in", (*spatial, 1, 0), 0.1, 0.6),
        ("in out k -> out in k", (1, 0, *spatial), 0.5, 0.0),
    ):
        if _permuted(shape, axes) == leaf:
            yield Layout(label, plain, (Transpose(axes),), True)
            yield Layout(f"{label}, k reversed", flipped, (flip, Transpose(axes)), True)


def _with_heads(shape: Shape, leaf: Shape, parts: int, heads: tuple[int, ...]) -> Iterator[Layout]:
    """Matrices [out, in] and biases [out] whose outputs or inputs are split into heads, or which fuse several parts."""
    out, inputs = shape[0], shape[1:]
    candidates = sorted({*leaf, *heads})
    if parts > 1 and out % parts == 0:
        rest = out // parts
        yield from _rearranged(shape, leaf, ("n", "o"), (parts, rest), inputs, "")
        for h in candidates:
            if 1 < h < rest and rest % h == 0:
                at = f" (h = {h})"
                yield from _rearranged(shape, leaf, ("n", "h", "d"), (parts, h, rest // h), inputs, at)
                yield from _rearranged(shape, leaf, ("h", "n", "d"), (h, parts, rest // h), inputs, at, extra=2.0)
    elif len(leaf) == len(shape) + 1:
        for h in candidates:
            if h < out and out % h == 0:
                yield from _rearranged(shape, leaf, ("h", "d"), (h, out // h), inputs, f" (h = {h})")
            if inputs and h < inputs[0] and inputs[0] % h == 0:
                yield from _rearranged_inputs(shape, leaf, h)


def _rearranged(
    shape: Shape, leaf: Shape, names: tuple[str, ...], sizes: Shape, inputs: Shape, at: str, extra: float = 0.0
) -> Iterator[Layout]:
    """Outputs factored into axes of these names, in any order of the axes that gives the leaf's shape."""
    axes = (*names, "i") if inputs else names
    dims = (*sizes, *inputs)
    for order in itertools.permutations(range(len(axes))):
        ordered = [axes[a] for a in order]
        outputs = [name for name in ordered if name != "i"]
        if "d" in outputs and "h" in outputs and "n" in outputs and outputs[-1] != "d":
            continue
        for groups in _merges(len(order), len(leaf)):
            merged = [[order[place] for place in group] for group in groups]
            if tuple(math.prod(dims[a] for a in group) for group in merged) != leaf:
                continue
            if any(len(group) > 1 and "i" in [axes[a] for a in group] for group in merged):
                continue
            transposed = ordered.index("i") < len(ordered) - 1 if inputs else None
            keeps_order = outputs == list(names)
            label = f"{_einops(names, bool(inputs))} -> {_target([[axes[a] for a in group] for group in merged])}{at}"
            penalty = extra + (0.0 if keeps_order else 1.5)
            if keeps_order and order == tuple(range(len(order))):
                yield Layout(label, penalty, (Reshape(leaf),), transposed)
            elif keeps_order and inputs and ordered[0] == "i":
                yield Layout(label, penalty, (Transpose((1, 0)), Reshape(leaf)), True)
            else:
                yield Layout(label, penalty, (Reshape(dims), Transpose(order), Reshape(leaf)), transposed)


def _rearranged_inputs(shape: Shape, leaf: Shape, h: int) -> Iterator[Layout]:
    """The kernel of a projection out of heads: inputs split."""
    out, inputs = shape
    dims = (out, h, inputs // h)
    for order in itertools.permutations(range(3)):
        if _permuted(dims, order) != leaf:
            continue
        ordered = [("o", "h", "d")[a] for a in order]
        keeps_order = ordered.index("h") < ordered.index("d")
        label = f"o (h d) -> {' '.join(ordered)} (h = {h})"
        if order == (1, 2, 0):
            steps: tuple[Step, ...] = (Transpose((1, 0)), Reshape(leaf))
        else:
            steps = (Reshape(dims), Transpose(order))
        penalty = (0.0 if keeps_order else 1.5) + (0.0 if ordered[0] == "o" or ordered[-1] == "o" else 0.5)
        yield Layout(label, penalty, steps, ordered[0] != "o")


def _merges(n: int, groups: int) -> Iterator[list[range]]:
    """All divisions of n places into so many runs."""
    if groups > n or groups < 1:
        return
    for cuts in itertools.combinations(range(1, n), groups - 1):
        bounds = (0, *cuts, n)
        yield [range(a, b) for a, b in itertools.pairwise(bounds)]


def _einops(names: tuple[str, ...], has_inputs: bool) -> str:
    return f"({' '.join(names)})" + (" i" if has_inputs else "")


def _target(groups: list[list[str]]) -> str:
    return " ".join(group[0] if len(group) == 1 else f"({' '.join(group)})" for group in groups)


def _permuted(shape: Shape, axes: tuple[int, ...]) -> Shape:
    return tuple(shape[a] for a in axes)


def _squeezed(shape: Shape) -> Shape:
    return tuple(size for size in shape if size != 1)
