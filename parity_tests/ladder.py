"""The rungs in order, and running them."""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parity_tests.harness import Row
from parity_tests.rungs import (
    accelerator,
    bfloat16,
    classification,
    devices,
    files,
    gpt2,
    inside,
    ops,
    optimizer,
    packing,
    randomness,
    trajectories,
    whole_model,
    whole_runs,
)
from parity_tests.sides import prepare_torch

RungFunction = Callable[[bool], Iterator[Row]]

# From the small to the large: the first that fails is the place to look.
RUNGS: dict[str, RungFunction] = {
    function.__name__.removeprefix("rung_"): function
    for function in (
        ops.rung_ops,
        ops.rung_out_of_range,
        ops.rung_block,
        whole_model.rung_model,
        whole_model.rung_whole_split,
        packing.rung_packing,
        optimizer.rung_optimizer,
        optimizer.rung_tiny_gradients,
        optimizer.rung_clip,
        optimizer.rung_decay_mask,
        optimizer.rung_schedules,
        trajectories.rung_trajectory_float64,
        trajectories.rung_trajectory_float32,
        bfloat16.rung_bfloat16,
        randomness.rung_initial_weights,
        randomness.rung_dropout,
        randomness.rung_text,
        randomness.rung_g_test,
        devices.rung_devices,
        classification.rung_classification,
        inside.rung_gradient_report,
        inside.rung_maps,
        inside.rung_early_stopping,
        files.rung_conversion,
        files.rung_resume_across,
        gpt2.rung_gpt2,
        gpt2.rung_nanogpt_names,
        whole_runs.rung_end_to_end,
        accelerator.rung_accelerator,
    )
}
# A fault that raises in a rung fails that rung, with an infinite signal: it is a row of this gate.
RAISED = "raised an error"


@dataclass(frozen=True)
class Finished:
    """A rung's rows, the seconds that it took, and the trace if it raised."""

    name: str
    rows: list[Row]
    seconds: float
    trace: str = ""


def run_rung(name: str, quick: bool = False) -> Finished:
    """All rows of one rung; what it raises becomes a row that has failed."""
    begun = time.perf_counter()
    rows, trace = [], ""
    try:
        rows.extend(RUNGS[name](quick))
    except Exception as e:
        trace = traceback.format_exc()
        reason = (str(e).splitlines() or [""])[0][:120]
        rows.append(Row(RAISED, "any", name, float("inf"), note=f"{type(e).__name__}: {reason}"))
    assert rows, f"the rung {name} compares nothing"
    return Finished(name, rows, time.perf_counter() - begun, trace)


# What one process does after the other: these share trajectories. The longest are begun first.
SHARING = ("trajectory_float64", "resume_across", "trajectory_float32")
LONGEST = ("end_to_end", "model", "optimizer", "gpt2")


def run_ladder(
    quick: bool,
    each: Callable[[Finished], None],
    mutant: str | None = None,
    picture: Path | None = None,
    processes: int | None = None,
) -> list[Finished]:
    """All rungs, in order, computed by several processes: most of the time goes into compiling, on one core each.

    Args:
        each: is told of every rung as it is done.
        mutant: the name of a fault that every process plants.
        picture: where to draw the trajectories.
    """
    rest = [name for name in RUNGS if name not in SHARING + LONGEST]
    groups = [SHARING, *((name,) for name in (*LONGEST, *rest))]
    finished: dict[str, Finished] = {}
    for results in in_processes(_run_group, [(group, quick, mutant, picture) for group in groups], processes):
        for done in results:
            finished[done.name] = done
            each(done)
    return [finished[name] for name in RUNGS]


def in_processes(
    function: Callable[..., Any], arguments: list[tuple[Any, ...]], processes: int | None = None
) -> Iterator[Any]:
    """The function's results as they come, computed by several processes."""
    processes = processes or max(1, min(4, os.cpu_count() or 1))
    n_threads = max(1, (os.cpu_count() or 1) // processes)
    # A GPU is shared by the processes: none may take all of its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), prepare_process, (n_threads,))
    try:
        for future in as_completed([pool.submit(function, *a) for a in arguments]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def prepare_jax() -> None:
    """The CPU devices that a rung divides a batch over; and what is compared is what is compiled here."""
    import jax

    jax.config.update("jax_num_cpu_devices", devices.N_DEVICES)
    jax.config.update("jax_enable_compilation_cache", False)


def prepare_process(n_threads: int) -> None:
    """PyTorch and JAX as they must be in a process of the pool."""
    import torch

    prepare_jax()
    torch.set_num_threads(n_threads)
    prepare_torch()


def _run_group(names: tuple[str, ...], quick: bool, mutant: str | None, picture: Path | None) -> list[Finished]:
    """Runs in a process of the pool."""
    with planted(mutant):
        finished = [run_rung(name, quick) for name in names]
        if picture and names == SHARING and not any(done.trace for done in finished):
            from parity_tests.report import trajectories_picture

            trajectories_picture(picture, quick)
    return finished


def planted(mutant: str | None) -> AbstractContextManager[Any]:
    """A context in which a fault of `parity_tests.mutants` is in place."""
    if mutant is None:
        return nullcontext()
    from parity_tests.mutants import find

    return find(mutant).patch()
