"""Several processes that train together: one on each host of a TPU pod or of a GPU cluster, or several on one machine.

Every process runs the same program, in the same order, on its own devices; together they are one mesh (`parallel.py`).
Process 0 alone writes the run's records and pictures. What a process decides by itself (a signal that it received, the
time that a dispatch took, what it finds on the disk) must be the same in all, or one would wait for a collective that
the others never join: the functions here make it so. With one process they communicate nothing.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxgpt import strict_json
from jaxgpt.config import ProcessLayout
from jaxgpt.errors import DamagedRun, UserError, first_line, flag
from jaxgpt.versions import versions

Value = TypeVar("Value")

# JAX's own time-out aborts the process with a stack trace: ours comes before it.
GRACE_SECONDS = 60
# How long process 0 waits before it exits with an error: it runs the service that the others would lose.
LINGER_SECONDS = 2.0
LOST = {"UNKNOWN", "UNAVAILABLE", "INTERNAL", "ABORTED", "CANCELLED", "DEADLINE_EXCEEDED"}  # of a failed collective


@contextlib.contextmanager
def joined(layout: ProcessLayout) -> Iterator[None]:
    """Joins the other processes if the layout says so; JAX finds them by itself on SLURM, Kubernetes, MPI and TPU pods.

    Before the first array: JAX cannot join later.

    Raises:
        UserError: no cluster was found, the processes do not fit together, or one of them has ended meanwhile.
        SystemExit: not all processes arrived in time; printed as one line, exit code 2.
    """
    if not layout.distributed:
        yield
        return
    _initialize(layout)
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as e:
        if not is_lost_process(e):
            raise
        raise UserError(
            f"--distributed: a collective has failed, as when another process ends ({first_line(e)}); see what the "
            "others print, and start all of them again with the same command: they go on from the last checkpoint"
        ) from e


def _initialize(layout: ProcessLayout) -> None:
    def too_late() -> None:
        given = f"--num-processes {layout.num_processes}" if layout.num_processes else "--distributed"
        where = f" at {layout.coordinator}" if layout.coordinator else ""
        print(
            f"error: {given}: not all processes have joined{where} within {layout.join_timeout} s; start the missing "
            "ones, check --coordinator, or raise --join-timeout",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    jax.config.update("jax_enable_preemption_service", False)  # the trainer handles signals, and shares them
    # A process that waits for others is inside a call of JAX, which no exception ends.
    watchdog = threading.Timer(layout.join_timeout, too_late)
    watchdog.daemon = True
    watchdog.start()
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)  # nor would Ctrl-C, by Python's own handler
    try:
        jax.distributed.initialize(
            layout.coordinator or None,
            layout.num_processes or None,
            layout.process_id if layout.process_id >= 0 else None,
            initialization_timeout=layout.join_timeout + GRACE_SECONDS,
            heartbeat_timeout_seconds=layout.heartbeat_timeout,
        )
    except (ValueError, RuntimeError, OSError) as e:
        remedy = "give --coordinator HOST:PORT, --num-processes and --process-id"
        if layout.coordinator:
            remedy = f"see that no other program listens at {layout.coordinator}, or name another port"
        raise UserError(f"--distributed: JAX cannot join the processes ({first_line(e)}); {remedy}") from None
    finally:
        watchdog.cancel()
        signal.signal(signal.SIGINT, handler)
    if os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0] == "1" or (
        os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    ):
        # JAX gives each process of SLURM and Open MPI one GPU, also where there is one process on a host.
        jax.config.update("jax_cuda_visible_devices", "all")
        jax.config.update("jax_rocm_visible_devices", "all")


def connect() -> None:
    """The first collective, by which the processes' devices connect: on CPUs gloo waits for all no longer than 30 s.

    So it comes before what takes one process longer than another, as tokenizing does.
    """
    if is_distributed():
        multihost_utils.sync_global_devices("connect")


def exit_with_error(code: int) -> None:
    """Ends this process if it has joined others: not as usual, which would wait until they end, too."""
    if not is_distributed():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first():
        time.sleep(LINGER_SECONDS)
    os._exit(code)


def require_same_devices() -> None:
    """Raises `UserError` unless all processes have as many devices, and the same versions of JAX and its libraries."""
    if not is_distributed():
        return
    counts = [sum(d.process_index == p for d in jax.devices()) for p in range(jax.process_count())]
    if len(set(counts)) > 1:
        raise UserError(
            f"--distributed: the processes have different numbers of devices ({', '.join(map(str, counts))}); give "
            "each as many, on CPUs by JAX_NUM_CPU_DEVICES"
        )
    here, there = versions(), broadcast(versions())
    for name, version in here.items():
        if name != "python" and there.get(name) != version:
            raise UserError(
                f"process {jax.process_index()} has {name} {version}, and process 0 {there.get(name)}; install the "
                "same versions everywhere"
            )


def require_same(values: dict[str, str]) -> None:
    """Raises `UserError` unless flags, by name, have the values that they have in process 0."""
    for name, value in broadcast(values).items():
        if values[name] != value:
            raise UserError(
                f"{flag(name)} {values[name]}: process 0 has {value or 'none'}; start all processes with the same"
            )


def is_lost_process(error: Exception) -> bool:
    """Whether an error says that another process has ended: a collective fails in all the others."""
    status = str(error).partition(":")[0]  # of XLA, which raises a ValueError for some
    return is_distributed() and isinstance(error, jax.errors.JaxRuntimeError | ValueError) and status in LOST


def is_distributed() -> bool:
    """Whether this process has joined others."""
    return jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this is process 0, which writes; so is a process by itself."""
    return not is_distributed() or jax.process_index() == 0


def all_gather(values: Sequence[int]) -> np.ndarray:
    """The whole numbers of every process, int32 [P, N]. All processes call it together."""
    row_N = np.asarray(values, np.int32)
    return multihost_utils.process_allgather(row_N) if is_distributed() else row_N[None]


def broadcast(value: Value) -> Value:
    """The value of process 0, which can be written as JSON. All processes call it together."""
    if not is_distributed():
        return value
    content = np.frombuffer(strict_json.dumps(value).encode(), np.uint8) if is_first() else np.zeros(0, np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    padded = np.zeros(1 << max(0, size - 1).bit_length(), np.uint8)  # few sizes: each is a program to compile
    padded[: len(content)] = content
    return strict_json.loads(multihost_utils.broadcast_one_to_all(padded)[:size].tobytes())


def on_first(function: Callable[[], Value]) -> Value | None:
    """Calls a function in process 0, while the others wait. All processes call it together.

    Returns:
        What the function returns, in process 0; None in the others.

    Raises:
        Exception: what the function raises, in process 0, and a `UserError` (`DamagedRun` for one) in the others.
    """
    if not is_distributed():
        return function()
    value, error = None, None
    if is_first():
        try:
            value = function()
        except Exception as e:
            error = e
    told = broadcast([isinstance(error, DamagedRun), str(error)] if error else None)
    if error is not None:
        raise error
    if told is not None:
        damaged, message = told
        raise (DamagedRun if damaged else UserError)(f"process 0: {message}")
    return value
