"""The derivation of a weight converter: from PyTorch's state dict to any JAX parameter tree, where the user gives none.

Layers are aligned first: numbered modules on either side that are as many and of the same sizes, and layers stacked
along a leading axis. What remains are patterns (`h.*.attn.c_attn.weight`), matched all together by their names, their
shapes and the kinds of their modules, as an assignment of least cost. What names and shapes leave open, a measurement
decides: `check` runs both models with a candidate and returns the relative error.
"""

import heapq
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np

from jaxgpt.parity import naming
from jaxgpt.parity.conversion import (
    Add,
    AddStart,
    Concatenate,
    Index,
    Path,
    Reshape,
    Slice,
    Source,
    Stack,
    Step,
    Transpose,
    function_code,
    simplified,
)
from jaxgpt.parity.layouts import Layout, layouts

EXACT = 1e-9  # of a float64 comparison: far above its rounding, far below any wrong weight
MAX_CHECKS = 400  # of the search in order of likelihood, and again of the descent after it
# Choices whose cost is so near to the likeliest's count as open; a synonym that only one of two names has costs more.
OPEN = 1.0
_FORBIDDEN = 1e6
_MISSING = 100.0
_LINEAR = {
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
_GATES = {"LSTM": "ifgo", "LSTMCell": "ifgo", "GRU": "rzn", "GRUCell": "rzn"}
_FUSED = {"qkv": ("q", "k", "v"), "kv": ("k", "v"), "gateup": ("gate", "up")}


@dataclass(frozen=True)
class TorchTensor:
    """One tensor of a PyTorch model.

    Attributes:
        name: as in the state dict, "encoder.layers.0.self_attn.q_proj.weight".
        module: the class name of the module that owns it, "Linear".
        is_parameter: False for a buffer.
        tied_to: the name of the tensor that shares its memory and comes first.
    """

    name: str
    shape: tuple[int, ...]
    module: str
    is_parameter: bool = True
    tied_to: str | None = None


@dataclass
class Derived:
    """A converter, and what it leaves open.

    Attributes:
        sources: how each leaf is made.
        candidates: of the leaves that neither names and shapes nor values decide, all sources, likeliest first.
        unused: torch tensors that no leaf takes, without ties and counters.
        missing: leaves that no torch tensor gives.
        decided: what the values decided, a line each.
        error: of the last check of these sources; None without one.
    """

    sources: dict[Path, Source]
    candidates: dict[Path, list[Source]] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    missing: tuple[Path, ...] = ()
    decided: tuple[str, ...] = ()
    error: float | None = None

    def convert(self, state_dict: Mapping[str, np.ndarray]) -> dict[Path, np.ndarray]:
        """The leaves, from a state dict of numpy arrays.

        Raises:
            KeyError: a tensor is not in the state dict.
        """
        return {path: source.apply(state_dict) for path, source in self.sources.items()}

    def code(self) -> str:
        """A Python function `to_params(state_dict)`, to keep, that builds the same tree with numpy alone."""
        return function_code(self.sources, self.decided)

    def message(self) -> str:
        """What is missing, unused and undecided, a line each; "" where nothing is."""
        lines = [f"{path_name(path)}: no torch tensor gives it" for path in self.missing]
        lines += [f"{name}: no leaf takes it" for name in self.unused]
        for path, sources in self.candidates.items():
            lines.append(f"{path_name(path)}: cannot be decided; candidates: {'; '.join(s.code() for s in sources)}")
        return "\n".join(lines)


def path_name(path: Path) -> str:
    """A path as users write it: blocks.0.attn.query.kernel."""
    return ".".join(map(str, path))


@dataclass(eq=False)
class _Tensor:
    """A tensor to take from the torch side: whole, a part of a fused one, or several joined.

    `shape` is that after `steps`; matrices are [out, in].
    """

    components: tuple[str | int, ...]
    shape: tuple[int, ...]
    kind: str
    names: tuple[str, ...]
    steps: tuple[Step, ...] = ()
    parts: int = 1
    cost: float = 0.0
    aliases: tuple[tuple[str | int, ...], ...] = ()
    others: tuple[tuple[str, tuple[Step, ...]], ...] = ()  # less likely steps to the same part of a fused tensor
    order: int = 0
    counts: bool = True
    pattern: tuple[str | int, ...] = ()
    layer: tuple[tuple[str, int], ...] = ()


@dataclass(eq=False)
class _Slot:
    """A JAX leaf, or one layer's part of a leaf with a leading axis of layers."""

    path: Path
    components: tuple[str | int, ...]
    shape: tuple[int, ...]
    index: int | None = None
    counts: bool = True
    pattern: tuple[str | int, ...] = ()
    layer: tuple[tuple[str, int], ...] = ()


_Entry = TypeVar("_Entry", _Tensor, _Slot)


@dataclass(eq=False)
class _Pattern(Generic[_Entry]):
    """The tensors, or the slots, that differ in the number of their layer alone."""

    components: tuple[str | int, ...]
    members: dict[tuple[tuple[str, int], ...], _Entry]
    words: tuple[tuple[str, ...], ...] = ()

    @property
    def first(self) -> _Entry:
        return next(iter(self.members.values()))

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(self.members[layer].shape for layer in sorted(self.members))


@dataclass
class _Choice:
    """One thing to decide: options with their costs, likeliest first."""

    options: list[tuple[float, object]]


def derive(
    torch: Sequence[TorchTensor],
    leaves: Mapping[Path, tuple[int, ...]],
    check: Callable[[Derived], float] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Derived:
    """Derives how each JAX leaf is made from the torch tensors.

    Args:
        torch: the tensors in the order of the state dict.
        leaves: the shape of each JAX leaf, by its path.
        check: the relative error of the JAX model against PyTorch with these sources; inf if it raises. Weights that
            are all ones or zeros hide which is which, so the torch model should have random values everywhere.
        say: takes a line about each decision.
    """
    plans = [_plan(tensors, leaves) for tensors in _variants(torch, leaves)]
    plan = min(plans, key=lambda p: (len(p.missing), p.left_over, p.cost))
    derived = plan.solve(torch, check)
    for line in derived.decided:
        say(line)
    return derived


# ---- the torch side ----


def _tensors(torch: Sequence[TorchTensor]) -> list[_Tensor]:
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
        if t.module in _GATES or t.module.startswith("RNN"):
            components = _rnn_components(t)
        if t.module == "Conv1D" and len(shape) == 2:
            steps, shape = (Transpose((1, 0)),), shape[::-1]
        tensors.append(
            _Tensor(
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
    if module in _LINEAR:
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


def _variants(torch: Sequence[TorchTensor], leaves: Mapping[Path, tuple[int, ...]]) -> Iterator[list[_Tensor]]:
    """The torch side with its fused tensors whole or split, its separate ones joined, recurrent biases added."""
    base = [_counting_parts(t) for t in _tensors(torch)]
    gates = {t.name: _GATES[t.module] for t in torch if t.module in _GATES}
    changes: list[list[Callable[[list[_Tensor]], list[_Tensor]]]] = []

    def keep(tensors: list[_Tensor]) -> list[_Tensor]:
        return tensors

    if any(t.module in _GATES or t.module.startswith("RNN") for t in torch):
        changes.append([keep, lambda ts: _biases_added(ts, gates)])
        changes.append([keep, lambda ts: _gates_split(ts, gates)])
    leaf_words = {word for path in leaves for word in naming.words(path)}
    for fused, parts in _FUSED.items():
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


def _counting_parts(t: _Tensor) -> _Tensor:
    """The tensor, with the number of its parts if it is a fused one."""
    words = naming.words(t.components)
    for fused, parts in _FUSED.items():
        if fused in words and len(t.shape) in (1, 2) and t.shape[0] % len(parts) == 0:
            if t.shape[0] > len(parts) and _part_sizes(t, len(parts)) == [t.shape[0] // len(parts)] * len(parts):
                return replace(t, parts=len(parts))
    return t


def _part(t: _Tensor, axis_steps: tuple[Step, ...], components: tuple[str | int, ...], rows: int) -> _Tensor:
    return replace(t, components=components, steps=axis_steps, shape=(rows, *t.shape[1:]), aliases=(), parts=1)


def _rows(t: _Tensor, start: int, stop: int) -> tuple[Step, ...]:
    """The steps to some of the outputs. Those of a matrix [in, out] are cut before it is transposed."""
    if t.steps and t.steps[0] == Transpose((1, 0)):
        return (Slice(1, start, stop), *t.steps)
    return (*t.steps, Slice(0, start, stop))


def _split(tensors: list[_Tensor], fused: str, parts: tuple[str, ...], leaves: Mapping) -> list[_Tensor]:
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


def _by_head(t: _Tensor, part: int, parts: int, leaves: Mapping) -> tuple[tuple[str, tuple[Step, ...]], ...]:
    """The steps to a part of a fused tensor that has query, key and value of the first head first, as GPT-NeoX has."""
    rows, rest = t.shape[0] // parts, t.shape[1:]
    shown = {size for shape in leaves.values() if len(shape) in (2, 3) for size in shape if len(shape) == 3}
    found = []
    for h in sorted(h for h in shown | {2, 4, 8, 12, 16} if 1 < h < rows and rows % h == 0):
        steps = (*t.steps, Reshape((h, parts, rows // h, *rest)), Index(1, part), Reshape((rows, *rest)))
        found.append((f"fused by head (h = {h})", simplified(steps)))
    return tuple(found)


def _part_sizes(t: _Tensor, n: int) -> list[int] | None:
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


def _joined(tensors: list[_Tensor], fused: str, parts: tuple[str, ...]) -> list[_Tensor]:
    """Separate projections of the same inputs as one. The same list if there are none."""
    groups: dict[tuple, dict[str, _Tensor]] = defaultdict(dict)
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
            _Tensor(
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


def _biases_added(tensors: list[_Tensor], gates: Mapping[str, str]) -> list[_Tensor]:
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


def _gates_split(tensors: list[_Tensor], gates: Mapping[str, str]) -> list[_Tensor]:
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


# ---- layers ----


@dataclass(eq=False)
class _Family:
    """Numbered modules, each the entries under it."""

    text: tuple[str | int, ...]
    members: list[list]
    places: tuple[int, ...]
    sizes: tuple[int, ...] = ()

    def __post_init__(self):
        self.sizes = tuple(sum(math.prod(e.shape) for e in member if e.counts) for member in self.members)


def _families(entries: list) -> list[_Family]:
    children: dict[tuple, dict[str | int, list]] = defaultdict(lambda: defaultdict(list))
    for entry in entries:
        for depth in range(len(entry.components) - 1):
            children[entry.components[:depth]][entry.components[depth]].append(entry)
    numbered: dict[tuple, dict[str, list]] = defaultdict(dict)  # node -> stem -> [(number, child, entries)]
    for node, named in children.items():
        for child, under in named.items():
            numbers = tuple(int(n) for n in re.findall(r"\d+", str(child)))
            if numbers:
                numbered[node].setdefault(re.sub(r"\d+", "*", str(child)), []).append((numbers, child, under))
    found = []
    for node, stems in numbered.items():
        for stem, group in stems.items():
            group.sort(key=lambda item: item[0])
            place = len(node)
            if len(group) > 1:
                found.append(_Family((*node, stem), [under for _, _, under in group], (place,)))
                found += _by_class(node, stem, group)
            inner = [numbered.get((*node, child), {}) for _, child, _ in group]
            for inner_stem in set(inner[0]) if len(group) > 1 else ():
                if all(inner_stem in stems_of for stems_of in inner):
                    members = [
                        under
                        for stems_of in inner
                        for _, _, under in sorted(stems_of[inner_stem], key=lambda item: item[0])
                    ]
                    found.append(_Family((*node, stem, inner_stem), members, (place, place + 1)))
    return found


def _by_class(node: tuple, stem: str, group: list) -> Iterator[_Family]:
    """Of numbered torch modules (`nn.Sequential`), those that have tensors of the same kinds."""
    place = len(node)
    classes: dict[tuple, list] = defaultdict(list)
    for _, _, under in group:
        if all(isinstance(e, _Tensor) and len(e.components) == place + 2 for e in under):
            classes[tuple(sorted({(e.kind, len(e.shape), str(e.components[-1])) for e in under}))].append(under)
    for members in classes.values():
        if 1 < len(members) < len(group):
            yield _Family((*node, stem), members, (place,))


def _stacked_families(slots: list[_Slot], counts: set[int]) -> list[_Family]:
    """Leaves with a leading axis of layers, below any node, as layers."""
    found = []
    nodes = {s.components[:depth] for s in slots for depth in range(len(s.components))}
    for node in sorted(nodes, key=lambda n: (len(n), str(n))):
        for n in counts:
            under = [
                s
                for s in slots
                if s.components[: len(node)] == node and s.index is None and s.shape[:1] == (n,) and not s.layer
            ]
            if under:
                members = [[replace(s, index=r, shape=s.shape[1:]) for s in under] for r in range(n)]
                found.append(_Family(node, members, ()))
    return found


def _align(slots: list[_Slot], tensors: list[_Tensor]) -> tuple[list[_Slot], list[_Tensor]]:
    """Gives the slots and the tensors of layers that belong together the same `layer`, and patterns.

    Layers belong together where they are as many and of the same numbers of elements; where none are, of the nearest.
    """
    done_slots: list[_Slot] = []
    done_tensors: list[_Tensor] = []
    while pair := _best_pair(slots, tensors):
        own, other = pair
        label = ".".join(map(str, own.text)) or "*"
        taken = {id(e) for member in other.members for e in member}
        paths = {e.path for member in own.members for e in member}
        slots = [s for s in slots if s.path not in paths]
        tensors = [t for t in tensors if id(t) not in taken]
        for rank, (left, right) in enumerate(zip(own.members, other.members, strict=True)):
            for family, entries in ((own, left), (other, right)):
                for e in entries:
                    e.layer = (*e.layer, (_label(e, family) if family is own else label, rank))
                    e.pattern = tuple(
                        re.sub(r"\d+", "*", str(c)) if i in family.places else c for i, c in enumerate(e.pattern)
                    )
            own_label = left[0].layer[-1][0] if left else label
            for e in right:
                e.layer = (*e.layer[:-1], (own_label, rank))
            inner_slots, inner_tensors = _align(left, right)
            done_slots += inner_slots
            done_tensors += inner_tensors
    return done_slots + slots, done_tensors + tensors


def _label(slot: _Slot, family: _Family) -> str:
    """A name for a family that is the same in every layer that has it."""
    depth = len(family.text) - len(family.places)
    return ".".join(map(str, (*slot.pattern[:depth], *family.text[depth:])))


def _best_pair(slots: list[_Slot], tensors: list[_Tensor]) -> tuple[_Family, _Family] | None:
    theirs = _families(tensors)
    ours = _families(slots)
    counts = {len(f.members) for f in theirs}
    ours += _stacked_families(slots, counts)
    weights: dict[str, float] = {}
    best, best_key = None, None
    for own in ours:
        if not sum(own.sizes):
            continue
        for other in theirs:
            if len(other.members) != len(own.members) or not sum(other.sizes):
                continue
            alike = naming.similarity(naming.words(own.text), naming.words(other.text), weights)
            exact = own.sizes == other.sizes
            ratios = [a / b if b else 0.0 for a, b in zip(own.sizes, other.sizes, strict=True)]
            near = min(min(r, 1 / r) if r else 0.0 for r in ratios)
            if not exact and (near < 0.6 or not own.places or (alike < 0.5 and near < 0.9)):
                continue
            key = (exact, sum(own.sizes) if exact else near, bool(own.places), alike, -len(own.text), -len(other.text))
            if best_key is None or key > best_key:
                best, best_key = (own, other), key
    return best


# ---- the assignment ----


def _patterns(entries: Sequence[_Entry]) -> list[_Pattern[_Entry]]:
    groups: dict[tuple, _Pattern[_Entry]] = {}
    for e in entries:
        key = (e.pattern, tuple(label for label, _ in e.layer))
        groups.setdefault(key, _Pattern[_Entry](e.pattern, {})).members[e.layer] = e
    for pattern in groups.values():
        texts = [pattern.components, *getattr(pattern.first, "aliases", ())]
        pattern.words = tuple(naming.words(text) for text in texts)
    return list(groups.values())


def assignment(cost: np.ndarray) -> list[int]:
    """The column of each row in an assignment of least total cost; at least as many columns as rows.

    The Hungarian method with shortest augmenting paths, O(rows^2 columns).
    """
    rows, columns = cost.shape
    u, v = np.zeros(rows + 1), np.zeros(columns + 1)
    row_of = np.zeros(columns + 1, int)
    for row in range(1, rows + 1):
        row_of[0], column = row, 0
        shortest, previous = np.full(columns + 1, np.inf), np.zeros(columns + 1, int)
        used = np.zeros(columns + 1, bool)
        while row_of[column]:
            used[column] = True
            reduced = cost[row_of[column] - 1] - u[row_of[column]] - v[1:]
            better = ~used[1:] & (reduced < shortest[1:])
            shortest[1:][better] = reduced[better]
            previous[1:][better] = column
            following = int(np.argmin(np.where(used, np.inf, shortest)))
            delta = shortest[following]
            u[row_of[used]] += delta
            v[used] -= delta
            shortest[~used] -= delta
            column = following
        while column:
            row_of[column] = row_of[previous[column]]
            column = previous[column]
    result = [0] * rows
    for column in range(1, columns + 1):
        if row_of[column]:
            result[row_of[column] - 1] = column - 1
    return result


_Own: TypeAlias = _Pattern[_Slot]
_Their: TypeAlias = _Pattern[_Tensor]


class _Plan:
    """A matching of patterns, and the choices that names and shapes leave."""

    def __init__(self, slots: list[_Slot], tensors: list[_Tensor], leaves: Mapping[Path, tuple[int, ...]]):
        self.leaves, self.tensors = leaves, tensors
        self.heads = _head_counts(slots, tensors)
        self.channels = tuple(sorted({t.shape[0] for t in tensors if t.kind == "conv"}))
        self.pairs: dict[_Own, _Their] = {}
        self.costs: dict[tuple[_Own, _Their], float] = {}
        self.cost = 0.0
        own, theirs = _patterns(slots), _patterns(tensors)
        self._match(own, theirs)
        # What is left over, each layer by itself.
        rest = [e for p in own if p not in self.pairs for e in p.members.values()]
        taken = set(map(id, self.pairs.values()))
        others = [e for p in theirs if id(p) not in taken for e in p.members.values()]
        if rest and others:
            self._match(
                [_Pattern(e.components, {(): e}, (naming.words(e.components),)) for e in rest],
                [_Pattern(e.components, {(): e}, (naming.words(e.components),)) for e in others],
            )
        given = {s.path for p in self.pairs for s in p.members.values()}
        whole = defaultdict(int)
        for p in self.pairs:
            for s in p.members.values():
                whole[s.path] += 1
        self.missing = tuple(
            path for path in leaves if path not in given or (whole[path] > 1 and whole[path] != leaves[path][0])
        )

    @property
    def left_over(self) -> int:
        """How many parameters, or parts of them, no leaf takes."""
        used = {id(t) for p in self.pairs.values() for t in p.members.values()}
        return sum(t.counts and id(t) not in used for t in self.tensors)

    def unused(self, torch: Sequence[TorchTensor]) -> tuple[str, ...]:
        """The torch tensors that no leaf takes, or not the whole of."""
        root = {t.name: t.tied_to or t.name for t in torch}
        used = {id(t) for p in self.pairs.values() for t in p.members.values()}
        left_over = {name for t in self.tensors if id(t) not in used for name in t.names}
        tied = {root[t.name] for t in torch if t.tied_to}
        used_names = {root[name] for t in self.tensors if id(t) in used for name in t.names}
        return tuple(t.name for t in torch if t.name in left_over and root[t.name] not in tied & used_names)

    def _match(self, own: list[_Own], theirs: list[_Their]) -> None:
        if not own:
            return
        weights = naming.word_weights([p.words[0] for p in own + theirs])
        n, m = len(own), len(theirs)
        cost = np.full((n, m), _FORBIDDEN)
        places = _relative_order(own, lambda p: [_sortable(p.components)])
        their_places = _relative_order(theirs, lambda p: [p.first.order])
        for i, a in enumerate(own):
            for j, b in enumerate(theirs):
                cost[i, j] = self._pair_cost(a, b, weights) + 0.2 * abs(places[a] - their_places[b])
        total = cost.copy()
        for _ in range(3):
            columns = assignment(np.concatenate([total, np.full((n, n), _MISSING)], axis=1))
            matched = [(i, j) for i, j in enumerate(columns) if j < m and cost[i, j] < _FORBIDDEN]
            together = defaultdict(float)
            for i, j in matched:
                together[(own[i].words[0], theirs[j].components[:-1])] += 1
            total = cost.copy()
            for i, a in enumerate(own):
                for j, b in enumerate(theirs):
                    links = together.get((a.words[0], b.components[:-1]), 0.0) - (columns[i] == j)
                    total[i, j] -= 0.5 * min(links, 1.0) if links > 0 else 0.0
        self.weights = weights
        for i, j in matched:
            self.pairs[own[i]] = theirs[j]
            self.cost += cost[i, j]
        self.costs = getattr(self, "costs", {}) | {
            (a, b): cost[i, j] for i, a in enumerate(own) for j, b in enumerate(theirs)
        }

    def _pair_cost(self, own: _Own, their: _Their, weights: Mapping[str, float]) -> float:
        if set(own.members) != set(their.members):
            return _FORBIDDEN
        kind, sure = naming.kind(own.components)
        their_kind = _tensor_kind(their.first)
        cost = their.first.cost
        if kind and their_kind and kind != their_kind:
            generic = {kind, their_kind} <= {"weight", "kernel", "embedding", "scale"}
            if "weight" in (kind, their_kind) and generic:
                cost += 0.1
            elif generic and {kind, their_kind} != {"kernel", "scale"}:
                cost += 0.5
            elif sure:
                return _FORBIDDEN
            else:
                cost += 2.0
        options = self.options(own, their)
        if not options:
            return _FORBIDDEN
        alike = max(naming.similarity(own.words[0], words, weights) for words in their.words)
        return cost + 4 * (1 - alike) + 0.3 * options[0].penalty

    def options(self, own: _Own, their: _Their) -> list[Layout]:
        """The layouts that fit in every layer, likeliest first."""
        common: dict[str, Layout] | None = None
        for layer, slot in own.members.items():
            found = {x.label: x for x in self.layouts(their.members[layer], slot)}
            common = found if common is None else {label: x for label, x in common.items() if label in found}
        return sorted((common or {}).values(), key=lambda x: x.penalty)

    def layouts(self, t: _Tensor, slot: _Slot) -> list[Layout]:
        """The layouts from the state dict's tensor to the leaf."""
        plain = layouts(t.kind, t.shape, slot.shape, t.parts, self.heads, self.channels)
        found = [replace(x, steps=simplified((*t.steps, *x.steps))) for x in plain]
        for label, steps in t.others:
            found += [
                replace(x, label=f"{x.label}, {label}", penalty=x.penalty + 1.5, steps=simplified((*steps, *x.steps)))
                for x in plain
            ]
        return found

    # ---- the choices ----

    def solve(self, torch: Sequence[TorchTensor], check: Callable[[Derived], float] | None) -> Derived:
        search = _Search(self, check if not self.missing else None)
        sources, candidates, decided, error = search.run()
        order = list(self.leaves)
        return Derived(
            {path: sources[path] for path in order if path in sources},
            {path: candidates[path] for path in order if path in candidates},
            self.unused(torch),
            self.missing,
            tuple(decided),
            error,
        )

    def sources(self, pairs: Mapping[_Own, _Their], labels: Mapping[_Own, str]) -> dict[Path, Source]:
        """The sources of all leaves under a matching and a layout of each pattern."""
        parts: dict[Path, list[tuple[int | None, tuple[str, ...], tuple[Step, ...]]]] = defaultdict(list)
        for own, their in pairs.items():
            for layer, slot in own.members.items():
                t = their.members[layer]
                fitting = self.layouts(t, slot)
                layout = next((x for x in fitting if x.label == labels[own]), fitting[0])
                parts[slot.path].append((slot.index, t.names, layout.steps))
        sources = {}
        for path, members in parts.items():
            if path in self.missing:
                continue
            if members[0][0] is None:
                sources[path] = Source(members[0][1], members[0][2])
            else:
                members.sort(key=lambda member: member[0] or 0)
                names = tuple(name for _, group, _ in members for name in group)
                sources[path] = Source(names, (*members[0][2], Stack(0, len(members))))
        return sources


def _plan(tensors: list[_Tensor], leaves: Mapping[Path, tuple[int, ...]]) -> _Plan:
    slots = []
    for path, shape in leaves.items():
        components = path[1:] if len(path) > 1 and path[0] in ("params", "batch_stats") else path
        if len(components) > 1 and components[-1] in ("value", "raw_value"):
            components = components[:-1]
        # Some trees are flat, their keys whole paths: "blocks.0.mlp.kernel", "blocks/0/mlp/kernel".
        split = [
            part for c in components for part in (re.split(r"[./]", c) if isinstance(c, str) else [c]) if part != ""
        ]
        components = tuple(int(c) if isinstance(c, str) and c.isdigit() else c for c in split)
        counts = naming.kind(components)[0] not in ("mean", "var")
        slots.append(_Slot(path, components, tuple(shape), counts=counts, pattern=components))
    for t in tensors:
        t.pattern = t.components
    return _Plan(*_align(slots, tensors), leaves)


def _tensor_kind(t: _Tensor) -> str:
    """The kind of a torch tensor, a value of `naming.KINDS`."""
    by_name = naming.kind(t.components)[0]
    if by_name in ("bias", "mean", "var", "scale"):
        return by_name
    if len(t.shape) > 1 and t.kind in ("linear", "conv", "conv_transpose"):
        return "kernel"
    if t.kind == "embedding":
        return "embedding"
    return "scale" if by_name == "weight" and (t.kind == "norm" or len(t.shape) == 1) else by_name


def _head_counts(slots: list[_Slot], tensors: list[_Tensor]) -> tuple[int, ...]:
    """Numbers of heads that fused projections may have: those of leaves that show them, else a few divisors."""
    shown = {size for s in slots if len(s.shape) in (3, 4) for size in s.shape}
    fused = {t.shape[0] // t.parts for t in tensors if t.parts > 1}
    divisors = {h for rows in fused for h in (2, 3, 4, 6, 8, 12, 16, 32) if rows % h == 0}
    return tuple(sorted(h for h in shown | divisors if any(rows % h == 0 for rows in fused)))


def _relative_order(
    patterns: list[_Pattern[_Entry]], key: Callable[[_Pattern[_Entry]], Any]
) -> dict[_Pattern[_Entry], float]:
    """The place of each pattern among those of the same shapes, from 0 to 1."""
    groups: dict[tuple, list[_Pattern[_Entry]]] = defaultdict(list)
    for pattern in patterns:
        groups[tuple(tuple(sorted(shape)) for shape in pattern.shapes)].append(pattern)
    places = {}
    for group in groups.values():
        for place, pattern in enumerate(sorted(group, key=key)):
            places[pattern] = place / max(len(group) - 1, 1)
    return places


def _sortable(components: tuple[str | int, ...]) -> list[tuple[int, int, str]]:
    parts = [part for c in components for part in re.split(r"(\d+)", str(c)) if part]
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


# ---- decisions by value ----


class _Search:
    """The search for the choices with which the JAX model computes what the PyTorch model does."""

    def __init__(self, plan: _Plan, check: Callable[[Derived], float] | None):
        self.plan, self.check = plan, check
        self.layouts = {own: plan.options(own, their) for own, their in plan.pairs.items()}
        self.convention = self._convention()
        self.choices: list[_Choice] = []
        self.permutations: list[int] = []
        self.group_of: dict[_Own, int] = {}
        self.own_choice: dict[_Own, int] = {}
        self._add_layouts()
        self._add_permutations()
        self.start: tuple[int, ...] = (0,) * len(self.choices)
        self.errors: dict[tuple, float] = {}

    def run(self) -> tuple[dict[Path, Source], dict[Path, list[Source]], list[str], float | None]:
        if self.check is None:
            return self._sources(self.start), self._candidates(self.start, self._open(self.start)), [], None
        state = self._found() or self._descended()
        error = self._error(state)
        if error > EXACT and not error < 0.1 * self._error(self.start):
            state, error = self.start, self._error(self.start)
        decided, undecided = [], []
        others: dict[int, list[tuple[int, float]]] = defaultdict(list)
        for place, option in self._open(state):
            other = self._error(_with(state, place, option))
            # A wrong weight that the models' output does not show, or a fault of the model that hides all else.
            if other <= EXACT or (error > EXACT and not other > 3 * error):
                undecided.append((place, option))
            else:
                others[place].append((option, other))
        for place, options in others.items():
            decided.append(
                self._words(state, place, [option for option, _ in options], error, min(e for _, e in options))
            )
        unlikely = [place for place, k in enumerate(state) if k and not self._is_open(place)]
        decided += [self._words(state, place, [0], error, self._error(_with(state, place, 0))) for place in unlikely]
        return self._sources(state), self._candidates(state, undecided), decided, error

    # ---- the choices ----

    def _convention(self) -> bool | None:
        """Whether the leaves are [in, out] where shapes leave no choice; None where there is no such leaf."""
        seen = [
            options[0].transposed
            for own, options in self.layouts.items()
            if self.plan.pairs[own].first.kind == "linear" and len({x.transposed for x in options}) == 1
        ]
        seen = [x for x in seen if x is not None]
        return sum(seen) * 2 >= len(seen) if seen else None

    def _penalty(self, own: _Own, layout: Layout) -> float:
        their = self.plan.pairs[own].first
        if their.kind != "linear" or layout.transposed is None:
            return layout.penalty
        word = str(own.components[-1])
        if word == "kernel":
            return layout.penalty + (0.0 if layout.transposed else 1.5)
        if self.convention is not None:
            return layout.penalty + (0.0 if layout.transposed == self.convention else 0.8)
        return layout.penalty + (0.5 if layout.transposed == (word == "weight") else 0.0)

    def _add_layouts(self) -> None:
        """One choice for all leaves with the same layouts, and one for each that departs from it."""
        groups: dict[tuple, list[_Own]] = defaultdict(list)
        for own, options in self.layouts.items():
            if len(options) > 1:
                groups[(own.components[-1] in ("kernel", "weight"), tuple(x.label for x in options))].append(own)
        for members in groups.values():
            options = sorted((self._penalty(members[0], x), x.label) for x in self.layouts[members[0]])
            for own in members:
                self.group_of[own] = len(self.choices)
            self.choices.append(_Choice(list(options)))
            if len(members) > 1:
                for own in members:
                    self.own_choice[own] = len(self.choices)
                    apart = [(1.5 + penalty, label) for penalty, label in options]
                    self.choices.append(_Choice([(0.0, None), *apart]))

    def _add_permutations(self) -> None:
        """A choice for each class of torch modules, and of torch tensors, that could stand for one another."""
        own_of = {their: own for own, their in self.plan.pairs.items()}
        modules: dict[tuple, list[_Their]] = defaultdict(list)
        for their in own_of:
            modules[(their.components[:-1], tuple(label for label, _ in their.first.layer))].append(their)
        classes: dict[tuple, list[list[_Their]]] = defaultdict(list)
        for members in modules.values():
            members.sort(key=lambda p: str(p.components[-1]))
            classes[tuple((str(p.components[-1]), _form(p)) for p in members)].append(members)
        for group in classes.values():
            self._add_permutation(group, own_of, math.inf)
        tensors: dict[tuple, list[list[_Their]]] = defaultdict(list)
        for their in own_of:
            tensors[_form(their)].append([their])
        for group in tensors.values():
            self._add_permutation(group, own_of, OPEN)

    def _add_permutation(self, group: list[list[_Their]], own_of: Mapping[_Their, _Own], most: float) -> None:
        n = len(group)
        if n < 2:
            return
        orders: list[tuple[int, ...]] = list(itertools.permutations(range(n))) if n <= 4 else []
        if n > 4:
            for a, b in itertools.combinations(range(n), 2):
                order = list(range(n))
                order[a], order[b] = b, a
                orders.append(tuple(order))
        options: list[tuple[float, object]] = []
        for order in orders:
            swapped = {p: q for k, i in enumerate(order) for p, q in zip(group[k], group[i], strict=True) if p is not q}
            if not swapped:
                continue
            new = [self.plan.costs.get((own_of[p], q), _FORBIDDEN) for p, q in swapped.items()]
            old = [self.plan.costs.get((own_of[p], p), 0.0) for p in swapped]
            penalty = max(sum(new) - sum(old), 0.05)
            if penalty < min(most, 50.0):
                options.append((penalty, swapped))
        if options:
            self.permutations.append(len(self.choices))
            options.sort(key=lambda option: option[0])
            self.choices.append(_Choice([(0.0, {}), *options]))

    # ---- states: the index of an option for each choice ----

    def _pairs(self, state: tuple[int, ...]) -> dict[_Own, _Their]:
        pairs = dict(self.plan.pairs)
        for place in self.permutations:
            swapped = self.choices[place].options[state[place]][1]
            assert isinstance(swapped, dict)
            pairs = {own: swapped.get(their, their) for own, their in pairs.items()}
        return pairs

    def _labels(self, state: tuple[int, ...]) -> dict[_Own, str]:
        labels = {}
        for own, options in self.layouts.items():
            label = None
            if own in self.own_choice:
                label = self.choices[self.own_choice[own]].options[state[self.own_choice[own]]][1]
            if label is None and own in self.group_of:
                label = self.choices[self.group_of[own]].options[state[self.group_of[own]]][1]
            labels[own] = options[0].label if label is None else str(label)
        return labels

    def _sources(self, state: tuple[int, ...]) -> dict[Path, Source]:
        return self.plan.sources(self._pairs(state), self._labels(state))

    def _error(self, state: tuple[int, ...]) -> float:
        assert self.check is not None
        pairs, labels = self._pairs(state), self._labels(state)
        key = tuple((id(pairs[own]), labels[own]) for own in self.plan.pairs)
        if key not in self.errors:
            error = self.check(Derived(self.plan.sources(pairs, labels)))
            self.errors[key] = math.inf if math.isnan(error) else error
        return self.errors[key]

    def _found(self) -> tuple[int, ...] | None:
        """The likeliest state that is exact, of the `MAX_CHECKS` likeliest."""
        heap: list[tuple[float, tuple[int, ...]]] = [(0.0, self.start)]
        self.best = self.start
        seen = 0
        while heap and len(self.errors) < MAX_CHECKS and seen < 20 * MAX_CHECKS:
            seen += 1
            cost, state = heapq.heappop(heap)
            error = self._error(state)
            if error <= EXACT:
                return state
            if error < self._error(self.best):
                self.best = state
            last = max((i for i, k in enumerate(state) if k), default=0)
            for place in range(last, len(state)):
                options = self.choices[place].options
                k = state[place]
                if k + 1 < len(options):
                    heapq.heappush(heap, (cost + options[k + 1][0] - options[k][0], _with(state, place, k + 1)))
        return None

    def _descended(self) -> tuple[int, ...]:
        """The best state found, improved choice by choice until none improves it."""
        best, most = self.best, 2 * MAX_CHECKS
        improved = True
        while improved and self._error(best) > EXACT:
            improved = False
            for place, choice in enumerate(self.choices):
                for option in range(len(choice.options)):
                    if len(self.errors) >= most:
                        return best
                    state = _with(best, place, option)
                    if self._error(state) < self._error(best):
                        best, improved = state, True
        return best

    # ---- what is said of them ----

    def _is_open(self, place: int) -> bool:
        options = self.choices[place].options
        return len(options) > 1 and options[1][0] - options[0][0] < OPEN

    def _open(self, state: tuple[int, ...]) -> list[tuple[int, int]]:
        """The other options of each choice that are about as likely as the likeliest."""
        return [
            (place, k)
            for place, choice in enumerate(self.choices)
            for k, (cost, _) in enumerate(choice.options)
            if k != state[place] and self._is_open(place) and cost - choice.options[0][0] < OPEN
        ][:60]

    def _candidates(self, state: tuple[int, ...], others: list[tuple[int, int]]) -> dict[Path, list[Source]]:
        chosen = self._sources(state)
        candidates: dict[Path, list[Source]] = {}
        for place, option in others:
            for path, source in self._sources(_with(state, place, option)).items():
                known = candidates.get(path, [chosen[path]])
                if source not in known:
                    candidates[path] = [*known, source]
        return candidates

    def _words(self, state: tuple[int, ...], place: int, options: list[int], error: float, other: float) -> str:
        """What the values decided at a choice: a leaf of those that it is about, and the errors."""
        chosen = self._sources(state)
        alternatives = [self._sources(_with(state, place, option)) for option in options]
        paths = [path for path in self.plan.leaves if any(a.get(path) != chosen.get(path) for a in alternatives)]
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        rest = "the other candidate" if len(options) == 1 else f"the best of {len(options)} other candidates"
        return (
            f"by value: {path_name(paths[0])}{more}: {chosen[paths[0]].code()}; "
            f"relative error {error:.0e}, {other:.0e} with {rest}"
        )


def _form(pattern: _Their) -> tuple:
    """What two torch patterns must share to stand for one another."""
    first = pattern.first
    return (first.kind, first.parts, pattern.shapes, tuple(sorted(pattern.members)))


def _with(state: tuple[int, ...], place: int, option: int) -> tuple[int, ...]:
    return (*state[:place], option, *state[place + 1 :])
