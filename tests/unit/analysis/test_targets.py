"""Targets: their names, and what JAX and XLA are told of them."""

import importlib.util
import os

import jax.numpy as jnp
import pytest

from jaxgpt import parallel
from jaxgpt.analysis import targets
from jaxgpt.analysis.targets import (
    CHIPS,
    assumed_cudnn,
    chip_of,
    compile_without_accelerators,
    gpu_target_config,
    parse_target,
)
from jaxgpt.config import TrainConfig
from jaxgpt.errors import UserError


@pytest.mark.parametrize(
    "text, chip, topology, n_devices",
    [
        ("v5e:4x4", "v5e", (4, 4), 16),
        ("v5e:1", "v5e", (1, 1), 1),
        ("v5e", "v5e", (1, 1), 1),
        ("v5p:2x2x4", "v5p", (2, 2, 4), 16),
        ("v6e:8x16", "v6e", (8, 16), 128),
        ("v4:2x2x1", "v4", (2, 2, 1), 8),  # two cores each
        ("tpu7x:1", "tpu7x", (1, 1, 1), 2),
        ("H100", "H100", (1,), 1),
        ("A100:8", "A100", (8,), 8),
    ],
)
def test_names(text, chip, topology, n_devices):
    target = parse_target(text)
    assert (target.chip.name, target.topology, target.n_devices) == (chip, topology, n_devices)


@pytest.mark.parametrize(
    "text, remedy",
    [
        ("v5", "choose of v4, v5e"),
        ("h100", "did you mean H100"),
        ("v5e:8", "as v5e:2x2, or v5e:1"),
        ("v5e:2x2x1", "a topology of 2 axes"),
        ("v5p:2x2", "as v5p:2x2x1"),
        ("v5e:", "a topology of 2 axes"),
        ("v5e:0x2", "a topology of 2 axes"),
        ("H100:2x2", "a number of GPUs"),
        ("H100:9", "at most H100:8"),
        ("H100:00", "a number of GPUs"),
    ],
)
def test_refuses(text, remedy):
    with pytest.raises(UserError, match=f"^--target {text}: .*{remedy}"):
        parse_target(text)


@pytest.mark.parametrize("name", CHIPS)
def test_a_target_trains_in_bfloat16(name):
    numerics = parallel.numerics(TrainConfig(), parse_target(name).stand_in)
    assert numerics.compute_dtype == jnp.bfloat16
    assert (numerics.attention == "cudnn") == (CHIPS[name].platform == "cuda")


def test_the_chip_of_a_device_of_this_machine():
    """As JAX names devices; of another form, whose figures differ, nothing is known."""
    kinds = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU7x": "tpu7x", "NVIDIA H100 80GB HBM3": "H100"}
    assert {kind: chip.name for kind in kinds if (chip := chip_of(kind))} == kinds
    assert chip_of("NVIDIA H100 PCIe") is None and chip_of("cpu") is None


def test_the_clock_of_a_tpu_gives_its_peak():
    """Matrix units of 128 x 128, two operations an element and cycle: v5e has 4, v4 and v5p 8."""
    for name, units in (("v5e", 4), ("v4", 8), ("v5p", 8)):
        chip = CHIPS[name]
        assert chip.clock_hz and chip.flop_per_s == pytest.approx(units * 2 * 128**2 * chip.clock_hz, rel=5e-3)


def test_the_description_of_a_card():
    text = gpu_target_config(CHIPS["A100"])
    assert "cuda_compute_capability { major: 8 minor: 0 }" in text and "core_count: 108" in text
    assert text.count("{") == text.count("}") == 3
    assert f"device_memory_size: {80 * 2**30}" in text


def test_cudnn_is_assumed_within_the_block_only():
    from jax._src.cudnn import fused_attention_stablehlo

    asked = fused_attention_stablehlo.check_cudnn_version
    with assumed_cudnn():
        assert fused_attention_stablehlo.check_cudnn_version() >= 90000
    assert fused_attention_stablehlo.check_cudnn_version is asked


def test_the_environment_keeps_libtpu_off_the_network_and_what_the_user_set(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("TPU_", "ALLOW_MULTIPLE", "TF_CPP", "JAX_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", dict(os.environ) | {"JAX_PLATFORMS": "cuda", "TPU_WORKER_HOSTNAMES": "mine"})
    compile_without_accelerators()
    assert os.environ["JAX_PLATFORMS"] == "cpu" and os.environ["TPU_WORKER_HOSTNAMES"] == "mine"
    assert os.environ["TPU_SKIP_MDS_QUERY"] == os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"


def test_what_is_installed_is_found(monkeypatch):
    found = {"libtpu": None, "jax_plugins.xla_cuda12": "a spec"}

    def find(name):
        if name == "jax_plugins.xla_cuda13":
            raise ModuleNotFoundError("No module named 'jax_plugins'")
        return found[name]

    monkeypatch.setattr(importlib.util, "find_spec", find)
    assert parse_target("H100").compiler_is_installed and not parse_target("v5e").compiler_is_installed
    found |= {"libtpu": "a spec", "jax_plugins.xla_cuda12": None}
    assert parse_target("v5e").compiler_is_installed and not parse_target("H100").compiler_is_installed


@pytest.mark.aot
@pytest.mark.slow
def test_a_topology_that_libtpu_refuses_is_told():
    pytest.importorskip("libtpu", reason="the compiler of TPUs is in the extra aot-tpu")
    targets.compile_without_accelerators()
    with pytest.raises(UserError, match="^--target v5e:3x5: refused by the compiler .*choose another topology"):
        parse_target("v5e:3x5").devices()
