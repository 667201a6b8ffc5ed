"""On an NVIDIA GPU: the default path, bfloat16 with cuDNN's attention, trains, and close to float32."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxgpt import parallel
from jaxgpt.config import ModelConfig, TrainConfig
from jaxgpt.data.loader import DeviceLoader
from jaxgpt.data.sampler import BatchSampler
from jaxgpt.objective import LanguageModelingObjective

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("kind", ["jit", "pmap"])
def test_bfloat16_follows_float32(kind):
    config = TrainConfig(
        batch_size=16, parallel=kind, model=ModelConfig(n_layer=2, n_head=2, n_embd=64, block_size=128)
    )
    tokens = np.random.default_rng(0).integers(0, 65, 5000).astype(np.uint8) % 7
    losses = {}
    for dtype in ("auto", "float32"):
        cfg = dataclasses.replace(config, dtype=dtype)
        numerics = parallel.numerics(cfg)
        assert numerics.attention == ("cudnn" if dtype == "auto" else "xla")
        executor = parallel.Executor(LanguageModelingObjective(cfg, 65, numerics))
        loader = DeviceLoader(tokens, BatchSampler(cfg, len(tokens)), executor.put)
        _, metrics = executor.train_steps(executor.init_state(), loader.take(0, 50), 50)
        losses[dtype] = metrics[:, 0]
    assert losses["auto"][-1] < 0.9 * losses["auto"][0]
    np.testing.assert_allclose(losses["auto"], losses["float32"], rtol=2e-2)  # bf16 has eight bits
