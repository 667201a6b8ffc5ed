"""From a configuration to something that runs: the one place that puts data, numerics, objective and executor together.

Training, fine-tuning, importing and restoring all come through here.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt import parallel
from jaxgpt.config import FinetuneConfig, TrainConfig
from jaxgpt.data.corpora import Corpus
from jaxgpt.data.files import cache_folder
from jaxgpt.data.labeled import pad_token
from jaxgpt.data.token_cache import Data, tokenize_corpus
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.objective import ClassificationObjective, LanguageModelingObjective, Objective
from jaxgpt.parallel import Executor


def build_objective(
    config: TrainConfig | FinetuneConfig, tokenizer: Tokenizer, labels: Sequence[str] = ()
) -> Objective:
    """The objective of a configuration on this machine; sets JAX's process-wide options first.

    The objective's configuration names the dtype that "auto" stands for here, so that a run keeps it on a machine of
    another kind.

    Args:
        labels: the classes, of a `FinetuneConfig`.
    """
    parallel.configure_jax(config, cache_folder() / "xla")
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
) -> Executor:
    """The objective of a configuration, compiled for devices of this machine.

    Args:
        devices: which ones; by default all that a training would take.

    Raises:
        UserError: the batch does not divide by the devices.
    """
    objective = build_objective(config, tokenizer, labels)
    return Executor(objective, devices(objective))


def build_language_modeling(
    config: TrainConfig,
    corpus: Corpus,
    data_dir: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    tokenizer: Tokenizer | None = None,
    devices: Callable[[Objective], list[Any]] = parallel.devices_for,
) -> tuple[Data, Executor]:
    """The tokens of a corpus, and an executor whose configuration has the number of steps that its epochs make.

    Args:
        data_dir: a folder to look for GPT-2's vocabulary in first.
        say: takes lines about what takes long.
        tokenizer: a run's own, in place of a new one.

    Raises:
        UserError: as `tokenize_corpus` and `build_executor` do.
    """
    config, data = tokenize_corpus(config, corpus, data_dir, say, tokenizer)
    return data, build_executor(config, data.tokenizer, devices=devices)
