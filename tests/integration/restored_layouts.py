"""Run by test_devices.py in a process of its own, on 8 virtual CPU devices: checkpoints restored in another layout.

Prints JSON: of each pair whether the restored state is equal to the last bit, and the next 20 losses in the layout that
wrote it and in the one that goes on. Argument: a folder.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from jaxgpt import parallel
from jaxgpt.config import ModelConfig, TrainConfig
from jaxgpt.data.loader import DeviceLoader
from jaxgpt.data.sampler import BatchSampler
from jaxgpt.data.tokenizer import ByteTokenizer
from jaxgpt.objective import LanguageModelingObjective
from jaxgpt.runs.checkpoint import Checkpoints
from jaxgpt.runs.run_dir import RunDir

PAIRS = (  # the devices and --mesh that write a checkpoint, and those that restore it
    ((8, ""), (1, "")),
    ((4, "fsdp=4"), (2, "data=2")),
    ((8, "data=2,fsdp=4"), (1, "")),
    ((1, ""), (8, "fsdp=8")),
)
N_STEPS = 20


def main() -> None:
    folder = Path(sys.argv[1])
    model = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=12)
    config = TrainConfig(batch_size=16, dtype="float64", lr=0.01, clip=0.2, model=model)
    parallel.configure_jax(config, folder / "cache")
    tokens = np.random.default_rng(0).integers(0, 50, 3000).astype(np.uint8)
    objective = LanguageModelingObjective(config, 50, parallel.numerics(config))
    found = []
    for number, layouts in enumerate(PAIRS):
        writer, reader = (parallel.Executor(objective, jax.devices()[:n], mesh) for n, mesh in layouts)
        loaders = [DeviceLoader(tokens, BatchSampler(config, len(tokens)), e.put) for e in (writer, reader)]
        state, _ = writer.train_steps(writer.init_state(), loaders[0].take(0, 5), 5)
        run = RunDir(folder / str(number), config, ByteTokenizer(), 0, "", "", has_manifests=True)
        run.path.mkdir()
        checkpoints = Checkpoints(run)
        checkpoints.save(state)
        checkpoints.wait()
        restored = checkpoints.restore(5, reader.abstract_state())
        checkpoints.close()
        pairs = zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True)
        equal = all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)
        _, expected = writer.train_steps(state, loaders[0].take(5, N_STEPS), N_STEPS)
        _, losses = reader.train_steps(restored, loaders[1].take(5, N_STEPS), N_STEPS)
        found.append({"equal": equal, "expected": expected[:, 0].tolist(), "losses": losses[:, 0].tolist()})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
