"""Both sides of a pair, from the same weights."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jaxgpt.parity import params
from jaxgpt.parity.graph import Value
from jaxgpt.parity.jax_side import JaxSide
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
    batches: list[Batch]
    converter: str = ""

    @cached_property
    def jax_values(self) -> list[Value]:
        """Every value that the JAX loss computes for the first batch, in float64."""
        return self.jax.recorded(self.batches[0])

    @cached_property
    def truth(self) -> Results:
        """PyTorch in float64 on the first batch."""
        return self.torch.results(self.batches[0], "float64")


def prepare(pair: Pair) -> Sides:
    """Builds both sides from the same weights. Raises `PairError` for whatever the pair's functions do wrong."""
    torch = TorchSide(pair)
    batches = draw_batches(pair, max(N_BATCHES, pair.n_updates if pair.torch_optimizer else 0))
    if pair.to_params is None:
        raise NotImplementedError
    structures: list[Structure] = []

    def convert(state: dict[str, np.ndarray]) -> dict[Path, np.ndarray]:
        structure, flat = params.split(call(pair, "to_params", state), "to_params")
        structures.append(structure)
        return flat

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
    return Sides(pair, torch, JaxSide(pair, structures[0], flat, trained), mapping, batches)
