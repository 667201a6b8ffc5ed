"""What a converter is derived from: PyTorch's tensors, the JAX leaves, and the patterns that layers make of both."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

from jaxgpt.parity.derive import naming
from jaxgpt.parity.derive.conversion import Step
from jaxgpt.parity.params import Path


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


@dataclass(eq=False)
class Tensor:
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
class Slot:
    """A JAX leaf, or one layer's part of a leaf with a leading axis of layers."""

    path: Path
    components: tuple[str | int, ...]
    shape: tuple[int, ...]
    index: int | None = None
    counts: bool = True
    pattern: tuple[str | int, ...] = ()
    layer: tuple[tuple[str, int], ...] = ()


Entry = TypeVar("Entry", Tensor, Slot)


@dataclass(eq=False)
class Pattern(Generic[Entry]):
    """The tensors, or the slots, that differ in the number of their layer alone."""

    components: tuple[str | int, ...]
    members: dict[tuple[tuple[str, int], ...], Entry]
    words: tuple[tuple[str, ...], ...] = ()

    @property
    def first(self) -> Entry:
        return next(iter(self.members.values()))

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(self.members[layer].shape for layer in sorted(self.members))


Own: TypeAlias = Pattern[Slot]
Their: TypeAlias = Pattern[Tensor]


def patterns(entries: Sequence[Entry]) -> list[Pattern[Entry]]:
    groups: dict[tuple, Pattern[Entry]] = {}
    for e in entries:
        key = (e.pattern, tuple(label for label, _ in e.layer))
        groups.setdefault(key, Pattern[Entry](e.pattern, {})).members[e.layer] = e
    for pattern in groups.values():
        texts = [pattern.components, *getattr(pattern.first, "aliases", ())]
        pattern.words = tuple(naming.words(text) for text in texts)
    return list(groups.values())
