"""Run by test_devices.py in a process of its own, on 8 virtual CPU devices: a training on one device and sharded.

Prints JSON: {"--mesh": [[loss, gradient norm, ...] of each step], ...}. Argument: a name of CASES.
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgpt import parallel
from jaxgpt.config import FinetuneConfig, ModelConfig, TrainConfig
from jaxgpt.data.loader import DeviceLoader, ExampleLoader
from jaxgpt.data.sampler import PADDING, BatchSampler, ExampleSampler
from jaxgpt.objective import ClassificationObjective, LanguageModelingObjective

MESHES = ("", "data=2,fsdp=4", "fsdp=8")  # the first on one device
N_STEPS, N_VOCAB, N_CLASSES = 60, 50, 3
MODEL = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=12)
CASES: dict[str, dict[str, Any]] = {
    "sgd": dict(optimizer="sgd", momentum=0.9, lr=0.05),
    "tied head": dict(model=dataclasses.replace(MODEL, tied_head=True)),
    "classification": dict(pool="mean", lr=0.003),
    "skipped updates": dict(on_nonfinite="skip", skip_spikes=1.01, optimizer="sgd"),  # whose norms fall slowly
    "bfloat16": dict(dtype="bfloat16"),
    "no clip": dict(clip=0.0),
}


def objective_of(name: str) -> LanguageModelingObjective | ClassificationObjective:
    fields: dict[str, Any] = dict(batch_size=16, dtype="float64", lr=0.01, clip=0.2, model=MODEL) | CASES[name]
    if name == "classification":
        config = FinetuneConfig(max_tokens=MODEL.block_size, **fields)
        return ClassificationObjective(config, N_VOCAB, parallel.numerics(config), n_classes=N_CLASSES)
    config = TrainConfig(**fields)
    return LanguageModelingObjective(config, N_VOCAB, parallel.numerics(config))


def loader_of(objective: Any, put: Any) -> DeviceLoader | ExampleLoader:
    draw = np.random.default_rng(0)
    if isinstance(objective, LanguageModelingObjective):
        tokens = (draw.integers(0, N_VOCAB, 3000) // draw.integers(1, 9, 3000)).astype(np.uint8)
        return DeviceLoader(tokens, BatchSampler(objective.config, len(tokens)), put)
    # Texts of any length, whose first token tells the class; the last batch of an epoch is not full.
    idx_NT = draw.integers(0, N_VOCAB, (101, MODEL.block_size)).astype(np.int32)
    idx_NT[np.arange(MODEL.block_size) >= draw.integers(1, MODEL.block_size + 1, 101)[:, None]] = PADDING
    return ExampleLoader(idx_NT, idx_NT[:, 0] % N_CLASSES, ExampleSampler(0, len(idx_NT), 16), put)


def main() -> None:
    objective = objective_of(sys.argv[1])
    with tempfile.TemporaryDirectory() as cache:
        parallel.configure_jax(objective.config, Path(cache))
        found = {}
        for mesh in MESHES:
            executor = parallel.Executor(objective, jax.devices() if mesh else jax.devices()[:1], mesh)
            source = loader_of(objective, executor.put).take(0, N_STEPS)
            found[mesh] = executor.train_steps(executor.init_state(), source, N_STEPS)[1].tolist()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
