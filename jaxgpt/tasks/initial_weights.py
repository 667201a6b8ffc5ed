"""The weights that a training starts from in place of random ones: those of a run, or of another program's model."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgpt import distributed
from jaxgpt.config import ModelConfig, TrainConfig
from jaxgpt.data.tokenizer import Tokenizer, choice
from jaxgpt.errors import UserError, flag
from jaxgpt.interop.pretrained import Pretrained, load_pretrained
from jaxgpt.parallel import Executor
from jaxgpt.presets import PRESETS
from jaxgpt.runs import run_dir
from jaxgpt.train_step import TrainState

POSITIONS = "pos_emb.embedding"
OF_TRAINING = ("dropout", "attention_dropout", "init")  # fields of a model that its weights do not have


@dataclass(frozen=True)
class InitialWeights:
    """Pretrained weights for a model, which may read fewer positions than they have."""

    pretrained: Pretrained
    model: ModelConfig

    @cached_property
    def params(self) -> dict[str, np.ndarray]:
        """The parameters by Flax name."""
        params = dict(self.pretrained.params)
        params[POSITIONS] = params[POSITIONS][: self.model.block_size]
        return params

    @cached_property
    def record(self) -> dict[str, Any]:
        """What data.json keeps of them: where they come from, after how many updates, and their digest."""
        return {"run": self.pretrained.source, "step": self.pretrained.step, "sha256": digest(self.params)}

    def require_vocabulary(self, vocab_size: int) -> None:
        """Raises `UserError` if a vocabulary is not theirs."""
        if vocab_size != self.pretrained.vocab_size:
            raise UserError(
                f"--init-from {self.pretrained.source}: has a vocabulary of {self.pretrained.vocab_size:,}, and the "
                f"tokenizer one of {vocab_size:,}; give the --dataset and the --tokenizer that it was trained with"
            )

    def state(self, executor: Executor) -> TrainState:
        """The state before the first update: these parameters, and of the optimizer the initial state."""
        dtype = executor.objective.numerics.param_dtype
        params = {name: jnp.asarray(p, dtype) for name, p in self.params.items()}
        return executor.put(TrainState(jnp.int32(0), params, executor.objective.optimizer.init(params)))


def initial_weights(
    config: TrainConfig,
    path: str,
    out_dir: Path | None,
    data_dir: Path | None,
    say: Callable[[str], None],
) -> tuple[TrainConfig, Tokenizer | None, InitialWeights | None]:
    """The weights that `--init-from` names, and a configuration with their model.

    Args:
        path: as `load_pretrained` takes it.
        out_dir: a folder whose run, if it has begun from the same path and has a checkpoint, goes on: then the weights
            are not read, and need not be there any more.
        say: takes lines about what is read.

    Returns:
        The configuration, with the model and the tokenizer of the weights; the tokenizer, or None if it is not known;
        the weights, or None for a run that goes on.

    Raises:
        UserError: the weights cannot be read, or flags ask for another model or tokenizer than theirs.
    """
    begun = distributed.broadcast(distributed.on_first(lambda: _has_begun(out_dir, path)))
    if begun and out_dir is not None:
        run = run_dir.open_run(out_dir)
        return _with_model(config, path, run.config.model, run.tokenizer), run.tokenizer, None
    pretrained = load_pretrained(path, "--init-from", data_dir=data_dir, say=say)
    config = _with_model(config, path, pretrained.model, pretrained.tokenizer)
    if pretrained.tokenizer is None:
        say(f"--init-from {path}: names no tokenizer; taking --tokenizer {config.tokenizer}")
    return config, pretrained.tokenizer, InitialWeights(pretrained, config.model)


def _has_begun(out_dir: Path | None, path: str) -> bool:
    """Whether the run in a folder was begun from the weights at a path, and has a checkpoint."""
    base = run_dir.recorded_base(out_dir)
    return base is not None and base.run in (path, os.path.abspath(path)) and run_dir.has_checkpoint(out_dir)


def _with_model(config: TrainConfig, path: str, model: ModelConfig, tokenizer: Tokenizer | None) -> TrainConfig:
    """The configuration with the model and the tokenizer of some weights.

    Flags that a preset has set say nothing; one that was given must fit.
    """
    preset = PRESETS[config.preset]
    fields: dict[str, Any] = {name: getattr(config.model, name) for name in OF_TRAINING}
    for name, given, theirs in _differences(config.model, preset.model, model):
        if name == "block_size" and given < theirs:
            fields[name] = given
        elif name not in OF_TRAINING:
            raise UserError(
                f"{flag('model.' + name)} {given}: {path} has {theirs}; leave it out: the model is that of the weights"
            )
    changes: dict[str, Any] = {"model": dataclasses.replace(model, **fields)}
    if tokenizer is not None:
        theirs = choice(tokenizer)
        if config.tokenizer not in (preset.tokenizer, theirs):
            raise UserError(f"--tokenizer {config.tokenizer}: {path} has {theirs}; leave it out")
        changes["tokenizer"] = theirs
    return dataclasses.replace(config, **changes)


def _differences(given: ModelConfig, default: ModelConfig, theirs: ModelConfig) -> list[tuple[str, Any, Any]]:
    """The fields that were given and that some weights have otherwise: name, value given, value of the weights."""
    found = []
    for field in dataclasses.fields(ModelConfig):
        values = [getattr(model, field.name) for model in (given, default, theirs)]
        if values[0] not in values[1:]:
            found.append((field.name, values[0], values[2]))
    return found


def digest(params: Mapping[str, np.ndarray]) -> str:
    """The SHA-256 of parameters: their names, dtypes, shapes and values."""
    found = hashlib.sha256()
    for name, p in sorted(params.items()):
        found.update(f"{name} {p.dtype} {p.shape} ".encode() + np.ascontiguousarray(p).tobytes())
    return found.hexdigest()
