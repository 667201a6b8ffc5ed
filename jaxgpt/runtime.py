"""From a configuration to something that runs: the one place that puts data, numerics, objective and executor together.

Training, fine-tuning, importing and restoring all come through here.
"""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import distributed, parallel
from jaxgpt.config import FinetuneConfig, TrainConfig, mesh_shape
from jaxgpt.data.corpora import Corpus
from jaxgpt.data.files import cache_folder
from jaxgpt.data.labeled import pad_token
from jaxgpt.data.token_cache import Data, tokenize_corpus
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.memory import require_memory
from jaxgpt.objective import ClassificationObjective, LanguageModelingObjective, Objective
from jaxgpt.parallel import Executor

LONG_STEP_SECONDS = 30.0  # without a word before it, a person would think that the program hangs
# Floating-point operations a second that the slowest machines reach: below them no step is measured.
SLOW_CPU, SLOW_ACCELERATOR = 2e10, 2e12


def build_objective(
    config: TrainConfig | FinetuneConfig, tokenizer: Tokenizer, labels: Sequence[str] = ()
) -> Objective:
    """The objective of a configuration on this machine; sets JAX's process-wide options first.

    The objective's configuration names the dtype that "auto" stands for here, so that a run keeps it on a machine of
    another kind.

    Args:
        labels: the classes, of a `FinetuneConfig`.
    """
    try:
        parallel.configure_jax(config, cache_folder() / "xla")
    except (RuntimeError, AssertionError) as e:  # JAX raises the second for a GPU's plugin that is not installed
        given = [f"{name}={os.environ[name]}" for name in ("JAX_PLATFORMS", "XLA_FLAGS") if name in os.environ]
        why = (str(e).splitlines() or ["no plugin for them"])[0][:200]
        raise UserError(f"{' '.join(given)}: JAX finds no such devices here ({why}); set JAX_PLATFORMS=cpu") from None
    numerics = parallel.numerics(config)
    config = dataclasses.replace(config, dtype=np.dtype(numerics.compute_dtype).name)
    if isinstance(config, FinetuneConfig):
        classes = dict(n_classes=len(labels), pad_token=pad_token(tokenizer))
        return ClassificationObjective(config, tokenizer.vocab_size, numerics, **classes)
    return LanguageModelingObjective(config, tokenizer.vocab_size, numerics, tokenizer.end_of_text)


def build_executor(
    config: TrainConfig | FinetuneConfig,
    tokenizer: Tokenizer,
    labels: Sequence[str] = (),
    devices: Callable[[Objective], list[Any]] = parallel.devices_for,
    trains: bool = False,
    mesh: str = "",
) -> Executor:
    """The objective of a configuration, compiled for the devices of this machine, or of all processes.

    Args:
        devices: which ones; by default all that a training would take.
        trains: it is to train; if not, the memory has to hold the state only.
        mesh: how the devices share a training, as `config.mesh_shape` reads it; then it takes all there are.

    Raises:
        UserError: the batch does not divide by the devices, they are no such mesh, or their memory is too small.
    """
    objective = build_objective(config, tokenizer, labels)
    distributed.require_same_devices()
    n_fsdp = mesh_shape(mesh, jax.device_count())[1] if mesh else 1
    require_memory(objective, jax.local_devices()[:1], trains=False, n_fsdp=n_fsdp)  # before the first trace
    chosen = parallel.all_devices() if mesh else devices(objective)
    require_memory(objective, chosen, trains, n_fsdp)
    return Executor(objective, chosen, mesh)


def build_language_modeling(
    config: TrainConfig,
    corpus: Corpus,
    data_dir: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    tokenizer: Tokenizer | None = None,
    devices: Callable[[Objective], list[Any]] = parallel.devices_for,
    trains: bool = True,
    mesh: str = "",
) -> tuple[Data, Executor]:
    """The tokens of a corpus, and an executor whose configuration has the number of steps that its epochs make.

    Args:
        data_dir: a folder to look for GPT-2's vocabulary in first.
        say: takes lines about what takes long.
        tokenizer: a run's own, in place of a new one.
        devices, trains, mesh: as of `build_executor`.

    Raises:
        UserError: as `tokenize_corpus` and `build_executor` do.
    """
    config, data = tokenize_corpus(config, corpus, data_dir, say, tokenizer)
    return data, build_executor(config, data.tokenizer, devices=devices, trains=trains, mesh=mesh)


def long_step_note(executor: Executor) -> str | None:
    """A line about a step that takes longer than `LONG_STEP_SECONDS`, or None.

    The time is a lower bound: the products that a step consists of, at the speed of one large product on this machine,
    which is measured only if the step is large.
    """
    config, device = executor.config, executor.mesh.devices.item(0)
    multiplied = sum(math.prod(p.shape) for name, p in executor.objective.param_shapes.items() if "_emb" not in name)
    flop = config.model.flop_per_token(multiplied)["F6"] * config.tokens_per_step
    if flop < LONG_STEP_SECONDS * (SLOW_CPU if device.platform == "cpu" else SLOW_ACCELERATOR):
        return None
    flop_per_second = _product_speed(executor)
    seconds = flop / flop_per_second
    if seconds < LONG_STEP_SECONDS:
        return None
    duration = f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:,.0f} minutes"
    return (
        f"a step of {config.tokens_per_step:,} tokens takes {flop:.2g} floating-point operations: {duration} or more "
        f"at the {flop_per_second:.2g} a second of a large product here; a lower --batch-size makes shorter steps"
    )


def _product_speed(executor: Executor) -> float:
    """The floating-point operations a second of a large matrix product on the executor's devices, measured."""
    size = 2048 if executor.mesh.devices.item(0).platform == "cpu" else 8192
    x_NN = jnp.ones((size, size), executor.objective.numerics.compute_dtype)
    product = jax.jit(jnp.dot)
    product(x_NN, x_NN).block_until_ready()
    begun = time.perf_counter()
    product(x_NN, x_NN).block_until_ready()
    one_device = 2 * size**3 / (time.perf_counter() - begun)
    # A CPU's product takes all of its cores, whatever the number of devices.
    return one_device if size == 2048 else one_device * executor.mesh.size
