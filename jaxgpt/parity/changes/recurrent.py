"""LSTMs and GRUs: gates in another order, biases left out, another formula of the new gate."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from jaxgpt.parity.changes.base import Change, bound, with_parameters
from jaxgpt.parity.torch_side import Call, Edit, Operation, OperationMode


def recurrent(record: OperationMode) -> Iterator[Change]:
    """The changes of each recurrent operation."""
    for op in record.operations:
        if op.name in ("lstm", "gru"):
            yield from _gates_and_biases(op)
        if op.name == "gru" and (edit := _written_out(op)):
            for detail, formula in FORMULAS.items():
                yield Change("gate formula", op.module, detail, {op.index: edit(formula)})


@dataclass(frozen=True)
class Formula:
    """What another GRU does than PyTorch's.

    Attributes:
        resets_state: the reset gate multiplies the state before its product with the weights, not after.
        bias_outside: the state's bias of the new gate is added outside the reset.
        keeps_new: the update gate is the share of the new state, not of the old one.
    """

    resets_state: bool = False
    bias_outside: bool = False
    keeps_new: bool = False


FORMULAS = {
    "the reset gate before the product with the state": Formula(resets_state=True),
    "the state's bias of the new gate outside the reset": Formula(bias_outside=True),
    "z of the new state for 1 - z": Formula(keeps_new=True),
}


def _written_out(op: Operation) -> Callable[[Formula], Edit] | None:
    """A GRU of another formula, after the documentation of `torch.nn.GRU`; None where it has two directions."""
    a = bound(op)
    if not a.get("has_biases") or a.get("bidirectional") or not isinstance(a.get("num_layers"), int):
        return None

    def edit_of(formula: Formula) -> Edit:
        def edit(call: Call) -> Any:
            a = bound(call)
            x_TBC = a["input"].transpose(0, 1) if a["batch_first"] else a["input"]
            last = []
            for layer in range(a["num_layers"]):
                weights = a["params"][4 * layer : 4 * layer + 4]
                x_TBC, hidden_BH = _layer(x_TBC, a["hx"][layer], weights, formula)
                last.append(hidden_BH)
            return (x_TBC.transpose(0, 1) if a["batch_first"] else x_TBC), torch.stack(last)

        return edit

    return edit_of


def _layer(x_TBC: torch.Tensor, hidden_BH: torch.Tensor, weights: Any, formula: Formula) -> Any:
    """The states [T, B, H] of a layer, and the last one."""
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    size, states = hidden_BH.shape[-1], []
    for x_BC in x_TBC:
        from_input_BG, from_state_BG = F.linear(x_BC, weight_ih, bias_ih), F.linear(hidden_BH, weight_hh, bias_hh)
        (ir, iz, new), (hr, hz, hn) = from_input_BG.chunk(3, -1), from_state_BG.chunk(3, -1)
        reset, update = torch.sigmoid(ir + hr), torch.sigmoid(iz + hz)
        if formula.resets_state:
            hn = F.linear(reset * hidden_BH, weight_hh[2 * size :], bias_hh[2 * size :])
        elif formula.bias_outside:
            hn = reset * (hn - bias_hh[2 * size :]) + bias_hh[2 * size :]
        else:
            hn = reset * hn
        new = torch.tanh(new + hn)
        kept, other = (new, hidden_BH) if formula.keeps_new else (hidden_BH, new)
        hidden_BH = update * kept + (1 - update) * other
        states.append(hidden_BH)
    return torch.stack(states), hidden_BH


def _gates_and_biases(op: Operation) -> Iterator[Change]:
    n_gates, letters = (4, "ifgo") if op.name == "lstm" else (3, "rzn")
    for order in itertools.permutations(range(n_gates)):
        if order != tuple(range(n_gates)):
            detail = "".join(letters[i] for i in order) + f" for {letters}"
            edit = _with_flat(lambda w, o=order, n=n_gates: torch.cat([w.chunk(n)[i] for i in o]))
            yield Change("gate order", op.module, detail, {op.index: edit})
    for leaf in ("bias_ih", "bias_hh"):
        names = [name for name in op.parameters if f".{leaf}" in f".{name}"]
        zero = {name: lambda tensors, n=name: torch.zeros_like(tensors[n]) for name in names}
        yield Change("bias missing", op.module, f"no {leaf}", {op.index: with_parameters(zero)})
    if op.name == "lstm":
        names = [name for name in op.parameters if ".bias_ih" in f".{name}"]
        plus = {name: lambda tensors, n=name: _forget_plus_one(tensors[n]) for name in names}
        yield Change("forget bias", op.module, "1 added to the forget gate", {op.index: with_parameters(plus)})


def _forget_plus_one(bias: torch.Tensor) -> torch.Tensor:
    i, f, g, o = bias.chunk(4)
    return torch.cat([i, f + 1, g, o])


def _with_flat(form: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    def edit(call: Call) -> Any:
        args = [[form(w) for w in a] if type(a) in (list, tuple) and len(a) > 2 else a for a in call.args]
        return call.function(*args, **call.kwargs)

    return edit
