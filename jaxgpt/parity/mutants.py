"""Mutants: faults planted on one side, which show that the checks can fail.

A fault is a patch. A probe is a check at its smallest, run while the fault is planted. A mutant names its probes; the
first must catch it with at least `ENOUGH` times its tolerance.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from jaxgpt.parity.harness import Row
from jaxgpt.parity.tolerances import RAISED, raised_row

ENOUGH = 10.0  # times the tolerance

Patch = Callable[[], AbstractContextManager[Any]]
Probe = Callable[[], Iterator[Row]]


@dataclass(frozen=True)
class Mutant:
    """One fault. `probes`: names of probes; the first must catch it."""

    name: str
    patch: Patch
    probes: tuple[str, ...]


def put(target: Any, name: str, value: Any) -> Patch:
    """Replaces target.name by the value."""
    return lambda: patch.object(target, name, value)


def wrap(target: Any, name: str, wrapper: Callable[[Any], Any]) -> Patch:
    """Replaces target.name by wrapper(the original)."""
    return lambda: patch.object(target, name, wrapper(getattr(target, name)))


def together(*patches: Patch) -> Patch:
    """All patches at once."""

    @contextmanager
    def all_of_them() -> Iterator[None]:
        with ExitStack() as stack:
            for one in patches:
                stack.enter_context(one())
            yield

    return all_of_them


def find(mutants: Sequence[Mutant], name: str) -> Mutant:
    """The mutant of that name, or the only one whose name contains it. Raises `LookupError`, which names them."""
    matching = [m for m in mutants if name.lower() in m.name.lower()]
    matching = [m for m in matching if m.name == name] or matching
    if len(matching) != 1:
        names = "; ".join(m.name for m in matching or mutants)
        raise LookupError(f"{'several match' if matching else 'unknown'}; choose of: {names}")
    return matching[0]


def worst_row(name: str, probe: Probe) -> Row:
    """A probe's row with the largest signal; an exception is a row that has failed."""
    try:
        return max((row for row in probe() if not row.not_run), key=lambda row: row.signal)
    except Exception as e:
        return raised_row(name, e)


def run(mutant: Mutant, probes: Mapping[str, Probe]) -> dict[str, Row]:
    """The worst row of each of the mutant's probes, with the fault planted."""
    with mutant.patch():
        return {name: worst_row(name, probes[name]) for name in mutant.probes}


def caught(mutant: Mutant, rows: Mapping[str, Row]) -> bool:
    """Whether the mutant's first probe caught it, with enough signal; an exception catches nothing."""
    row = rows[mutant.probes[0]]
    return row.signal >= ENOUGH and row.check != RAISED
