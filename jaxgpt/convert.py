"""Weights between the torch names of the write-ups and the Flax names: numpy in and out, no torch import."""

import re
from collections.abc import Mapping

import numpy as np

from jaxgpt.errors import UserError

# Flax names on the left; a kernel is [in, out] in Flax and [out, in] in torch.
_LAST = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
_MLP = {"mlp.fc": "ff.0", "mlp.proj": "ff.2"}


def torch_name(name: str) -> str:
    """The torch name of a Flax parameter: blocks.0.mlp.fc.kernel -> blocks.0.ff.0.weight."""
    stem, last = name.rsplit(".", 1)
    return f"{re.sub('|'.join(_MLP), lambda m: _MLP[m[0]], stem)}.{_LAST[last]}"


def to_torch(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state dict of `torch_ref.model.GPT`."""
    return {torch_name(name): _turned(name, np.asarray(p)) for name, p in params.items()}


def from_torch(state_dict: Mapping[str, np.ndarray], like: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The Flax parameters, with the names and shapes of `like`.

    Raises:
        UserError: a name is missing or left over, or a shape differs.
    """
    wanted = {torch_name(name): name for name in like}
    if odd := sorted(set(wanted) ^ set(state_dict)):
        raise UserError(f"the weights do not match the model: {', '.join(odd)} on one side only")
    params = {name: _turned(name, np.asarray(state_dict[torch])) for torch, name in wanted.items()}
    for name, p in params.items():
        if p.shape != like[name].shape:
            raise UserError(f"{torch_name(name)}: shape {p.shape} of the weights, {like[name].shape} of the model")
    return params


def _turned(name: str, p: np.ndarray) -> np.ndarray:
    return p.T if name.endswith(".kernel") else p
