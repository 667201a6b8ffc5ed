"""A PyTorch model as its files describe it: what each reader of a format gives, and what fits it into a Flax model."""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import jax
import numpy as np

from jaxgpt.config import ModelConfig, TrainConfig
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.interop import torch_names
from jaxgpt.memory import count_params
from jaxgpt.model.gpt import Numerics
from jaxgpt.objective import LanguageModelingObjective

GPT2_VOCABULARY = 50_257
PADDED_VOCABULARY = 50_304  # GPT-2's, to a multiple of 128


@dataclass(frozen=True)
class TorchModel:
    """A model of another program.

    Args:
        kind: the program, for messages.
        model: the shape. Dropout is what it was trained with.
        tensors: the weights under the tutorials' names, in PyTorch's layout.
        vocab_size: the rows of the token embedding.
        tokenizer: None if the files do not say, or if it is not known here.
        has_unknown_tokenizer: whether it is the second.
        step: the updates that it was trained for.
        optimizer_state: under the names that `torch_names.optimizer_from_torch` takes; None if there is none.
        recipe: fields of a `TrainConfig` that the files say its training has had.
        notes: what was assumed or left out, as sentences without a full stop.
    """

    kind: str
    model: ModelConfig
    tensors: Mapping[str, np.ndarray]
    vocab_size: int
    tokenizer: Tokenizer | None = None
    step: int = 0
    optimizer_state: Mapping[str, np.ndarray] | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    has_unknown_tokenizer: bool = False

    def without_padding(self, vocab_size: int) -> "TorchModel":
        """The model with the first rows of its vocabulary: the others are padding that no token has."""
        if vocab_size >= self.vocab_size:
            return self
        state = self.optimizer_state and torch_names.without_padding(self.optimizer_state, vocab_size)
        note = f"{self.vocab_size - vocab_size} rows of padding after the {vocab_size:,} of the vocabulary were cut"
        return replace(
            self,
            tensors=torch_names.without_padding(self.tensors, vocab_size),
            optimizer_state=state,
            vocab_size=vocab_size,
            notes=(*self.notes, note),
        )

    def flax_params(self) -> dict[str, np.ndarray]:
        """The parameters by Flax name, in float32, or float64 if a tensor is.

        Raises:
            UserError: the tensors are not those of the model, or hold values that are not finite.
        """
        self._require_shape()
        return self.fitted("give a file with all of its weights")

    def fitted(self, hint: str) -> dict[str, np.ndarray]:
        """`flax_params` without a look at the shape before.

        Args:
            hint: what a message says to do about weights of another model.
        """
        dtype = reduce(np.promote_types, (p.dtype for p in self.tensors.values() if p.dtype.kind == "f"), np.float32)
        objective = LanguageModelingObjective(TrainConfig(model=self.model), self.vocab_size, Numerics(dtype, dtype))
        with jax.enable_x64(dtype == np.float64):
            shapes = objective.param_shapes
        return torch_names.from_torch(self.tensors, shapes, hint)

    def _require_shape(self) -> None:
        """Raises `UserError` if the tensors are far from the model; before it is traced, which may take minutes."""
        shape = self.model
        expected = {
            "token_emb.weight": (self.vocab_size, shape.n_embd),
            "pos_emb.weight": (shape.block_size, shape.n_embd),
        }
        for name, sizes in expected.items():
            found = self.tensors.get(name)
            if found is None or found.shape != sizes:
                has = "is missing" if found is None else f"has shape {list(found.shape)}"
                raise UserError(
                    f"{name} {has}, and the configuration says {list(sizes)}; give files that belong together"
                )
        n_blocks = count_blocks(self.tensors)
        if n_blocks != shape.n_layer:
            raise UserError(
                f"holds {n_blocks} blocks, and the configuration says {shape.n_layer}; give files that belong together"
            )
        n_params = sum(count_params(shape, self.vocab_size, None))
        n_values = sum(math.prod(p.shape) for p in self.tensors.values())
        if n_values < n_params:
            raise UserError(
                f"holds {n_values:,} weights, and the model of its configuration has {n_params:,}; give all its files"
            )


def count_blocks(tensors: Mapping[str, Any]) -> int:
    """How many blocks the tensors belong to, under the tutorials' names."""
    found = (re.match(r"blocks\.(\d+)\.", name) for name in tensors)
    return len({match[1] for match in found if match})


def shown(value: Any) -> str:
    """A value of a foreign file for a message: its type, if it is not plain. The repr of nested values may not end."""
    return f"{value!r:.40}" if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"


@contextlib.contextmanager
def errors_prefixed(flag_and_path: str) -> Iterator[None]:
    """Puts the flag and the file before the message of a `UserError`, unless it begins so."""
    try:
        yield
    except UserError as e:
        message = str(e)
        raise UserError(message if message.startswith(flag_and_path) else f"{flag_and_path}: {message}") from None


def model_config(**fields: Any) -> ModelConfig:
    """The `ModelConfig` of fields that a file holds, which may have any type.

    Raises:
        UserError: a value is of another type, or out of its range.
    """
    kinds: dict[str, tuple[type, ...]] = {"bool": (bool,), "int": (int,), "float": (int, float), "str": (str,)}
    for name, value in fields.items():
        expected = type(getattr(ModelConfig(), name)).__name__
        if not isinstance(value, kinds[expected]) or (isinstance(value, bool) and expected != "bool"):
            raise UserError(f"{name} is {shown(value)}; give a file whose {name} is of type {expected}")
    try:
        return ModelConfig(**fields)
    except UserError as e:  # it names flags of jaxgpt train, which nobody has given
        raise UserError(
            f"its configuration cannot be had here ({str(e).partition(';')[0]}); give another model"
        ) from None
