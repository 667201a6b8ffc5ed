"""Both sides of a pair, from the same weights."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import manual_seed

from jaxgpt.parity import params
from jaxgpt.parity.derive.derivation import Derived, derive
from jaxgpt.parity.graph import Value
from jaxgpt.parity.harness import Refused, relative_l2
from jaxgpt.parity.jax_side import JaxSide, precision_of
from jaxgpt.parity.mapping import Convert, ElementMap, map_elements
from jaxgpt.parity.pair import Batch, Pair, PairError, blamed, call, draw_batches
from jaxgpt.parity.params import Path, Structure, path_name
from jaxgpt.parity.torch_side import TorchSide

FAR = 0.01  # a loss that differs by more than this settles it: the others need not be computed
N_BATCHES = 8  # over which the errors of float32 and bfloat16 are pooled: one loss alone would be luck


@dataclass
class Sides:
    """A pair made ready: what the levels, the diagnosis and the mutants share.

    Attributes:
        mapping: where each PyTorch tensor went.
        convert: a `state_dict` of numpy arrays -> the JAX arrays by path.
        converter: the code of a derived converter; "" of one that was given.
        undecided: what its derivation leaves open, a line each.
    """

    pair: Pair
    torch: TorchSide
    jax: JaxSide
    mapping: ElementMap
    batches: Sequence[Batch]
    convert: Convert
    converter: str = ""
    undecided: Sequence[str] = ()

    def __post_init__(self):
        self._values: dict[int, list[Value]] = {}

    def jax_values(self, batch: int) -> list[Value]:
        """Every value that the JAX loss computes for one of the batches, in float64."""
        if batch not in self._values:
            self._values[batch] = self.jax.recorded(self.batches[batch])
        return self._values[batch]


def prepare(pair: Pair, say: Callable[[str], None] = lambda line: None) -> Sides:
    """Builds both sides from the same weights; `say` takes a line of progress.

    Raises:
        PairError: a function of the pair raises, or gives what cannot be used.
    """
    torch = TorchSide(pair)
    batches = draw_batches(pair, max(N_BATCHES, pair.n_updates if pair.torch_optimizer else 0))
    _require_repeatable(torch, batches[0])
    structures: list[Structure] = []
    code, undecided = "", []
    if pair.to_params is None:
        derived = _derived(pair, torch, batches, structures, say)
        code, undecided = derived.code(), derived.message().splitlines()

        def convert(state: dict[str, np.ndarray]) -> dict[Path, np.ndarray]:
            return derived.convert(state)
    else:

        def convert(state: dict[str, np.ndarray]) -> dict[Path, np.ndarray]:
            with precision_of("float64"):  # nothing may be rounded on the way
                structure, flat = params.split(call(pair, "to_params", state), "to_params")
            if form is not None:
                _require_same_paths(form, flat)
            structures.append(form or structure)
            return flat

        form = None if pair.jax_params is None else _form(pair)[0]

    flat, again = (convert({name: np.array(array) for name, array in torch.state.items()}) for _ in range(2))
    for path, array in again.items():
        if path not in flat or not np.array_equal(array, flat[path], equal_nan=True):
            raise PairError(
                f"Pair to_params: gives {path_name(path)} other values on each call; leave chance out of it"
            )
    for path, array in flat.items():
        if not np.isfinite(array).all():
            raise PairError(f"Pair to_params: {path_name(path)} holds a value that is not finite; mend it there")
    with blamed("to_params", pair.to_params):
        mapping = map_elements(convert, torch.state, torch.ties)
    trained_names = set(torch.parameters)
    # What comes from no PyTorch parameter is not trained: running statistics, tables, and what the converter makes up.
    trained = [path for path in flat if set(mapping.sources[path]) & trained_names or path in mapping.computed]
    if not trained:
        raise PairError("Pair to_params: no array holds a PyTorch parameter; fill the arrays from the state_dict")
    return Sides(pair, torch, JaxSide(pair, structures[0], flat, trained), mapping, batches, convert, code, undecided)


def _require_repeatable(torch: TorchSide, batch: Batch) -> None:
    """Raises `PairError` if the loss draws random numbers."""
    losses = []
    for seed in range(2):
        manual_seed(seed)
        losses.append(torch.results(batch, "float64", logits=False, grads=False).loss)
    if losses[0] != losses[1] and not all(map(math.isnan, losses)):
        remedy = "turn dropout off in the model, or put its masks into the batch"
        raise PairError(f"Pair torch_loss: gives another value on each call; {remedy}")


def _form(pair: Pair) -> tuple[Structure, dict[Path, np.ndarray]]:
    """The form of the JAX parameters that the pair builds, and their arrays of any values."""
    with precision_of("float32"):
        return params.split(call(pair, "jax_params"), "jax_params")


def _require_same_paths(form: Structure, flat: Mapping[Path, Any]) -> None:
    """Raises `PairError` unless a converter gives the arrays of the form, and no others."""
    wanted = {path for path in form.order if path not in form.others}
    for text, paths in (("lacks", wanted - set(flat)), ("has also", set(flat) - wanted)):
        if paths:
            names = ", ".join(sorted(map(path_name, paths))[:4])
            raise PairError(f"Pair to_params: {text} {names}; give the arrays that jax_params has")


def _derived(
    pair: Pair, torch: TorchSide, batches: Sequence[Batch], structures: list[Structure], say: Callable[[str], None]
) -> Derived:
    """The converter of a pair that gives none: what names and shapes leave open, the loss in float64 decides."""
    structure, leaves = _form(pair)
    structures.append(structure)
    truths = [torch.results(batch, "float64", grads=False) for batch in batches[:N_BATCHES]]
    truth = truths[0].logits
    losses = np.array([result.loss for result in truths])
    side = JaxSide(pair, structure, leaves, list(leaves))

    def check(candidate: Derived) -> float:
        """The relative difference of the outputs, or of several losses: to one loss, one of many wrong converters comes
        near by chance."""
        try:
            side.flat = candidate.convert(torch.state)
            if truth is not None and (logits := side.logits(batches[0], "float64")) is not None:
                return relative_l2(logits, truth)
            first = abs(side.loss(batches[0], "float64") - losses[0]) / (abs(losses[0]) or 1.0)
            if first > FAR:
                return first
            return relative_l2([side.loss(batch, "float64") for batch in batches[:N_BATCHES]], losses)
        except (PairError, ValueError, KeyError, TypeError, Refused):
            return math.inf

    derived = derive(torch.tensors, {path: array.shape for path, array in leaves.items()}, check, say)
    if derived.missing:
        raise PairError(f"Pair jax_params: {derived.message().splitlines()[0]}; give to_params")
    return derived
