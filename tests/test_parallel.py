"""jit on one, two and eight devices and pmap on eight are the same training; one program serves every dispatch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxgpt import checkpoint, parallel
from jaxgpt.batches import Order, documents, whole_split
from jaxgpt.config import ModelConfig, TrainConfig
from jaxgpt.errors import UserError
from jaxgpt.loader import make_loader
from jaxgpt.train_step import Program

SMALL = TrainConfig(batch_size=4, model=ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=12))
TOKENS = np.random.default_rng(0).integers(0, 50, 3000).astype(np.uint8)


# float32: sums over other groupings of rows; 3 units in the last place measured, of the 4 that 1e-6 allows.
# Dropout as well: its masks belong to rows, so they do not depend on the devices either.
@pytest.mark.parametrize("dtype, dropout, gate", [("float64", 0, 1e-10), ("float32", 0, 1e-6), ("float64", 0.2, 1e-10)])
def test_one_device_and_several_give_the_same_losses(tmp_path, dtype, dropout, gate):
    script = Path(__file__).with_name("device_losses.py")
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    out = subprocess.run(
        [sys.executable, script, dtype, str(dropout), tmp_path], env=env, capture_output=True, text=True, check=True
    )
    runs = json.loads(out.stdout)
    one = runs["jit 1"]
    assert len(one["loss"]) == 50 and len(set(one["loss"])) == 50 and np.isfinite(one["loss"]).all()
    assert max(one["grad_norm"]) > 0.1  # the clip was at work
    assert len(runs) == 4
    for run in runs.values():
        assert not run["shapes_have_device_axis"] and run["step"] == 50 and run["count"] == 80 * 24
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


@pytest.mark.parametrize("n_devices", [1, 2])
@pytest.mark.parametrize("kind, where", [("jit", "device"), ("pmap", "device"), ("jit", "host"), ("pmap", "host")])
def test_one_program_serves_every_number_of_steps_bit_for_bit(kind, where, n_devices, caplog):
    import dataclasses

    config = dataclasses.replace(SMALL, parallel=kind)

    def trained(dispatches, where):
        executor = parallel.Executor(Program(config, 50, parallel.numerics(config)), jax.devices()[:n_devices])
        loader = make_loader(TOKENS, Order(config, len(TOKENS)), executor, where)
        state, none = executor.updates(executor.init_state(), loader.take(0, 0), 0)
        assert none.shape == (0, 2)
        rows = []
        with jax.log_compiles():
            for n_steps in dispatches:
                state, metrics = executor.updates(state, loader.take(len(rows), n_steps), n_steps)
                rows += metrics.tolist()
        loader.close()
        return state, rows

    caplog.clear()
    once, rows = trained([40], "device")
    parts, part_rows = trained([1, 13, 3, 22, 1], where)
    assert not [r for r in caplog.records if "Finished XLA compilation" in r.getMessage()]
    assert rows == part_rows and len(rows) == 40
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "batch_size, n_devices, n_cores",
    [
        (32, 2, 2),
        (31, 1, 2),  # a batch that nothing divides
        (12, 6, 8),
        (10, 5, 8),
        (3, 1, 8),  # 96 tokens are too few for three
        (64, 8, 8),
    ],
)
def test_a_cpus_cores_are_devices_where_it_pays(batch_size, n_devices, n_cores, monkeypatch):
    import dataclasses

    config = dataclasses.replace(SMALL, batch_size=batch_size, model=dataclasses.replace(SMALL.model, block_size=32))
    program, device = Program(config, 50, parallel.numerics(config)), jax.local_devices()[0]
    monkeypatch.setattr(jax, "local_devices", lambda: [device] * n_cores)
    assert parallel.devices_for(program) == [device] * n_devices
    many_words = Program(config, 200_000, program.numerics)  # 6.4 million parameters: each needs 535 tokens
    most = max(1, batch_size * 32 // 535)
    assert len(parallel.devices_for(many_words)) <= most < 4
    wide = dataclasses.replace(config, model=dataclasses.replace(config.model, n_layer=2, n_embd=1024))
    assert parallel.devices_for(Program(wide, 50, program.numerics)) == [device]  # 25 million parameters
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", str(n_cores))  # the user says so
    assert parallel.devices_for(program) == [device] * n_cores


def test_cores_are_those_that_a_container_may_use(monkeypatch, tmp_path):
    monkeypatch.setattr(parallel, "CPU_QUOTA", tmp_path / "none")
    n_cores = parallel.usable_cores()
    assert n_cores >= 1
    for quota, expected in (("max 100000", n_cores), ("50000 100000", 1), ("150000 100000", 1), ("9900000 100000", 99)):
        (tmp_path / "cpu.max").write_text(quota + "\n")
        monkeypatch.setattr(parallel, "CPU_QUOTA", tmp_path / "cpu.max")
        assert parallel.usable_cores() == min(expected, n_cores)


def test_sums_over_devices_are_laid_end_to_end_by_dtype():
    tree = {"a": np.arange(6.0, dtype=np.float32).reshape(2, 3), "b": [np.int32(4), np.zeros((0, 2), np.float32)]}
    tree |= {"c": np.float32(7), "d": np.arange(3, dtype=np.int32)}
    seen = []

    def doubled(x_N):
        seen.append((x_N.dtype.name, x_N.shape))
        return 2 * x_N

    found = parallel._as_one(doubled, jax.tree.map(jax.numpy.asarray, tree))
    assert seen == [("float32", (7,)), ("int32", (4,))]
    jax.tree.map(lambda ours, x: np.testing.assert_array_equal(ours, 2 * x, strict=True), found, tree)


def test_rows_of_a_part_divide_the_rows():
    rows_at_once = parallel.Shards(None, None, 128).rows_at_once
    found = {(16, 128): 1, (6, 64): 2, (16, 24): 4, (3, 1024): 1, (5, 8): 5, (31, 64): 1}
    found |= {(7, 32): 7, (31, 8): 31, (62, 8): 31}  # one row at a time would be slower
    assert {shape: rows_at_once(*shape) for shape in found} == found
    assert parallel.Shards(None, None).rows_at_once(16, 128) == 16


def test_the_loss_reported_is_the_one_before_the_update():
    executor = parallel.Executor(Program(SMALL, 50, parallel.numerics(SMALL)))
    loader = make_loader(TOKENS, Order(SMALL, len(TOKENS)), executor, "auto")
    _, metrics = executor.updates(executor.init_state(), loader.take(0, 1), 1)
    assert metrics[0, 0] == pytest.approx(np.log(50), abs=0.05)  # of an untrained model


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("n_devices", [1, 2])
def test_a_checkpoint_holds_the_state_of_its_save_whatever_becomes_of_its_memory(
    n_devices, large, tmp_path, monkeypatch
):
    if large:
        monkeypatch.setattr(checkpoint, "LARGE", 1)
    executor = parallel.Executor(Program(SMALL, 50, parallel.numerics(SMALL)), jax.devices()[:n_devices])
    loader = make_loader(TOKENS, Order(SMALL, len(TOKENS)), executor, "auto")
    state, _ = executor.updates(executor.init_state(), loader.take(0, 1), 1)
    kept = jax.tree.map(lambda x: np.array(x, copy=True), state)
    manager = checkpoint.open_checkpoints(tmp_path / "checkpoints")
    checkpoint.save(manager, state, None)
    if large:  # all there before the next step asks for memory
        assert (tmp_path / "checkpoints/1/default").is_dir()
    for step in range(1, 30):  # each takes the state's memory
        state, _ = executor.updates(state, loader.take(step, 1), 1)
    checkpoint.wait(manager)
    found = checkpoint.restore(manager, executor.abstract_state(), 1, "")
    manager.close()
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(state.params["token_emb.embedding"], kept.params["token_emb.embedding"])


def test_evaluation_leaves_out_what_only_fills_the_batch():
    executor = parallel.Executor(Program(SMALL, 50, parallel.numerics(SMALL)))
    params = executor.init_state().params
    sums_J2 = executor.evaluate(params, whole_split(TOKENS[:61], 4, 12))
    assert sums_J2.shape == (2, 2) and sums_J2[:, 1].tolist() == [4 * 12, 12]
    apart = [executor.evaluate(params, whole_split(TOKENS[s : s + 13], 4, 12))[0, 0] for s in range(0, 60, 12)]
    assert sums_J2[:, 0].sum() == pytest.approx(sum(apart), rel=1e-6)


def test_packed_documents_are_as_each_alone():
    """Logits of two documents in one window are those of each by itself, and what follows an end does not count."""
    import dataclasses

    config = dataclasses.replace(SMALL, packing="documents", tokenizer="gpt2", dtype="float64", batch_size=1)
    with jax.enable_x64(True):
        program = Program(config, 50, parallel.numerics(config), end_of_text=49)
        params = program.init_state().params
        first, second = np.array([[3, 1, 4, 49]]), np.array([[5, 9, 2, 6, 5, 49]])
        both = np.concatenate([first, second], 1)
        packed = program.model(params)(both, None, *documents(both, 49))
        alone = np.concatenate([program.model(params)(idx) for idx in (first, second)], 1)
        np.testing.assert_allclose(packed, alone, atol=1e-15)  # a few units in the last place of logits of 0.1
        target = np.roll(both, -1, 1)
        loss, count = program.loss_sum(params, both, target, None)
        nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(alone)), target[..., None], -1)[0, :, 0]
        assert count == 8 and loss == pytest.approx(nll[both[0] != 49].sum(), rel=1e-14)
