"""Memory: what a configuration takes at the least, and what this machine has. What cannot fit is refused at once.

The need is computed from the configuration, without a trace: of a thousand layers that alone takes minutes. It is a
lower bound, so nothing is refused that would have run; what lies between it and the true need ends with "out of memory"
when it is compiled or run.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgpt.config import FinetuneConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxgpt.environment import address_space_limit
from jaxgpt.errors import UserError, flag
from jaxgpt.objective import Objective
from jaxgpt.parallel import CPU_TUNING
from jaxgpt.train_step import microbatch_rows

MEMINFO = Path("/proc/meminfo")
OWN_CGROUP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


class ParamCounts(NamedTuple):
    """The number of parameters in each part of a model."""

    tokens: int  # the embedding table and the head over tokens
    positions: int
    blocks: int
    rest: int  # the final norm and a classifier's head

    @property
    def largest(self) -> int:
        return max(self)


def count_params(model: ModelConfig, vocab_size: int, n_classes: int | None) -> ParamCounts:
    """The parameters of a model by part, computed from its shape alone.

    Args:
        n_classes: the size of a classifier's head; None for a language model.
    """
    C = model.n_embd
    block = 12 * C * C + (13 if model.bias else 2) * C  # four projections, the MLP's two, their biases, and two norms
    norm = (2 if model.bias else 1) * C
    tables = 1 if model.tied_head or n_classes is not None else 2
    classifier = 0 if n_classes is None else (C + 1) * n_classes
    return ParamCounts(tables * vocab_size * C, model.block_size * C, model.n_layer * block, norm + classifier)


def n_moments(config: OptimizerConfig) -> int:
    """How many arrays of the parameters' shape the optimizer keeps."""
    return 2 if config.optimizer in ("adam", "adamw") else 1 if config.momentum else 0


class MemoryNeed(NamedTuple):
    """The memory that a configuration takes at the least, in bytes: on each accelerator, or of a CPU on all devices."""

    parameters: int
    optimizer_state: int
    gradients: int = 0
    activations: int = 0  # with the tokens of the batch

    @property
    def total(self) -> int:
        return sum(self)

    def __str__(self) -> str:
        kinds = ((name.replace("_", " "), n_bytes) for name, n_bytes in self._asdict().items() if n_bytes)
        return f"{size_text(self.total)} of memory ({', '.join(f'{kind} {size_text(n)}' for kind, n in kinds)})"


def memory_need(
    objective: Objective, on_cpu: bool, n_devices: int, trains: bool, n_fsdp: int = 1, n_processes: int = 1
) -> MemoryNeed:
    """A lower bound of the memory of a training step, or of the restored state alone.

    Parameters and optimizer state are exact, but for the optimizer's counters. Gradients: all of them where they must
    exist at the same time, for microbatches, an all-reduce or a clip; else the largest. Activations: what the backward
    pass needs of one microbatch. On a CPU that is, in each block, its input, the input of the MLP, query, key, value,
    the attention's weights (their causal half) and output, and the MLP's hidden layer, and of the head the logits of
    one time step. On an accelerator XLA may recompute all but the blocks' inputs.

    Args:
        on_cpu: the devices are a CPU's cores, which share its memory; each holds the whole state, or its shards of it.
        trains: count gradients and activations too.
        n_fsdp: over how many devices parameters, gradients and optimizer state are sharded.
        n_processes: over how many processes, each on a machine of its own, the devices are divided.
    """
    config, numerics = objective.config, objective.numerics
    model: ModelConfig = config.model
    counts = count_params(model, objective.vocab_size, objective.n_classes)
    param_bytes, compute_bytes = np.dtype(numerics.param_dtype).itemsize, np.dtype(numerics.compute_dtype).itemsize
    moments = n_moments(config)
    state = MemoryNeed(param_bytes * sum(counts), moments * param_bytes * sum(counts))
    shared = max(1, max(n_devices, n_fsdp) // n_processes) if on_cpu else 1  # by how many devices one memory is
    if trains:
        rows, n_time = -(-config.batch_size // n_devices), config.n_time
        together = _rows_together(config, on_cpu, n_devices)
        all_at_once = n_devices > 1 or config.grad_accum > 1 or bool(config.clip)
        largest = max(model.n_embd * n for n in (4 * model.n_embd, objective.vocab_size, model.block_size))
        of_token = model.n_layer * model.n_embd
        if on_cpu:
            of_token = model.n_layer * (10 * model.n_embd + model.n_head * n_time // 2)
        logits = together * objective.vocab_size * param_bytes if objective.n_classes is None else 0
        tokens = rows * n_time * np.dtype(np.int32).itemsize
        state = state._replace(
            gradients=param_bytes * (sum(counts) if all_at_once else largest),
            activations=together * n_time * of_token * compute_bytes + logits + tokens,
        )
    return MemoryNeed(
        shared * state.parameters // n_fsdp,
        shared * state.optimizer_state // n_fsdp,
        shared * state.gradients // n_fsdp,
        shared * state.activations,
    )


def require_memory(objective: Objective, devices: Sequence[Any], trains: bool, n_fsdp: int = 1) -> None:
    """Raises `UserError` if the state, or with `trains` a training step, cannot fit the devices' memory."""
    on_cpu = devices[0].platform == "cpu"
    own = next((d for d in devices if d in jax.local_devices()), devices[0])  # another process's tells nothing
    has = host_memory() if on_cpu else (own.memory_stats() or {}).get("bytes_limit")
    need = memory_need(objective, on_cpu, len(devices), trains, n_fsdp, jax.process_count())
    if has is None or need.total <= has:
        return
    names = _causes(objective, need, _rows_together(objective.config, on_cpu, len(devices)))
    named = [f"{flag(name)} {_value(objective.config, name)}" for name in names]
    where = "this machine" if on_cpu else "each device"
    raise UserError(
        f"{named[0]}: takes at least {need}, and {where} has {size_text(has)}; lower it"
        + "".join(f", or {other}" for other in named[1:])
    )


def _rows_together(config: TrainConfig | FinetuneConfig, on_cpu: bool, n_devices: int) -> int:
    """How many rows of a batch a device computes at a time."""
    microbatch_tokens = CPU_TUNING.microbatch_tokens if on_cpu and n_devices > 1 else None
    return microbatch_rows(-(-config.batch_size // (n_devices * config.grad_accum)), config.n_time, microbatch_tokens)


def _causes(objective: Objective, need: MemoryNeed, rows_together: int) -> list[str]:
    """The fields that make a need so large, by dotted name, the one to lower first."""
    config: TrainConfig | FinetuneConfig = objective.config
    if need.activations > need.total // 2:
        time = "max_tokens" if isinstance(config, FinetuneConfig) else "model.block_size"
        return [time, "batch_size"] if rows_together == 1 else ["batch_size", time]
    counts = count_params(config.model, objective.vocab_size, objective.n_classes)
    if counts.largest == counts.positions:
        return ["model.block_size", "model.n_embd"]
    return ["model.n_embd", "model.n_layer"] if counts.largest == counts.blocks else ["model.n_embd"]


def _value(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def host_memory() -> int | None:
    """The most memory that this process can use on the host, in bytes: physical memory with all swap, the limits of
    its container and on its address space. None if the system does not tell."""
    limits = []
    with contextlib.suppress(OSError, ValueError, AttributeError):  # Windows has no sysconf
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + _swap())
    limits += [limit + _swap() for limit in _cgroup_limits()]
    if (address_space := address_space_limit()) is not None:
        limits.append(address_space)
    return min(limits, default=None)


def _swap() -> int:
    """How much can be swapped out, in bytes. Where the system makes swap files as it needs them: all free disk."""
    with contextlib.suppress(OSError, ValueError):
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("SwapTotal:"):
                return 1024 * int(line.split()[1])
    with contextlib.suppress(OSError):
        return shutil.disk_usage("/").free
    return 0


def _cgroup_limits() -> Iterator[int]:
    """The memory limits of this process's control groups, of version 1 or 2, in bytes."""
    try:
        lines = OWN_CGROUP.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, name = (CGROUPS / "memory", "memory.limit_in_bytes") if controllers else (CGROUPS, "memory.max")
        folder = root / path.strip("/")
        for group in (folder, *folder.parents):
            with contextlib.suppress(OSError, ValueError):  # ValueError: "max"
                yield int((group / name).read_text())
            if group == root:
                break


def size_text(n_bytes: float) -> str:
    """A number of bytes for a person, with three digits."""
    for unit in ("B", "KB", "MB", "GB", "TB", "PB"):
        if n_bytes < 1000 or unit == "PB":
            return f"{n_bytes:.3g} {unit}" if unit != "B" else f"{n_bytes} B"
        n_bytes /= 1000
    raise AssertionError
