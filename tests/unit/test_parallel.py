"""Executors on one and two devices, by jit and by pmap; which devices a step takes; the all-reduce."""

import dataclasses
import math
import re
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import parallel
from jaxgpt.config import ModelConfig, TrainConfig, mesh_shape
from jaxgpt.data import sampler
from jaxgpt.data.loader import HostLoader, ProcessRows, make_loader
from jaxgpt.data.sampler import BatchSampler, whole_split
from jaxgpt.data.tokenizer import ByteTokenizer
from jaxgpt.errors import UserError
from jaxgpt.objective import LanguageModelingObjective
from jaxgpt.runs import checkpoint
from jaxgpt.runs.checkpoint import Checkpoints
from jaxgpt.runs.run_dir import RunDir

SMALL = TrainConfig(batch_size=4, model=ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=12))
TOKENS = np.random.default_rng(0).integers(0, 50, 3000).astype(np.uint8)


def executor_of(config=None, n_devices=None, mesh=""):
    config = config or SMALL
    objective = LanguageModelingObjective(config, 50, parallel.numerics(config))
    return parallel.Executor(objective, n_devices and jax.devices()[:n_devices], mesh)


def loader_of(executor, where="auto"):
    sampler = BatchSampler(executor.config, len(TOKENS))
    return make_loader(TOKENS, sampler, executor.put, executor.bytes_for_tokens, where)


@pytest.mark.parametrize("kind", ["jit", "pmap"])
def test_a_batch_that_does_not_divide_is_refused(kind):
    config = dataclasses.replace(SMALL, batch_size=5, parallel=kind)
    objective = LanguageModelingObjective(config, 50, parallel.numerics(config))
    with pytest.raises(UserError, match="--batch-size 5: not divisible by the 2 devices"):
        parallel.Executor(objective, jax.devices()[:1] * 2)


@pytest.fixture(scope="module")
def train():
    """(kind, n_devices, where, dispatches) -> state, metrics of a training; one executor for each kind and number."""
    executors = {}

    def run(kind, n_devices, where, dispatches):
        key = kind, n_devices
        if key not in executors:
            executors[key] = executor_of(dataclasses.replace(SMALL, parallel=kind), n_devices)
        executor = executors[key]
        loader = loader_of(executor, where)
        state, none = executor.train_steps(executor.init_state(), loader.take(0, 0), 0)
        assert none.shape == (0, 2)
        rows = []
        with jax.log_compiles():
            for n_steps in dispatches:
                state, metrics = executor.train_steps(state, loader.take(len(rows), n_steps), n_steps)
                rows += metrics.tolist()
        loader.close()
        return state, rows

    return run


@pytest.mark.parametrize(
    "kind, n_devices, where",
    [
        ("jit", 2, "device"),
        ("pmap", 2, "device"),
        pytest.param("jit", 2, "host", marks=pytest.mark.slow),
        pytest.param("jit", 1, "device", marks=pytest.mark.slow),
        pytest.param("jit", 1, "host", marks=pytest.mark.slow),
        pytest.param("pmap", 1, "device", marks=pytest.mark.slow),
        pytest.param("pmap", 1, "host", marks=pytest.mark.slow),
        pytest.param("pmap", 2, "host", marks=pytest.mark.slow),
    ],
)
def test_one_program_serves_every_number_of_steps_bit_for_bit(train, kind, n_devices, where, caplog):
    once, rows = train(kind, n_devices, "device", [40])
    caplog.clear()
    parts, part_rows = train(kind, n_devices, where, [1, 13, 3, 22, 1])
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
    config = dataclasses.replace(SMALL, batch_size=batch_size, model=dataclasses.replace(SMALL.model, block_size=32))
    objective, device = LanguageModelingObjective(config, 50, parallel.numerics(config)), jax.local_devices()[0]
    monkeypatch.setattr(jax, "devices", lambda: [device] * n_cores)
    assert parallel.devices_for(objective) == [device] * n_devices
    # 6.4 million parameters: each device needs 535 tokens.
    many_words = LanguageModelingObjective(config, 200_000, objective.numerics)
    most = max(1, batch_size * 32 // 535)
    assert len(parallel.devices_for(many_words)) <= most < 4
    wide = dataclasses.replace(config, model=dataclasses.replace(config.model, n_layer=2, n_embd=1024))
    many_params = LanguageModelingObjective(wide, 50, objective.numerics)  # 25 million
    assert parallel.devices_for(many_params) == [device]
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", str(n_cores))  # the user says so
    assert parallel.devices_for(objective) == [device] * n_cores


def test_cores_are_those_that_a_container_may_use(monkeypatch, tmp_path):
    monkeypatch.setattr(parallel, "CPU_QUOTA", tmp_path / "none")
    n_cores = parallel.usable_cores()
    assert n_cores >= 1
    for quota, expected in (("max 100000", n_cores), ("50000 100000", 1), ("150000 100000", 1), ("9900000 100000", 99)):
        (tmp_path / "cpu.max").write_text(quota + "\n")
        monkeypatch.setattr(parallel, "CPU_QUOTA", tmp_path / "cpu.max")
        assert parallel.usable_cores() == min(expected, n_cores)


@pytest.mark.parametrize("all_reduce", [parallel._all_reduce, parallel._all_reduce_ravelled])
def test_an_all_reduce_adds_up_every_array_over_the_devices(all_reduce):
    def tree(scale):
        arrays = {"a": np.arange(6).reshape(2, 3), "b": [np.float32(4), np.zeros((0, 2))], "c": np.arange(3)}
        return jax.tree.map(lambda x: jnp.asarray(scale * x, jnp.float32), arrays)

    both = jax.tree.map(lambda *xs: jnp.stack(xs), tree(1), tree(10))
    sums = jax.pmap(partial(all_reduce, axes=parallel.DATA), axis_name=parallel.DATA, devices=jax.devices()[:2])(both)
    expected = jax.tree.map(lambda x: np.stack([x, x]), tree(11))
    jax.tree.map(np.testing.assert_array_equal, sums, expected)


def test_the_ravelled_all_reduce_is_one():
    tree = {"a": jnp.ones((2, 3)), "b": jnp.ones(4)}
    mapped = jax.make_jaxpr(partial(parallel._all_reduce_ravelled, axes="data"), axis_env=[("data", 2)])(tree)
    assert str(mapped).count("psum") == 1


def test_the_loss_reported_is_the_one_before_the_update():
    executor = executor_of()
    loader = loader_of(executor)
    _, metrics = executor.train_steps(executor.init_state(), loader.take(0, 1), 1)
    assert metrics[0, 0] == pytest.approx(np.log(50), abs=0.05)  # of an untrained model


@pytest.mark.parametrize(
    "n_devices, large",
    [
        (2, False),
        (1, True),
        pytest.param(1, False, marks=pytest.mark.slow),
        pytest.param(2, True, marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_holds_the_state_of_its_save_whatever_becomes_of_its_memory(
    n_devices, large, tmp_path, monkeypatch
):
    if large:
        monkeypatch.setattr(checkpoint, "LARGE", 1)
    executor = executor_of(n_devices=n_devices)
    loader = loader_of(executor)
    run = RunDir(tmp_path, executor.config, ByteTokenizer(), "")
    checkpoints = Checkpoints(run)
    state, _ = executor.train_steps(executor.init_state(), loader.take(0, 1), 1)
    checkpoints.save(state)  # the first save of a run is never in the background
    state, _ = executor.train_steps(state, loader.take(1, 1), 1)
    kept = jax.tree.map(lambda x: np.array(x, copy=True), state)
    checkpoints.save(state)
    if large:  # all there before the next step asks for memory
        assert (tmp_path / "checkpoints/2/default").is_dir()
    for step in range(2, 30):  # each takes the state's memory
        state, _ = executor.train_steps(state, loader.take(step, 1), 1)
    checkpoints.wait()
    found = checkpoints.restore(2, executor.abstract_state())
    checkpoints.close()
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(state.params["token_emb.embedding"], kept.params["token_emb.embedding"])


def test_evaluation_leaves_out_what_only_fills_the_batch():
    executor = executor_of()
    params = executor.init_state().params
    sums_J2 = executor.evaluate(params, whole_split(TOKENS[:61], 4, 12))
    assert sums_J2.shape == (2, 2) and sums_J2[:, 1].tolist() == [4 * 12, 12]
    one_by_one = [executor.evaluate(params, whole_split(TOKENS[s : s + 13], 4, 12))[0, 0] for s in range(0, 60, 12)]
    assert sums_J2[:, 0].sum() == pytest.approx(sum(one_by_one), rel=1e-6)


def losses_of(n_steps=50, n_devices=1, mesh="", **fields):
    """The losses and gradient norms of a training in float64, [n_steps, 2]; half of its updates are clipped."""
    model = dataclasses.replace(SMALL.model, block_size=8)
    config = dataclasses.replace(SMALL, dtype="float64", lr=0.01, clip=0.45, batch_size=8, model=model, **fields)
    with jax.enable_x64(True):
        executor = executor_of(config, n_devices, mesh)
        _, metrics = executor.train_steps(executor.init_state(), loader_of(executor).take(0, n_steps), n_steps)
    return metrics


@pytest.fixture(scope="module")
def whole_batch_losses():
    return losses_of()


@pytest.mark.parametrize(
    "n_devices, fields",
    [
        (2, dict(mesh="fsdp=2", grad_accum=2, remat="block")),
        pytest.param(1, dict(grad_accum=4), marks=pytest.mark.slow),
        pytest.param(2, dict(grad_accum=2, remat="block"), marks=pytest.mark.slow),
        pytest.param(2, dict(mesh="fsdp=2", grad_accum=2), marks=pytest.mark.slow),
        pytest.param(2, dict(mesh="fsdp=2"), marks=pytest.mark.slow),
        pytest.param(2, dict(mesh="data=1", remat="block"), marks=pytest.mark.slow),
        pytest.param(1, dict(grad_accum=8), marks=pytest.mark.slow),
        pytest.param(2, dict(grad_accum=4, parallel="pmap"), marks=pytest.mark.slow),
        pytest.param(1, dict(remat="dots"), marks=pytest.mark.slow),
    ],
)
def test_shards_microbatches_and_recomputed_blocks_train_the_same(whole_batch_losses, n_devices, fields):
    """50 updates in float64: another order of the same sums, 1e-16 each, which Adam amplifies; far below 1e-10."""
    np.testing.assert_allclose(losses_of(n_devices=n_devices, **fields), whole_batch_losses, rtol=1e-10)
    norms = whole_batch_losses[:, 1]
    assert 0 < (norms > 0.45).sum() < len(norms), norms


def test_accumulation_that_does_not_divide_a_devices_rows_is_refused():
    config = dataclasses.replace(SMALL, grad_accum=4)
    objective = LanguageModelingObjective(config, 50, parallel.numerics(config))
    with pytest.raises(
        UserError, match="--grad-accum 4: does not divide the 2 rows that each of the 2 devices of this machine has"
    ):
        parallel.Executor(objective, jax.devices()[:1] * 2)


@pytest.mark.slow
def test_accumulating_takes_less_memory():
    """What the compiler plans for activations and gradients, where activations are most of it."""
    config = dataclasses.replace(SMALL, batch_size=32, model=dataclasses.replace(SMALL.model, block_size=64))
    planned = []
    for grad_accum in (1, 8):
        executor = executor_of(dataclasses.replace(config, grad_accum=grad_accum), 1)
        planned.append(executor.memory(loader_of(executor).take(0, 1))["activations and gradients"])
    assert planned[1] < 0.5 * planned[0], planned


def test_what_the_backward_pass_recomputes():
    """By FLOP as lowered, where products are most of them: all of a block's forward but its last product twice.

    XLA's CPU backend finds the recomputed values equal to those of the forward pass and keeps these, so neither memory
    nor FLOP change on a CPU; accelerators recompute.
    """
    model = ModelConfig(n_layer=2, n_head=2, n_embd=128, block_size=32)
    flop = {}
    for remat in ("none", "block", "dots"):
        config = dataclasses.replace(SMALL, model=model, remat=remat)
        objective = LanguageModelingObjective(config, 50, parallel.numerics(config))
        batch = (jax.ShapeDtypeStruct((4, 32), jnp.int32),) * 2
        gradient = jax.jit(
            jax.grad(lambda params, *batch, objective=objective: objective.loss_sum(params, *batch, None)[0])
        )
        flop[remat] = gradient.lower(objective.param_shapes, *batch).cost_analysis()["flops"]
    assert 1.15 < flop["block"] / flop["none"] < 1.35, flop
    assert 1 < flop["dots"] / flop["none"] < 1.15, flop


# ------------------------------------------------------------------------------------------------------ sharded state


@pytest.mark.parametrize(
    "mesh, n_devices, shape",
    [
        ("", 8, (8, 1)),
        ("data=4,fsdp=2", 8, (4, 2)),
        ("fsdp=2,data=4", 8, (4, 2)),
        ("fsdp=8", 8, (1, 8)),
        ("data=2", 8, (2, 4)),
    ],
)
def test_a_mesh_takes_all_devices(mesh, n_devices, shape):
    assert mesh_shape(mesh, n_devices) == shape


@pytest.mark.parametrize(
    "mesh, message",
    [
        ("data=3", "is not a mesh of the 8 devices that there are; give one of so many, as data=4,fsdp=2"),
        ("data=4,fsdp=4", "is not a mesh of the 8 devices"),
        ("fsdp=16", "is not a mesh of the 8 devices"),
        ("4", "'4' cannot be read; give it as data=4,fsdp=2"),
        ("data=0", "'data=0' cannot be read"),
        ("data=-1", "'data=-1' cannot be read"),
        ("data=\u0664", "cannot be read"),
        ("model=4", "'model=4' cannot be read"),
        ("data=4,data=2", "'data=2' cannot be read"),
        ("data=4,", "'' cannot be read"),
    ],
)
def test_no_other_mesh_is_taken(mesh, message):
    with pytest.raises(UserError, match=f"^--mesh {mesh}: ") as e:
        mesh_shape(mesh, 8)
    assert message in str(e.value)


def test_pmap_shards_no_state():
    with pytest.raises(UserError, match="--mesh fsdp=2: --parallel pmap has no axis fsdp"):
        executor_of(dataclasses.replace(SMALL, parallel="pmap"), 2, "fsdp=2")


def test_what_is_sharded_and_along_which_axis():
    assert parallel.shard_axis((768, 3072), 8) == 1 and parallel.shard_axis((3072, 768), 8) == 0
    assert parallel.shard_axis((50257, 768), 8) == 1  # a vocabulary that 8 does not divide
    assert parallel.shard_axis((64, 64), 2) == 1
    assert parallel.shard_axis((7, 5), 2) is None and parallel.shard_axis((64,), 2) is None
    assert parallel.shard_axis((64, 64), 1) is None


@pytest.mark.parametrize("fused_qkv", [False, True])
@pytest.mark.parametrize("remat", ["none", pytest.param("dots", marks=pytest.mark.slow)])
def test_the_backward_pass_gathers_a_blocks_parameters_again(fused_qkv, remat):
    """As lowered: XLA's CPU backend may find that both gathers give the same, and keep one."""
    config = dataclasses.replace(SMALL, dtype="bfloat16", remat=remat)
    numerics = dataclasses.replace(parallel.numerics(config), fused_qkv=fused_qkv)
    executor = parallel.Executor(LanguageModelingObjective(config, 50, numerics), jax.devices()[:2], "fsdp=2")
    text = executor.lower_train_steps(loader_of(executor).take(0, 0)).as_text()
    matrices = [name for name, p in executor.objective.param_shapes.items() if len(p.shape) == 2]
    of_blocks = sum(name.startswith("blocks.") for name in matrices)
    assert text.count("stablehlo.all_gather") == len(matrices) + of_blocks
    assert len(re.findall(r"stablehlo\.all_gather.*xbf16>", text)) == 2 * of_blocks


def collectives(executor):
    """The collectives of the compiled training steps: (kind, the shape of its result) of each."""
    compiled = executor.lower_train_steps(loader_of(executor).take(0, 0)).compile()
    found = re.findall(
        r" = \w+\[([\d,]*)\]\S* (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\(",
        compiled.as_text(),
    )
    return [(kind, tuple(map(int, filter(None, shape.split(","))))) for shape, kind in found], compiled


def test_the_compiled_steps_gather_parameters_and_nothing_else():
    """And reduce-scatter their gradients; each device plans memory for its shards alone."""
    config = dataclasses.replace(SMALL, model=ModelConfig(n_layer=2, n_head=2, n_embd=64, block_size=12))
    sharded, whole = executor_of(config, 2, "fsdp=2"), executor_of(config, 2)
    found, compiled = collectives(sharded)
    by_name = {name: p.shape for name, p in sharded.objective.param_shapes.items()}
    shapes = list(by_name.values())
    of_matrices = sorted(shape for shape in shapes if len(shape) == 2)
    again = [shape for name, shape in by_name.items() if len(shape) == 2 and name.startswith("blocks.")]
    gathered = sorted(shape for kind, shape in found if kind == "all-gather")
    # For the backward pass, too, unless XLA finds that both gathers of a block give the same, as jax 0.10's does.
    assert gathered in (of_matrices, sorted(of_matrices + again))
    scattered = [math.prod(shape) for kind, shape in found if kind == "reduce-scatter"]
    assert sum(scattered) == sum(map(math.prod, of_matrices)) // 2 and len(scattered) == len(of_matrices)
    # What stays whole, with the loss and its count; the shards, on a data axis of size 1; the squared norm.
    vectors = sum(math.prod(shape) for shape in shapes if len(shape) == 1)
    assert {shape for kind, shape in found if kind == "all-reduce"} <= {(vectors + 2,), (sum(scattered),), ()}
    assert {kind for kind, _ in found} == {"all-gather", "reduce-scatter", "all-reduce"}
    state_bytes = sum(3 * 4 * math.prod(shape) for shape in shapes)  # parameters and two moments
    arguments = compiled.memory_analysis().argument_size_in_bytes
    of_whole = collectives(whole)[1].memory_analysis().argument_size_in_bytes
    vector_bytes = 3 * 4 * vectors
    assert of_whole - arguments == (state_bytes - vector_bytes) // 2


@pytest.mark.parametrize(
    "first, then",
    [
        ("fsdp=2", "one device"),
        pytest.param("fsdp=2", "", marks=pytest.mark.slow),
        pytest.param("", "fsdp=2", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_of_one_layout_is_restored_in_another(tmp_path, first, then):
    """The state bitwise, and the next losses those of the run that goes on as it was, but for the order of sums."""
    (tmp_path / "run").mkdir()
    run = RunDir(tmp_path / "run", SMALL, ByteTokenizer(), 0, "", "", has_manifests=True)
    written = executor_of(SMALL, 2, first)
    loader = loader_of(written)
    state, _ = written.train_steps(written.init_state(), loader.take(0, 3), 3)
    checkpoints = Checkpoints(run)
    checkpoints.save(state)
    checkpoints.wait()
    read = executor_of(SMALL, 1) if then == "one device" else executor_of(SMALL, 2, then)
    restored = checkpoints.restore(3, read.abstract_state())
    checkpoints.close()
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    wanted = jax.tree.map(lambda x: x.sharding, read.abstract_state())
    assert jax.tree.map(lambda x: x.sharding, restored) == wanted
    _, expected = written.train_steps(state, loader.take(3, 5), 5)
    _, found = read.train_steps(restored, loader_of(read).take(3, 5), 5)
    np.testing.assert_allclose(found, expected, rtol=2e-5)  # float32: some units in the last place, amplified by Adam


@pytest.mark.parametrize("packing", ["chunks", pytest.param("windows", marks=pytest.mark.slow)])
def test_in_10000_steps_no_window_is_wrong_missing_or_doubled(packing):
    """Of all devices of each mesh together, for every step of epochs of 7 batches, whose last chunks fill no batch."""
    block_size, batch_size, n_steps = 4, 16, 10_000
    config = TrainConfig(batch_size=batch_size, packing=packing, model=ModelConfig(block_size=block_size))
    tokens_N = jnp.arange(block_size * (batch_size * 7 + 5) + 1)
    start_KB = BatchSampler(config, len(tokens_N)).starts(0, n_steps)
    window_KBT = np.asarray(tokens_N)[start_KB[..., None] + np.arange(block_size + 1)]
    if packing == "chunks":
        for epoch in start_KB[: n_steps // 7 * 7].reshape(-1, 7 * batch_size):
            assert len(set(epoch)) == len(epoch) and not (epoch % block_size).any()
    for n_devices, mesh in ((1, ""), (2, ""), (4, "data=2,fsdp=2"), (8, "data=2,fsdp=4"), (8, "fsdp=8")):
        devices = np.array(jax.devices()[:1] * n_devices).reshape(mesh_shape(mesh, n_devices))
        stand_in = types.SimpleNamespace(devices=devices, size=n_devices)
        contexts = [parallel._step_context(stand_in, jnp.int32(i), parallel.ROWS) for i in range(n_devices)]
        rows = [jax.vmap(context.local_rows)(jnp.asarray(start_KB)) for context in contexts]
        windows = [np.asarray(sampler.windows(tokens_N, r.reshape(-1), block_size)) for r in rows]
        windows = [w.reshape(n_steps, -1, block_size + 1) for w in windows]
        np.testing.assert_array_equal(np.concatenate(windows, axis=1), window_KBT)


@pytest.mark.parametrize("n_processes", [1, 2, 4])
def test_processes_read_each_window_of_10000_steps_once(n_processes):
    """Each by the loader of its own rows, of batches that are divided over 4 devices."""
    config = TrainConfig(batch_size=8, packing="chunks", model=ModelConfig(block_size=4))
    tokens_N = np.arange(4 * (8 * 7 + 5) + 1)
    batch_sampler = BatchSampler(config, len(tokens_N))
    devices = [types.SimpleNamespace(process_index=i * n_processes // 4) for i in range(4)]
    mesh = types.SimpleNamespace(devices=np.array(devices).reshape(2, 2), size=4)
    rows = [parallel.rows_of_process(mesh, 8, process) for process in range(n_processes)]
    loaders = [HostLoader(tokens_N, batch_sampler, ProcessRows(own, sampler.RowSource)) for own in rows]
    for step in range(0, 10_000, loaders[0].max_steps):
        n_steps = min(loaders[0].max_steps, 10_000 - step)
        read = [loader.take(step, n_steps).window_KBT[:n_steps] for loader in loaders]
        start_KB = batch_sampler.starts(step, n_steps)
        np.testing.assert_array_equal(np.concatenate(read, axis=1), tokens_N[start_KB[..., None] + np.arange(5)])
    for loader in loaders:
        loader.close()
