"""Functions between the weights: activations, sums, tables, factors, padding, rounding."""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from jaxgpt.parity.changes.base import (
    NORMS,
    WEIGHTED,
    Change,
    after,
    bound,
    is_residual,
    with_arguments,
)
from jaxgpt.parity.torch_side import Call, Edit, Operation, OperationMode

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "GELU of erf": F.gelu,
    "GELU of tanh": lambda x: F.gelu(x, approximate="tanh"),
    "GELU of the sigmoid": lambda x: x * torch.sigmoid(1.702 * x),
    "ReLU": torch.relu,
    "SiLU": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "ELU": F.elu,
    "leaky ReLU": F.leaky_relu,
    "no activation": lambda x: x,
}
ACTIVATION_FUNCTIONS = ("gelu", "relu", "relu_", "silu", "tanh", "sigmoid", "elu", "leaky_relu", "mish", "softplus")


def activation(record: OperationMode) -> Iterator[Change]:
    sites: list[tuple[str, int, str, Callable[[Call], torch.Tensor]]] = []
    inside: set[int] = set()
    for call in record.calls:
        ops = record.operations[call.first : call.end]
        if call.input is None or len(ops) < 2 or any(op.parameters for op in ops):
            continue
        if re.search("gelu|activation|swish|silu|mish|act$", f"{call.kind} {call.name}".lower()):
            sites.append((call.name, call.end - 1, call.kind, lambda c, i=call.input: c.output_of(i)))
            inside.update(range(call.first, call.end))
    for op in record.operations:
        if op.name in ACTIVATION_FUNCTIONS and op.trained and op.index not in inside:
            sites.append(
                (op.module, op.index, _activation_name(op), lambda c: c.args[0] if c.args else c.kwargs["input"])
            )
    for layer, at, own, source in sites:
        for name, function in ACTIVATIONS.items():
            if name != own:
                edit = lambda c, f=function, s=source: f(s(c).clone())  # noqa: E731
                yield Change("activation", layer, f"{name} for {own}", {at: edit})


def _activation_name(op: Operation) -> str:
    if op.name == "gelu":
        return "GELU of tanh" if op.kwargs.get("approximate") == "tanh" else "GELU of erf"
    return {"relu": "ReLU", "relu_": "ReLU", "silu": "SiLU", "elu": "ELU"}.get(op.name, op.name)


def sums(record: OperationMode) -> Iterator[Change]:
    """One side of a sum left out."""
    for op in record.operations:
        if not is_residual(record, op):
            continue
        shapes = [a.shape for a in op.args[:2]]
        for kept, lost in ((1, 0), (0, 1)):
            at = record.source_of(op.args[lost])
            assert at is not None, "a residual's operands come from operations"
            source = record.operations[record.skip_back(at)]
            cause = "embedding missing" if source.name == "embedding" else "residual missing"
            edit = lambda call, k=kept, s=op.arrays[0].shape: call.args[k].expand(s).clone()  # noqa: E731
            detail = f"without the output of {source.module or source.name}"
            if shapes[kept] == op.arrays[0].shape:
                yield Change(cause, op.module, detail, {op.index: edit})


def tables(record: OperationMode) -> Iterator[Change]:
    """Embeddings looked up one position off, or scaled."""
    for op in record.operations:
        if op.name == "embedding":
            ids = bound(op)["input"]
            rows = record.tensors[op.parameters[0]].shape[0] if op.parameters else 0
            ordered = ids.ndim and ids.shape[-1] > 2 and bool((ids.diff() == 1).all())
            if ordered:
                for by in (1, -1):
                    edit = with_arguments(input=lambda i, by=by, n=rows: (i + by).clamp(0, n - 1))
                    yield Change("positions shifted", op.module, f"positions {by:+d}", {op.index: edit})
            width = op.arrays[0].shape[-1]
            for text, factor in (("times sqrt(n_embd)", width**0.5), ("over sqrt(n_embd)", width**-0.5)):
                yield Change("embedding scale", op.module, text, {op.index: after(lambda y, f=factor: y * f)})
        if op.name == "arange" and not op.trained:
            for by in (1, -1):
                yield Change(
                    "positions shifted", op.module, f"positions {by:+d}", {op.index: after(lambda y, b=by: y + b)}
                )


def constants(record: OperationMode) -> Iterator[Change]:
    """A factor left out or inverted."""
    for op in record.operations:
        if op.name in ("mul", "div", "__mul__", "__truediv__", "__rmul__") and op.trained:
            factors = [a for a in op.args if isinstance(a, int | float) and not isinstance(a, bool) and a not in (0, 1)]
            tensors = [a for a in op.args if isinstance(a, torch.Tensor)]
            if len(factors) == 1 and len(tensors) == 1:
                edit = lambda call: next(a for a in call.args if isinstance(a, torch.Tensor)).clone()  # noqa: E731
                scores = op.arrays and op.arrays[0].ndim == 4
                cause = "attention scale" if scores else "factor missing"
                yield Change(cause, op.module, f"no factor {factors[0]:.4g}", {op.index: edit})


def joins(record: OperationMode) -> Iterator[Change]:
    """Two tensors joined in the other order: sines and cosines, a skip connection, a class token at the end."""
    for op in record.operations:
        if op.name in ("cat", "concat") and op.args and type(op.args[0]) in (tuple, list) and len(op.args[0]) == 2:
            edit = lambda call: call.function(call.args[0][::-1], *call.args[1:], **call.kwargs)  # noqa: E731
            yield Change("operands swapped", op.module, "the second before the first in cat", {op.index: edit})


def pooling(record: OperationMode) -> Iterator[Change]:
    """One position in place of the mean over positions, another one, or the mean in its place."""
    for op in record.operations:
        if not op.trained or not op.arrays or len(op.args) < 1 or not isinstance(op.args[0], torch.Tensor):
            continue
        x, own = op.args[0], "the mean"
        axis = _pooled_axis(op.name, list(op.args), op.kwargs)
        if axis is None or not x.is_floating_point() or x.ndim < 2:
            continue
        if op.name == "__getitem__":
            own = "the last" if list(op.args)[1][axis] in (-1, x.shape[axis] - 1) else "the first"
        forms: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
            "the first": lambda x, a=axis: x.select(a, 0),
            "the last": lambda x, a=axis: x.select(a, -1),
            "the mean": lambda x, a=axis: x.mean(a),
            "the maximum": lambda x, a=axis: x.amax(a),
        }
        for text, form in forms.items():
            if text != own:
                edit = lambda call, f=form: f(call.args[0])  # noqa: E731
                yield Change("pooling", op.module, f"{text} position for {own}", {op.index: edit})


def _pooled_axis(name: str, args: list[Any], kwargs: dict[str, Any]) -> int | None:
    """The axis of which `x[:, 0]` or `x.mean(1)` leaves nothing; None of another operation."""
    if name == "mean":
        axis = kwargs.get("dim", args[1] if len(args) > 1 else None)
        axis = axis[0] if isinstance(axis, list | tuple) and len(axis) == 1 else axis
        kept = kwargs.get("keepdim", len(args) > 2 and args[2])
        return axis % args[0].ndim if type(axis) is int and not kept else None
    if name == "__getitem__" and isinstance(args[1], tuple):
        numbers = [i for i, item in enumerate(args[1]) if type(item) is int]
        others = [item for item in args[1] if type(item) is not int]
        is_plain = all(isinstance(item, slice) and item == slice(None) for item in others)
        return numbers[0] if len(numbers) == 1 and is_plain else None
    return None


def resizing(record: OperationMode) -> Iterator[Change]:
    """Another interpolation between pixels."""
    for op in record.operations:
        if op.name == "interpolate" and op.trained:
            a = bound(op)
            own = a.get("mode", "nearest"), a.get("align_corners")
            for mode, corners in (("nearest", None), ("bilinear", False), ("bilinear", True), ("bicubic", False)):
                if (mode, corners) != own:
                    detail = f"{mode} for {own[0]}" + (", corners aligned" if corners else "")
                    edit = with_arguments(mode=mode, align_corners=corners)
                    yield Change("interpolation", op.module, detail, {op.index: edit})


def rounding(record: OperationMode) -> Iterator[Change]:
    """An output rounded to bfloat16."""
    names = (*WEIGHTED, *NORMS, "embedding", "softmax", "scaled_dot_product_attention", "lstm", "gru", "bmm")
    for op in record.operations:
        if op.trained and op.name in names and op.arrays and isinstance(op.output, torch.Tensor):
            edit = after(lambda y: y.to(torch.bfloat16).to(y.dtype))
            yield Change("rounded to bfloat16", op.module, f"the output of {op.name}", {op.index: edit})


def padding(record: OperationMode) -> Iterator[Change]:
    """XLA's "SAME", which pads the end more than the beginning, in place of PyTorch's equal padding."""
    for op in record.operations:
        if op.name in ("conv2d", "max_pool2d", "avg_pool2d"):
            a = bound(op)
            x = a["input"]
            kernel = tuple(a["weight"].shape[-2:]) if "weight" in a else _two(a["kernel_size"])
            stride, pads = _two(a.get("stride") or kernel), a.get("padding", 0)
            if isinstance(pads, str):
                continue
            pads = _two(pads)
            same = []
            for n, k, s in zip(x.shape[-2:], kernel, stride, strict=True):
                total = max((math.ceil(n / s) - 1) * s + k - n, 0)
                same.append((total // 2, total - total // 2))
            fill = -math.inf if op.name == "max_pool2d" else 0.0
            if any(lo != p or hi != p for (lo, hi), p in zip(same, pads, strict=True)):
                edges = (*same[1], *same[0])
                edit = _padded(edges, fill)
                yield Change("padding", op.module, f'"SAME" for equal padding in {op.name}', {op.index: edit})
            if op.name == "max_pool2d" and any(pads):
                edges = (pads[1], pads[1], pads[0], pads[0])
                yield Change("padding", op.module, "0 for -inf", {op.index: _padded(edges, 0.0)})
        if op.name == "avg_pool2d":
            edit = with_arguments(count_include_pad=lambda on: on is False)
            yield Change("padding", op.module, "padding counted or not", {op.index: edit})


def _two(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value) * (2 // len(value))


def _padded(edges: tuple[int, ...], fill: float) -> Edit:
    def edit(call: Call) -> Any:
        a = bound(call)
        return call.function(**{**a, "input": F.pad(a["input"], edges, value=fill), "padding": 0})

    return edit
