"""Both sides of a pair, from the same weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from jaxgpt.parity import params
from jaxgpt.parity.derive.derivation import Derived, derive
from jaxgpt.parity.graph import Value
from jaxgpt.parity.jax_side import JaxSide, precision_of
from jaxgpt.parity.mapping import ElementMap, map_elements
from jaxgpt.parity.pair import Batch, Pair, PairError, call, draw_batches
from jaxgpt.parity.params import Path, Structure, path_name
from jaxgpt.parity.torch_side import Results, TorchSide

N_BATCHES = 8  # over which the errors of float32 and bfloat16 are pooled: one loss alone would be luck


@dataclass
class Sides:
    """A pair made ready: what the levels, the diagnosis and the mutants share.

    Attributes:
        mapping: where each PyTorch tensor went.
        converter: the code of a derived converter; "" of one that was given.
    """

    pair: Pair
    torch: TorchSide
    jax: JaxSide
    mapping: ElementMap
    batches: Sequence[Batch]
    converter: str = ""

    @cached_property
    def jax_values(self) -> list[Value]:
        """Every value that the JAX loss computes for the first batch, in float64."""
        return self.jax.recorded(self.batches[0])

    @cached_property
    def truth(self) -> Results:
        """PyTorch in float64 on the first batch."""
        return self.torch.results(self.batches[0], "float64")


def prepare(pair: Pair, say: Callable[[str], None] = lambda line: None) -> Sides:
    """Builds both sides from the same weights; `say` takes a line of progress.

    Raises:
        PairError: a function of the pair raises, or gives what cannot be used.
    """
    torch = TorchSide(pair)
    batches = draw_batches(pair, max(N_BATCHES, pair.n_updates if pair.torch_optimizer else 0))
    structures: list[Structure] = []
    code = ""
    if pair.to_params is None:
        derived = _derived(pair, torch, batches[0], structures, say)
        code = derived.code()

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

    flat = convert({name: np.array(array) for name, array in torch.state.items()})
    for path, array in flat.items():
        if not np.isfinite(array).all():
            raise PairError(f"Pair to_params: {path_name(path)} holds a value that is not finite; mend it there")
    mapping = map_elements(convert, torch.state, torch.ties)
    trained_names = set(torch.parameters)
    # What comes from no PyTorch parameter is not trained: running statistics, tables, and what the converter makes up.
    trained = [path for path in flat if set(mapping.sources[path]) & trained_names or path in mapping.computed]
    if not trained:
        raise PairError("Pair to_params: no array holds a PyTorch parameter; fill the arrays from the state_dict")
    return Sides(pair, torch, JaxSide(pair, structures[0], flat, trained), mapping, batches, code)


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
    pair: Pair, torch: TorchSide, batch: Batch, structures: list[Structure], say: Callable[[str], None]
) -> Derived:
    """The converter of a pair that gives none: what names and shapes leave open, the loss in float64 decides."""
    structure, leaves = _form(pair)
    structures.append(structure)
    truth = torch.results(batch, "float64", logits=False, grads=False).loss
    side = JaxSide(pair, structure, leaves, list(leaves))

    def check(candidate: Derived) -> float:
        try:
            side.flat = candidate.convert(torch.state)
            return abs(side.loss(batch, "float64") - truth) / abs(truth)
        except (PairError, ValueError, KeyError, TypeError):
            return np.inf

    derived = derive(torch.tensors, {path: array.shape for path, array in leaves.items()}, check, say)
    if derived.missing:
        raise PairError(f"Pair jax_params: {derived.message().splitlines()[0]}; give to_params")
    return derived
