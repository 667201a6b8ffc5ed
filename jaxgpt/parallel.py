"""How the pure functions meet devices: `jit` over a mesh, or `pmap`. Nothing else knows devices.

In both, the state is whole on every device and has no device axis, the tokens are whole on every device, and the batch
is divided: a step computes which rows are its own. What is compiled takes the number of steps as an argument, so one
program serves every dispatch. A CPU's cores are devices, too: each takes its rows a few at a time, which stay in its
cache, instead of sharing every small operation with the others (docs/benchmarks.md).
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
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
from jaxgpt.program_cache import keep_programs
from jaxgpt.train_step import ALONE, Program, Shards, TrainState

AXIS = "data"
# On a CPU, of several devices:
TOKENS_AT_ONCE = 128  # of a device's rows; their activations fit a core's cache
LEAST_TOKENS = 64  # of a device in a step: fewer cost more to add up than they save
PARAMETERS_A_TOKEN = 12_000  # each device adds up and updates them all: it must have enough tokens to make up for it
MOST_PARAMETERS = 2**24  # each device holds its own, and its moments
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container


def prepare(config: TrainConfig | FinetuneConfig, cache_dir: Path) -> None:
    """Process-wide settings, before the first array: CPU devices, float64 if asked for, exact products, the cache."""
    if not _cpu_devices_are_given() and jax.config.jax_num_cpu_devices < 0:
        with contextlib.suppress(RuntimeError):  # there are arrays already, as in a notebook: it stays at one device
            jax.config.update("jax_num_cpu_devices", usable_cores())
    if config.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    # TF32 on GPU and bfloat16 passes on TPU are not float32; bfloat16 operands are not affected.
    jax.config.update("jax_default_matmul_precision", "highest")
    keep_programs(cache_dir)


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


def _cpu_devices_are_given() -> bool:
    """Whether the user says how many CPU devices there are."""
    return "JAX_NUM_CPU_DEVICES" in os.environ or "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")


def usable_cores() -> int:
    """The cores that this process may use: of its affinity, and of a container's quota."""
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # "max 100000" or "150000 100000": microseconds, and of how many
        quota, period = CPU_QUOTA.read_text().split()
        n_cores = min(n_cores, max(1, int(quota) // int(period)))
    return n_cores


def devices_for(program: Program) -> list[Any]:
    """All local devices; of a CPU's cores as many as divide the batch, as far as that is faster."""
    devices, config = jax.local_devices(), program.config
    if devices[0].platform != "cpu" or _cpu_devices_are_given():
        return devices
    n_params = sum(math.prod(p.shape) for p in program.state_shapes.params.values())
    if n_params > MOST_PARAMETERS:
        return devices[:1]
    most = min(len(devices), config.tokens_per_step // max(LEAST_TOKENS, n_params // PARAMETERS_A_TOKEN))
    return devices[: max(n for n in range(1, max(most, 1) + 1) if config.batch_size % n == 0)]


def one_device() -> list[Any]:
    """The first local device alone: any batch divides by it."""
    return jax.local_devices()[:1]


def cores_or_one_device(program: Program) -> list[Any]:
    """A CPU's cores as in training, so that a run's figures are the same to the last bit; of accelerators one."""
    devices = devices_for(program)
    whole = devices[0].platform == "cpu" and program.config.batch_size % len(devices) == 0
    return devices if whole else devices[:1]


def on_one_device(tree: Any) -> Any:
    """A state's arrays on the first device alone; what is computed from them is not computed on every device."""
    return jax.device_put(tree, jax.local_devices()[0])


class Executor:
    """A configuration's program, compiled for `devices_for` it, or for the devices given.

    Raises:
        UserError: the batch does not divide by the devices.
    """

    def __init__(self, program: Program, devices: list[Any] | None = None):
        devices = devices if devices is not None else devices_for(program)
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
        self._ahead: Future | None = None
        self._evaluate = self.compiled(program.evaluate)

    def describe_devices(self) -> str:
        """The devices for a person: "CPU", "2 x CPU" or the accelerator's name."""
        devices = list(self.mesh.devices.flat)
        kind = "CPU" if devices[0].platform == "cpu" else devices[0].device_kind
        return f"{self.mesh.size} x {kind}" if self.mesh.size > 1 else kind

    @property
    def bytes_for_tokens(self) -> int:
        """How many bytes of tokens the devices keep: an eighth of an accelerator's memory, 256 MiB on a CPU in all."""
        stats = self.mesh.devices.item(0).memory_stats() or {}
        return stats["bytes_limit"] // 8 if "bytes_limit" in stats else 2**28 // self.mesh.size

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
        shapes = self.program.state_shapes
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes)

    def compile_ahead(self, feed: Feed) -> None:
        """Begins to compile `updates` for feeds like this one beside what comes next, as the state has yet to be made.

        Under pmap it does nothing: the first call compiles.
        """
        if self.program.config.parallel == "jit":
            pool = ThreadPoolExecutor(1)
            self._ahead = pool.submit(lambda: self._updates.lower(self.abstract_state(), feed, jnp.int32(0)).compile())
            pool.shutdown(wait=False)

    def updates(self, state: TrainState, feed: Feed, n_steps: int) -> tuple[TrainState, np.ndarray]:
        """`n_steps` updates; 0 only compiles. Donates the state, waits, and returns host metrics [n_steps, 2]."""
        if self._ahead is not None:
            self._updates, self._ahead = self._ahead.result(), None
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


def _shards(mesh: Mesh, index: Array) -> Shards:
    """The share of the device number `index`: its rows in order, and sums over all."""
    on_cpu = mesh.devices.item(0).platform == "cpu"

    def rows(x_B: Array) -> Array:
        rows_each = x_B.shape[0] // mesh.size
        return lax.dynamic_slice_in_dim(x_B, index * rows_each, rows_each)

    def total(tree: Any) -> Any:
        # A sum over CPU devices is a meeting of their threads, which costs more than what it adds up: one for all
        # arrays, not one for each. XLA does that by itself elsewhere.
        return _as_one(lambda x: lax.psum(x, AXIS), tree) if on_cpu else lax.psum(tree, AXIS)

    return Shards(rows, total, TOKENS_AT_ONCE if on_cpu and mesh.size > 1 else None)


def _as_one(function: Callable[[Array], Array], tree: Any) -> Any:
    """A function of single numbers, of the tree's arrays laid end to end, for each dtype."""
    leaves, form = jax.tree.flatten(tree)
    for dtype in {x.dtype: None for x in leaves}:
        of_dtype = [k for k, x in enumerate(leaves) if x.dtype == dtype]
        ends = np.cumsum([leaves[k].size for k in of_dtype])
        flat_N = function(jnp.concatenate([leaves[k].ravel() for k in of_dtype]))
        for k, part in zip(of_dtype, jnp.split(flat_N, ends[:-1]), strict=True):
            leaves[k] = part.reshape(leaves[k].shape)
    return jax.tree.unflatten(form, leaves)


def _jit(function: Callable, mesh: Mesh, donate: bool) -> Callable:
    """One program for all devices, each with its index in the mesh."""
    whole, alone = PartitionSpec(), mesh.size == 1

    def program(*args):
        return function(*args, ALONE if alone else _shards(mesh, lax.axis_index(AXIS)))

    if not alone:
        # check_vma would put sums of its own into the gradients of what is whole everywhere: ours are written out.
        program = jax.shard_map(program, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
    return jax.jit(program, donate_argnums=0 if donate else (), out_shardings=NamedSharding(mesh, whole))


def _pmap(function: Callable, mesh: Mesh, donate: bool) -> Callable:
    """The same program on each device, told its index."""

    def program(first, rest, index):
        return function(first, *rest, _shards(mesh, index))

    mapped = jax.pmap(
        program,
        axis_name=AXIS,
        in_axes=(None, None, 0),
        out_axes=None,
        devices=list(mesh.devices.flat),
        donate_argnums=0 if donate else (),
    )
    index_D = jnp.arange(mesh.size, dtype=jnp.int32)
    return lambda first, *rest: mapped(first, rest, index_D)
