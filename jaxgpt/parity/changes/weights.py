"""Weights transposed, flipped, exchanged, in another order, left out."""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from jaxgpt.parity.changes.base import (
    NORMS,
    WEIGHTED,
    Change,
    after,
    last,
    with_parameters,
)
from jaxgpt.parity.torch_side import Operation, OperationMode

TRANSPOSING = ("einsum", "t", "T", "mT", "transpose", "permute", "swapaxes")  # in x @ weight.T the weight goes in here


def weights(record: OperationMode) -> Iterator[Change]:
    """Weights transposed or flipped, biases left out."""
    for op in record.operations:
        if op.name in (*WEIGHTED, *TRANSPOSING):
            for name in op.parameters:
                tensor = record.tensors[name]
                if tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1]:
                    yield _reformed(op, name, "kernel transposed", "its transpose", lambda w: w.T)
                if tensor.ndim == 4 and tensor.shape[-1] > 1:
                    cause = "kernel's spatial axes transposed"
                    yield _reformed(op, name, cause, "width for height", lambda w: w.transpose(-1, -2))
                    yield _reformed(op, name, "kernel flipped", "both axes flipped", lambda w: w.flip(-1, -2))
                if op.name == "conv_transpose2d" and tensor.ndim == 4 and tensor.shape[0] == tensor.shape[1]:
                    form = lambda w: w.transpose(0, 1).flip(-1, -2)  # noqa: E731
                    yield _reformed(op, name, "kernel transposed", "flipped, and inputs for outputs", form)
                if tensor.ndim == 4 and tensor.shape[0] == tensor.shape[1]:
                    yield _reformed(op, name, "kernel transposed", "inputs for outputs", lambda w: w.transpose(0, 1))
        if op.name in (*WEIGHTED, *NORMS, "add", "add_", "__add__"):
            for name in op.parameters:
                if record.tensors[name].ndim == 1 and re.search("bias|beta", name.rpartition(".")[2]):
                    yield _reformed(op, name, "bias missing", "no bias", torch.zeros_like)


def _reformed(
    op: Operation, name: str, cause: str, detail: str, form: Callable[[torch.Tensor], torch.Tensor]
) -> Change:
    edit = with_parameters({name: lambda tensors: form(tensors[name])})
    return Change(cause, name.rpartition(".")[0], detail, {op.index: edit})


def swaps(record: OperationMode) -> Iterator[Change]:
    """The weights of two modules exchanged: neighbours in one parent, or two layers of a list."""
    by_module: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in record.tensors.items():
        module, _, leaf = name.rpartition(".")
        by_module.setdefault(module, {})[leaf] = tensor
    by_parent: dict[str, list[str]] = {}
    for module, tensors in by_module.items():
        if any(t.ndim > 1 for t in tensors.values()):
            by_parent.setdefault(module.rpartition(".")[0], []).append(module)
    for modules in by_parent.values():
        for a, b in itertools.combinations(modules, 2):
            if _shapes(by_module[a]) == _shapes(by_module[b]):
                names = [(f"{a}.{leaf}", f"{b}.{leaf}") for leaf in by_module[a]]
                yield from _swap(record, names, "weights swapped", f"{a}, {b}", f"{last(a)} for {last(b)}")
    stacks: dict[str, dict[int, list[str]]] = {}
    for name in record.tensors:
        if found := re.search(r"^(.*?)\.(\d+)\.", name):
            stacks.setdefault(found[1], {}).setdefault(int(found[2]), []).append(name)
    for prefix, layers in stacks.items():
        for i, j in itertools.combinations(sorted(layers), 2):
            names = [(a, a.replace(f"{prefix}.{i}.", f"{prefix}.{j}.", 1)) for a in layers[i]]
            if len(layers[i]) == len(layers[j]) and all(
                b in record.tensors and record.tensors[a].shape == record.tensors[b].shape for a, b in names
            ):
                yield from _swap(record, names, "layers swapped", f"{prefix}.{i}, {prefix}.{j}", f"{i} for {j}")


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {leaf: tensor.shape for leaf, tensor in tensors.items()}


def _swap(record: OperationMode, names: list[tuple[str, str]], cause: str, layer: str, detail: str) -> Iterator[Change]:
    other = dict(names) | {b: a for a, b in names}
    edit = with_parameters({name: lambda tensors, n=n: tensors[n] for name, n in other.items()})
    edits = {op.index: edit for op in record.operations if set(op.parameters) & set(other)}
    if edits:
        yield Change(cause, layer, detail, edits)


def fused(record: OperationMode) -> Iterator[Change]:
    """Queries, keys and values of a fused projection in another order."""
    for op in record.operations:
        if op.name in ("linear", "addmm") and op.parameters:
            out, width = op.arrays[0].shape[-1], record.operations[op.inputs[0]].arrays if op.inputs else ()
            if width and width[0].ndim and out == 3 * width[0].shape[-1]:
                for order in itertools.permutations(range(3)):
                    if order != (0, 1, 2):
                        detail = "".join("qkv"[i] for i in order) + " for qkv"
                        edit = after(lambda y, o=order: torch.cat([y.chunk(3, -1)[i] for i in o], -1))
                        yield Change("weights swapped", op.module, detail, {op.index: edit})
