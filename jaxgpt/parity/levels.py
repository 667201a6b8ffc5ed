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
# So few values may be exact by chance: PyTorch's own error of them is then taken to be at least as its median one.
FEW = 256
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
    ("gradients of computed arrays", "float64"): Tolerance(1e-6, None, "central differences of the converter"),
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
        grads = [result.grads for result in self.torch_results["float64"]]
        unused = {name for name in grads[0] if not any(grad[name].any() for grad in grads)}
        unmapped = [name for name, count in trained.items() if (count == 0).any() and name not in unused]
        note = f"unmapped: {_list(unmapped)}" if unmapped else ""
        idle = [name for name, count in trained.items() if (count == 0).all() and name in unused]
        if idle and not note:
            note = f"left out, as the loss does not use them: {_list(idle)}"
        yield self.row("parameters, unmapped", "any", error=float(len(unmapped)), note=note)
        twice = {name: mapping.paths(name) for name, count in trained.items() if (count > 1).any()}
        note = "; ".join(f"{name} -> {_list(map(path_name, paths))}" for name, paths in twice.items())
        yield self.row("parameters, mapped twice", "any", error=float(len(twice)), note=note)
        given = [path for path, array in sides.jax.flat.items() if array.size and path not in mapping.computed]
        new = [path_name(path) for path in given if not mapping.sources[path]]
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
        """The JAX side's, with gradients under PyTorch's names."""
        return {
            precision: [self._jax_results(batch, precision) for batch in self.sides.batches[:N_BATCHES]]
            for precision in ("float64", "float32")
        }

    def _jax_results(self, batch: Any, precision: str) -> Results:
        logits = self.sides.jax.logits(batch, precision)
        loss, grads = self.sides.jax.loss_and_grads(batch, precision)
        known = {path: grad for path, grad in grads.items() if path not in self.sides.mapping.computed}
        return Results(logits, loss, self.sides.mapping.gradients(known) if known else {})

    def check_finite(self) -> None:
        """Raises `PairError` where a loss is not finite, or says nothing of the parameters."""
        for precision, results in self.torch_results.items():
            if not all(math.isfinite(result.loss) for result in results):
                raise PairError(
                    f"Pair torch_loss: is not finite in {precision}; give other weights, or batches that it can compute"
                )
            for name in results[0].grads:
                if not all(np.isfinite(result.grads[name]).all() for result in results):
                    remedy = "give other weights, or batches that it can compute"
                    raise PairError(f"Pair torch_loss: its gradient of {name} is not finite in {precision}; {remedy}")
        truth = self.torch_results["float64"]
        if not any(result.loss for result in truth):
            raise PairError("Pair torch_loss: is 0 on every batch; give weights or batches of which it is not")
        if not any(grad.any() for result in truth for grad in result.grads.values()):
            raise PairError("Pair torch_loss: all its gradients are 0; let it depend on the parameters")
        for precision, results in self.jax_results.items():
            if not all(math.isfinite(result.loss) for result in results):
                where = self._first_not_finite()
                raise PairError(
                    f"Pair jax_loss: is not finite in {precision}, where PyTorch's is{where}; mend it there"
                )

    def _first_not_finite(self) -> str:
        for value in self.sides.jax_values(0):
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
        ours = [result.logits for result in self.jax_results["float64"]]
        yield TOLERANCES.error_row("forward", "float64", self.case, partial(_worst_relative, ours, truths))
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
        ours = [result.loss for result in self.jax_results["float64"]]
        yield self.row("loss", "float64", error=rms(np.subtract(ours, truths)) / rms(np.array(truths)))
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
        truth = [result.grads for result in self.torch_results["float64"]]
        known = [name for name in truth[0] if self.sides.mapping.paths(name)]
        zero = [name for name in known if all(rms(grads[name]) <= NEAR_ZERO * self.largest for grads in truth)]
        return [name for name in known if name not in zero], zero

    @cached_property
    def largest(self) -> float:
        """The largest root mean square of a gradient."""
        return max(rms(grad) for result in self.torch_results["float64"] for grad in result.grads.values())

    def departing_batch(self) -> int:
        """The batch whose loss or gradients in float64 differ the most."""

        def difference(ours: Results, truth: Results) -> float:
            loss = abs(ours.loss - truth.loss) / max(abs(truth.loss), FLOOR)
            grads = [rms(ours.grads[name] - truth.grads[name]) / self.largest for name in self.compared[0]]
            return max(loss, *map(_number, grads), 0.0)

        both = zip(self.jax_results["float64"], self.torch_results["float64"], strict=True)
        return int(np.argmax([difference(ours, truth) for ours, truth in both]))

    def gradients(self) -> Iterator[Row]:
        """Gradients tensor by tensor, under PyTorch's names."""
        truth, ours = self.torch_results["float64"], self.jax_results["float64"]
        named, zero = self.compared
        if self.sides.mapping.computed:
            yield self.computed_gradients()
        if zero:
            errors = [(max(rms(result.grads[name]) for result in ours) / self.largest, name) for name in zero]
            error, where = _worst(errors)
            yield self.row("gradients that are 0", "float64", error=error, note=where if error > 1e-12 else "")
        if not named:
            yield self.not_run("gradients", "float64", "no gradient can be carried back to a PyTorch tensor")
            return
        yield gradient_row(self.case, [result.grads for result in ours], [result.grads for result in truth], named)
        ratios = self.gradient_ratios(named)
        where = max(ratios, key=lambda name: ratios[name])
        yield self.row("gradients, R median", "float32", ratio=statistics.median(ratios.values()))
        yield self.row("gradients, R worst", "float32", ratio=ratios[where], note=where)

    def gradient_ratios(self, names: Sequence[str]) -> dict[str, float]:
        """R of each gradient in float32; infinite for a refused one."""
        sides = (self.jax_results["float32"], self.torch_results["float32"], self.torch_results["float64"])
        errors: dict[str, tuple[float, float]] = {}
        sizes: dict[str, float] = {}
        for name in names:
            ours, low, truth = ([result.grads[name] for result in results] for results in sides)
            try:
                errors[name] = pooled(ours, low, truth, "float32")
            except Refused:
                errors[name] = (math.inf, 1.0)
            sizes[name] = rms(np.array(truth))
        usual = statistics.median(errors[name][1] / sizes[name] for name in names)
        ratios = {}
        for name, (mine, own) in errors.items():
            few = self.torch_results["float64"][0].grads[name].size * N_BATCHES < FEW
            ratios[name] = mine / (max(own, usual * sizes[name]) if few else own)
        return ratios

    def computed_gradients(self) -> Row:
        """The gradients of arrays that the converter computes from several PyTorch elements, such as a sum of biases.

        The derivative of the loss along a random direction of each PyTorch tensor is the same on both sides: PyTorch's
        gradient times the direction, and JAX's times what the converter makes of it, by central differences.
        """
        sides, rng = self.sides, np.random.default_rng(0)
        _, by_path = sides.jax.loss_and_grads(sides.batches[0], "float64")
        grads = self.torch_results["float64"][0].grads
        errors = []
        for name in sides.torch.parameters:
            if name in sides.torch.ties or name not in sides.torch.state:
                continue
            start = sides.torch.state[name]
            direction = rng.standard_normal(start.shape) * (rms(start) or 1.0)
            whole, half = (self._slope(name, direction, step, by_path) for step in (1e-4, 5e-5))
            if whole is None or half is None:
                continue
            expected = float(np.sum(grads[name] * direction))
            size = max(rms(grads[name]), NEAR_ZERO * self.largest) * rms(direction) * math.sqrt(start.size)
            if abs(whole - half) > 1e-4 * size:
                return self.not_run("gradients of computed arrays", "float64", "to_params rounds to float32")
            slope = (4 * half - whole) / 3  # Richardson's extrapolation
            errors.append((abs(slope - expected) / size, name))
        error, where = _worst(errors) if errors else (0.0, "")
        return self.row("gradients of computed arrays", "float64", error=error, note=where)

    def _slope(self, name: str, direction: np.ndarray, step: float, grads: Mapping[Any, np.ndarray]) -> float | None:
        """The derivative of JAX's loss along a direction of a PyTorch tensor; None if no computed array holds it."""
        state, ties = self.sides.torch.state, self.sides.torch.ties
        moved = []
        for h in (step, -step):
            tensors = {n: np.array(state[n] + h * direction if ties.get(n, n) == name else state[n]) for n in state}
            moved.append(self.sides.convert(tensors))
        after, before = moved
        if not any((after[path] != before[path]).any() for path in self.sides.mapping.computed):
            return None
        return sum(float(np.sum(grad * (after[path] - before[path]))) for path, grad in grads.items()) / (2 * step)

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
            error, where = _worst([(relative(ours.buffers[n], truth.buffers[n]), n) for n in changed])
            yield self.row("updates, buffers", "float64", error=error, note=where)
        low, mine = self.torch_trained["float32"], self.jax_trained["float32"]
        if not self.updated:
            return
        ratios = [self._ratio(t, mine, low, truth) for t in range(self.pair.n_updates)]
        yield self.row("updates, R(t) median", "float32", ratio=statistics.median(ratios))
        worst = int(np.argmax(ratios))
        yield self.row("updates, R(t) worst", "float32", ratio=ratios[worst], note=f"after update {worst + 1}")

    @cached_property
    def updated(self) -> list[str]:
        """Names of the parameters whose updates are compared.

        Of a gradient that is 0 but for rounding Adam makes steps of its rounding: those are left out.
        """
        named, zero = self.compared
        results = [*self.torch_results["float64"], *self.jax_results["float64"]]
        return [*named, *(name for name in zero if not any(result.grads[name].any() for result in results))]

    def _ratio(self, t: int, mine: Trajectory, low: Trajectory, truth: Trajectory) -> float:
        """R of the parameters after update t: the median over tensors, as one gradient near Adam's epsilon may be all
        of a sum.

        PyTorch's own error is at least what storing them in float32 costs, and what Adam's bias correction does: optax
        computes 1 - b2**t in float32, which costs up to 2^-26 / (1 - b2) of an update; PyTorch computes it in float64.
        """
        ratios = []
        for name in self.updated:
            exact, start = truth.params[t][name], self.sides.torch.state[name]
            stored = rms(exact) * 2.0**-24 / math.sqrt(3)
            corrected = rms(exact - start) * 2.0**-26 / (1 - self._second_beta)
            own = max(rms(low.params[t][name] - exact), math.hypot(stored, corrected))
            error = rms(mine.params[t][name] - exact)
            ratios.append(_number(error / own) if own else 0.0 if error == 0 else math.inf)
        return statistics.median(ratios)

    @cached_property
    def _second_beta(self) -> float:
        """Adam's second beta, the largest of the optimizer's groups; 0 of an optimizer without."""
        optimizer, _ = self.sides.torch.optimizer(self.sides.torch.model("float32"))
        betas = [group["betas"][1] for group in optimizer.param_groups if "betas" in group]
        return max((float(beta) for beta in betas if beta < 1), default=0.0)


def gradient_row(
    case: str, ours: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> Row:
    """The largest relative L2 error of the named gradients over some batches, and the tensor it is in."""

    def error(name: str) -> float:
        return relative([grads[name] for grads in ours], [grads[name] for grads in truth])

    largest, where = _worst([(error(name), name) for name in names])
    return TOLERANCES.row("gradients", "float64", case, largest, note=where)


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
    if errors:
        error, where = _worst(errors)
        yield TOLERANCES.row("updates, every parameter", "float64", case, error, note=where)


def _worst(errors: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """The largest error and its name; NaN counts as infinite."""
    return max((_number(error), name) for error, name in errors)


def _number(error: float) -> float:
    return math.inf if math.isnan(error) else error


def relative(ours: Any, truth: Any) -> float:
    """||ours - truth|| / ||truth||; infinite for what is not finite or has another shape."""
    try:
        return _relative(ours, truth)
    except Refused:
        return math.inf


def _worst_relative(ours: Sequence[Any], truths: Sequence[Any]) -> float:
    return max(_relative(mine, truth) for mine, truth in zip(ours, truths, strict=True))


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
