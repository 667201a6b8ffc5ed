"""Losses: other targets, another mean."""

from collections.abc import Iterator

import torch

from jaxgpt.parity.changes.base import Change, bound, with_arguments
from jaxgpt.parity.torch_side import Call, Operation, OperationMode


def losses(record: OperationMode) -> Iterator[Change]:
    """Other targets, another mean."""
    for op in record.operations:
        if op.name in ("mse_loss", "l1_loss", "binary_cross_entropy_with_logits", "nll_loss"):
            yield from _reductions(op)
        if op.name != "cross_entropy":
            continue
        yield from _reductions(op)
        a = bound(op)
        target, ignored = a["target"], a.get("ignore_index", -100)
        for smoothing in (0.1, 0.0):
            if smoothing != a.get("label_smoothing", 0.0):
                edit = with_arguments(label_smoothing=smoothing)
                yield Change("label smoothing", _of_loss(op), f"label smoothing {smoothing:g}", {op.index: edit})
        if target.is_floating_point():
            continue
        if (target == ignored).any():

            def counted(call: Call) -> torch.Tensor:
                b = bound(call)
                return call.function(**{**b, "reduction": "sum"}) / b["target"].numel()

            yield Change("ignored labels counted", _of_loss(op), "the mean over all positions", {op.index: counted})
            for label in (0, a["input"].shape[1] - 1):
                edit = with_arguments(target=lambda t, i=ignored, n=label: torch.where(t == i, n, t))
                yield Change("ignored labels counted", _of_loss(op), f"as label {label}", {op.index: edit})
        n_time = record.time_of(a["input"])
        if n_time and target.numel() % n_time == 0:
            rows = target.numel() // n_time
            total = with_arguments(reduction="sum")
            edit = {op.index: lambda call, total=total, n=rows: total(call) / n}
            yield Change("loss reduction", _of_loss(op), "the sum over each row", edit)
            for text, last in (("last", True), ("first", False)):
                edit = with_arguments(target=lambda t, n=n_time, i=ignored, last=last: _without_end(t, n, i, last))
                yield Change(f"{text} token dropped", _of_loss(op), f"no {text} target of a row", {op.index: edit})
            for text, by in (("the token itself", 1), ("the token after the next", -1)):
                edit = with_arguments(target=lambda t, n=n_time, i=ignored, by=by: _shifted(t, n, i, by))
                yield Change("label shift missing", _of_loss(op), f"{text} as target", {op.index: edit})
            for labels in record.integers(target.numel() // n_time, n_time):
                edit = with_arguments(target=lambda t, y=labels: y.reshape(t.shape))
                yield Change("label shift missing", _of_loss(op), "the labels as they are", {op.index: edit})
                shifted = torch.full_like(labels, ignored)
                shifted[:, :-1] = labels[:, 1:]
                edit = with_arguments(target=lambda t, y=shifted: y.reshape(t.shape))
                yield Change("label shift missing", _of_loss(op), "the labels shifted once more", {op.index: edit})


def _reductions(op: Operation) -> Iterator[Change]:
    own = bound(op).get("reduction", "mean")
    other = "sum" if own == "mean" else "mean"
    yield Change("loss reduction", _of_loss(op), f"{other} for {own}", {op.index: with_arguments(reduction=other)})


def _of_loss(op: Operation) -> str:
    return op.module or "loss"


def _without_end(target: torch.Tensor, n_time: int, ignored: int, last: bool) -> torch.Tensor:
    """Targets [B * T] of which each row's last (or first) counted one is ignored."""
    rows = target.reshape(-1, n_time).clone()
    counted = rows != ignored
    positions = torch.arange(n_time).expand_as(rows)
    ends = torch.where(counted, positions, -1).amax(1) if last else torch.where(counted, positions, n_time).amin(1)
    ends = ends.clamp(0, n_time - 1)
    rows[torch.arange(len(rows)), ends] = ignored
    return rows.reshape(target.shape)


def _shifted(target: torch.Tensor, n_time: int, ignored: int, by: int) -> torch.Tensor:
    rows = torch.full_like(target, ignored).reshape(-1, n_time)
    of = target.reshape(-1, n_time)
    if by > 0:
        rows[:, by:] = of[:, :-by]
    else:
        rows[:, :by] = of[:, -by:]
    return rows.reshape(target.shape)
