"""The memory that a configuration needs: exact for the state, never above what the compiler plans."""

import dataclasses
import math
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxgpt import memory, runtime
from jaxgpt.config import FinetuneConfig, ModelConfig, TrainConfig
from jaxgpt.data.tokenizer import ByteTokenizer
from jaxgpt.errors import UserError
from jaxgpt.memory import count_params, host_memory, memory_need, require_memory, size_text

slow = pytest.mark.slow
MODEL = ModelConfig(n_layer=3, n_head=2, n_embd=24, block_size=32)


def config_of(**values) -> TrainConfig:
    return TrainConfig(**{"model": MODEL, "batch_size": 8, **values})


def objective_of(config, labels=()):
    return runtime.build_objective(config, ByteTokenizer(), labels)


def n_bytes(tree) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


CONFIGS = {
    "adamw": config_of(),
    "tied": config_of(model=dataclasses.replace(MODEL, tied_head=True), optimizer="adam"),
    "sgd": config_of(optimizer="sgd"),
    "momentum": config_of(optimizer="sgd", momentum=0.9),
    "classifier": FinetuneConfig(model=MODEL, max_tokens=16),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_and_optimizer_state_are_exact(name):
    config = CONFIGS[name]
    labels = ("a", "b", "c") if isinstance(config, FinetuneConfig) else ()
    executor = runtime.build_executor(config, ByteTokenizer(), labels, lambda _: jax.local_devices()[:1])
    objective = executor.objective
    counts = count_params(config.model, 256, objective.n_classes)
    assert sum(counts) == sum(math.prod(p.shape) for p in objective.param_shapes.values())
    state = executor.abstract_state()
    need = memory_need(objective, on_cpu=True, n_devices=1, trains=False)
    assert need.parameters == n_bytes(state.params)
    counters = n_bytes([x for x in jax.tree.leaves(state.opt_state) if not x.shape])
    assert need.optimizer_state == n_bytes(state.opt_state) - counters and counters <= 8
    assert need.gradients == need.activations == 0
    of_two = memory_need(objective, on_cpu=True, n_devices=2, trains=False)
    assert of_two.total == 2 * need.total  # each core has its own
    assert memory_need(objective, on_cpu=False, n_devices=2, trains=False) == need


@pytest.mark.parametrize(
    "n_devices, changes",
    [
        pytest.param(1, {}, marks=slow),
        pytest.param(1, {"clip": 1.0, "model": dataclasses.replace(MODEL, n_head=6, block_size=200)}, marks=slow),
        pytest.param(1, {"model": ModelConfig(n_layer=6, n_head=2, n_embd=24, tied_head=True)}, marks=slow),
        pytest.param(2, {"batch_size": 64, "model": dataclasses.replace(MODEL, n_layer=1)}, marks=slow),
    ],
)
def test_a_step_needs_no_less_than_the_bound(n_devices, changes):
    """Held against the temporary memory that the compiler plans for the step."""
    from jaxgpt.data.loader import DeviceLoader
    from jaxgpt.data.sampler import BatchSampler

    config = config_of(**changes)
    devices = jax.local_devices()[:n_devices]
    executor = runtime.build_executor(config, ByteTokenizer(), devices=lambda _: devices, trains=True)
    tokens_N = np.zeros(5000, np.uint8)
    source = DeviceLoader(tokens_N, BatchSampler(config, len(tokens_N)), executor.put).take(0, 0)
    planned = executor.memory(source)["activations and gradients"]
    need = memory_need(executor.objective, on_cpu=True, n_devices=n_devices, trains=True)
    bound = (need.gradients + need.activations) / n_devices
    assert bound <= planned < 12 * bound, (bound, planned)


def test_a_larger_batch_needs_more_unless_it_is_divided_into_microbatches():
    few, many = (objective_of(config_of(batch_size=n)) for n in (1000, 10**6))
    on_one, on_two = ([memory_need(o, True, n, trains=True).total for o in (few, many)] for n in (1, 2))
    assert on_one[1] > 500 * on_one[0]
    assert on_two[1] < 10**9  # the tokens of the batch; the activations are those of a microbatch


@pytest.mark.parametrize(
    "changes, named",
    [
        (
            {"model": ModelConfig(n_layer=1000, n_head=2, n_embd=99998)},
            "--model.n-embd 99998: .*n-layer 1000",
        ),
        (
            {"model": ModelConfig(block_size=10**6), "batch_size": 2},
            "--batch-size 2: .*block-size 1000000",
        ),
        ({"batch_size": 10**6}, "--batch-size 1000000: .*, or --model.block-size 32"),
        ({"model": ModelConfig(n_layer=1, n_head=1, n_embd=10**5)}, "--model.n-embd 100000: .*, or --model.n-layer 1$"),
    ],
)
def test_what_cannot_fit_names_the_flags_and_the_kinds(monkeypatch, changes, named):
    monkeypatch.setattr(memory, "host_memory", lambda: 16 * 10**9)
    objective = objective_of(config_of(**changes))
    with pytest.raises(UserError, match=named) as e:
        require_memory(objective, jax.local_devices()[:1], trains=True)
    kinds = r"parameters \S+ .?B, optimizer state \S+ .?B, gradients \S+ .?B, activations \S+ .?B"
    assert re.search(
        rf"takes at least \S+ .B of memory \({kinds}\), and this machine has 16 GB; lower it", str(e.value)
    )
    monkeypatch.setattr(memory, "host_memory", lambda: None)
    require_memory(objective, jax.local_devices()[:1], trains=True)


class Accelerator:
    """A device with a limit on its memory."""

    platform = "gpu"

    def __init__(self, stats):
        self.memory_stats = lambda: stats


def test_an_accelerator_has_what_jax_may_take_of_it():
    objective = objective_of(config_of())
    need = memory_need(objective, on_cpu=False, n_devices=1, trains=True).total
    for stats in (None, {}, {"bytes_limit": need}):
        require_memory(objective, [Accelerator(stats)], trains=True)
    with pytest.raises(UserError, match="and each device has"):
        require_memory(objective, [Accelerator({"bytes_limit": need - 1})], trains=True)


@pytest.fixture
def system(tmp_path, monkeypatch):
    """The system's files about memory, none at first, as a function from a path to its text."""
    for name in ("MEMINFO", "OWN_CGROUP", "CGROUPS"):
        monkeypatch.setattr(memory, name, tmp_path / name)
    monkeypatch.setattr(memory.os, "sysconf", {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}.__getitem__)
    monkeypatch.setattr(memory, "address_space_limit", lambda: None)

    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    return write


def test_the_memory_of_the_host(system, monkeypatch):
    system("MEMINFO", "MemTotal: 4000 kB\nSwapTotal: 10 kB\n")
    assert host_memory() == 4_096_000 + 10_240  # physical, and swap
    system("OWN_CGROUP", "0::/a/b\n")
    system("CGROUPS/a/b/memory.max", "max\n")
    system("CGROUPS/a/memory.max", "2000000\n")
    assert host_memory() == 2_000_000 + 10_240  # of a group above
    system("OWN_CGROUP", "2:cpu:/x\n1:memory,other:/gone\n")
    system("CGROUPS/memory/memory.limit_in_bytes", "1000000\n")
    assert host_memory() == 1_000_000 + 10_240  # version 1, in a container that does not see its group
    monkeypatch.setattr(memory, "address_space_limit", lambda: 500_000)
    assert host_memory() == 500_000


def test_swap_of_a_system_that_does_not_tell_is_the_free_disk(system, monkeypatch):
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**12))
    assert host_memory() == 4_096_000 + 10**12


@pytest.mark.parametrize(
    "n, text", [(0, "0 B"), (999, "999 B"), (25_270_000_000, "25.3 GB"), (4.8e14, "480 TB"), (2e18, "2e+03 PB")]
)
def test_sizes_have_three_digits(n, text):
    assert size_text(n) == text


def test_a_long_step_is_announced(monkeypatch):
    config = config_of(batch_size=10**6)
    executor = runtime.build_executor(config, ByteTokenizer(), trains=True)
    monkeypatch.setattr(runtime, "_product_speed", lambda _: 1e9)
    note = runtime.long_step_note(executor)
    assert note.startswith("a step of 32,000,000 tokens takes") and "minutes or more" in note and "--batch-size" in note
    monkeypatch.setattr(runtime, "_product_speed", lambda _: 1e15)
    assert runtime.long_step_note(executor) is None


def test_an_ordinary_step_is_not_even_measured(monkeypatch):
    monkeypatch.setattr(runtime, "_product_speed", lambda _: pytest.fail("measured"))
    assert runtime.long_step_note(runtime.build_executor(config_of(), ByteTokenizer(), trains=True)) is None
