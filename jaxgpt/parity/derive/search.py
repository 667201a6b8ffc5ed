"""What names and shapes leave open, decided by value: the choices with which both models compute the same."""

import heapq
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jaxgpt.parity.derive.conversion import Source
from jaxgpt.parity.derive.entries import Own, Their
from jaxgpt.parity.derive.layouts import Layout
from jaxgpt.parity.derive.plan import FORBIDDEN, Plan
from jaxgpt.parity.params import Path, path_name

EXACT = 1e-9  # of a float64 comparison: far above its rounding, far below any wrong weight
MAX_CHECKS = 400  # of the search in order of likelihood, and again of the descent after it
# Choices whose cost is so near to the likeliest's count as open; a synonym that only one of two names has costs more.
OPEN = 1.0


Check = Callable[[dict[Path, Source]], float]  # the relative error of the JAX model with a converter


@dataclass
class Choice:
    """One thing to decide: options with their costs, likeliest first."""

    options: list[tuple[float, object]]


class Search:
    """The search for the choices with which the JAX model computes what the PyTorch model does."""

    def __init__(self, plan: Plan, check: Check | None):
        self.plan, self.check = plan, check
        self.layouts = {own: plan.options(own, their) for own, their in plan.pairs.items()}
        self.convention = self._convention()
        self.choices: list[Choice] = []
        self.permutations: list[int] = []
        self.group_of: dict[Own, int] = {}
        self.own_choice: dict[Own, int] = {}
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

    def _penalty(self, own: Own, layout: Layout) -> float:
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
        groups: dict[tuple, list[Own]] = defaultdict(list)
        for own, options in self.layouts.items():
            if len(options) > 1:
                groups[(own.components[-1] in ("kernel", "weight"), tuple(x.label for x in options))].append(own)
        for members in groups.values():
            options = sorted((self._penalty(members[0], x), x.label) for x in self.layouts[members[0]])
            for own in members:
                self.group_of[own] = len(self.choices)
            self.choices.append(Choice(list(options)))
            if len(members) > 1:
                for own in members:
                    self.own_choice[own] = len(self.choices)
                    apart = [(1.5 + penalty, label) for penalty, label in options]
                    self.choices.append(Choice([(0.0, None), *apart]))

    def _add_permutations(self) -> None:
        """A choice for each class of torch modules, and of torch tensors, that could stand for one another."""
        own_of = {their: own for own, their in self.plan.pairs.items()}
        modules: dict[tuple, list[Their]] = defaultdict(list)
        for their in own_of:
            modules[(their.components[:-1], tuple(label for label, _ in their.first.layer))].append(their)
        classes: dict[tuple, list[list[Their]]] = defaultdict(list)
        for members in modules.values():
            members.sort(key=lambda p: str(p.components[-1]))
            classes[tuple((str(p.components[-1]), _form(p)) for p in members)].append(members)
        for group in classes.values():
            self._add_permutation(group, own_of, math.inf)
        tensors: dict[tuple, list[list[Their]]] = defaultdict(list)
        for their in own_of:
            tensors[_form(their)].append([their])
        for group in tensors.values():
            self._add_permutation(group, own_of, OPEN)

    def _add_permutation(self, group: list[list[Their]], own_of: Mapping[Their, Own], most: float) -> None:
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
            new = [self.plan.costs.get((own_of[p], q), FORBIDDEN) for p, q in swapped.items()]
            old = [self.plan.costs.get((own_of[p], p), 0.0) for p in swapped]
            penalty = max(sum(new) - sum(old), 0.05)
            if penalty < min(most, 50.0):
                options.append((penalty, swapped))
        if options:
            self.permutations.append(len(self.choices))
            options.sort(key=lambda option: option[0])
            self.choices.append(Choice([(0.0, {}), *options]))

    # ---- states: the index of an option for each choice ----

    def _pairs(self, state: tuple[int, ...]) -> dict[Own, Their]:
        pairs = dict(self.plan.pairs)
        for place in self.permutations:
            swapped = self.choices[place].options[state[place]][1]
            assert isinstance(swapped, dict)
            pairs = {own: swapped.get(their, their) for own, their in pairs.items()}
        return pairs

    def _labels(self, state: tuple[int, ...]) -> dict[Own, str]:
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
            error = self.check(self.plan.sources(pairs, labels))
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


def _form(pattern: Their) -> tuple:
    """What two torch patterns must share to stand for one another."""
    first = pattern.first
    return (first.kind, first.parts, pattern.shapes, tuple(sorted(pattern.members)))


def _with(state: tuple[int, ...], place: int, option: int) -> tuple[int, ...]:
    return (*state[:place], option, *state[place + 1 :])
