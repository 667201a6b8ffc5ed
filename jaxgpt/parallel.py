"""Data parallelism over devices: `jit` with `shard_map`, or `pmap`. Nothing else knows devices.

The batch is divided: each device computes the sums over its own rows, and an all-reduce adds them up. The devices are a
mesh of two axes, `data` and `fsdp`, and the rows are divided over both. Along `data` the state is replicated. Along
`fsdp` each device holds a shard of the parameters, of their gradients and moments (fully sharded data parallelism, also
known as ZeRO-3). It gathers a block's parameters when it computes the block, and a reduce-scatter adds up the
gradients. All collectives are written out here, so the compiled program has no others.

The devices of several processes (`distributed.py`) are one mesh, process by process, so that a process has rows of a
batch that follow each other.

What is compiled takes the number of steps as an argument, so one program serves every dispatch. A CPU's cores are
devices, too: each takes its rows in microbatches that stay in its cache, instead of sharing every small operation with
the others (docs/speed-log.md).
"""

import contextlib
import dataclasses
import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.experimental import multihost_utils
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxgpt import distributed
from jaxgpt.compilation_cache import enable_compilation_cache
from jaxgpt.config import MESH_AXES, FinetuneConfig, TrainConfig, mesh_shape, mesh_text
from jaxgpt.data.loader import ProcessRows
from jaxgpt.data.sampler import RowSource
from jaxgpt.errors import UserError
from jaxgpt.model.attention import AttentionImplementation
from jaxgpt.model.gpt import Numerics
from jaxgpt.objective import Objective
from jaxgpt.train_step import (
    SINGLE_DEVICE,
    StepContext,
    TrainState,
    eval_step,
    init_state,
    state_shapes,
    train_steps,
)

DATA, FSDP = MESH_AXES
ROWS = MESH_AXES  # those over which a batch's rows are divided
ROW_SOURCE = PartitionSpec(None, ROWS)  # of the windows [K, B, T + 1] of a `RowSource`
Axes = str | tuple[str, ...]


@dataclass(frozen=True)
class CpuTuning:
    """Where dividing a step over a CPU's cores pays. None of it changes what a step computes, but for rounding.

    The values were measured on one two-core machine; `jaxgpt bench --tune-cpu` measures them on another.
    """

    microbatch_tokens: int | None = 128  # of a device's rows; their activations fit a core's cache. None: all rows
    min_device_tokens: int = 64  # of a device in a step: fewer cost more to all-reduce than they save
    params_per_token: int = 12_000  # each device all-reduces and updates them all: its tokens must make up for it
    max_params: int = 2**24  # each device holds its own, and its moments

    def n_devices(self, n_params: int, batch_size: int, tokens_per_step: int, n_cores: int) -> int:
        """How many of `n_cores` devices share a step: as many as divide the batch, as far as that is faster."""
        if n_params > self.max_params:
            return 1
        min_tokens = max(self.min_device_tokens, n_params // self.params_per_token)
        most = min(n_cores, tokens_per_step // min_tokens)
        return max(n for n in range(1, max(most, 1) + 1) if batch_size % n == 0)


CPU_TUNING = CpuTuning()
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container


def configure_jax(config: TrainConfig | FinetuneConfig, cache_dir: Path) -> None:
    """Sets JAX's process-wide options, before the first array.

    They are the number of CPU devices, float64 if asked for, products in full precision, and the compilation cache.
    """
    use_cores_as_devices()
    if config.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    # TF32 on GPU and bfloat16 passes on TPU are not float32; bfloat16 operands are not affected.
    jax.config.update("jax_default_matmul_precision", "highest")
    enable_compilation_cache(cache_dir)


def use_cores_as_devices() -> None:
    """Makes each core of a CPU a device, unless the user says how many there are."""
    given: int = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]
    if not _cpu_devices_are_given() and given < 0:
        with contextlib.suppress(RuntimeError):  # there are arrays already, as in a notebook: it stays at one device
            jax.config.update("jax_num_cpu_devices", usable_cores())


def numerics(config: TrainConfig | FinetuneConfig, device: Any = None) -> Numerics:
    """The dtypes and the attention for a device.

    Args:
        device: with a `platform`, and a `compute_capability` on CUDA; by default this process's first. A device of
            `jax.experimental.topologies`, which this machine does not have, is one too.
    """
    device = jax.local_devices()[0] if device is None else device
    on_cpu, dtype = device.platform == "cpu", config.dtype
    if dtype == "auto":
        dtype = "float32" if on_cpu else "bfloat16"
    if dtype == "float64":
        return Numerics(jnp.float64, jnp.float64, remat=config.remat)
    compute_dtype = jnp.dtype(dtype)
    attention = _flash_attention(device, config) if compute_dtype == jnp.bfloat16 else "xla"
    found = Numerics(jnp.float32, compute_dtype, attention, remat=config.remat)
    if on_cpu:
        return found
    # Chunks of the loss large enough for full speed: five thousand tokens of GPT-2's. Each chunk reads and writes the
    # head's gradient, which takes a TPU's slower memory longer: there twice as many (docs/accelerators.md).
    # 50257 columns would keep the matrix units from their fast path. Three products in one start are one (on CPU it
    # gains nothing: benchmarks.md).
    chunk_logits = 2**29 if device.platform == "tpu" else 2**28
    return dataclasses.replace(found, chunk_logits=chunk_logits, head_multiple=128, fused_qkv=True)


def _flash_attention(device: Any, config: TrainConfig | FinetuneConfig) -> AttentionImplementation:
    """The attention of a training step in bfloat16: a kernel of the device where it takes these sizes, else "xla"."""
    head_size = config.model.n_embd // config.model.n_head
    if config.model.attention_dropout:  # the kernels have no mask of what is dropped
        return "xla"
    if device.platform == "tpu":
        # The kernels' blocks are multiples of the 128 lanes of a register; wider heads were not compiled.
        return "splash" if config.n_time % 128 == 0 and head_size <= 256 else "xla"
    capability = getattr(device, "compute_capability", "")  # "9.0" on CUDA, "gfx942" on ROCm, none elsewhere
    try:
        generation = float(capability)
    except ValueError:
        return "xla"
    # cuDNN: from Ampere on, heads of 8, 16, ... 128 (Hopper: 256); with a mask, as of documents, an even T.
    allowed = generation >= 8 and head_size % 8 == 0 and head_size <= (256 if generation >= 9 else 128)
    return "cudnn" if allowed and not (config.within_documents and config.n_time % 2) else "xla"


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


def all_devices() -> list[Any]:
    """The devices of all processes, process by process."""
    return sorted(jax.devices(), key=lambda device: device.process_index)


def devices_for(objective: Objective) -> list[Any]:
    """All devices; of a CPU's cores as many in each process as divide its rows, as far as that is faster."""
    devices, config = all_devices(), objective.config
    if devices[0].platform != "cpu" or _cpu_devices_are_given():
        return devices
    n_params = sum(math.prod(p.shape) for p in objective.param_shapes.values())
    # Each device has its share of every microbatch.
    n_processes = jax.process_count()
    n_rows, n_tokens = config.batch_size // config.grad_accum // n_processes, config.tokens_per_step // n_processes
    of_process = np.array(devices).reshape(n_processes, -1)
    n_local = CPU_TUNING.n_devices(n_params, max(n_rows, 1), n_tokens, of_process.shape[1])
    return list(of_process[:, :n_local].flat)


def one_device(objective: Objective | None = None) -> list[Any]:
    """The first local device alone: any batch divides by it."""
    return jax.local_devices()[:1]


def cores_or_one_device(objective: Objective) -> list[Any]:
    """A CPU's cores as in training, so that a run's figures are the same to the last bit; of accelerators one."""
    devices = devices_for(objective)
    config = objective.config
    divides = devices[0].platform == "cpu" and config.batch_size % (len(devices) * config.grad_accum) == 0
    return devices if divides else devices[:1]


def on_one_device(tree: Any) -> Any:
    """A state's arrays on the first device alone; what is computed from them is not computed on every device.

    Of several processes each gets all of them, on its own first device; they call it together.
    """
    return jax.device_put(on_host(tree), jax.local_devices()[0])


def on_host(tree: Any) -> Any:
    """A state's arrays whole on the host, if other processes have parts of them; else as they are."""

    def whole(x: Any) -> Any:
        if x.is_fully_addressable:
            return x
        return x.addressable_data(0) if x.is_fully_replicated else multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(whole, tree)


def addressable_values(x: Any) -> list[np.ndarray]:
    """The parts of an array that this process answers for, on the host; those of all processes are the array."""
    if x.is_fully_addressable:
        return [np.asarray(x)]
    return [np.asarray(shard.data) for shard in x.addressable_shards if shard.replica_id == 0]


def rows_of_process(mesh: Mesh, batch_size: int, process: int) -> slice:
    """The rows of a batch that a process's devices have: they follow each other, as the devices do."""
    at = [i for i, device in enumerate(mesh.devices.flat) if device.process_index == process]
    rows_each = batch_size // mesh.size
    return slice(at[0] * rows_each, (at[-1] + 1) * rows_each)


def shard_axis(shape: tuple[int, ...], fsdp: int) -> int | None:
    """The axis along which a parameter is sharded: the largest that `fsdp` divides, the last of equals.

    None if it stays whole: no axis divides, or it is a vector, as biases and norms are, a thousandth of a model.
    """
    divisible = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or len(shape) < 2 or not divisible:
        return None
    return max(divisible, key=lambda axis: (shape[axis], axis))


def require_division(config: TrainConfig | FinetuneConfig, n_devices: int, of: str) -> None:
    """Raises `UserError` if a batch does not divide by the devices, or their rows not into microbatches.

    Args:
        of: what has the devices, for the message.
    """
    if config.batch_size % n_devices:
        raise UserError(
            f"--batch-size {config.batch_size}: not divisible by the {n_devices} devices of {of}; choose a multiple "
            f"of {n_devices}"
        )
    if config.batch_size % (n_devices * config.grad_accum):
        raise UserError(
            f"--grad-accum {config.grad_accum}: does not divide the {config.batch_size // n_devices} rows that each of "
            f"the {n_devices} devices of {of} has; choose a divisor of that"
        )


class Executor:
    """An objective's steps, compiled for `devices_for` it, or for the devices given.

    Args:
        devices: of this machine, or abstract ones of `jax.experimental.topologies`.
        mesh: how they are arranged, as `config.mesh_shape` reads it.

    Raises:
        UserError: the batch does not divide by the devices, or they are no such mesh.
    """

    def __init__(self, objective: Objective, devices: list[Any] | None = None, mesh: str = ""):
        devices = devices if devices is not None else devices_for(objective)
        config = objective.config
        of = "all processes" if distributed.is_distributed() else "this machine"
        require_division(config, len(devices), of)
        shape = mesh_shape(mesh, len(devices))
        if distributed.is_distributed() and config.parallel == "pmap":
            raise UserError("--parallel pmap: takes the devices of one process; leave it out with --distributed")
        if shape[1] > 1 and config.parallel == "pmap":
            raise UserError(f"--mesh {mesh}: --parallel pmap has no axis fsdp; leave out one of both")
        self.objective = objective
        self.mesh = Mesh(np.array(devices).reshape(shape), ROWS, axis_types=(AxisType.Auto,) * 2)
        axes = {name: shard_axis(p.shape, shape[1]) for name, p in objective.param_shapes.items()}
        self._shard_axes = {name: axis for name, axis in axes.items() if axis is not None}
        self._train_steps = self._compiled_steps() if config.parallel == "jit" else self.compiled(self._steps, True)
        self._compiling: Future | None = None
        eval_batch = partial(eval_step, objective)

        def evaluate(params: Any, inputs: Any, targets: Any, ctx: StepContext) -> Any:
            return eval_batch(params, (inputs, targets), ctx)

        if self._shard_axes:
            specs = self._specs(objective.param_shapes)
            self._evaluate = _jit(evaluate, self.mesh, False, specs, PartitionSpec(), self._shard_axes)
        else:
            self._evaluate = self.compiled(evaluate)

    @property
    def _steps(self) -> Callable:
        return partial(train_steps, self.objective)

    def _compiled_steps(self) -> Callable:
        """`train_steps` under jit; each device has its shards of the state."""
        if not self._shard_axes:
            return _jit(self._steps, self.mesh, donate=True)
        specs = self._specs(self.abstract_state())
        return _jit(self._steps, self.mesh, True, specs, (specs, PartitionSpec()), self._shard_axes)

    def _specs(self, tree: Any) -> Any:
        """The partition of each array of a tree: of a parameter, its gradient and moments, and of anything else.

        They are known by the parameter's name, which is their last key.
        """

        def spec(path: Any, _: Any) -> PartitionSpec:
            axis = self._shard_axes.get(_name(path))
            return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, FSDP)

        return jax.tree_util.tree_map_with_path(spec, tree)

    def _shardings(self, tree: Any) -> Any:
        return jax.tree.map(partial(NamedSharding, self.mesh), self._specs(tree))

    @property
    def config(self) -> Any:
        """The objective's configuration."""
        return self.objective.config

    def describe_devices(self) -> str:
        """The devices for a person: "CPU", "2 x CPU", "8 x NVIDIA H100 80GB HBM3 (data=4,fsdp=2)"."""
        devices = list(self.mesh.devices.flat)
        kind = "CPU" if devices[0].platform == "cpu" else devices[0].device_kind
        sharded = f" ({mesh_text(self.mesh.shape)})" if self.mesh.shape[FSDP] > 1 else ""
        return f"{self.mesh.size} x {kind}{sharded}" if self.mesh.size > 1 else kind

    @property
    def bytes_for_tokens(self) -> int:
        """How many bytes of tokens the devices keep: an eighth of an accelerator's memory, 256 MiB on a CPU in all."""
        stats = jax.local_devices()[0].memory_stats() or {}
        return stats["bytes_limit"] // 8 if "bytes_limit" in stats else 2**28 // self.mesh.size

    def compiled(self, function: Callable, donate: bool = False) -> Callable:
        """A pure function (first, *rest, ctx) compiled for the devices, to be called without its `StepContext`.

        Every device gets its arguments whole, sharded ones too.

        Args:
            donate: whether the result may take the first argument's memory.
        """
        compile_for = _jit if self.config.parallel == "jit" else _pmap
        return compile_for(function, self.mesh, donate=donate)

    def put(self, tree: Any) -> Any:
        """The tree's arrays on the devices: of parameters and their moments the shards, all else whole on each."""
        shardings = self._shardings(tree)
        if not distributed.is_distributed():
            return jax.device_put(tree, shardings)

        def put(x: Any, sharding: NamedSharding) -> Array:  # of each process's own copy, which is the same in all
            values = np.asarray(x)
            return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

        return jax.tree.map(put, tree, shardings)

    @property
    def process_rows(self) -> ProcessRows | None:
        """The rows of a batch that this process reads; None if it has all devices."""
        if not distributed.is_distributed():
            return None
        sharding = NamedSharding(self.mesh, ROW_SOURCE)

        def source(window_KBT: np.ndarray) -> RowSource:
            K, _, T = window_KBT.shape
            shape = (K, self.config.batch_size, T)
            return RowSource(jax.make_array_from_process_local_data(sharding, window_KBT, shape))

        return ProcessRows(rows_of_process(self.mesh, self.config.batch_size, jax.process_index()), source)

    def init_state(self) -> TrainState:
        """The initial state on the devices. Not in one jit: compiling so many random draws together takes seconds."""
        return self.put(init_state(self.objective))

    def abstract_state(self) -> TrainState:
        """The state's shapes, dtypes and devices, without computing it: what a checkpoint is restored to."""
        shapes = state_shapes(self.objective)
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            shapes,
            self._shardings(shapes),
        )

    def compile_ahead(self, source: Any) -> None:
        """Begins to compile `train_steps` for sources like this one in the background, while the state is made.

        Under pmap it does nothing: the first call compiles.
        """
        if self.config.parallel == "jit":
            pool = ThreadPoolExecutor(1)
            lower = self._train_steps.lower
            self._compiling = pool.submit(lambda: lower(self.abstract_state(), source, np.int32(0)).compile())
            pool.shutdown(wait=False)

    def train_steps(self, state: TrainState, source: Any, n_steps: int) -> tuple[TrainState, np.ndarray]:
        """`n_steps` updates in one dispatch; 0 only compiles.

        Donates the state and waits for the result.

        Returns:
            The new state, and on the host the metrics of each step, as `train_step.train_steps` has them.
        """
        if self._compiling is not None:
            self._train_steps, self._compiling = self._compiling.result(), None
        state, metrics_KM = self._train_steps(state, source, np.int32(n_steps))
        return state, np.asarray(metrics_KM)[:n_steps]

    def lower_train_steps(self, source: Any) -> Any:
        """`train_steps` as a `jax.stages.Lowered` for the executor's devices, which this machine need not have.

        Under pmap each device has the same program as under jit, which this is.

        Args:
            source: a source of batches, or its shapes and dtypes.
        """
        whole = partial(jax.ShapeDtypeStruct, sharding=NamedSharding(self.mesh, PartitionSpec()))
        source = jax.tree.map(lambda x: whole(x.shape, x.dtype), source)
        return self._compiled_steps().lower(self.abstract_state(), source, whole((), jnp.int32))

    def memory(self, source: Any) -> dict[str, int]:
        """What the compiler plans for `train_steps` on each device, in bytes; compiles it anew."""
        state = self.abstract_state()
        plan = self.lower_train_steps(source).compile().memory_analysis()

        def size(tree: Any) -> int:  # of one device's shards
            sharded = ((x.dtype, getattr(x, "sharding", None), x.shape) for x in jax.tree.leaves(tree))
            return sum(math.prod(s.shard_shape(shape) if s else shape) * dtype.itemsize for dtype, s, shape in sharded)

        kept = {"weights": size(state.params), "optimiser state": size(state.opt_state), "tokens": size(source)}
        return {**kept, "activations and gradients": plan.temp_size_in_bytes}

    def evaluate(self, params: Any, batches: Iterable[tuple]) -> np.ndarray:
        """Of each batch the sums of `eval_step` in float64, ravelled: [J, 2 or more], the loss and the count first."""
        sums: list[np.ndarray] = []
        in_flight: list[Any] = []  # dispatch some batches ahead of what is read back
        for batch in batches:
            in_flight.append(self._evaluate(params, *batch))
            if len(in_flight) > 8:
                sums.append(_ravelled(in_flight.pop(0)))
        return np.stack(sums + [_ravelled(tree) for tree in in_flight])


def _ravelled(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])


def _name(path: tuple[Any, ...]) -> str:
    """The last key of an array's path in a tree; of a parameter, its gradient or moment, the parameter's name."""
    return str(getattr(path[-1], "key", "")) if path else ""


def _step_context(mesh: Mesh, index: Array, axes: Axes, shard_axes: Mapping[str, int] | None = None) -> StepContext:
    """The data-parallel context of one device of a mesh.

    Args:
        index: of the device among all of the mesh.
        axes: those over which rows are divided.
        shard_axes: of the sharded parameters, the axis along which each is sharded.
    """
    on_cpu = mesh.devices.item(0).platform == "cpu"
    reduce_over = _all_reduce_ravelled if on_cpu else _all_reduce

    def local_rows(x_B: Array) -> Array:
        rows_each = x_B.shape[0] // mesh.size
        return lax.dynamic_slice_in_dim(x_B, index * rows_each, rows_each)

    microbatch_tokens = CPU_TUNING.microbatch_tokens if on_cpu and mesh.size > 1 else None
    context = StepContext(local_rows, lambda sums: reduce_over(sums, axes), microbatch_tokens)
    if not shard_axes:
        return context

    def partition(tree: Any) -> tuple[Any, Any]:
        """The shards and the whole arrays, each with None in place of the others."""
        is_shard = jax.tree_util.tree_map_with_path(lambda path, _: _name(path) in shard_axes, tree)
        select = partial(jax.tree.map, lambda x, keep: x if keep else None)
        return select(tree, is_shard), select(tree, jax.tree.map(operator.not_, is_shard))

    def all_reduce(sums: Any) -> Any:
        shards, whole = partition(sums)  # the reduce-scatter has added up the shards over fsdp
        shards, whole = reduce_over(shards, DATA), reduce_over(whole, axes)
        return jax.tree.map(lambda a, b: b if a is None else a, shards, whole, is_leaf=lambda x: x is None)

    def global_norm(grads: Any) -> Array:
        return _global_norm(*partition(grads))

    def gather(name: str, shard: Array, dtype: Any) -> Array:
        return _gather(shard, shard_axes[name], dtype) if name in shard_axes else shard.astype(dtype)

    return context._replace(all_reduce=all_reduce, global_norm=global_norm, gather=gather)


def _global_norm(shards: Any, whole: Any) -> Array:
    """The global norm of gradients of which each device of FSDP has shards, and the same whole ones."""
    of_shards, of_whole = (optax.tree.norm(part, squared=True) for part in (shards, whole))
    return jnp.sqrt(lax.psum(of_shards, FSDP) + of_whole)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(shard: Array, axis: int, dtype: Any) -> Array:
    """The whole parameter, in a dtype, from the shards along an axis that the devices of FSDP have.

    The cast comes first, so that a bfloat16 kernel takes half of the traffic. The backward pass adds up the gradients
    in the parameter's own dtype, as the all-reduce of data parallelism does, and leaves each device its shard.
    """
    return lax.all_gather(shard.astype(dtype), FSDP, axis=axis, tiled=True)


def _gather_fwd(shard: Array, axis: int, dtype: Any) -> tuple[Array, Array]:
    return _gather(shard, axis, dtype), jnp.zeros((), shard.dtype)


def _gather_bwd(axis: int, dtype: Any, like: Array, grad: Array) -> tuple[Array]:
    return (lax.psum_scatter(grad.astype(like.dtype), FSDP, scatter_dimension=axis, tiled=True),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def _all_reduce(sums: Any, axes: Axes) -> Any:
    return lax.psum(sums, axes)


def _all_reduce_ravelled(sums: Any, axes: Axes) -> Any:
    """One all-reduce of the ravelled pytree. On a CPU it synchronises the devices' threads, which costs more than the
    additions: once for all arrays, not once for each. Elsewhere XLA combines them by itself."""
    sums_N, unravel = ravel_pytree(sums)
    return unravel(_all_reduce(sums_N, axes))


def _jit(
    function: Callable,
    mesh: Mesh,
    donate: bool,
    first: Any = PartitionSpec(),  # noqa: B008  (immutable)
    out: Any = PartitionSpec(),  # noqa: B008
    shard_axes: Mapping[str, int] | None = None,
) -> Callable:
    """One program for all devices, each with its index in the mesh.

    Args:
        first, out: the partitions of the function's first argument and of its result; of the others, the windows of a
            `RowSource` are divided by rows, and all else is whole.
        shard_axes: as of `_step_context`.
    """
    single = mesh.size == 1

    def on_device(first, rest):
        context = SINGLE_DEVICE if single else _step_context(mesh, lax.axis_index(ROWS), ROWS, shard_axes)
        return function(first, *rest, context)

    first_spec = first

    def program(first, *rest):
        if single:
            return on_device(first, rest)
        in_specs = (first_spec, tuple(ROW_SOURCE if isinstance(x, RowSource) else PartitionSpec() for x in rest))
        # check_vma would insert all-reduces of its own into the gradients of replicated arrays: ours are written out.
        mapped = jax.shard_map(on_device, mesh=mesh, in_specs=in_specs, out_specs=out, check_vma=False)
        return mapped(first, rest)

    shardings = jax.tree.map(partial(NamedSharding, mesh), out)
    return jax.jit(program, donate_argnums=0 if donate else (), out_shardings=shardings)


def _pmap(function: Callable, mesh: Mesh, donate: bool) -> Callable:
    """The same program on each device, which gets its index as an argument."""

    def program(first, rest, index):
        return function(first, *rest, _step_context(mesh, index, DATA))

    mapped = jax.pmap(
        program,
        axis_name=DATA,
        in_axes=(None, None, 0),
        out_axes=None,
        devices=list(mesh.devices.flat),
        donate_argnums=0 if donate else (),
    )
    index_D = jnp.arange(mesh.size, dtype=jnp.int32)
    return lambda first, *rest: mapped(first, rest, index_D)
