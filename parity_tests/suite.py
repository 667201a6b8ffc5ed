"""The parity suite of this GPT: its checks in order, and what a process needs before it runs them."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from jaxgpt.parity.suite import CheckResult, Suite
from jaxgpt.parity.torch_side import prepare_torch
from parity_tests import mutants, pictures
from parity_tests.checks import (
    accelerator,
    bfloat16,
    classification,
    data,
    devices,
    files,
    gpt2,
    inside,
    kernels,
    ops,
    optimizer,
    packing,
    pairs,
    randomness,
    trajectories,
    whole_model,
    whole_runs,
)


def prepare_jax() -> None:
    """The CPU devices that a check divides a batch over; no compilation cache: what is compared is compiled here."""
    import jax

    jax.config.update("jax_num_cpu_devices", devices.N_DEVICES)
    jax.config.update("jax_enable_compilation_cache", False)


def prepare_process(n_threads: int) -> None:
    """PyTorch and JAX as they must be in a process of the suite."""
    import torch

    prepare_jax()
    torch.set_num_threads(n_threads)
    prepare_torch()


# These share trajectories.
TRAJECTORIES = ("trajectory_float64", "resume_across", "trajectory_float32")
SUITE = Suite(
    checks={
        check.__name__.removeprefix("check_"): check
        for check in (
            ops.check_ops,
            ops.check_out_of_range,
            ops.check_block,
            kernels.check_splash_attention,
            whole_model.check_model,
            whole_model.check_whole_split,
            packing.check_packing,
            data.check_data,
            optimizer.check_optimizer,
            optimizer.check_tiny_gradients,
            optimizer.check_clip,
            optimizer.check_decay_mask,
            optimizer.check_schedules,
            trajectories.check_trajectory_float64,
            trajectories.check_trajectory_float32,
            bfloat16.check_bfloat16,
            randomness.check_initial_weights,
            randomness.check_dropout,
            randomness.check_text,
            randomness.check_g_test,
            devices.check_devices,
            classification.check_classification,
            inside.check_gradient_report,
            inside.check_maps,
            inside.check_early_stopping,
            files.check_conversion,
            files.check_resume_across,
            gpt2.check_gpt2,
            gpt2.check_nanogpt_names,
            pairs.check_pairs,
            whole_runs.check_end_to_end,
            accelerator.check_accelerator,
        )
    },
    groups=(TRAJECTORIES,),
    longest=("end_to_end", "model", "optimizer", "gpt2"),
    prepare=prepare_process,
)


def run_suite(
    quick: bool, on_result: Callable[[CheckResult], None], mutant: str | None = None, picture: Path | None = None
) -> list[CheckResult]:
    """Runs all checks.

    Args:
        quick: the core of each alone.
        on_result: takes every result as it comes.
        mutant: the name of a fault that every process plants.
        picture: where to draw the trajectories.
    """
    within = partial(mutants.planted, mutant) if mutant else nullcontext
    after = partial(_draw, picture, quick) if picture else None
    return SUITE.run(quick, on_result, within, after)


def _draw(path: Path, quick: bool, names: tuple[str, ...]) -> None:
    """In the process that has computed the trajectories."""
    if names == TRAJECTORIES:
        pictures.trajectories(path, quick)
