"""A matching of PyTorch's patterns with those of the JAX leaves, as an assignment of least cost."""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from jaxgpt.parity.derive import naming
from jaxgpt.parity.derive.conversion import Source, Stack, Step, simplified
from jaxgpt.parity.derive.entries import Entry, Own, Pattern, Slot, Tensor, Their, TorchTensor, patterns
from jaxgpt.parity.derive.layers import align
from jaxgpt.parity.derive.layouts import Layout, layouts
from jaxgpt.parity.params import Path

FORBIDDEN = 1e6
MISSING = 100.0


class Plan:
    """A matching of patterns, and the choices that names and shapes leave."""

    def __init__(self, slots: list[Slot], tensors: list[Tensor], leaves: Mapping[Path, tuple[int, ...]]):
        self.leaves, self.tensors = leaves, tensors
        self.heads = _head_counts(slots, tensors)
        self.channels = tuple(sorted({t.shape[0] for t in tensors if t.kind == "conv"}))
        self.pairs: dict[Own, Their] = {}
        self.costs: dict[tuple[Own, Their], float] = {}
        self.cost = 0.0
        own, theirs = patterns(slots), patterns(tensors)
        self._match(own, theirs)
        # What is left over, each layer by itself.
        rest = [e for p in own if p not in self.pairs for e in p.members.values()]
        taken = set(map(id, self.pairs.values()))
        others = [e for p in theirs if id(p) not in taken for e in p.members.values()]
        if rest and others:
            self._match(
                [Pattern(e.components, {(): e}, (naming.words(e.components),)) for e in rest],
                [Pattern(e.components, {(): e}, (naming.words(e.components),)) for e in others],
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

    def _match(self, own: list[Own], theirs: list[Their]) -> None:
        if not own:
            return
        weights = naming.word_weights([p.words[0] for p in own + theirs])
        n, m = len(own), len(theirs)
        cost = np.full((n, m), FORBIDDEN)
        places = _relative_order(own, lambda p: [_sortable(p.components)])
        their_places = _relative_order(theirs, lambda p: [p.first.order])
        for i, a in enumerate(own):
            for j, b in enumerate(theirs):
                cost[i, j] = self._pair_cost(a, b, weights) + 0.2 * abs(places[a] - their_places[b])
        total = cost.copy()
        for _ in range(3):
            columns = linear_sum_assignment(np.concatenate([total, np.full((n, n), MISSING)], axis=1))[1]
            matched = [(i, j) for i, j in enumerate(columns) if j < m and cost[i, j] < FORBIDDEN]
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

    def _pair_cost(self, own: Own, their: Their, weights: Mapping[str, float]) -> float:
        if set(own.members) != set(their.members):
            return FORBIDDEN
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
                return FORBIDDEN
            else:
                cost += 2.0
        options = self.options(own, their)
        if not options:
            return FORBIDDEN
        alike = max(naming.similarity(own.words[0], words, weights) for words in their.words)
        return cost + 4 * (1 - alike) + 0.3 * options[0].penalty

    def options(self, own: Own, their: Their) -> list[Layout]:
        """The layouts that fit in every layer, likeliest first."""
        common: dict[str, Layout] | None = None
        for layer, slot in own.members.items():
            found = {x.label: x for x in self.layouts(their.members[layer], slot)}
            common = found if common is None else {label: x for label, x in common.items() if label in found}
        return sorted((common or {}).values(), key=lambda x: x.penalty)

    def layouts(self, t: Tensor, slot: Slot) -> list[Layout]:
        """The layouts from the state dict's tensor to the leaf."""
        plain = layouts(t.kind, t.shape, slot.shape, t.parts, self.heads, self.channels)
        found = [replace(x, steps=simplified((*t.steps, *x.steps))) for x in plain]
        for label, steps in t.others:
            found += [
                replace(x, label=f"{x.label}, {label}", penalty=x.penalty + 1.5, steps=simplified((*steps, *x.steps)))
                for x in plain
            ]
        return found

    def sources(self, pairs: Mapping[Own, Their], labels: Mapping[Own, str]) -> dict[Path, Source]:
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


def make_plan(tensors: list[Tensor], leaves: Mapping[Path, tuple[int, ...]]) -> Plan:
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
        slots.append(Slot(path, components, tuple(shape), counts=counts, pattern=components))
    for t in tensors:
        t.pattern = t.components
    return Plan(*align(slots, tensors), leaves)


def _tensor_kind(t: Tensor) -> str:
    """The kind of a torch tensor, a value of `naming.KINDS`."""
    by_name = naming.kind(t.components)[0]
    if by_name in ("bias", "mean", "var", "scale"):
        return by_name
    if len(t.shape) > 1 and t.kind in ("linear", "conv", "conv_transpose"):
        return "kernel"
    if t.kind == "embedding":
        return "embedding"
    return "scale" if by_name == "weight" and (t.kind == "norm" or len(t.shape) == 1) else by_name


def _head_counts(slots: list[Slot], tensors: list[Tensor]) -> tuple[int, ...]:
    """Numbers of heads that fused projections may have: those of leaves that show them, else a few divisors."""
    shown = {size for s in slots if len(s.shape) in (3, 4) for size in s.shape}
    fused = {t.shape[0] // t.parts for t in tensors if t.parts > 1}
    divisors = {h for rows in fused for h in (2, 3, 4, 6, 8, 12, 16, 32) if rows % h == 0}
    return tuple(sorted(h for h in shown | divisors if any(rows % h == 0 for rows in fused)))


def _relative_order(
    patterns: list[Pattern[Entry]], key: Callable[[Pattern[Entry]], Any]
) -> dict[Pattern[Entry], float]:
    """The place of each pattern among those of the same shapes, from 0 to 1."""
    groups: dict[tuple, list[Pattern[Entry]]] = defaultdict(list)
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
