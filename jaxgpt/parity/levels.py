"""The levels at which a pair is compared: parameters, forward, loss, gradients, updates.

No level asks for a tolerance. In float64 a row is held against float64's own precision. In float32 and bfloat16 two
correct programs differ, so the row is R: the root mean square of the JAX side's error over that of PyTorch's own, both
against PyTorch in float64.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np

from jaxgpt.errors import first_line
from jaxgpt.parity.harness import Refused, Row, checked, rms
from jaxgpt.parity.pair import PairError
from jaxgpt.parity.params import path_name
from jaxgpt.parity.sides import N_BATCHES, Sides
from jaxgpt.parity.tolerances import Tolerance, Tolerances
from jaxgpt.parity.torch_side import Results, Trajectory

LEVELS = ("parameters", "forward", "loss", "gradients", "updates")
NEAR_ZERO = 1e-10  # a gradient this small beside the largest one is 0 but for rounding: that of a key's bias, for one
FLOOR = 1e-30  # a value is refused as near zero only where it is zero: what is compared is what the pair computes

_FLOAT64 = "sums of a few hundred terms, each rounded by 1e-16, through a dozen layers"
_R = "twice PyTorch's own error: another order of summation"
_PAIR: dict[tuple[str, str], Tolerance] = {
    ("parameters, unmapped", "any"): Tolerance(0.0, None, "every tensor that takes part has its place"),
    ("parameters, mapped twice", "any"): Tolerance(0.0, None, "two copies of one tensor receive different updates"),
    ("parameters, of another origin", "any"): Tolerance(0.0, None, "an array that is trained comes from PyTorch"),
    ("forward", "float64"): Tolerance(1e-12, None, _FLOAT64),
    ("forward", "float32"): Tolerance(2.0, None, _R),
    ("forward", "bfloat16"): Tolerance(2.0, None, _R + ", and other casts between the layers"),
    ("loss", "float64"): Tolerance(1e-12, None, _FLOAT64),
    ("loss", "float32"): Tolerance(4.0, None, f"{N_BATCHES} losses: chance alone makes R 2 of equal errors"),
    ("gradients", "float64"): Tolerance(1e-12, None, _FLOAT64 + " and back"),
    ("gradients that are 0", "float64"): Tolerance(1e-12, None, "rounding, beside the largest gradient"),
    ("gradients, R median", "float32"): Tolerance(2.0, None, _R),
    ("gradients, R worst", "float32"): Tolerance(4.0, None, "XLA's CPU sums run straight, PyTorch's cascade"),
    ("updates, every loss", "float64"): Tolerance(1e-10, None, "Adam amplifies rounding"),
    ("updates, every parameter", "float64"): Tolerance(1e-8, None, "the error over what the updates have changed"),
    ("updates, buffers", "float64"): Tolerance(1e-10, None, "averages over the updates"),
    ("updates, R(t) median", "float32"): Tolerance(2.0, None, _R),
    ("updates, R(t) worst", "float32"): Tolerance(4.0, None, "single updates by chance; Adam amplifies rounding"),
}
TOLERANCES = Tolerances(_PAIR)


class Levels:
    """The rows of a pair, level by level; what a level has computed serves the next."""

    def __init__(self, sides: Sides):
        self.sides, self.pair = sides, sides.pair
        self.case = sides.pair.name or "pair"

    def row(self, check: str, precision: str, **values: Any) -> Row:
        return TOLERANCES.row(check, precision, self.case, **values)

    def not_run(self, check: str, precision: str, why: str) -> Row:
        return self.row(check, precision, note=why, not_run=True)

    def rows(self, level: str) -> Iterator[Row]:
        """The rows of one level of LEVELS."""
        return getattr(self, level)()

    # ------------------------------------------------------------------------------------------------- parameters

    def parameters(self) -> Iterator[Row]:
        """Every tensor mapped once."""
        sides, mapping = self.sides, self.sides.mapping
        held = mapping.times_held()
        trained = {name: held[name] for name in sides.torch.parameters if name in held}
        if mapping.computed:  # what they hold is not known
            trained = {name: count for name, count in trained.items() if count.any()}
        unused = {name for name, grad in sides.truth.grads.items() if not grad.any()}
        unmapped = [name for name, count in trained.items() if (count == 0).any() and name not in unused]
        note = f"unmapped: {_list(unmapped)}" if unmapped else ""
        idle = [name for name, count in trained.items() if (count == 0).all() and name in unused]
        if idle and not note:
            note = f"left out, as the loss does not use them: {_list(idle)}"
        yield self.row("parameters, unmapped", "any", error=float(len(unmapped)), note=note)
        twice = {name: mapping.paths(name) for name, count in trained.items() if (count > 1).any()}
        note = "; ".join(f"{name} -> {_list(map(path_name, paths))}" for name, paths in twice.items())
        yield self.row("parameters, mapped twice", "any", error=float(len(twice)), note=note)
        new = [path_name(path) for path in sides.jax.flat if not mapping.sources[path] and path not in mapping.computed]
        note = f"from no PyTorch tensor: {_list(new)}; not trained here" if new else ""
        if mapping.computed and not note:
            note = f"computed from several tensors: {_list(map(path_name, mapping.computed))}"
        yield self.row("parameters, of another origin", "any", error=float(len(new)), note=note)

    # ---------------------------------------------------------------------------------------------------- results

    @cached_property
    def torch_results(self) -> dict[str, list[Results]]:
        """PyTorch's results of each batch in float64 and float32."""
        return {
            precision: [self.sides.torch.results(batch, precision) for batch in self.sides.batches[:N_BATCHES]]
            for precision in ("float64", "float32")
        }

    @cached_property
    def jax_results(self) -> dict[str, list[Results]]:
        """The JAX side's, with gradients under PyTorch's names; in float64 of the first batch alone."""
        found: dict[str, list[Results]] = {}
        for precision, count in (("float64", 1), ("float32", N_BATCHES)):
            found[precision] = [self._jax_results(batch, precision) for batch in self.sides.batches[:count]]
        return found

    def _jax_results(self, batch: Any, precision: str) -> Results:
        logits = self.sides.jax.logits(batch, precision)
        loss, grads = self.sides.jax.loss_and_grads(batch, precision)
        known = {path: grad for path, grad in grads.items() if path not in self.sides.mapping.computed}
        return Results(logits, loss, self.sides.mapping.gradients(known) if known else {})

    def check_finite(self) -> None:
        """Raises `PairError` where a loss is not finite: no comparison means anything then."""
        for precision, results in self.torch_results.items():
            if not all(math.isfinite(result.loss) for result in results):
                raise PairError(
                    f"Pair torch_loss: is not finite in {precision}; give other weights, or batches that it can compute"
                )
        for precision, results in self.jax_results.items():
            if not all(math.isfinite(result.loss) for result in results):
                where = self._first_not_finite()
                raise PairError(
                    f"Pair jax_loss: is not finite in {precision}, where PyTorch's is{where}; mend it there"
                )

    def _first_not_finite(self) -> str:
        for value in self.sides.jax_values:
            if value.array is not None and np.isnan(value.array).any():
                return f", first in {value.operation} at {value.where}"
        return ""

    def check_shapes(self) -> None:
        """Raises `PairError` where the two outputs have other shapes."""
        ours, theirs = self.jax_results["float64"][0].logits, self.torch_results["float64"][0].logits
        if ours is not None and theirs is not None and ours.shape != theirs.shape:
            remedy = "return them in the same form, with the same axes"
            raise PairError(f"Pair jax_logits, torch_logits: give shapes {ours.shape} and {theirs.shape}; {remedy}")

    # ---------------------------------------------------------------------------------------------- forward, loss

    def forward(self) -> Iterator[Row]:
        """The output."""
        if self.pair.torch_logits is None:
            for precision in ("float64", "float32", "bfloat16"):
                yield self.not_run("forward", precision, "give torch_logits and jax_logits")
            return
        truths = [result.logits for result in self.torch_results["float64"]]
        ours = self.jax_results["float64"][0].logits
        yield TOLERANCES.error_row("forward", "float64", self.case, partial(_relative, ours, truths[0]))
        low = [result.logits for result in self.torch_results["float32"]]
        mine = [result.logits for result in self.jax_results["float32"]]
        yield self.ratio_row("forward", "float32", lambda: pooled(mine, low, truths, "float32"))
        yield self.bfloat16(truths)

    def bfloat16(self, truths: Sequence[Any]) -> Row:
        batches = self.sides.batches[:N_BATCHES]
        try:
            low = [self.sides.torch.results(batch, "bfloat16", grads=False).logits for batch in batches]
        except Exception as e:
            return self.not_run("forward", "bfloat16", f"PyTorch: {type(e).__name__}: {_line(e)}")
        try:
            mine = [self.sides.jax.logits(batch, "bfloat16") for batch in batches]
        except Exception as e:
            return self.not_run("forward", "bfloat16", f"JAX: {type(e).__name__}: {_line(e)}")
        return self.ratio_row("forward", "bfloat16", lambda: pooled(mine, low, truths, "bfloat16"))

    def loss(self) -> Iterator[Row]:
        """The loss."""
        truths = [result.loss for result in self.torch_results["float64"]]
        ours = self.jax_results["float64"][0].loss
        yield self.row("loss", "float64", error=abs(ours - truths[0]) / max(abs(truths[0]), FLOOR))
        low = [result.loss for result in self.torch_results["float32"]]
        mine = [result.loss for result in self.jax_results["float32"]]
        arrays = [[np.array(losses)] for losses in (mine, low, truths)]
        yield self.ratio_row("loss", "float32", lambda: pooled(arrays[0], arrays[1], arrays[2], "float32"))

    def ratio_row(self, check: str, precision: str, errors: Callable[[], tuple[float, float]]) -> Row:
        return TOLERANCES.ratio_row(check, precision, self.case, errors)

    # -------------------------------------------------------------------------------------------------- gradients

    @cached_property
    def compared(self) -> tuple[list[str], list[str]]:
        """Names of the tensors whose gradients are compared: those with a gradient, and those whose gradient is 0."""
        truth = self.torch_results["float64"][0].grads
        known = [name for name in truth if self.sides.mapping.paths(name)]
        largest = max((rms(grad) for grad in truth.values()), default=0.0)
        zero = [name for name in known if rms(truth[name]) <= NEAR_ZERO * largest]
        return [name for name in known if name not in zero], zero

    def gradients(self) -> Iterator[Row]:
        """Gradients tensor by tensor, under PyTorch's names."""
        truth, ours = self.torch_results["float64"], self.jax_results["float64"][0].grads
        named, zero = self.compared
        if not named:
            yield self.not_run("gradients", "float64", "no gradient can be carried back to a PyTorch tensor")
            return
        yield gradient_row(self.case, ours, truth[0].grads, named)
        largest = max(rms(grad) for grad in truth[0].grads.values())
        if zero:
            error, where = max((rms(ours[name]) / largest, name) for name in zero)
            yield self.row("gradients that are 0", "float64", error=error, note=where if error > 1e-12 else "")
        low, mine = self.torch_results["float32"], self.jax_results["float32"]
        ratios = {}
        for name in named:
            of = [[result.grads[name] for result in results] for results in (mine, low, truth)]
            try:
                errors = pooled(of[0], of[1], of[2], "float32")
                ratios[name] = errors[0] / errors[1]
            except Refused:
                ratios[name] = math.inf
        where = max(ratios, key=lambda name: ratios[name])
        yield self.row("gradients, R median", "float32", ratio=statistics.median(ratios.values()))
        yield self.row("gradients, R worst", "float32", ratio=ratios[where], note=where)

    # ---------------------------------------------------------------------------------------------------- updates

    @cached_property
    def torch_trained(self) -> dict[str, Trajectory]:
        batches = self.sides.batches[: self.pair.n_updates]
        return {precision: self.sides.torch.train(batches, precision) for precision in ("float64", "float32")}

    @cached_property
    def jax_trained(self) -> dict[str, Trajectory]:
        """The JAX side's updates, under PyTorch's names."""
        found = {}
        for precision in ("float64", "float32"):
            losses, params = self.sides.jax.train(self.sides.batches[: self.pair.n_updates], precision)
            weights = [self.sides.mapping.weights(flat) for flat in params]
            found[precision] = Trajectory(losses, weights, weights[-1])
        return found

    def updates(self) -> Iterator[Row]:
        """N updates: every loss, every parameter, and what the model keeps beside them."""
        if self.pair.torch_optimizer is None:
            for check, precision in _PAIR:
                if check.startswith("updates"):
                    yield self.not_run(check, precision, "give torch_optimizer and optax_optimizer")
            return
        truth, ours = self.torch_trained["float64"], self.jax_trained["float64"]
        yield from update_rows(self.case, ours, truth, self.sides.torch.state, self.updated)
        held = [name for name in truth.buffers if self.sides.mapping.paths(name)]
        changed = [name for name in held if (truth.buffers[name] != self.sides.torch.state[name]).any()]
        if changed and self.sides.jax.structure.is_nnx:
            pairs = [(relative(ours.buffers[n], truth.buffers[n]), n) for n in changed]
            error, where = max(pairs)
            yield self.row("updates, buffers", "float64", error=error, note=where)
        low, mine = self.torch_trained["float32"], self.jax_trained["float32"]
        ratios = [self._ratio(t, mine, low, truth) for t in range(self.pair.n_updates)]
        yield self.row("updates, R(t) median", "float32", ratio=statistics.median(ratios))
        worst = int(np.argmax(ratios))
        yield self.row("updates, R(t) worst", "float32", ratio=ratios[worst], note=f"after update {worst + 1}")

    @cached_property
    def updated(self) -> list[str]:
        """Names of the parameters whose updates are compared: of a gradient of 0 Adam makes steps of its rounding."""
        return self.compared[0]

    def _ratio(self, t: int, mine: Trajectory, low: Trajectory, truth: Trajectory) -> float:
        names = self.updated
        errors = [
            math.sqrt(sum(float(np.sum((side.params[t][n] - truth.params[t][n]) ** 2)) for n in names))
            for side in (mine, low)
        ]
        return errors[0] / errors[1] if errors[1] else 0.0 if errors[0] == 0 else math.inf


def gradient_row(case: str, ours: Mapping[str, Any], truth: Mapping[str, Any], names: Sequence[str]) -> Row:
    """The largest relative L2 error of the named gradients, and the tensor it is in."""
    error, where = max((relative(ours[name], truth[name]), name) for name in names)
    return TOLERANCES.row("gradients", "float64", case, error, note=where)


def update_rows(
    case: str, ours: Trajectory, truth: Trajectory, start: Mapping[str, np.ndarray], names: Sequence[str]
) -> Iterator[Row]:
    """The losses and parameters of a trajectory in float64."""
    losses = np.array(truth.losses)
    error = float(np.max(np.abs(np.array(ours.losses) - losses) / np.maximum(np.abs(losses), FLOOR)))
    yield TOLERANCES.row("updates, every loss", "float64", case, error)
    errors = []
    for name in names:
        moved = rms(truth.params[-1][name] - start[name])
        difference = rms(ours.params[-1][name] - truth.params[-1][name])
        # A parameter that does not move must not move; its own size then stands for the change.
        errors.append((difference / (moved or rms(start[name]) or 1.0), name))
    error, where = max(errors)
    yield TOLERANCES.row("updates, every parameter", "float64", case, error, note=where)


def relative(ours: Any, truth: Any) -> float:
    """||ours - truth|| / ||truth||; infinite for what is not finite or has another shape."""
    try:
        return _relative(ours, truth)
    except Refused:
        return math.inf


def _relative(ours: Any, truth: Any) -> float:
    mine, theirs = checked(ours, truth, FLOOR)
    return rms(mine - theirs) / rms(theirs)


def pooled(ours: Sequence[Any], low: Sequence[Any], truths: Sequence[Any], precision: str) -> tuple[float, float]:
    """The root mean square errors of both sides over several batches, for R = the first / the second.

    PyTorch's own is at least what rounding the truth once to the precision costs: no result can be nearer but by luck.
    """
    mine = np.concatenate([np.ravel(_same(a, t)) for a, t in zip(ours, truths, strict=True)])
    theirs = np.concatenate([np.ravel(_same(a, t)) for a, t in zip(low, truths, strict=True)])
    truth = np.concatenate([np.ravel(t) for t in truths])
    rounding = rms(truth) * (2.0**-24 if precision == "float32" else 2.0**-8) / math.sqrt(3)
    return rms(mine - truth), max(rms(theirs - truth), rounding)


def _same(array: Any, truth: Any) -> np.ndarray:
    array = np.asarray(array, np.float64)
    if array.shape != np.shape(truth):
        raise Refused(f"shape {array.shape}, reference {np.shape(truth)}")
    if not np.isfinite(array).all():
        raise Refused("not finite")
    return array


def _line(error: Exception) -> str:
    return first_line(error, 80)


def _list(names: Any, most: int = 6) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
