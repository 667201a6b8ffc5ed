"""The whole comparison of a pair: its levels, the diagnosis of a failure, and the mutants that show it can fail."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from jaxgpt.errors import first_line
from jaxgpt.parity import report
from jaxgpt.parity.changes.base import Change
from jaxgpt.parity.changes.catalogue import all_changes
from jaxgpt.parity.changes.optimizers import optimizer_changes
from jaxgpt.parity.diagnosis import Diagnosis, diagnose
from jaxgpt.parity.harness import Row
from jaxgpt.parity.levels import LEVELS, TOLERANCES, Levels, gradient_row, update_rows
from jaxgpt.parity.mutants import ENOUGH
from jaxgpt.parity.pair import Pair
from jaxgpt.parity.params import path_name
from jaxgpt.parity.sides import Sides, prepare
from jaxgpt.parity.torch_side import prepare_torch

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "numpy")
MOST_UNDECIDED = 4  # lines
# The mutants: for each of these causes the first place of the pair that a change of it can be made in.
PLANTED = (
    "epsilon",
    "kernel transposed",
    "heads swapped",
    "weights swapped",
    "layers swapped",
    "bias missing",
    "scale missing",
    "activation",
    "attention scale",
    "mask off by one",
    "padding mask missing",
    "rotary base",
    "positions shifted",
    "residual missing",
    "gate order",
    "padding",
    "batch statistics",
    "last token dropped",
    "ignored labels counted",
    "loss reduction",
    "rounded to bfloat16",
)
OPTIMIZERS = (
    "learning rate",
    "schedule late",
    "decay mask",
    "coupled decay",
    "clip missing",
    "optimizer epsilon",
    "bias correction missing",
    "momentum",
)


@dataclass(frozen=True)
class PairMutant:
    """A mistake made on purpose. `signal`: the worst row's value over its tolerance; `row`: that row's check."""

    name: str
    signal: float
    row: str

    @property
    def caught(self) -> bool:
        """Whether the signal is at least ten times the tolerance."""
        return self.signal >= ENOUGH

    def to_json(self) -> dict[str, Any]:
        signal = self.signal if math.isfinite(self.signal) else str(self.signal)
        return {"name": self.name, "caught": self.caught, "signal": signal, "row": self.row}


@dataclass(frozen=True)
class Comparison:
    """What the comparison of a pair found. `mutants` is empty where a level fails: they would show nothing."""

    name: str
    rows: list[Row]
    diagnosis: Diagnosis
    mutants: list[PairMutant]
    converter: str
    seconds: float
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether no row has failed."""
        return not any(row.status == "FAILED" for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """The rows, the diagnosis and the mutants, for `--json`."""
        return {
            "pair": self.name,
            "passed": self.passed,
            "environment": report.environment(PACKAGES),
            "seconds": round(self.seconds, 1),
            "rows": [_row_json(row) for row in self.rows],
            "departure": vars(self.diagnosis.departure) if self.diagnosis.departure else None,
            "diagnosis": [finding.to_json() for finding in self.diagnosis.findings],
            "mutants": [mutant.to_json() for mutant in self.mutants],
            "converter": self.converter,
            "notes": self.notes,
        }

    def text(self) -> str:
        """The tables for a terminal."""
        lines = [report.table(self.rows), *self._diagnosis_lines(), *self._mutant_lines()]
        return "\n".join([*lines, *self.notes])

    def _diagnosis_lines(self) -> Iterator[str]:
        if self.passed:
            return
        yield ""
        if where := self.diagnosis.departure:
            inputs = "its inputs are equal, its output is not" if where.inputs_equal else "its output is not equal"
            jax = f"; in JAX: {where.jax}" if where.jax else ""
            yield f"departs at {where.layer or 'the model'} ({where.operation}): {inputs}{jax}"
        elif not self.diagnosis.findings:
            if all(row.precision not in ("any", "float64") for row in self.rows if row.status == "FAILED"):
                yield "in float64 both are equal: what differs is the rounding in the rows' precision"
            else:
                yield "each array of one side has its equal on the other: a single number differs, or the output alone"
        for finding in self.diagnosis.findings:
            left = "not tried" if finding.left is None else f"with it removed the difference is {finding.left:.1e}"
            jax = f" [{finding.jax}]" if finding.jax else ""
            yield f"  {finding.cause} in {finding.layer or 'the model'}{jax}: {finding.detail}; {left}"

    def _mutant_lines(self) -> Iterator[str]:
        if not self.mutants:
            return
        unseen = [mutant.name for mutant in self.mutants if not mutant.caught]
        yield ""
        yield f"{len(self.mutants) - len(unseen)} of {len(self.mutants)} mutants caught"
        for mutant in self.mutants:
            signal = f"{mutant.signal:.1e} times the tolerance of {mutant.row}" if mutant.caught else "NOT SEEN"
            yield f"  {mutant.name}: {signal}"


def compare(pair: Pair, mutants: bool = True, say: Callable[[str], None] = lambda line: None) -> Comparison:
    """Compares a pair at every level, diagnoses what fails, and plants mutants if nothing does.

    Args:
        mutants: whether to plant them.
        say: takes a line of progress.

    Raises:
        PairError: a function of the pair raises, or gives what cannot be compared.
    """
    begun = time.perf_counter()
    n_threads = torch.get_num_threads()
    prepare_torch()
    torch.set_num_threads(1)  # small models: threads cost more than they give, and sums keep their order
    try:
        levels, rows = compare_levels(pair, say)
        found, planted, notes = Diagnosis(None, []), [], list(_notes(levels.sides))
        try:
            if any(row.status == "FAILED" for row in rows):
                say("diagnosis")
                found = diagnose(levels, rows)
            elif mutants:
                say("mutants")
                planted = list(plant(levels))
        except Exception as e:  # the verdict stands, whatever the models do that a record of them cannot follow
            what = "diagnosis" if any(row.status == "FAILED" for row in rows) else "mutants"
            notes.append(f"no {what}: {type(e).__name__}: {first_line(e)}")
    finally:
        prepare_torch(False)
        torch.set_num_threads(n_threads)
    seconds = time.perf_counter() - begun
    return Comparison(pair.name or "pair", rows, found, planted, levels.sides.converter, seconds, notes)


def compare_levels(pair: Pair, say: Callable[[str], None] = lambda line: None) -> tuple[Levels, list[Row]]:
    """The rows of every level, in a process that `prepare_torch` has set up. Raises `PairError` as `compare` does."""
    say("both models, from the same weights")
    levels = Levels(prepare(pair, say))
    levels.check_finite()
    levels.check_shapes()
    rows: list[Row] = []
    for level in LEVELS:
        say(f"level {level}")
        rows.extend(levels.rows(level))
    return levels, rows


def plant(levels: Levels) -> Iterator[PairMutant]:
    """Each mistake of PLANTED and OPTIMIZERS that can be made in the pair, and the row that sees it best.

    The mistakes are made on PyTorch's side: a comparison is the same from both.
    """
    sides = levels.sides
    changes = all_changes(sides.torch.recorded(sides.batches[0]))
    for cause in PLANTED:
        for change in [c for c in changes if c.cause == cause][:1]:
            yield _model_mutant(levels, change)
    if sides.pair.torch_optimizer is None:
        return
    ours, state = levels.jax_trained["float64"], sides.torch.state
    batches = sides.batches[: sides.pair.n_updates]
    candidates = optimizer_changes(sides.torch, batches, levels.torch_trained["float64"])
    for cause in OPTIMIZERS:
        for change in [c for c in candidates if c.cause == cause][:1]:
            theirs = sides.torch.train(batches, "float64", change.make_update)
            yield _worst(change.name, list(update_rows("", ours, theirs, state, levels.updated)))


def _model_mutant(levels: Levels, change: Change) -> PairMutant:
    ours = levels.jax_results["float64"][0]
    try:
        theirs = levels.sides.torch.results(levels.sides.batches[0], "float64", change.edits, logits=False)
    except Exception:  # the change does not fit this model: an error is seen, too
        return PairMutant(change.name, math.inf, "an error")
    error = abs(theirs.loss - ours.loss) / abs(ours.loss) if math.isfinite(theirs.loss) else math.inf
    rows = [TOLERANCES.row("loss", "float64", "", error)]
    truth = levels.torch_results["float64"][0].grads
    if names := [name for name in levels.compared[0] if truth[name].any()]:
        rows.append(gradient_row("", [ours.grads], [theirs.grads], names))
    return _worst(change.name, rows)


def _worst(name: str, rows: Sequence[Row]) -> PairMutant:
    row = max(rows, key=lambda row: row.signal)
    return PairMutant(name, row.signal, row.check)


def _notes(sides: Sides) -> Iterator[str]:
    for line in sides.undecided[:MOST_UNDECIDED]:
        yield f"the derived converter: {line}"
    if len(sides.undecided) > MOST_UNDECIDED:
        yield f"the derived converter: {len(sides.undecided) - MOST_UNDECIDED} more arrays have other candidates"
    if sides.mapping.computed:
        names = ", ".join(map(path_name, sides.mapping.computed))
        yield (
            f"the converter computes {names} from several elements: their gradients are compared along random "
            "directions, their updates are not"
        )
    if sides.torch.moved:
        names = ", ".join(sides.torch.moved[:3]) + (", ..." if len(sides.torch.moved) > 3 else "")
        yield (
            f"{len(sides.torch.moved)} constant tensors ({names}) were moved by a tenth on both sides: a bias of 0 "
            "would hide that it is missing"
        )
    if sides.pair.clip is not None:
        yield "the clip is compared without the 1e-6 that clip_grad_norm_ adds to the norm"


def _row_json(row: Row) -> dict[str, Any]:
    values = row.to_json()
    return {"level": values.pop("check"), **values}
