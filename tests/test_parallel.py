"""jit on one device, jit on eight and pmap on eight are the same training; one program serves every dispatch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxgpt import parallel
from jaxgpt.config import ModelConfig, TrainConfig
from jaxgpt.errors import UserError
from jaxgpt.train_step import Program

SMALL = TrainConfig(batch_size=4, model=ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=12))
TOKENS = np.random.default_rng(0).integers(0, 50, 3000).astype(np.uint8)


# float32: sums over other groupings of rows; 3 units in the last place measured, of the 4 that 1e-6 allows.
# Dropout as well: its masks belong to rows, so they do not depend on the devices either.
@pytest.mark.parametrize("dtype, dropout, gate", [("float64", 0, 1e-10), ("float32", 0, 1e-6), ("float64", 0.2, 1e-10)])
def test_one_device_eight_and_pmap_give_the_same_losses(tmp_path, dtype, dropout, gate):
    script = Path(__file__).with_name("device_losses.py")
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    out = subprocess.run(
        [sys.executable, script, dtype, str(dropout), tmp_path], env=env, capture_output=True, text=True, check=True
    )
    runs = json.loads(out.stdout)
    one = runs["jit 1"]
    assert len(one["loss"]) == 50 and len(set(one["loss"])) == 50 and np.isfinite(one["loss"]).all()
    assert max(one["grad_norm"]) > 0.1  # the clip was at work
    assert len(runs) == 3
    for run in runs.values():
        assert not run["shapes_have_device_axis"] and run["step"] == 50 and run["count"] == 40 * 24
        np.testing.assert_allclose(run["loss"], one["loss"], rtol=0, atol=gate)
        np.testing.assert_allclose(run["grad_norm"], one["grad_norm"], rtol=gate)
        np.testing.assert_allclose(run["whole"], one["whole"], rtol=gate)


@pytest.mark.parametrize("kind", ["jit", "pmap"])
def test_a_batch_that_does_not_divide_is_refused(kind):
    import dataclasses

    config = dataclasses.replace(SMALL, batch_size=5, parallel=kind)
    program = Program(config, 50, parallel.numerics(config))
    with pytest.raises(UserError, match="--batch-size 5: not divisible by the 2 devices"):
        parallel.Executor(program, jax.devices()[:1] * 2)


@pytest.mark.parametrize("kind", ["jit", "pmap"])
def test_one_program_serves_every_number_of_steps_bit_for_bit(kind, caplog):
    import dataclasses

    config = dataclasses.replace(SMALL, parallel=kind)

    def trained(dispatches):
        executor = parallel.Executor(Program(config, 50, parallel.numerics(config)))
        state, tokens_N = executor.init_state(), executor.put(TOKENS)
        state, none = executor.updates(state, tokens_N, 0)
        assert none.shape == (0, 2)
        rows = []
        with jax.log_compiles():
            for n_steps in dispatches:
                state, metrics = executor.updates(state, tokens_N, n_steps)
                rows += metrics.tolist()
        return state, rows

    caplog.clear()
    once, rows = trained([40])
    parts, part_rows = trained([1, 13, 3, 22, 1])
    assert not [r for r in caplog.records if "Finished XLA compilation" in r.getMessage()]
    assert rows == part_rows and len(rows) == 40
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_loss_reported_is_the_one_before_the_update():
    executor = parallel.Executor(Program(SMALL, 50, parallel.numerics(SMALL)))
    tokens_N = executor.put(TOKENS)
    _, metrics = executor.updates(executor.init_state(), tokens_N, 1)
    assert metrics[0, 0] == pytest.approx(np.log(50), abs=0.05)  # of an untrained model


def test_evaluation_leaves_out_what_only_fills_the_batch():
    executor = parallel.Executor(Program(SMALL, 50, parallel.numerics(SMALL)))
    params, tokens_N = executor.init_state().params, executor.put(TOKENS)
    start = np.array([[0, 12, 24, 36], [48, 0, 0, 0]])
    real = np.array([[True] * 4, [True, False, False, False]])
    loss, count = executor.evaluate(params, tokens_N, start, real)
    assert count == 5 * 12
    apart = [
        executor.evaluate(params, tokens_N, np.full((1, 4), s), np.eye(1, 4, dtype=bool)) for s in range(0, 60, 12)
    ]
    assert loss == pytest.approx(sum(loss for loss, _ in apart), rel=1e-6)
