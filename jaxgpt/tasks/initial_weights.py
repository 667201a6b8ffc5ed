"""The weights that a training starts from in place of random ones: those of a run, or of another program's model."""

import hashlib
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgpt import distributed
from jaxgpt.config import ModelConfig, TrainConfig
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.interop.pretrained import Pretrained, cropped, load_pretrained, with_model
from jaxgpt.parallel import Executor
from jaxgpt.runs import run_dir
from jaxgpt.train_step import TrainState


@dataclass(frozen=True)
class InitialWeights:
    """Pretrained weights for a model, which may read fewer positions than they have."""

    pretrained: Pretrained
    model: ModelConfig

    @cached_property
    def params(self) -> dict[str, np.ndarray]:
        """The parameters by Flax name."""
        return cropped(self.pretrained.params, self.model.block_size)

    @cached_property
    def record(self) -> dict[str, Any]:
        """What data.json keeps of them: where they come from, after how many updates, and their digest."""
        return {"run": self.pretrained.source, "step": self.pretrained.step, "sha256": digest(self.params)}

    def require_vocabulary(self, vocab_size: int) -> None:
        """Raises `UserError` if a vocabulary is not theirs."""
        self.pretrained.require_vocabulary(vocab_size, f"--init-from {self.pretrained.source}", "the tokenizer")

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
    given: Collection[str] = (),
) -> tuple[TrainConfig, Tokenizer | None, InitialWeights | None]:
    """The weights that `--init-from` names, and a configuration with their model.

    Args:
        path: as `load_pretrained` takes it.
        out_dir: a folder whose run, if it has begun from the same path and has a checkpoint, goes on: then the weights
            are not read, and need not be there any more.
        say: takes lines about what is read.
        given: the fields whose flags were given, as `interop.pretrained.with_model` takes them.

    Returns:
        The configuration, with the model and the tokenizer of the weights; the tokenizer, or None if it is not known;
        the weights, or None for a run that goes on.

    Raises:
        UserError: the weights cannot be read, or flags ask for another model or tokenizer than theirs.
    """
    begun = distributed.broadcast(distributed.on_first(lambda: _has_begun(out_dir, path)))
    if begun and out_dir is not None:
        run = run_dir.open_run(out_dir)
        return with_model(config, path, run.config.model, run.tokenizer, given), run.tokenizer, None
    pretrained = load_pretrained(path, "--init-from", data_dir=data_dir, say=say)
    config = with_model(config, path, pretrained.model, pretrained.tokenizer, given)
    if pretrained.tokenizer is None:
        say(f"--init-from {path}: names no tokenizer; taking --tokenizer {config.tokenizer}")
    return config, pretrained.tokenizer, InitialWeights(pretrained, config.model)


def _has_begun(out_dir: Path | None, path: str) -> bool:
    """Whether the run in a folder was begun from the weights at a path, and has a checkpoint."""
    base = run_dir.recorded_base(out_dir)
    return base is not None and base.run in (path, os.path.abspath(path)) and run_dir.has_checkpoint(out_dir)


def digest(params: Mapping[str, np.ndarray]) -> str:
    """The SHA-256 of parameters: their names, dtypes, shapes and values."""
    found = hashlib.sha256()
    for name, p in sorted(params.items()):
        found.update(f"{name} {p.dtype} {p.shape} ".encode() + np.ascontiguousarray(p).tobytes())
    return found.hexdigest()
