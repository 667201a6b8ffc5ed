"""The accelerators that `jaxgpt plan` compiles for: their published figures, their names, and their devices.

A target is a TPU slice by its topology, "v5e:4x4", or a number of GPUs of one host, "H100:8"; "v5e:1" and "H100" are
one chip. None of them has to be on this machine: XLA compiles for a description of them.
"""

import contextlib
import difflib
import importlib.util
import math
import os
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from jaxgpt.errors import UserError

GiB, GB, TB, TFLOP = 2**30, 1e9, 1e12, 1e12
MAX_GPUS = 8  # of one host, which NVLink connects
CUDNN_VERSION = 91000  # 9.10, the oldest that images with jax 0.10 hold; where none is installed, JAX is told this one


@dataclass(frozen=True)
class GpuDescription:
    """What XLA's GPU compiler asks of a card, beside memory and bandwidth."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    float32_lanes: int  # of each multiprocessor
    shared_bytes: int  # of each multiprocessor; a block may have one KiB less
    l2_bytes: int
    clock_ghz: float


@dataclass(frozen=True)
class Chip:
    """The published figures of a chip."""

    name: str
    platform: Literal["tpu", "cuda"]
    memory_bytes: float
    flop_per_s: float  # dense bfloat16 products
    memory_bytes_per_s: float
    interconnect_bytes_per_s: float  # out of a chip over all its links, one direction
    n_axes: int = 0  # of a TPU's topology
    cores: int = 1  # each is a device of its own
    clock_hz: float | None = None  # of a TPU, by which estimated cycles become seconds; None: not published
    gpu: GpuDescription | None = None

    @property
    def device_flop_per_s(self) -> float:
        """A device's peak of dense bfloat16 products."""
        return self.flop_per_s / self.cores

    @property
    def device_bytes(self) -> float:
        """A device's memory."""
        return self.memory_bytes / self.cores

    @property
    def usable_bytes(self) -> float:
        """Of a device's memory, what a program may take: JAX reserves three quarters of a GPU's
        (XLA_PYTHON_CLIENT_MEM_FRACTION). A TPU's compiler knows its own limit."""
        return (0.75 if self.platform == "cuda" else 1) * self.device_bytes


# TPUs: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and tpu7x; the interconnect is half of the bidirectional figure.
# Clocks: v4 in Jouppi et al., "TPU v4" (arXiv 2304.01433); v5e and v5p by the number of their matrix units, each of
# 128 x 128, in the same documents: 197e12 / (4 * 2 * 128**2) and 459e12 / (8 * 2 * 128**2).
# GPUs, SXM forms: NVIDIA's A100 and H100 architecture white papers, the H200 data sheet, the DGX B200 data sheet; the
# interconnect is half of NVLink's bidirectional figure. Caches and shared memory: CUDA C++ Programming Guide, "Compute
# Capabilities".
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "tpu", 32 * GiB, 275 * TFLOP, 1228 * GB, 300 * GB, 3, cores=2, clock_hz=1.05e9),
        Chip("v5e", "tpu", 16 * GiB, 197 * TFLOP, 819 * GB, 200 * GB, 2, clock_hz=1.5e9),
        Chip("v5p", "tpu", 95 * GiB, 459 * TFLOP, 2765 * GB, 600 * GB, 3, clock_hz=1.75e9),
        Chip("v6e", "tpu", 32 * GiB, 918 * TFLOP, 1638 * GB, 400 * GB, 2),
        Chip("tpu7x", "tpu", 192 * GiB, 2307 * TFLOP, 7380 * GB, 600 * GB, 3, cores=2),
        Chip(
            *("A100", "cuda", 80 * GiB, 312 * TFLOP, 2.039 * TB, 300 * GB),
            gpu=GpuDescription("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 164 * 2**10, 40 * 2**20, 1.41),
        ),
        Chip(
            *("H100", "cuda", 80 * GiB, 989 * TFLOP, 3.35 * TB, 450 * GB),
            gpu=GpuDescription("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 228 * 2**10, 50 * 2**20, 1.98),
        ),
        Chip(
            *("H200", "cuda", 141 * GB, 989 * TFLOP, 4.8 * TB, 450 * GB),
            gpu=GpuDescription("NVIDIA H200", (9, 0), 132, 128, 228 * 2**10, 50 * 2**20, 1.98),
        ),
        Chip(
            *("B200", "cuda", 180 * GB, 2250 * TFLOP, 8 * TB, 900 * GB),
            gpu=GpuDescription("NVIDIA B200", (10, 0), 148, 128, 228 * 2**10, 126 * 2**20, 1.965),
        ),
    )
}


# What JAX calls a TPU's devices, beside the names of GPUs in their descriptions.
TPU_DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a device of this machine, by `jax.Device.device_kind`; None for a form that `CHIPS` does not have."""
    names = {chip.gpu.name: chip.name for chip in CHIPS.values() if chip.gpu} | TPU_DEVICE_KINDS
    return CHIPS[names[device_kind]] if device_kind in names else None


@dataclass(frozen=True)
class Target:
    """The accelerators that a step is compiled for.

    Attributes:
        name: as it was given.
        topology: of a TPU slice, the chips along each axis of its torus; of GPUs their number.
    """

    name: str
    chip: Chip
    topology: tuple[int, ...]

    @property
    def n_devices(self) -> int:
        return math.prod(self.topology) * self.chip.cores

    @property
    def extra(self) -> str:
        """The extra of jaxgpt that installs the compiler."""
        return "aot-tpu" if self.chip.platform == "tpu" else "aot-gpu"

    @property
    def compiler_is_installed(self) -> bool:
        names = ("libtpu",) if self.chip.platform == "tpu" else ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
        return any(_is_installed(name) for name in names)

    @property
    def stand_in(self) -> Any:
        """A device with what `parallel.numerics` asks of one; it cannot be compiled for."""
        capability = "{}.{}".format(*self.chip.gpu.capability) if self.chip.gpu else ""
        return types.SimpleNamespace(platform=self.chip.platform, compute_capability=capability)

    def devices(self) -> list[Any]:
        """The target's devices, to compile for; the compiler must be installed.

        Raises:
            UserError: the compiler refuses the topology.
        """
        from jax.experimental import topologies

        shape = "x".join(map(str, self.topology))
        try:
            if self.chip.gpu:
                config = gpu_target_config(self.chip)
                description = topologies.get_topology_desc(
                    self.name, platform="cuda", target_config=config, topology=f"1x1x{shape}"
                )
            else:
                one = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(self.topology) == 1 else {}
                description = topologies.get_topology_desc(f"{self.chip.name}:{shape}", platform="tpu", **one)
        except RuntimeError as e:  # jax.errors.JaxRuntimeError, jax's own for what is not installed
            why = str(e).splitlines()[0][:200]
            raise UserError(f"--target {self.name}: refused by the compiler ({why}); choose another topology") from None
        devices = list(description.devices)
        assert len(devices) == self.n_devices, f"{self.name} has {len(devices)} devices"
        return devices


def parse_target(text: str) -> Target:
    """The target of a name: CHIP, CHIP:1, for GPUs CHIP:COUNT, for TPUs CHIP:TOPOLOGY.

    Raises:
        UserError: an unknown chip, or no such number or topology.
    """
    name, colon, shape = text.partition(":")
    if name not in CHIPS:
        near = difflib.get_close_matches(name, CHIPS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"--target {text}: unknown chip; choose of {', '.join(CHIPS)}{hint}")
    chip, shape = CHIPS[name], shape if colon else "1"
    n_axes = 1 if chip.gpu or shape == "1" else chip.n_axes
    if not re.fullmatch("x".join([r"[1-9]\d{0,3}"] * n_axes), shape):
        example = f"{name}:8" if chip.gpu else f"{name}:2x2" + ("x1" if chip.n_axes == 3 else "")
        what = "a number of GPUs" if chip.gpu else f"a topology of {chip.n_axes} axes"
        raise UserError(f"--target {text}: not {what}; give one as {example}, or {name}:1")
    topology = tuple(map(int, shape.split("x")))
    if chip.gpu and topology[0] > MAX_GPUS:
        raise UserError(f"--target {text}: more than the {MAX_GPUS} GPUs of one host; give at most {name}:{MAX_GPUS}")
    return Target(text, chip, topology if chip.gpu or shape != "1" else (1,) * chip.n_axes)


def gpu_target_config(chip: Chip) -> str:
    """A card as XLA's GPU compiler takes it: a text of its message `GpuTargetConfigProto`."""
    gpu = chip.gpu
    assert gpu is not None
    major, minor = gpu.capability
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * 2**10,
        "shared_memory_per_block_optin": gpu.shared_bytes - 2**10,
        "shared_memory_per_core": gpu.shared_bytes,
        "threads_per_core_limit": 2048,
        "core_count": gpu.multiprocessors,
        "fpus_per_core": gpu.float32_lanes,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
        "memory_bandwidth": int(chip.memory_bytes_per_s),
        "l2_cache_size": gpu.l2_bytes,
        "clock_rate_ghz": gpu.clock_ghz,
        "device_memory_size": int(chip.memory_bytes),
    }
    fields = " ".join(f"{name}: {value}" for name, value in device.items())
    capability = f"cuda_compute_capability {{ major: {major} minor: {minor} }}"
    cudnn = f"dnn_version_info {{ major: {CUDNN_VERSION // 10_000} minor: {CUDNN_VERSION // 100 % 100} }}"
    return (
        f'platform_name: "CUDA" {cudnn} device_description_str: "{gpu.name}" '
        f'gpu_device_info {{ {fields} device_vendor: "NVIDIA Corporation" {capability} }}'
    )


def compile_without_accelerators() -> None:
    """Prepares this process for compilation alone. To be called before JAX starts.

    JAX itself computes on the CPU, and libtpu neither asks Google Cloud what machine this is, nor claims a TPU that
    another process uses, nor prints what it does not find.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # a program for devices that are not here cannot be loaded again
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # whatever the target is: it is not looked at any further
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def assumed_cudnn() -> Iterator[None]:
    """Within it, JAX takes cuDNN as installed here: it asks for the version of this process's own."""
    from jax._src.cudnn import fused_attention_stablehlo

    asked = fused_attention_stablehlo.check_cudnn_version
    fused_attention_stablehlo.check_cudnn_version = lambda: CUDNN_VERSION
    try:
        yield
    finally:
        fused_attention_stablehlo.check_cudnn_version = asked


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of its package
        return False
