"""Where a pair departs, and why.

The place is the first value that only one side computes; the cause is the change that makes the difference vanish.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from jaxgpt.parity.changes.base import Change, grouped, merged, pattern
from jaxgpt.parity.changes.catalogue import all_changes
from jaxgpt.parity.changes.gradients import gradient_changes
from jaxgpt.parity.changes.norms import running_statistics
from jaxgpt.parity.changes.optimizers import (
    OptimizerChange,
    decayed_on_one_side,
    estimated_factor,
    optimizer_changes,
)
from jaxgpt.parity.graph import Value, first_departure, matches
from jaxgpt.parity.harness import Row, rms
from jaxgpt.parity.levels import Levels, relative, update_rows
from jaxgpt.parity.params import path_name
from jaxgpt.parity.torch_side import Edit, Results

REMOVED = 1e-9  # a change explains a difference if what is left is rounding
HELPS = 0.5  # of the difference must go before a change is named at all
UNTOLD = "none of the changes that were tried removes it"
FIRST_OF_TWO = 12  # changes that are tried together with every other one
MOST = 5  # findings that are worth a reader's time


@dataclass(frozen=True)
class Departure:
    """The first value that only one side computes.

    Attributes:
        layer: PyTorch's module; `operation`: its function.
        jax: the place in the JAX program; "" where every value of it has its equal.
        inputs_equal: whether the JAX side computes what goes into the operation.
    """

    layer: str
    operation: str
    jax: str
    inputs_equal: bool


@dataclass(frozen=True)
class Finding:
    """A cause that was tried.

    Attributes:
        layer: PyTorch's module or modules, or "optimizer".
        jax: the arrays or the place of it on the JAX side.
        error: that of the level without the change, `left`: with it.
    """

    level: str
    cause: str
    layer: str
    detail: str
    jax: str
    error: float
    left: float | None

    @property
    def explains(self) -> bool:
        return self.left is not None and self.left <= REMOVED

    def to_json(self) -> dict[str, Any]:
        left = self.left if self.left is None or math.isfinite(self.left) else str(self.left)
        return {
            "level": self.level,
            "layer": self.layer,
            "jax": self.jax,
            "cause": self.cause,
            "detail": self.detail,
            "error": self.error if math.isfinite(self.error) else str(self.error),
            "error_with_cause_removed": left,
        }


@dataclass(frozen=True)
class Diagnosis:
    """Where the pair departs, None if nothing does, and the causes, likeliest first."""

    departure: Departure | None
    findings: list[Finding]


def diagnose(levels: Levels, rows: Sequence[Row]) -> Diagnosis:
    """The diagnosis of rows of which some have failed, of the first level that departs."""
    failed = [row for row in rows if row.status == "FAILED"]
    found = _Diagnosis(levels)
    findings = found.of_parameters(failed)
    departure = None
    checks = {row.check for row in failed if row.precision == "float64"}
    if checks & {"forward", "loss"}:
        departure = found.departure()
        causes = found.of_forward(departure)
        # What explains the difference comes before what the parameters alone say of it.
        findings = [*causes, *findings] if causes and causes[0].explains else [*findings, *causes]
    elif checks & {"gradients", "gradients that are 0"}:
        findings += found.of_gradients()
    elif any(check.startswith("updates") for check in checks):
        findings += found.of_updates()
    return Diagnosis(departure, findings)


class _Diagnosis:
    """The search for a cause, on the batch that shows the difference best."""

    def __init__(self, levels: Levels):
        self.levels, self.sides = levels, levels.sides
        self.at = levels.departing_batch()
        self.batch = self.sides.batches[self.at]
        self.record = self.sides.torch.recorded(self.batch)

    def ours(self) -> Results:
        return self.levels.jax_results["float64"][self.at]

    def truth(self) -> Results:
        return self.levels.torch_results["float64"][self.at]

    # ----------------------------------------------------------------------------------------------- where it departs

    def departure(self) -> Departure | None:
        theirs, ours = self.record.values(), self.sides.jax_values(self.at)
        equal = matches(theirs, ours)
        value = first_departure(theirs, set(equal))
        if value is None:
            return None
        known = {i for i in value.inputs if i in equal or not theirs[i].trained}
        place = first_departure(ours, set(matches(ours, theirs)))
        return Departure(value.where, value.operation, _where(place), len(known) == len(value.inputs))

    def jax_names(self, change: Change) -> str:
        """The JAX arrays that hold what the changed operations take."""
        names = [n for at in change.edits for n in self.record.operations[at].parameters]
        inside = [
            n for n in self.sides.mapping.shapes if n.startswith(tuple(f"{p}." for p in change.layer.split(", ")))
        ]
        paths = [path for n in dict.fromkeys(names or inside) for path in self.sides.mapping.paths(n)]
        return ", ".join(path_name(path) for path in dict.fromkeys(paths[:4]))

    # --------------------------------------------------------------------------------------------------- parameters

    def of_parameters(self, failed: Sequence[Row]) -> list[Finding]:
        findings = []
        mapping, ties = self.sides.mapping, set(self.sides.torch.ties.values())
        for row in failed:
            if row.check == "parameters, mapped twice":
                for name, count in mapping.times_held().items():
                    if (count > 1).any() and name in self.sides.torch.parameters:
                        cause = "tie cut" if name in ties else "mapped twice"
                        jax = ", ".join(map(path_name, mapping.paths(name)))
                        detail = "separate arrays, which receive an update each"
                        left = self.without_the_tie(name) if cause == "tie cut" else None
                        layer = name.rpartition(".")[0]
                        findings.append(Finding("parameters", cause, layer, detail, jax, row.value, left))
            elif row.check == "parameters, unmapped":
                for name in row.note.removeprefix("unmapped: ").split(", "):
                    findings.append(
                        Finding("parameters", "unmapped", name, "no JAX array holds it", "", row.value, None)
                    )
            elif row.check == "parameters, of another origin":
                findings.append(Finding("parameters", "of another origin", "", row.note, "", row.value, None))
        return findings

    def without_the_tie(self, name: str) -> float:
        """How far the gradients of the separate arrays, summed, are from the tied tensor's: 0 if the tie is all."""
        return relative(self.ours().grads[name], self.truth().grads[name])

    # ------------------------------------------------------------------------------------------------ forward, loss

    def of_forward(self, departure: Departure | None) -> list[Finding]:
        """Each change tried on the loss, and those that remove the difference on the gradients, too."""
        loss, before = self.ours().loss, self.truth().loss
        error = _difference(before, loss)
        changes = all_changes(self.record)
        tried = []
        for change in changes:
            left = self.loss_error(change.edits)
            tried.append((left, change))
        explained = [change for left, change in tried if left <= REMOVED]
        findings = []
        for change in explained:
            left = max(self.loss_error(change.edits), self.gradient_error(change.edits))
            findings.append((self.rank(change, departure), left, change))
        findings.sort(key=lambda item: (item[1] > REMOVED, item[0]))
        results = [
            Finding("forward", c.cause, c.layer, c.detail, self.jax_names(c) or _jax(departure), error, left)
            for _, left, c in findings[:MOST]
        ]
        if results and results[0].explains:
            return results
        return results + self.of_two(tried, error, departure)

    def rank(self, change: Change, departure: Departure | None) -> tuple[bool, int]:
        """Changes of the layer that departs come first, then those that change the least."""
        elsewhere = departure is not None and not _is_in(departure.layer, change.layer)
        return elsewhere, len(change.edits)

    def of_two(self, tried: list[tuple[float, Change]], error: float, departure: Departure | None) -> list[Finding]:
        """Two faults at once: the pairs of changes, of which one is in the layer that departs first."""
        if departure is None:
            return [self.of_scale(error)]
        how_far = [(self.moves_on(change, departure), -i, change) for i, (_, change) in enumerate(tried)]
        first = [change for far, _, change in sorted(how_far, key=lambda item: item[:2], reverse=True) if far]
        if not first:  # both may be in one operation, which then departs with either alone
            first = [change for _, change in tried if _is_in(departure.layer, change.layer)]
        for one in first[:FIRST_OF_TWO]:
            for _, other in tried:
                orders = [(one, other), (other, one)] if set(other.edits) & set(one.edits) else [(one, other)]
                left = min(self.loss_error(merged(a.edits, b.edits)) for a, b in orders)
                if left <= REMOVED:
                    together = "together with the other"
                    return [self.finding("forward", change, error, left, together) for change in (one, other)]
        partial = [(left, change) for left, change in tried if change in first and left <= HELPS * error]
        if partial:
            left, change = min(partial, key=lambda item: item[0])
            more = "it moves the departure on, something else is left"
            return [self.finding("forward", change, error, left, more)]
        if rounded := self.rounded():
            detail = f"every number of it fits into {rounded}"
            return [Finding("forward", f"rounded to {rounded}", departure.layer, detail, departure.jax, error, None)]
        return [Finding("forward", "unknown", departure.layer, UNTOLD, departure.jax, error, None)]

    def of_scale(self, error: float) -> Finding:
        """A loss that is PyTorch's times a number, where all arrays are equal."""
        if error <= REMOVED:
            detail = "the losses are equal: torch_logits and jax_logits give something else"
            return Finding("forward", "unknown", "logits", detail, "", error, None)
        both = list(zip(self.levels.jax_results["float64"], self.levels.torch_results["float64"], strict=True))
        factor = self.ours().loss / self.truth().loss
        left = max(abs(ours.loss - factor * truth.loss) / abs(factor * truth.loss) for ours, truth in both)
        if left > REMOVED:
            detail = "every array has its equal: a single number differs, or the output alone"
            return Finding("loss", "unknown", "loss", detail, "", error, None)
        return Finding("loss", "loss reduction", "loss", f"PyTorch's loss times {factor:.6g}", "", error, left)

    def rounded(self) -> str:
        """ "bfloat16" or "float16" if the first departing value of the JAX side holds such numbers alone; else ""."""
        ours = self.sides.jax_values(self.at)
        value = first_departure(ours, set(matches(ours, self.record.values())))
        if value is None or value.array is None:
            return ""
        for dtype in (torch.bfloat16, torch.float16):
            numbers = torch.from_numpy(value.array)
            if torch.equal(numbers.to(dtype).double(), numbers):
                return str(dtype).removeprefix("torch.")
        return ""

    def finding(self, level: str, change: Change, error: float, left: float, more: str = "") -> Finding:
        detail = f"{change.detail}; {more}" if more else change.detail
        return Finding(level, change.cause, change.layer, detail, self.jax_names(change), error, left)

    def moves_on(self, change: Change, departure: Departure) -> float:
        """By how many operations the first departure comes later with a change in its layer; infinite: it is gone."""
        if not _is_in(departure.layer, change.layer) and not _inside(departure.layer, change.layer):
            return 0
        try:
            values = self.sides.torch.recorded(self.batch, change.edits).values()
        except Exception:
            return 0
        ours = self.sides.jax_values(self.at)
        now = first_departure(values, set(matches(values, ours)))
        before = self.record.values()
        was = first_departure(before, set(matches(before, ours)))
        return 0 if was is None else math.inf if now is None else max(0, now.index - was.index)

    def loss_error(self, edits: Mapping[int, Edit]) -> float:
        try:
            result = self.sides.torch.results(self.batch, "float64", edits, logits=False, grads=False)
        except Exception:  # a change may not fit: another shape, for one
            return math.inf
        return _difference(result.loss, self.ours().loss)

    def gradient_error(self, edits: Mapping[int, Edit]) -> float:
        """The largest relative error of a gradient, with a change."""
        try:
            grads = self.sides.torch.results(self.batch, "float64", edits, logits=False).grads
        except Exception:
            return math.inf
        return _gradient_difference(self.ours().grads, grads, self.levels.compared[0])

    # --------------------------------------------------------------------------------------------------- gradients

    def of_gradients(self) -> list[Finding]:
        """Gradients stopped or scaled at each operation."""
        ours, truth = self.ours().grads, self.truth().grads
        names = self.levels.compared[0]
        error = _gradient_difference(ours, truth, names)
        factors = []
        for name in names:
            factor = float(np.sum(ours[name] * truth[name]) / (np.sum(truth[name] ** 2) or 1.0))
            if abs(factor - 1) > 1e-6 and rms(ours[name] - factor * truth[name]) <= 1e-9 * rms(truth[name]):
                factors.append(float(f"{factor:.8g}"))
        factors = [f for f in dict.fromkeys([*factors, 2.0, 0.5]) if f][:4]
        tried = []
        for change in gradient_changes(self.record, factors):
            left = self.gradient_error(change.edits)
            if left <= REMOVED:
                tried.append((len(change.edits), left, change))
        tried.sort(key=lambda item: item[0])
        found = [
            Finding("gradients", c.cause, c.layer, c.detail, self.jax_names(c), error, left) for _, left, c in tried
        ]
        if found:
            return found[:MOST]
        worst = max(names, key=lambda name: rms(ours[name] - truth[name]) / (rms(truth[name]) or self.levels.largest))
        jax = ", ".join(map(path_name, self.sides.mapping.paths(worst)))
        return [Finding("gradients", "unknown", worst.rpartition(".")[0], UNTOLD, jax, error, None)]

    # ----------------------------------------------------------------------------------------------------- updates

    def of_updates(self) -> list[Finding]:
        """Another optimizer, schedule or clip; other running statistics."""
        ours, truth = self.levels.jax_trained["float64"], self.levels.torch_trained["float64"]
        batches = self.sides.batches[: self.sides.pair.n_updates]
        names, state = self.levels.updated, self.sides.torch.state
        buffers = [n for n in truth.buffers if self.sides.mapping.paths(n) and self.sides.jax.structure.is_nnx]

        def left_of(trajectory: Any) -> float:
            """The worst row, with another trajectory in place of PyTorch's."""
            values = [row.value for row in update_rows("", ours, trajectory, state, names)]
            values += [
                relative(ours.buffers[n], trajectory.buffers[n]) for n in buffers if self.sides.jax.structure.is_nnx
            ]
            return max(values)

        def left_with(**changes: Any) -> float:
            try:
                return left_of(self.sides.torch.train(batches, "float64", **changes))
            except Exception:  # a change may not fit this model
                return math.inf

        error = left_of(truth)
        first = {name: truth.params[0][name] for name in names}
        factor = estimated_factor(ours.params[0], first, {name: state[name] for name in names})
        factors = [] if factor is None else [factor, float(f"{factor:.3g}")]
        tried: list[tuple[float, OptimizerChange | Change]] = []
        toggled = decayed_on_one_side(ours, truth, {name: state[name] for name in names})
        for change in optimizer_changes(self.sides.torch, batches, truth, factors, toggled):
            tried.append((left_with(make_update=change.make_update), change))
        edits = list(running_statistics(self.record))
        for change in [*edits, *grouped(edits)]:
            tried.append((left_with(edits=change.edits), change))
        tried = [(left if math.isfinite(left) else math.inf, change) for left, change in tried]
        tried.sort(key=lambda item: (item[0] > 1e-7, item[0] if item[0] > 1e-7 else 0))
        tried = list(
            {(change.cause, change.detail, change.layer): (left, change) for left, change in tried[::-1]}.values()
        )
        tried.reverse()
        good = [(left, change) for left, change in tried if left <= 1e-7] or [
            (left, change) for left, change in tried[:2] if left <= HELPS * error
        ]
        found = [
            Finding("updates", c.cause, c.layer, c.detail, "optax_optimizer", error, left) for left, c in good[:MOST]
        ]
        return found or [Finding("updates", "unknown", "optimizer", UNTOLD, "", error, None)]


def _jax(departure: Departure | None) -> str:
    return departure.jax if departure else ""


def _where(value: Value | None) -> str:
    return "" if value is None else f"{value.where} {value.operation}".strip()


def _is_in(layer: str, layers: str) -> bool:
    """Whether a layer is one of several, which may have `*` for their numbers."""
    return bool({layer, pattern(layer)} & set(layers.split(", ")))


def _inside(layer: str, other: str) -> bool:
    return any(layer.startswith(f"{part}.") or part.startswith(f"{layer}.") for part in other.split(", "))


def _difference(loss: float, other: float) -> float:
    return abs(loss - other) / max(abs(other), 1e-30) if math.isfinite(loss) else math.inf


def _gradient_difference(ours: Mapping[str, Any], theirs: Mapping[str, Any], names: Iterable[str]) -> float:
    """The largest relative L2 error over tensors; one that is 0 on one side counts by the largest gradient."""
    largest = max(rms(theirs[name]) for name in theirs) or 1.0
    errors = [rms(ours[n] - theirs[n]) / max(rms(theirs[n]), 1e-8 * largest) for n in names]
    return max((math.inf if math.isnan(error) else error for error in errors), default=0.0)
