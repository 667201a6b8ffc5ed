"""Run by test_devices.py in a process of its own, on 8 virtual CPU devices: 50 losses in each way to use them.

Prints JSON: {"jit 1": {...}, "jit 2": {...}, ...}. Arguments: dtype, dropout rate, a folder. Of two devices each
takes its 24 rows of 24 tokens in six microbatches, of eight its six in two.
"""

import dataclasses
import json
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np

from jaxgpt import parallel
from jaxgpt.config import ModelConfig, TrainConfig
from jaxgpt.data.loader import DeviceLoader
from jaxgpt.data.sampler import BatchSampler, whole_split
from jaxgpt.objective import LanguageModelingObjective
from jaxgpt.train_step import init_state

WAYS = (  # --parallel, the number of devices, --mesh, --grad-accum
    ("jit", 1, "", 1),
    ("jit", 2, "", 1),
    ("jit", 8, "", 1),
    ("pmap", 8, "", 1),
    ("jit", 8, "data=2,fsdp=4", 1),
    ("jit", 8, "fsdp=8", 1),
    ("jit", 1, "", 4),
    ("jit", 8, "data=2,fsdp=4", 2),
    ("pmap", 4, "", 4),
    ("jit", 4, "fsdp=4", 4),
)


def main() -> None:
    dtype, dropout, cache = sys.argv[1], float(sys.argv[2]), Path(sys.argv[3])
    # A clip that bites, so that clipping before the sum over devices would show.
    config = TrainConfig(
        batch_size=48,
        clip=0.1,
        dtype=dtype,
        model=ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=24, dropout=dropout),
    )
    parallel.configure_jax(config, cache)
    tokens = np.random.default_rng(0).integers(0, 50, 5000).astype(np.uint8)
    losses = {}
    for kind, n_devices, mesh, grad_accum in WAYS:
        own = dataclasses.replace(config, parallel=kind, grad_accum=grad_accum)
        objective = LanguageModelingObjective(own, 50, parallel.numerics(own))
        executor = parallel.Executor(objective, jax.devices()[:n_devices], mesh)
        state, loader = executor.init_state(), DeviceLoader(tokens, BatchSampler(config, len(tokens)), executor.put)
        metrics = []
        for n_steps in (20, 1, 29):
            state, rows = executor.train_steps(state, loader.take(len(metrics), n_steps), n_steps)
            metrics += rows.tolist()
        loss, count = executor.evaluate(state.params, whole_split(tokens[: 80 * 24 + 1], 48, 24)).sum(0)
        losses[" ".join(map(str, (kind, n_devices, mesh, grad_accum)))] = {
            "loss": [loss for loss, _ in metrics],
            "grad_norm": [norm for _, norm in metrics],
            "whole": loss / count,
            "count": count,
            "step": int(state.step),
            "shapes_have_device_axis": any(
                p.shape != q.shape
                for p, q in zip(
                    jax.tree.leaves(state), jax.tree.leaves(jax.eval_shape(partial(init_state, objective))), strict=True
                )
            ),
        }
    print(json.dumps(losses))


if __name__ == "__main__":
    main()
