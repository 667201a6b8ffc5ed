"""How the pure functions meet devices: `jit` over a mesh, or `pmap`. Nothing else knows devices.

In both, the state is whole on every device and has no device axis, the tokens are whole on every device, and the batch
is divided: a step computes which rows are its own. What is compiled takes the number of steps as an argument, so one
program serves every dispatch.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxgpt.batches import Feed
from jaxgpt.config import FinetuneConfig, TrainConfig
from jaxgpt.errors import UserError
from jaxgpt.model import Numerics
from jaxgpt.train_step import Program, Shards, TrainState

AXIS = "data"


def prepare(config: TrainConfig | FinetuneConfig, cache_dir: Path) -> None:
    """Process-wide settings, before the first array: float64 if asked for, exact products, the compilation cache."""
    if config.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    # TF32 on GPU and bfloat16 passes on TPU are not float32; bfloat16 operands are not affected.
    jax.config.update("jax_default_matmul_precision", "highest")
    # Not on CPU: loading compiled programs from it can wait forever inside jaxlib 0.10.1 (docs/design.md).
    if jax.default_backend() == "cpu":
        return
    with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
        cache_dir.mkdir(parents=True, exist_ok=True)
        if os.access(cache_dir, os.W_OK) and jax.config.jax_compilation_cache_dir is None:
            jax.config.update("jax_compilation_cache_dir", str(cache_dir))


def numerics(config: TrainConfig | FinetuneConfig) -> Numerics:
    """The dtypes and the attention for this machine's devices."""
    backend = jax.default_backend()
    dtype = config.dtype
    if dtype == "auto":
        dtype = "float32" if backend == "cpu" else "bfloat16"
    if dtype == "float64":
        return Numerics(jnp.float64, jnp.float64)
    compute_dtype = jnp.dtype(dtype)
    flash = compute_dtype == jnp.bfloat16 and _has_flash_attention(config.model.n_embd // config.model.n_head)
    flash = flash and not config.within_documents  # it knows the causal mask only
    found = Numerics(jnp.float32, compute_dtype, "cudnn" if flash else "xla")
    if backend == "cpu":
        return found
    # Chunks of the loss large enough for full speed: ten thousand tokens of GPT-2's. 50257 columns would keep the
    # matrix units from their fast path. Three products in one start are one (on CPU it gains nothing: benchmarks.md).
    return dataclasses.replace(found, logits_at_once=2**29, head_multiple=128, fused_qkv=True)


def _has_flash_attention(head_size: int) -> bool:
    """Whether cuDNN's attention runs here in bfloat16: NVIDIA from Ampere on, heads of 8, 16, ... 128 (Hopper: 256)."""
    capability = getattr(jax.devices()[0], "compute_capability", "")  # "9.0" on CUDA, "gfx942" on ROCm, none elsewhere
    try:
        generation = float(capability)
    except ValueError:
        return False
    return generation >= 8 and head_size % 8 == 0 and head_size <= (256 if generation >= 9 else 128)


def describe_devices() -> str:
    """The devices for a person: "8 x TFRT_CPU" or the accelerator's name."""
    devices = jax.local_devices()
    kind = "CPU" if devices[0].platform == "cpu" else devices[0].device_kind
    return f"{len(devices)} x {kind}" if len(devices) > 1 else kind


def one_device() -> list[Any]:
    """The first local device alone: enough for evaluation and generation, and any batch divides by it."""
    return jax.local_devices()[:1]


class Executor:
    """A configuration's program, compiled for all local devices.

    Raises:
        UserError: the batch does not divide by the devices.
    """

    def __init__(self, program: Program, devices: list[Any] | None = None):
        devices = devices if devices is not None else jax.local_devices()
        config = program.config
        if config.batch_size % len(devices):
            raise UserError(
                f"--batch-size {config.batch_size}: not divisible by the {len(devices)} devices of this machine; "
                f"choose a multiple of {len(devices)}"
            )
        self.program = program
        self.mesh = Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))
        self._build = _jit if config.parallel == "jit" else _pmap
        self._updates = self._build(program.updates, self.mesh, donate=True)
        self._evaluate = self.compiled(program.evaluate)

    def compiled(self, function: Callable) -> Callable:
        """A pure function (first, *rest, shards) compiled for the devices, to be called without its shards."""
        return self._build(function, self.mesh, donate=False)

    def put(self, tree: Any) -> Any:
        """The tree's arrays, whole on every device."""
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))

    def init_state(self) -> TrainState:
        """The initial state on the devices. Not in one jit: compiling so many random draws together takes seconds."""
        return self.put(self.program.init_state())

    def abstract_state(self) -> TrainState:
        """The state's shapes, dtypes and devices, without computing it: what a checkpoint is restored to."""
        whole = NamedSharding(self.mesh, PartitionSpec())
        shapes = jax.eval_shape(self.program.init_state)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes)

    def updates(self, state: TrainState, feed: Feed, n_steps: int) -> tuple[TrainState, np.ndarray]:
        """`n_steps` updates; 0 only compiles. Donates the state, waits, and returns host metrics [n_steps, 2]."""
        state, metrics_K2 = self._updates(state, feed, jnp.int32(n_steps))
        return state, np.asarray(metrics_K2)[:n_steps]

    def memory(self, feed: Feed) -> dict[str, int]:
        """What the compiler plans for `updates` on each device, in bytes; compiles it anew."""
        state = self.abstract_state()
        program = _jit(self.program.updates, self.mesh, donate=True)  # under pmap each device has the same
        plan = program.lower(state, feed, jnp.int32(0)).compile().memory_analysis()

        def size(tree: Any) -> int:
            return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))

        kept = {"weights": size(state.params), "optimiser state": size(state.opt_state), "tokens": size(feed)}
        return {**kept, "activations and gradients": plan.temp_size_in_bytes}

    def evaluate(self, params: Any, scored: Iterable[tuple]) -> np.ndarray:
        """Of each batch what `Program.evaluate` sums up, in float64: [J, 2], the loss and the number of targets."""
        sums: list[np.ndarray] = []
        computing: list[Any] = []  # some batches ahead of what is read back
        for batch in scored:
            computing.append(self._evaluate(params, *batch))
            if len(computing) > 8:
                sums.append(_flat(computing.pop(0)))
        return np.stack(sums + [_flat(tree) for tree in computing])


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])


def _jit(function: Callable, mesh: Mesh, donate: bool) -> Callable:
    """One program for all devices; the compiler divides it along the batch and inserts the sums."""
    by_row, whole = NamedSharding(mesh, PartitionSpec(AXIS)), NamedSharding(mesh, PartitionSpec())
    shards = Shards(rows=lambda x_B: lax.with_sharding_constraint(x_B, by_row), total=lambda tree: tree)

    def program(*args):
        return function(*args, shards)

    return jax.jit(program, donate_argnums=0 if donate else (), out_shardings=whole)


def _pmap(function: Callable, mesh: Mesh, donate: bool) -> Callable:
    """The same program on each device, told its index; sums are written out as psum."""
    devices = list(mesh.devices.flat)

    def rows(x_B: Array, index: Array) -> Array:
        rows_each = x_B.shape[0] // len(devices)
        return lax.dynamic_slice_in_dim(x_B, index * rows_each, rows_each)

    def program(first, rest, index):
        shards = Shards(rows=lambda x_B: rows(x_B, index), total=lambda tree: lax.psum(tree, AXIS))
        return function(first, *rest, shards)

    mapped = jax.pmap(
        program,
        axis_name=AXIS,
        in_axes=(None, None, 0),
        out_axes=None,
        devices=devices,
        donate_argnums=0 if donate else (),
    )
    index_D = jnp.arange(len(devices), dtype=jnp.int32)
    return lambda first, *rest: mapped(first, rest, index_D)
