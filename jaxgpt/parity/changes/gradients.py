"""Gradients stopped or scaled, where the values stay as they are."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from jaxgpt.parity.changes.base import Change, Form, after, bound, grouped, with_arguments, with_parameters
from jaxgpt.parity.torch_side import OperationMode


def gradient_changes(record: OperationMode, factors: Sequence[float]) -> list[Change]:
    """Gradients stopped or scaled at each operation, whose outputs stay as they are."""
    found = []
    for op in record.operations:
        if op.trained and op.arrays:
            edit = after(partial(_each, form=torch.Tensor.detach))
            found.append(Change("stop gradient", op.module, f"after {op.name}", {op.index: edit}))
            for factor in factors:
                scaled = lambda y, k=factor: y.detach() + k * (y - y.detach())  # noqa: E731
                edit = after(partial(_each, form=scaled))
                detail = f"times {factor:.4g} after {op.name}"
                found.append(Change("gradient scaled", op.module, detail, {op.index: edit}))
        if op.name == "embedding" and bound(op).get("padding_idx") is not None and (bound(op)["padding_idx"] >= 0):
            edit = with_arguments(padding_idx=None)
            found.append(Change("padding row trained", op.module, "no padding_idx", {op.index: edit}))
    by_module: dict[str, list[str]] = {}
    for name, tensor in record.tensors.items():
        if isinstance(tensor, torch.nn.Parameter):
            by_module.setdefault(name.rpartition(".")[0], []).append(name)
    for module, names in by_module.items():
        for stopped in [names, *([n] for n in names if len(names) > 1)]:
            edit = with_parameters({name: lambda tensors, n=name: tensors[n].detach() for name in stopped})
            edits = {op.index: edit for op in record.operations if set(op.parameters) & set(stopped)}
            if edits:
                detail = f"of {', '.join(name.rpartition('.')[2] for name in stopped)}"
                found.append(Change("stop gradient", module, detail, edits))
    for name in dict.fromkeys(n for op in record.operations for n in op.parameters):
        uses = [op for op in record.operations if name in op.parameters]
        if len(uses) > 1:
            for op in uses:
                edit = with_parameters({name: lambda tensors, n=name: tensors[n].detach()})
                detail = f"{name} without its use in {op.name}"
                found.append(Change("tie cut", op.module, detail, {op.index: edit}))
    return [*found, *grouped(found)]


def _each(output: Any, form: Form) -> Any:
    """The form of a tensor, or of each of a tuple's."""
    if isinstance(output, torch.Tensor):
        return form(output) if output.is_floating_point() else output
    return type(output)(_each(y, form) for y in output) if type(output) in (tuple, list) else output
