"""The PyTorch side of a derivation: its tensors, with fused ones whole or split, separate ones joined."""

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from jaxgpt.parity.derive import naming
from jaxgpt.parity.derive.conversion import (
    Add,
    AddStart,
    Concatenate,
    Index,
    Reshape,
    Slice,
    Step,
    Transpose,
    simplified,
)
from jaxgpt.parity.derive.entries import Tensor, TorchTensor
from jaxgpt.parity.params import Path

LINEAR = {
    "Linear",
    "NonDynamicallyQuantizableLinear",
    "Conv1D",
    "LSTM",
    "GRU",
    "RNN",
    "LSTMCell",
    "GRUCell",
    "RNNCell",
}
GATES = {"LSTM": "ifgo", "LSTMCell": "ifgo", "GRU": "rzn", "GRUCell": "rzn"}
FUSED = {"qkv": ("q", "k", "v"), "kv": ("k", "v"), "gateup": ("gate", "up")}


def _tensors(torch: Sequence[TorchTensor]) -> list[Tensor]:
    tensors = []
    aliases = defaultdict(list)
    for t in torch:
        if t.tied_to is not None:
            aliases[t.tied_to].append(naming.components(t.name))
    for order, t in enumerate(torch):
        if t.name.endswith("num_batches_tracked"):
            continue
        last = t.name.rpartition(".")[2]
        running = last in ("running_mean", "running_var")
        kind, steps, shape = _kind(t.module, len(t.shape)), (), t.shape
        components = naming.components(t.name)
        if t.module == "MultiheadAttention" and (match := re.fullmatch(r"(\w*_proj)_(weight|bias)", last)):
            kind, components = "linear", (*components[:-1], match[1], match[2])
        if t.module in GATES or t.module.startswith("RNN"):
            components = _rnn_components(t)
        if t.module == "Conv1D" and len(shape) == 2:
            steps, shape = (Transpose((1, 0)),), shape[::-1]
        tensors.append(
            Tensor(
                components,
                shape,
                kind,
                (t.name,),
                steps,
                cost=0.1 if t.tied_to else 0.0 if t.is_parameter or running else 2.0,
                aliases=tuple(aliases[t.name]),
                order=order,
                counts=t.is_parameter and t.tied_to is None,
            )
        )
    return tensors


def _kind(module: str, rank: int) -> str:
    if module in LINEAR:
        return "linear"
    if re.fullmatch(r"(Lazy)?ConvTranspose\dd", module):
        return "conv_transpose" if rank > 2 else "bias"
    if re.search(r"Conv\dd$", module):
        return "conv" if rank > 2 else "bias"
    if "Norm" in module:
        return "norm"
    if "Embedding" in module and rank == 2:
        return "embedding"
    return "other"


def _rnn_components(t: TorchTensor) -> tuple[str | int, ...]:
    """`lstm.weight_ih_l1_reverse` as lstm, 1, reverse, ih, weight."""
    stem, _, last = t.name.rpartition(".")
    match = re.fullmatch(r"(weight|bias)_(ih|hh)(?:_l(\d+))?(_reverse)?", last)
    prefix = naming.components(stem) if stem else ()
    if match is None:
        return (*prefix, last)
    layer = (int(match[3]),) if match[3] else ()
    return (*prefix, *layer, *(("reverse",) if match[4] else ()), match[2], match[1])


def variants(torch: Sequence[TorchTensor], leaves: Mapping[Path, tuple[int, ...]]) -> Iterator[list[Tensor]]:
    """The torch side with its fused tensors whole or split, its separate ones joined, recurrent biases added."""
    base = [_counting_parts(t) for t in _tensors(torch)]
    gates = {t.name: GATES[t.module] for t in torch if t.module in GATES}
    changes: list[list[Callable[[list[Tensor]], list[Tensor]]]] = []

    def keep(tensors: list[Tensor]) -> list[Tensor]:
        return tensors

    if any(t.module in GATES or t.module.startswith("RNN") for t in torch):
        changes.append([keep, lambda ts: _biases_added(ts, gates)])
        changes.append([keep, lambda ts: _gates_split(ts, gates)])
    leaf_words = {word for path in leaves for word in naming.words(path)}
    for fused, parts in FUSED.items():
        has_fused = any(fused in naming.words(t.components) for t in base)
        options = [keep]
        if has_fused:
            options.append(partial(_split, fused=fused, parts=parts, leaves=leaves))
        elif _joined(base, fused, parts) is not base and (fused in leaf_words or not leaf_words & set(parts)):
            options.append(partial(_joined, fused=fused, parts=parts))
        changes.append(options)
    for chosen in itertools.product(*changes):
        tensors = base
        for change in chosen:
            tensors = change(tensors)
        yield [replace(t) for t in tensors]


def _counting_parts(t: Tensor) -> Tensor:
    """The tensor, with the number of its parts if it is a fused one."""
    words = naming.words(t.components)
    for fused, parts in FUSED.items():
        if fused in words and len(t.shape) in (1, 2) and t.shape[0] % len(parts) == 0:
            if t.shape[0] > len(parts) and _part_sizes(t, len(parts)) == [t.shape[0] // len(parts)] * len(parts):
                return replace(t, parts=len(parts))
    return t


def _part(t: Tensor, axis_steps: tuple[Step, ...], components: tuple[str | int, ...], rows: int) -> Tensor:
    return replace(t, components=components, steps=axis_steps, shape=(rows, *t.shape[1:]), aliases=(), parts=1)


def _rows(t: Tensor, start: int, stop: int) -> tuple[Step, ...]:
    """The steps to some of the outputs. Those of a matrix [in, out] are cut before it is transposed."""
    if t.steps and t.steps[0] == Transpose((1, 0)):
        return (Slice(1, start, stop), *t.steps)
    return (*t.steps, Slice(0, start, stop))


def _split(tensors: list[Tensor], fused: str, parts: tuple[str, ...], leaves: Mapping) -> list[Tensor]:
    """Each fused tensor as its parts, which lie one after the other along the outputs."""
    out = []
    for t in tensors:
        sizes = _part_sizes(t, len(parts)) if fused in naming.words(t.components) else None
        if sizes is None:
            out.append(t)
            continue
        start = 0
        for k, (part, rows) in enumerate(zip(parts, sizes, strict=True)):
            name = _with_word(t.components, fused, part)
            piece = _part(t, _rows(t, start, start + rows), name, rows)
            out.append(replace(piece, others=_by_head(t, k, len(parts), leaves) if t.parts > 1 else ()))
            start += rows
    return out


def _by_head(t: Tensor, part: int, parts: int, leaves: Mapping) -> tuple[tuple[str, tuple[Step, ...]], ...]:
    """The steps to a part of a fused tensor that has query, key and value of the first head first, as GPT-NeoX has."""
    rows, rest = t.shape[0] // parts, t.shape[1:]
    shown = {size for shape in leaves.values() if len(shape) in (2, 3) for size in shape if len(shape) == 3}
    found = []
    for h in sorted(h for h in shown | {2, 4, 8, 12, 16} if 1 < h < rows and rows % h == 0):
        steps = (*t.steps, Reshape((h, parts, rows // h, *rest)), Index(1, part), Reshape((rows, *rest)))
        found.append((f"fused by head (h = {h})", simplified(steps)))
    return tuple(found)


def _part_sizes(t: Tensor, n: int) -> list[int] | None:
    rows = t.shape[0]
    if len(t.shape) == 2 and n == 3 and t.shape[1] < rows < 3 * t.shape[1] and (rows - t.shape[1]) % 2 == 0:
        return [t.shape[1], (rows - t.shape[1]) // 2, (rows - t.shape[1]) // 2]  # grouped heads
    return [rows // n] * n if rows % n == 0 and rows > n else None


def _with_word(components: tuple[str | int, ...], fused: str, part: str) -> tuple[str | int, ...]:
    """The path with the component that means `fused` as the part: attn.c_attn.weight -> attn.q.weight."""
    for place in reversed(range(len(components))):
        if fused in naming.words((components[place],)):
            return (*components[:place], part, *components[place + 1 :])
    return (*components[:-1], part, components[-1])


def _joined(tensors: list[Tensor], fused: str, parts: tuple[str, ...]) -> list[Tensor]:
    """Separate projections of the same inputs as one. The same list if there are none."""
    groups: dict[tuple, dict[str, Tensor]] = defaultdict(dict)
    for t in tensors:
        word = naming.words(t.components)[-1:]
        if word and word[0] in parts and t.kind == "linear" and len(t.names) == 1:
            groups[(t.components[:-2], t.components[-1])][word[0]] = t
    complete = {key: group for key, group in groups.items() if len(group) == len(parts)}
    if not complete:
        return tensors
    used = {id(t) for group in complete.values() for t in group.values()}
    out = [t for t in tensors if id(t) not in used]
    for (prefix, leaf), group in complete.items():
        members = [group[part] for part in parts]
        if len({m.shape[1:] for m in members}) > 1 or len({m.steps for m in members}) > 1:
            out += members
            continue
        rows = [m.shape[0] for m in members]
        out.append(
            Tensor(
                (*prefix, fused, leaf),
                (sum(rows), *members[0].shape[1:]),
                "linear",
                tuple(name for m in members for name in m.names),
                (*members[0].steps, Concatenate(0, len(members))),
                parts=len(parts) if len(set(rows)) == 1 else 1,
                order=members[0].order,
            )
        )
    return sorted(out, key=lambda t: t.order)


def _biases_added(tensors: list[Tensor], gates: Mapping[str, str]) -> list[Tensor]:
    """The two biases of a recurrent layer as one, all but that of a GRU's new gate, which stands inside a product."""
    out = []
    by_place = {t.components: t for t in tensors}
    for t in tensors:
        if t.components[-2:] == ("hh", "bias"):
            continue
        other = by_place.get((*t.components[:-2], "hh", "bias"))
        if t.components[-2:] != ("ih", "bias") or other is None:
            out.append(t)
            continue
        names = (*t.names, *other.names)
        if gates.get(t.names[0]) == "rzn":
            rows = t.shape[0] // 3 * 2
            out.append(replace(t, names=names, steps=(AddStart(rows),)))
            rest = (Slice(0, rows, t.shape[0]),)
            out.append(replace(other, components=(*t.components[:-2], "bias_n"), steps=rest, shape=(t.shape[0] // 3,)))
        else:
            out.append(replace(t, names=names, steps=(Add(2),), aliases=(other.components,)))
    return out


def _gates_split(tensors: list[Tensor], gates: Mapping[str, str]) -> list[Tensor]:
    """Each gate of a recurrent layer by itself, under Flax's names: `ii`, `if`, `ig`, `io`, `hi`, ..."""
    out = []
    for t in tensors:
        letters = gates.get(t.names[0])
        if letters is None or t.components[-2] not in ("ih", "hh"):
            out.append(replace(t, components=(*t.components[:-1], "hn", "bias")) if t.components[-1] == "bias_n" else t)
            continue
        rows = t.shape[0] // len(letters)
        side, leaf = t.components[-2][0], t.components[-1]
        for k, letter in enumerate(letters):
            names, steps = t.names, (*t.steps, Slice(0, k * rows, (k + 1) * rows))
            if isinstance(t.steps[:1] and t.steps[0], AddStart):
                names, steps = (t.names[:1], steps[1:]) if letter == "n" else (names, (Add(2), *steps[1:]))
            part = _part(t, steps, (*t.components[:-2], side + letter, leaf), rows)
            added = len(names) > 1
            out.append(replace(part, names=names, aliases=((*t.components[:-2], "h" + letter, leaf),) if added else ()))
    return out
