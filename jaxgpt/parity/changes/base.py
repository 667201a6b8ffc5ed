"""A change of the PyTorch side, and the ways to edit a call."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from jaxgpt.parity.torch_side import Call, Edit, Operation, OperationMode

# The parameters of functions that PyTorch takes by position.
SIGNATURES: dict[str, tuple[str, ...]] = {
    "linear": ("input", "weight", "bias"),
    "addmm": ("input", "mat1", "mat2"),
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    "conv1d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "conv2d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "conv3d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "conv_transpose2d": ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
    "embedding": ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
    "scaled_dot_product_attention": ("query", "key", "value", "attn_mask", "dropout_p", "is_causal"),
    "cross_entropy": (
        "input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing"
    ),
    "mse_loss": ("input", "target", "size_average", "reduce", "reduction"),
    "max_pool2d": ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    "avg_pool2d": ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"),
    "interpolate": ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias"),
    "lstm": ("input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first"),
    "gru": ("input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first"),
}  # fmt: skip
NORMS = ("layer_norm", "rms_norm", "group_norm", "batch_norm")
WEIGHTED = ("linear", "addmm", "matmul", "conv1d", "conv2d", "conv3d", "conv_transpose2d")
Form = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Change:
    """One mistake.

    Attributes:
        cause: its kind: "epsilon".
        layer: the module that it is in; several, or a pattern with `*` for the layers' numbers.
        detail: what is changed to what.
        edits: the edited operations.
    """

    cause: str
    layer: str
    detail: str
    edits: Mapping[int, Edit]

    @property
    def name(self) -> str:
        return f"{self.cause}: {self.detail} in {self.layer or 'the model'}"


def bound(call: Call | Operation) -> dict[str, Any]:
    """The arguments of a call by name; a function without an entry in SIGNATURES has numbers for names."""
    name = call.name if isinstance(call, Operation) else getattr(call.function, "__name__", "")
    names = SIGNATURES.get(name, ())
    by_position = {names[i] if i < len(names) else str(i): value for i, value in enumerate(call.args)}
    return by_position | call.kwargs


def with_arguments(**changes: Any) -> Edit:
    """Calls the function with some arguments changed; a change that is a function is given the old value."""

    def edit(call: Call) -> Any:
        arguments = bound(call)
        for name, value in changes.items():
            arguments[name] = value(arguments.get(name)) if callable(value) else value
        return call.function(**arguments)

    return edit


def with_parameters(changes: Mapping[str, Callable[[Mapping[str, torch.Tensor]], torch.Tensor]]) -> Edit:
    """Calls the function with other tensors in place of some parameters of the model, by their names."""

    def edit(call: Call) -> Any:
        def changed(tree: Any) -> Any:
            if isinstance(tree, torch.Tensor):
                name = call.mode.names.get(id(tree), "")
                return changes[name](call.mode.tensors) if name in changes else tree
            if type(tree) in (tuple, list):
                return type(tree)(changed(item) for item in tree)
            return tree

        kwargs = {name: changed(value) for name, value in call.kwargs.items()}
        return call.function(*changed(call.args), **kwargs)

    return edit


def after(function: Callable[[Any], Any]) -> Edit:
    """Changes the output of the function."""
    return lambda call: function(call.original())


def before(form: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    """Changes the input of a projection."""

    def edit(call: Call) -> Any:
        arguments = bound(call)
        name = "mat1" if "mat1" in arguments else "input"
        return call.function(**{**arguments, name: form(arguments[name])})

    return edit


def merged(one: Mapping[int, Edit], other: Mapping[int, Edit]) -> dict[int, Edit]:
    """The edits of two changes at once; of an operation that both edit, the second calls the first."""
    return {**one, **other} | {at: _chained(one[at], other[at]) for at in set(one) & set(other)}


def _chained(first: Edit, second: Edit) -> Edit:
    def edit(call: Call) -> Any:
        @functools.wraps(call.function)
        def function(*args: Any, **kwargs: Any) -> Any:
            return first(Call(call.function, args, kwargs, call.mode))

        return second(Call(function, call.args, call.kwargs, call.mode))

    return edit


def grouped(single: Sequence[Change]) -> list[Change]:
    """The same change in all layers of a pattern, in all modules of a name, and wherever it can be made."""
    found = []
    keys = (
        lambda c: (c.cause, c.detail, pattern(c.layer)),
        lambda c: (c.cause, c.detail, last(c.layer)),
        lambda c: (c.cause, c.detail),
    )
    for key in keys:
        groups: dict[Any, list[Change]] = {}
        for change in single:
            groups.setdefault(key(change), []).append(change)
        for members in groups.values():
            edits: dict[int, Edit] = {}
            for change in members:
                edits.update({at: edit for at, edit in change.edits.items() if at not in edits})
            if len({change.layer for change in members}) > 1:
                layers = ", ".join(dict.fromkeys(pattern(change.layer) for change in members))
                change = Change(members[0].cause, layers, members[0].detail, edits)
                if not any(set(change.edits) == set(other.edits) and other.name == change.name for other in found):
                    found.append(change)
    return found


def pattern(layer: str) -> str:
    """The name of a layer with `*` for its numbers: of lists of modules, not of names such as `ln_1`."""
    return re.sub(r"(?<=\.)\d+(?=\.|,|$)", "*", layer)


def last(name: str) -> str:
    return name.rpartition(".")[2]


def is_residual(record: OperationMode, op: Operation) -> bool:
    """Whether it adds two values that the weights have a part in."""
    if op.name not in ("add", "add_", "__add__", "__iadd__") or not op.trained or len(op.args) < 2:
        return False
    return all(isinstance(a, torch.Tensor) and record.source_of(a) is not None for a in op.args[:2])
