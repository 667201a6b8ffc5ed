"""Norms: another epsilon or formula, another place, other statistics."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from jaxgpt.parity.changes.base import NORMS, Change, after, bound, is_residual, last, with_arguments, with_parameters
from jaxgpt.parity.torch_side import PASSING, Call, Edit, Operation, OperationMode

EPSILONS = (1e-3, 1e-5, 1e-6, 1e-8, 1e-12, 0.0)
MOMENTA = (0.1, 0.9, 0.01, 0.99)


@dataclass(frozen=True)
class Norm:
    """A normalization: one operation, or the operations of a module that adds an epsilon to a mean.

    Attributes:
        at: the operation that gives the result.
        epsilon_at: the operation that takes the epsilon.
        input: the operation whose output is normalized.
        kind: "layer", "rms", "group", "batch".
        scale, bias: names of parameters, "" where there is none.
        operation: the function, None where it is written out.
    """

    layer: str
    at: int
    epsilon_at: int
    epsilon: float
    input: int | None
    kind: str
    scale: str
    bias: str
    operation: Operation | None

    def of(self, call: Call, x: torch.Tensor) -> torch.Tensor:
        """The norm of another tensor."""
        if self.operation is not None:
            return getattr(F, self.operation.name)(**{**bound(self.operation), "input": x})
        return self.written_out(call, x, self.kind)

    def written_out(self, call: Call, x: torch.Tensor, kind: str, correction: int = 0) -> torch.Tensor:
        """The norm over the last axis, with the formula of `kind`; the variance is over n - correction."""
        scale, bias = (call.mode.tensors.get(name) for name in (self.scale, self.bias))
        if kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        variance = x.square().sum(-1, keepdim=True) / (x.shape[-1] - correction)
        x = x * torch.rsqrt(variance + self.epsilon)
        x = x if scale is None else x * scale
        return x if bias is None else x + bias


def norms(record: OperationMode) -> list[Norm]:
    """The norms of a forward pass."""
    found = []
    for op in record.operations:
        if op.name in NORMS and op.trained:
            epsilon = bound(op).get("eps")
            kind = op.name.removesuffix("_norm")
            source = record.source_of(bound(op)["input"])
            scale, bias = _scale_and_bias(op.parameters)
            epsilon = 1e-5 if epsilon is None else epsilon
            found.append(Norm(op.module, op.index, op.index, epsilon, source, kind, scale, bias, op))
        elif op.name in ("add", "add_", "__add__") and op.trained and op.inputs:
            scalars = [a for a in op.args if isinstance(a, float) and 0 < a < 0.01]
            call = record.call_around(op.index)
            is_mean = record.operations[record.skip_back(op.inputs[0])].name in ("mean", "var", "std")
            if scalars and is_mean and call is not None and call.input is not None and call.name:
                names = [n for n, t in record.tensors.items() if n.rpartition(".")[0] == call.name and t.ndim == 1]
                inside = [o.name for o in record.operations[call.first : call.end]]
                kind = "layer" if {"sub", "var", "std", "__sub__"} & set(inside) else "rms"
                scale, bias = _scale_and_bias(names)
                found.append(Norm(op.module, call.end - 1, op.index, scalars[0], call.input, kind, scale, bias, None))
    return found


def _scale_and_bias(names: Sequence[str]) -> tuple[str, str]:
    """Which parameter is which, by its name: "weight" and "bias", or "gamma" and "beta", "a_2" and "b_2"."""
    biases = [n for n in names if re.match("bias|beta|b", last(n))]
    scales = [n for n in names if n not in biases and not last(n).startswith("running")]
    return next(iter(scales), ""), next(iter(biases), "")


def epsilon(record: OperationMode) -> Iterator[Change]:
    for norm in norms(record):
        for value in EPSILONS:
            if value != norm.epsilon:
                if norm.at == norm.epsilon_at:
                    edit = with_arguments(eps=value)
                else:
                    edit = after(lambda out, by=value - norm.epsilon: out + by)
                yield Change("epsilon", norm.layer, f"eps {value:g} for {norm.epsilon:g}", {norm.epsilon_at: edit})


def norm_forms(record: OperationMode) -> Iterator[Change]:
    """A norm left out, or with another formula."""
    for norm in norms(record):
        layer, at, source = norm.layer, norm.at, norm.input
        if source is not None:
            yield Change("norm missing", layer, "no norm", {at: lambda call, i=source: call.output_of(i)})
        if norm.scale and norm.operation is not None:
            plus_one = with_parameters({norm.scale: lambda tensors, n=norm.scale: 1 + tensors[n]})
            yield Change("scale plus one", layer, "1 + weight for weight", {at: plus_one})
            ones = with_parameters({norm.scale: lambda tensors, n=norm.scale: torch.ones_like(tensors[n])})
            yield Change("scale missing", layer, "no weight", {at: ones})
        elif norm.scale:
            using = [op.index for op in record.operations if norm.scale in op.parameters]
            for cause, detail, form in (
                ("scale plus one", "1 + weight for weight", lambda w: 1 + w),
                ("scale missing", "no weight", torch.ones_like),
            ):
                edit = with_parameters({norm.scale: lambda tensors, n=norm.scale, f=form: f(tensors[n])})
                yield Change(cause, layer, detail, dict.fromkeys(using, edit))
        if source is None:
            continue

        def written_out(kind: str, correction: int = 0, norm: Norm = norm, i: int = source) -> Edit:
            return lambda call: norm.written_out(call, call.output_of(i), kind, correction)

        if norm.kind == "layer":
            yield Change("mean not subtracted", layer, "RMSNorm for LayerNorm", {at: written_out("rms")})
            yield Change("variance unbiased", layer, "variance over n - 1", {at: written_out("layer", 1)})
            if norm.operation is None:
                yield Change("variance biased", layer, "variance over n", {at: written_out("layer")})
        if norm.kind == "rms":
            yield Change("mean subtracted", layer, "LayerNorm for RMSNorm", {at: written_out("layer")})
        if norm.kind == "batch":
            other = with_arguments(training=lambda on: not on)
            yield Change("batch statistics", layer, "the other statistics", {at: other})


def norm_placement(record: OperationMode) -> Iterator[Change]:
    """N(x + f(x)) becomes x + N(f(x)) or x + f(N(x)); x + f(N(x)) becomes N(x + f(x)) or N(x) + f(N(x))."""
    adds = {op.index: op for op in record.operations if is_residual(record, op)}
    for norm in norms(record):
        if norm.input is None or norm.kind == "batch":
            continue
        before = record.skip_back(norm.input)
        x, branch = sorted(record.source_of(a) or 0 for a in adds[before].args[:2]) if before in adds else (0, 0)
        if before in adds and record.depends(branch, x):

            def around_branch(call: Call, x: int = x, branch: int = branch, norm: Norm = norm) -> torch.Tensor:
                return call.output_of(x) + norm.of(call, call.output_of(branch))

            yield Change("norm placement", norm.layer, "x + norm(f) for norm(x + f)", {norm.at: around_branch})
            edits: dict[int, Edit] = {norm.at: lambda call, i=norm.input: call.output_of(i)}
            for op in record.operations[x + 1 : before]:
                taken = [i for i, a in enumerate(op.args) if record.root_of(a) == record.skip_back(x)]
                if taken and op.name not in PASSING:
                    edits[op.index] = _with_normed(norm, taken)
            yield Change("norm placement", norm.layer, "x + f(norm(x)) for norm(x + f(x))", edits)
        for add in adds.values():
            if add.index > norm.at and before in [record.root_of(a) for a in add.args[:2]]:
                edits = {
                    norm.at: lambda call, i=norm.input: call.output_of(i),
                    add.index: lambda call, norm=norm: norm.of(call, call.original()),
                }
                yield Change("norm placement", norm.layer, "norm(x + f(x)) for x + f(norm(x))", edits)
                x = [record.root_of(a) for a in add.args[:2]].index(before)

                def from_norm(call: Call, x: int = x, at: int = norm.at) -> Any:
                    args = [call.output_of(at) if i == x else a for i, a in enumerate(call.args)]
                    return call.function(*args, **call.kwargs)

                detail = "norm(x) + f(norm(x)) for x + f(norm(x))"
                yield Change("norm placement", norm.layer, detail, {add.index: from_norm})
                break


def _with_normed(norm: Norm, taken: Sequence[int]) -> Edit:
    """Calls the function with the norm of some arguments in place of them."""

    def edit(call: Call) -> Any:
        args = [norm.of(call, a) if i in taken else a for i, a in enumerate(call.args)]
        return call.function(*args, **call.kwargs)

    return edit


def running_statistics(record: OperationMode) -> Iterator[Change]:
    """Other running averages of batch norm, which only updates show."""
    for op in record.operations:
        if op.name == "batch_norm" and bound(op).get("training"):
            own = bound(op).get("momentum", 0.1)
            for momentum in MOMENTA:
                if momentum != own:
                    edit = with_arguments(momentum=momentum)
                    detail = f"momentum {momentum:g} for {own:g}"
                    yield Change("batch norm momentum", op.module, detail, {op.index: edit})
            edit = {op.index: _biased_variance}
            yield Change("running variance biased", op.module, "variance over n for n - 1", edit)


def _biased_variance(call: Call) -> torch.Tensor:
    a = bound(call)
    before = a["running_var"].clone()
    out = call.original()
    x = a["input"]
    n = x.numel() / x.shape[1]
    unbiased_part = a["running_var"] - (1 - a["momentum"]) * before
    # The data alone: the backward pass refuses a tensor that was changed in the open.
    a["running_var"].data.copy_((1 - a["momentum"]) * before + unbiased_part * (n - 1) / n)
    return out
