"""Layers of both sides that belong together: numbered modules, and leaves with a leading axis of layers."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

from jaxgpt.parity.derive import naming
from jaxgpt.parity.derive.entries import Slot, Tensor


@dataclass(eq=False)
class Family:
    """Numbered modules, each the entries under it."""

    text: tuple[str | int, ...]
    members: list[list]
    places: tuple[int, ...]
    sizes: tuple[int, ...] = ()

    def __post_init__(self):
        self.sizes = tuple(sum(math.prod(e.shape) for e in member if e.counts) for member in self.members)


def _families(entries: list) -> list[Family]:
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
                found.append(Family((*node, stem), [under for _, _, under in group], (place,)))
                found += _by_class(node, stem, group)
            inner = [numbered.get((*node, child), {}) for _, child, _ in group]
            for inner_stem in set(inner[0]) if len(group) > 1 else ():
                if all(inner_stem in stems_of for stems_of in inner):
                    members = [
                        under
                        for stems_of in inner
                        for _, _, under in sorted(stems_of[inner_stem], key=lambda item: item[0])
                    ]
                    found.append(Family((*node, stem, inner_stem), members, (place, place + 1)))
    return found


def _by_class(node: tuple, stem: str, group: list) -> Iterator[Family]:
    """Of numbered torch modules (`nn.Sequential`), those that have tensors of the same kinds."""
    place = len(node)
    classes: dict[tuple, list] = defaultdict(list)
    for _, _, under in group:
        if all(isinstance(e, Tensor) and len(e.components) == place + 2 for e in under):
            classes[tuple(sorted({(e.kind, len(e.shape), str(e.components[-1])) for e in under}))].append(under)
    for members in classes.values():
        if 1 < len(members) < len(group):
            yield Family((*node, stem), members, (place,))


def _stacked_families(slots: list[Slot], counts: set[int]) -> list[Family]:
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
                found.append(Family(node, members, ()))
    return found


def align(slots: list[Slot], tensors: list[Tensor]) -> tuple[list[Slot], list[Tensor]]:
    """Gives the slots and the tensors of layers that belong together the same `layer`, and patterns.

    Layers belong together where they are as many and of the same numbers of elements; where none are, of the nearest.
    """
    done_slots: list[Slot] = []
    done_tensors: list[Tensor] = []
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
            inner_slots, inner_tensors = align(left, right)
            done_slots += inner_slots
            done_tensors += inner_tensors
    return done_slots + slots, done_tensors + tensors


def _label(slot: Slot, family: Family) -> str:
    """A name for a family that is the same in every layer that has it."""
    depth = len(family.text) - len(family.places)
    return ".".join(map(str, (*slot.pattern[:depth], *family.text[depth:])))


def _best_pair(slots: list[Slot], tensors: list[Tensor]) -> tuple[Family, Family] | None:
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
