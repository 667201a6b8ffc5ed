"""Weights of any origin; so far of a run."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.runs.restore import restore_language_model


@dataclass(frozen=True)
class Pretrained:
    kind: str
    source: str
    model: ModelConfig
    params: dict[str, np.ndarray]
    tokenizer: Tokenizer | None
    vocab_size: int
    step: int = 0
    optimizer_state: Mapping[str, np.ndarray] | None = None
    recipe: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()


def load_pretrained(
    path: str,
    flag: str = "--init-from",
    checkpoint: str = "result",
    data_dir: Path | None = None,
    say: Callable[[str], None] = print,
) -> Pretrained:
    run, _, state = restore_language_model(Path(path), checkpoint)
    params = {name: np.asarray(p) for name, p in jax.device_get(state.params).items()}
    return Pretrained(
        "run",
        os.path.abspath(path),
        run.config.model,
        params,
        run.tokenizer,
        run.tokenizer.vocab_size,
        int(state.step),
    )
