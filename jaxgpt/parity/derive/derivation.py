"""The derivation of a weight converter: from PyTorch's state dict to any JAX parameter tree, where the user gives none.

Layers are aligned first: numbered modules on either side that are as many and of the same sizes, and layers stacked
along a leading axis. What remains are patterns (`h.*.attn.c_attn.weight`), matched all together by their names, their
shapes and the kinds of their modules, as an assignment of least cost. What names and shapes leave open, a measurement
decides: `check` runs both models with a candidate and returns the relative error.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxgpt.parity.derive.conversion import Source, function_code
from jaxgpt.parity.derive.entries import TorchTensor
from jaxgpt.parity.derive.plan import make_plan
from jaxgpt.parity.derive.search import Search
from jaxgpt.parity.derive.torch_tensors import variants
from jaxgpt.parity.params import Path, path_name


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
    plans = [make_plan(tensors, leaves) for tensors in variants(torch, leaves)]
    plan = min(plans, key=lambda p: (len(p.missing), p.left_over, p.cost))
    by_value = None if check is None or plan.missing else lambda sources: check(Derived(sources))
    sources, candidates, decided, error = Search(plan, by_value).run()
    derived = Derived(
        {path: sources[path] for path in leaves if path in sources},
        {path: candidates[path] for path in leaves if path in candidates},
        plan.unused(torch),
        plan.missing,
        tuple(decided),
        error,
    )
    for line in derived.decided:
        say(line)
    return derived
