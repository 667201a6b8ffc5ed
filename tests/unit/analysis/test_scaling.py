"""The formula for memory and communication, held against traces, compiled programs and the plans of GPT-2."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks import scale
from jaxgpt import parallel
from jaxgpt.analysis import plan
from jaxgpt.analysis.compiled_program import CompiledProgram
from jaxgpt.analysis.scaling import Footprint, block_bytes, footprint
from jaxgpt.analysis.targets import assumed_cudnn, parse_target
from jaxgpt.config import ModelConfig, TrainConfig, mesh_shape
from jaxgpt.objective import LanguageModelingObjective
from jaxgpt.presets import PRESETS

ROOT = Path(__file__).resolve().parents[3]
SMALL = TrainConfig(
    batch_size=16, clip=1.0, model=ModelConfig(n_layer=2, n_head=2, n_embd=64, block_size=16, tied_head=True)
)
SCALARS = 2 * 4, 3 * 4  # the sums of losses and tokens; of a sharded state the squared norm of the gradients, too


def objective_of(config: TrainConfig, target: str = "") -> LanguageModelingObjective:
    device = parse_target(target).stand_in if target else None
    return LanguageModelingObjective(config, 50, parallel.numerics(config, device))


def footprint_of(objective: LanguageModelingObjective, mesh: str, n_devices: int) -> Footprint:
    shape = mesh_shape(mesh, n_devices)
    return footprint(objective.config, objective.numerics, objective.param_shapes, *shape)


@pytest.mark.parametrize(
    "target, remat",
    [
        ("H100", "none"),
        ("v5e", "dots"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("H100", "dots"), ("H100", "block"))),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("v5e", "none"), ("v5e", "block"))),
    ],
)
def test_what_the_backward_pass_finds_saved_of_a_block(target, remat):
    """By the trace: of each token, what one more layer adds."""
    n_time = 128

    def saved(n_layer: int, n_rows: int) -> int:
        model = ModelConfig(n_layer=n_layer, n_head=2, n_embd=128, block_size=n_time, gelu="tanh")
        objective = objective_of(TrainConfig(batch_size=n_rows, remat=remat, model=model), target=target)
        batch = (jax.ShapeDtypeStruct((n_rows, n_time), jnp.int32),) * 2

        def residuals(params, *batch):
            return jax.vjp(lambda params: objective.loss_sum(params, *batch, None)[0], params)[1]

        with assumed_cudnn():
            arrays = jax.tree.leaves(jax.eval_shape(residuals, objective.param_shapes, *batch))
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)

    one_row, two_rows = (saved(2, n_rows) - saved(1, n_rows) for n_rows in (1, 2))
    config = TrainConfig(remat=remat, model=ModelConfig(n_layer=1, n_head=2, n_embd=128, block_size=n_time))
    expected = block_bytes(config.model, objective_of(config, target=target).numerics)
    # The trace has attention's output twice, as [B, T, H, D] and as [N, C]: the same bytes to a compiler.
    twice = 2 * config.model.n_embd if remat == "none" else 0
    assert (two_rows - one_row) / n_time == expected + twice


@pytest.mark.parametrize("mesh, grad_accum", [pytest.param("", 1, marks=pytest.mark.slow), ("fsdp=2", 2)])
def test_the_collectives_of_two_devices_as_lowered(mesh, grad_accum):
    objective = objective_of(dataclasses.replace(SMALL, grad_accum=grad_accum))
    executor = parallel.Executor(objective, jax.devices()[:2], mesh)
    lowered = executor.lower_train_steps(plan._source(objective.config)).compiler_ir("hlo").as_hlo_text()
    found, expected = plan._collectives(CompiledProgram(lowered)), footprint_of(objective, mesh, 2)
    assert found.get("all-gather", 0) == expected.all_gather
    assert found.get("reduce-scatter", 0) == expected.reduce_scatter
    assert found["all-reduce"] == expected.all_reduce + SCALARS[bool(mesh)]


COMPILES = """
import dataclasses, json, sys
import jax
from jaxgpt import parallel
from jaxgpt.analysis import plan
from jaxgpt.analysis.compiled_program import CompiledProgram
from tests.unit.analysis.test_scaling import SMALL, objective_of

found = {}
for mesh in sys.argv[1:]:
    objective = objective_of(SMALL)
    executor = parallel.Executor(objective, jax.devices(), mesh)
    source = plan._source(objective.config)
    compiled = executor.lower_train_steps(source).compile()
    state = compiled.memory_analysis().argument_size_in_bytes - sum(4 * x.size for x in source)
    found[mesh] = {"state": state, **plan._collectives(CompiledProgram(compiled.as_text()))}
print(json.dumps(found))
"""


@pytest.mark.slow
def test_the_state_and_the_collectives_of_eight_devices_as_compiled():
    meshes = ["data=8", "data=2,fsdp=4", "fsdp=8"]
    flags = "--xla_force_host_platform_device_count=8"
    env = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", COMPILES, *meshes], env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    objective = objective_of(SMALL)
    n_of_blocks = sum(
        x.size for name, x in objective.param_shapes.items() if x.ndim == 2 and name.startswith("blocks.")
    )
    for mesh in meshes:
        expected, sharded = footprint_of(objective, mesh, 8), "fsdp" in mesh
        assert found[mesh]["state"] == expected.state + 4 * 4, (
            mesh
        )  # two steps, the optimizer's count, the number of steps
        # XLA's CPU backend may find that both gathers of a block's parameters give the same, and keep one.
        once = expected.all_gather - sharded * 4 * n_of_blocks
        assert found[mesh].get("all-gather", 0) in (expected.all_gather, once), mesh
        assert found[mesh].get("reduce-scatter", 0) == expected.reduce_scatter, mesh
        assert found[mesh]["all-reduce"] == expected.all_reduce + SCALARS[sharded], mesh
    assert footprint_of(objective, "fsdp=8", 8).state < footprint_of(objective, "data=8", 8).state / 6


def recorded() -> dict[str, dict]:
    """The plans of GPT-2 in docs/accelerators.json: of compiled programs."""
    plans = json.loads((ROOT / "docs" / "accelerators.json").read_text(encoding="utf-8"))
    return {name: found for name, found in plans.items() if found["preset"] == "gpt2"}


@pytest.mark.parametrize("name", recorded())
def test_the_plans_of_gpt2(name):
    found = recorded()[name]
    assert found["read_from"] == "compiled"
    words = found["flags"].split()
    flags = dict(zip(words[::2], words[1::2], strict=True))
    config = dataclasses.replace(
        PRESETS["gpt2"],
        batch_size=found["batch_size"],
        remat=flags.get("--remat", "none"),
        grad_accum=int(flags.get("--grad-accum", 1)),
    )
    numerics = parallel.numerics(config, parse_target(found["target"]).stand_in)
    shape = mesh_shape(flags.get("--mesh", ""), found["devices"])
    expected = footprint(config, numerics, scale.shapes_of("124M"), *shape)
    memory, collectives = found["bytes_per_device"], found["collectives"]
    assert expected.weights == memory["weights"]
    assert expected.moments == pytest.approx(memory["optimizer_state"], abs=8)  # with counts of steps
    assert 0.84 < expected.peak / memory["peak"] < 1.17
    assert collectives.get("all-gather", 0) == pytest.approx(expected.all_gather, rel=1e-3)
    # TPUs may write a reduce-scatter as an all-reduce of which each device keeps a part.
    reduced = collectives.get("reduce-scatter", 0) + collectives.get("all-reduce", 0)
    assert reduced == pytest.approx(expected.reduce_scatter + expected.all_reduce, rel=2e-3)


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("remat, tolerance", [("none", 0.05), ("block", 0.15)])
def test_what_a_layer_adds_to_the_memory_of_a_compiled_step(command, tmp_path, remat, tolerance):
    target = parse_target("H100")
    if not target.compiler_is_installed:
        pytest.skip(f"its compiler is in the extra {target.extra}")
    model = ModelConfig(n_head=4, n_embd=512, block_size=1024, tied_head=True, gelu="tanh")
    flags = (*("--batch-size=32", "--vocab-size=512", "--model.n-head=4", "--model.n-embd=512"),)
    flags += ("--model.block-size=1024", "--model.tied-head", "--model.gelu=tanh", f"--remat={remat}")
    temporary = {}
    for n_layer in (2, 4):
        path = tmp_path / f"{n_layer}.json"
        done = command("plan.py", *flags, f"--model.n-layer={n_layer}", "--target", target.name, "--json", path)
        assert (done.returncode, done.stderr) == (0, "")
        temporary[n_layer] = json.loads(path.read_text())["bytes_per_device"]["temporary"]
    config = TrainConfig(batch_size=32, remat=remat, model=model)
    formula = config.tokens_per_step * block_bytes(model, objective_of(config, target.name).numerics)
    assert (temporary[4] - temporary[2]) / 2 == pytest.approx(formula, rel=tolerance)
