"""Plans: of a small model, lowered by default; with the compilers' extras, compiled for each kind of accelerator."""

import dataclasses
import json

import jax
import pytest

from jaxgpt import parallel
from jaxgpt.analysis import plan
from jaxgpt.analysis.compiled_program import Collective, CompiledProgram
from jaxgpt.analysis.plan import make_plan, read_out_of_memory, text
from jaxgpt.analysis.targets import Target, parse_target
from jaxgpt.config import ModelConfig, TrainConfig
from jaxgpt.errors import UserError
from jaxgpt.memory import count_params
from jaxgpt.objective import LanguageModelingObjective
from jaxgpt.train_step import state_shapes

CONFIG = TrainConfig(batch_size=8, clip=1.0, model=ModelConfig(n_layer=1, n_head=2, n_embd=128, block_size=128))
VOCABULARY = 300
# The same for the command.
FLAGS = (
    *("--batch-size=8", "--clip=1", "--vocab-size=300", "--model.n-layer=1", "--model.n-head=2"),
    *("--model.n-embd=128", "--model.block-size=128"),
)
EMPTY = CompiledProgram("HloModule m\n\nENTRY %e () -> f32[] {\n}\n")


@pytest.fixture
def without_compilers(monkeypatch):
    monkeypatch.setattr(Target, "compiler_is_installed", False)


def planned(name: str, **fields) -> dict:
    return make_plan(dataclasses.replace(CONFIG, **fields), VOCABULARY, parse_target(name), 1e9)


def n_state_arrays() -> int:
    objective = LanguageModelingObjective(CONFIG, VOCABULARY, parallel.numerics(CONFIG))
    return len(jax.tree.leaves(state_shapes(objective)))


def test_without_its_compiler_a_target_is_lowered(without_compilers):
    found = planned("H100:2")
    assert (found["read_from"], found["fits"], found["estimated"], found["collectives"]) == ("lowered", None, None, {})
    assert found["flash_attention"] == {"forward": 1, "backward": 1, "layers": 1, "why_not": None}
    assert set(found["products"]) == {"bf16 x bf16"} and found["float32_products"]["count"] == 0
    assert found["donated"] == found["donatable"] == n_state_arrays() and found["host_callbacks"] == 0
    flop = found["flop_per_device"]
    assert flop["compiled"] == pytest.approx(flop["F6"], rel=0.1) and flop["flash_attention"] > 0
    weights = found["bytes_per_device"]["weights"]
    assert weights == 4 * sum(count_params(CONFIG.model, VOCABULARY, None))
    assert found["bytes_per_device"]["optimizer_state"] == pytest.approx(2 * weights, rel=1e-3)
    printed = text(found, parse_target("H100:2"))
    assert 'pip install -e ".[aot-gpu]" in a checkout' in printed and "estimated" not in printed


def test_accumulation_repeats_the_products_of_a_microbatch(without_compilers):
    whole, parts = planned("H100"), planned("H100", grad_accum=4)
    assert parts["flop_per_device"]["products"] == whole["flop_per_device"]["products"]


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"dtype": "float32"}, "--dtype is float32"),
        ({"packing": "documents", "tokenizer": "gpt2"}, "--packing documents"),
        ({"model": ModelConfig(n_layer=1, n_head=2, n_embd=132, block_size=128)}, "heads of 66 channels"),
    ],
)
def test_why_there_is_no_flash_attention(fields, reason):
    target, config = parse_target("H100"), dataclasses.replace(CONFIG, **fields)
    objective = LanguageModelingObjective(config, VOCABULARY, parallel.numerics(config, target.stand_in), 0)
    found = plan._flash_attention(objective, target, EMPTY)
    assert (found["forward"], found["layers"]) == (0, 1) and reason in found["why_not"]


def test_float32_products_are_told_with_their_shapes(without_compilers):
    found = planned("H100", dtype="float32")
    assert (
        set(found["products"]) == {"f32 x f32"} and found["float32_products"]["count"] == found["products"]["f32 x f32"]
    )
    assert found["float32_products"]["largest"][0].startswith("f32[")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"batch_size": 6}, "--batch-size 6: not divisible by the 4 devices of v5e:2x2; choose a multiple of 4"),
        ({"grad_accum": 4}, "--grad-accum 4: does not divide the 2 rows that each of the 4 devices of v5e:2x2 has"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        planned("v5e:2x2", **fields)


def test_what_libtpu_says_of_a_program_that_does_not_fit():
    # The words of libtpu; the sizes are made up.
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 2.50G of 1.75G hbm. Exceeded.\n\n"
        '  1. Size: 1.50G\n     Operator: op_name="x"\n     Shape: f32[32,12]{1,0:T(8,128)}\n'
        "  2. Size: 512.00M\n     Shape: bf16[7]{0}\n     Unpadded size: 512.00M\n"
    )
    assert read_out_of_memory(message) == (5 * 2**29, "largest buffers: f32[32,12] of 1.50GiB, bf16[7] of 512.00MiB")
    message = "RESOURCE_EXHAUSTED: Allocation (size=99) would exceed memory (size=9) :: %s [shape: f32[3], index: 3]"
    assert read_out_of_memory(message) == (99, "largest buffers: f32[3]")


def test_what_to_change_where_it_does_not_fit():
    target, memory = parse_target("v5e:2x2"), {"weights": 2**30, "optimizer_state": 2**31}
    changes = ["--grad-accum 2", "--remat block", "--batch-size 4", "more devices"]
    assert plan._to_fit(CONFIG, memory, target, fsdp=4) == changes
    assert plan._to_fit(CONFIG, memory, target, fsdp=1) == ["--mesh fsdp=4", *changes]
    small = dataclasses.replace(CONFIG, batch_size=4, remat="block")
    assert plan._to_fit(small, memory, target, fsdp=4) == ["a shorter --model.block-size, or a smaller model"]
    too_large = {"weights": 2**33, "optimizer_state": 2**34}
    first, second = plan._to_fit(CONFIG, too_large, target, fsdp=1)
    assert first == "--mesh fsdp=4" and "a smaller model" in second


def test_the_estimate_is_a_roofline(monkeypatch):
    """Of a program whose figures are given: the longest of its parts, and what no computation hides."""
    target = parse_target("v5e:2x2")
    rate, bandwidth, links = 197e12, 819e9, 200e9
    given = {
        "bytes_accessed": int(2e-3 * bandwidth),
        "estimated_cycles": None,
        "collectives": [
            Collective("all-reduce", 1, int(1e-3 * links), flop_meanwhile=int(5e-4 * rate)),  # takes 1.5 ms
            Collective("all-gather", 2, int(1e-3 * links), bytes_meanwhile=int(bandwidth)),  # hidden
            Collective("all-reduce", 1, int(0.5e-3 * links), bytes_meanwhile=int(bandwidth), group_size=2),  # 0.5 ms
            Collective("all-reduce", 1, int(1e-3 * links), group_size=1),  # moves nothing
        ],
    }
    for name, value in given.items():
        monkeypatch.setattr(CompiledProgram, name, value)
    flop = {"compiled": 1e-3 * rate, "F12": 1e-3 * rate, "flash_attention": 0.0}
    found = plan._estimate(EMPTY, flop, CONFIG, target, 1e9)
    assert (found["bound"], found["flop_s"], found["memory_s"]) == ("memory", 1e-3, pytest.approx(2e-3))
    assert found["collectives_s"] == pytest.approx(1.5e-3 + 2 * 0.75e-3 + 0.5e-3)
    assert found["collectives_exposed_s"] == pytest.approx(1e-3)
    assert found["step_s"] == pytest.approx(3e-3) and found["mfu"] == pytest.approx(1 / 3)
    assert found["tokens_per_s"] == pytest.approx(8 * 128 / 3e-3)
    assert found["hours"] == pytest.approx(1e9 / found["tokens_per_s"] / 3600)
    monkeypatch.setattr(CompiledProgram, "estimated_cycles", 6_000_000)
    found = plan._estimate(EMPTY, flop, CONFIG, target, 1e9)
    assert (found["bound"], found["cycles_s"], found["step_s"]) == ("cycles", 4e-3, pytest.approx(5e-3))
    # Kernels of Pallas have no cycles: heads of 64 channels use half of a matrix unit.
    found = plan._estimate(EMPTY, flop | {"flash_attention": 1e-3 * rate}, CONFIG, target, 1e9)
    assert found["cycles_s"] == pytest.approx(6e-3)


# ------------------------------------------------------------------------------------------------ with the compilers


@pytest.fixture(scope="module")
def compiled(command, tmp_path_factory):
    """Plans of compiled programs, each made once by a process of its own: plugins are found when JAX starts."""
    folder = tmp_path_factory.mktemp("plans")

    def plan_of(name: str, *flags: str) -> dict:
        target = parse_target(name)
        if not target.compiler_is_installed:
            pytest.skip(f"the compiler for {name} is in the extra {target.extra}")
        path = folder / f"{''.join([name, *flags])}.json"
        if not path.exists():
            done = command("plan.py", *FLAGS, "--target", name, *flags, "--json", path)
            assert (done.returncode, done.stderr) == (0, "")
        return json.loads(path.read_text())

    return plan_of


TPUS, GPUS = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"], ["A100:2", "H100:2"]


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("name", [*TPUS, *GPUS])
def test_a_compiled_step(compiled, name):
    found = compiled(name)
    assert (found["read_from"], found["fits"], found["problem"]) == ("compiled", True, None)
    assert found["donated"] == found["donatable"] == n_state_arrays()
    assert found["host_callbacks"] == 0
    # Gradients are reduced; nothing is gathered.
    assert set(found["collectives"]) == {"all-reduce"}
    weights = found["bytes_per_device"]["weights"]
    assert found["collectives"]["all-reduce"] == pytest.approx(weights, rel=1e-3)
    assert found["bytes_per_device"]["memory"] > found["bytes_per_device"]["peak"] > 3 * weights
    flop = found["flop_per_device"]
    assert 0.9 * flop["F6"] < flop["compiled"] < 1.1 * flop["F12"]
    estimated = found["estimated"]
    assert estimated["step_s"] >= max(estimated["flop_s"], estimated["memory_s"]) > 0
    assert estimated["tokens_per_s"] * estimated["step_s"] == pytest.approx(CONFIG.tokens_per_step)


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("name", GPUS)
def test_a_gpu_computes_all_products_in_bfloat16_and_attention_by_cudnn(compiled, name):
    found = compiled(name)
    assert set(found["products"]) == {"bf16 x bf16"}
    assert (found["flash_attention"]["forward"], found["flash_attention"]["backward"]) == (1, 1)


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("name", TPUS)
def test_a_tpu_has_no_float32_products_and_attention_by_splash_kernels(compiled, name):
    found = compiled(name)
    assert found["float32_products"]["count"] == 0, found["float32_products"]
    assert (found["flash_attention"]["forward"], found["flash_attention"]["backward"]) == (1, 1)
    assert found["estimated_cycles"] > 0


@pytest.mark.aot
@pytest.mark.slow
def test_accumulation_counts_all_microbatches_of_a_compiled_step(compiled):
    """XLA's own analysis counts a loop's body once."""
    whole, parts = compiled("v5e:2x2"), compiled("v5e:2x2", "--grad-accum=2")
    assert parts["flop_per_device"]["products"] == whole["flop_per_device"]["products"]


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5e:2x2", "H100:2"])
def test_a_sharded_step_gathers_parameters_and_nothing_else(compiled, name):
    n = parse_target(name).n_devices
    whole, sharded = compiled(name), compiled(name, f"--mesh=fsdp={n}")
    shapes = LanguageModelingObjective(CONFIG, VOCABULARY, parallel.numerics(CONFIG)).param_shapes
    of_blocks = sum(p.size for key, p in shapes.items() if p.ndim > 1 and key.startswith("blocks."))
    of_rest = sum(p.size for key, p in shapes.items() if p.ndim > 1 and not key.startswith("blocks."))
    collectives = sharded["collectives"]
    # libtpu moves the edges of shards whose size is no multiple of its tiles.
    moved = collectives.pop("collective-permute", 0)
    assert set(collectives) <= {"all-gather", "reduce-scatter", "all-reduce"} and moved < 0.1 * sum(
        collectives.values()
    )
    # Blocks in bfloat16, forward and backward; the others in bfloat16 or float32, as the compiler chooses.
    assert 4 * of_blocks + 2 * of_rest <= collectives["all-gather"] <= 4 * (of_blocks + of_rest)
    # Gradients in float32. TPUs may write a reduce-scatter as an all-reduce of which each device keeps a part.
    reduced = collectives.get("reduce-scatter", 0) + collectives.get("all-reduce", 0)
    assert reduced == pytest.approx(4 * (of_blocks + of_rest), rel=0.1)
    memory, of_whole = sharded["bytes_per_device"], whole["bytes_per_device"]
    for kind in ("weights", "optimizer_state"):
        assert memory[kind] == pytest.approx(of_whole[kind] / n, rel=0.1)  # vectors stay whole
