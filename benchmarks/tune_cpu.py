"""`jaxgpt bench --tune-cpu`: measures the thresholds of `jaxgpt.parallel.CpuTuning` on this machine.

It measures two things, each alternately: a preset's step with microbatches of several sizes, and, over a grid of
models and batches, the step on one device against that on several. It suggests the thresholds with the least mean
slowdown. They change how fast a step is, not what it computes: all variants must have the same losses.
"""

import argparse
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax

from benchmarks.alternating import (
    benchmark_config,
    measure_alternately,
    random_tokens,
    require_same_losses,
    say,
)
from benchmarks.implementations import cpu_name
from benchmarks.trainer_steps import MicrobatchedSteps, TrainerSteps
from jaxgpt import parallel
from jaxgpt.config import ModelConfig, TrainConfig
from jaxgpt.errors import UserError
from jaxgpt.objective import LanguageModelingObjective
from jaxgpt.parallel import CPU_TUNING, CpuTuning, Executor
from jaxgpt.train_step import microbatch_rows

MICROBATCH_TOKENS: tuple[int | None, ...] = (32, 64, 128, 256, 512, None)  # None: all of a device's rows
# The candidates of the other thresholds.
MIN_DEVICE_TOKENS = (16, 32, 64, 128, 256, 512, 1024)
PARAMS_PER_TOKEN = (1_500, 3_000, 6_000, 12_000, 24_000, 48_000, 96_000)
MAX_PARAMS = (2**20, 2**22, 2**23, 2**24, 2**25, 2**26)
# Below this share of the time, a difference is taken for noise, and the present value stays.
MIN_GAIN = 0.02


@dataclass(frozen=True)
class Grid:
    """The models and batches whose step is timed on one device and on several.

    Args:
        models: each with its vocabulary size; 0.1, 0.8, 4.3 and 18 million parameters.
        batch_sizes: in rows of the models' block size.
    """

    models: tuple[tuple[ModelConfig, int], ...] = (
        (ModelConfig(n_layer=2, n_head=4, n_embd=64, block_size=32), 65),
        (ModelConfig(n_layer=4, n_head=4, n_embd=128, block_size=32), 65),
        (ModelConfig(n_layer=2, n_head=4, n_embd=64, block_size=32), 32_768),
        (ModelConfig(n_layer=2, n_head=4, n_embd=256, block_size=32), 32_768),
    )
    batch_sizes: tuple[int, ...] = (2, 8, 32, 64)


@dataclass(frozen=True)
class GridPoint:
    """One model and batch, and by the number of devices the time of its step over that on one device."""

    n_params: int
    batch_size: int
    tokens_per_step: int
    relative_time: dict[int, float]

    def slowdown(self, tuning: CpuTuning) -> float:
        """The time under a tuning over the least; 1 if it takes the fastest number of devices."""
        n = tuning.n_devices(self.n_params, self.batch_size, self.tokens_per_step, max(self.relative_time))
        return self.relative_time[n] / min(self.relative_time.values())


class InProcess:
    """A contender (`alternating.Contender`) that trains in this process."""

    def __init__(self, name: str, steps: TrainerSteps):
        self.name, self.steps = name, steps
        self.step_seconds: list[float] = []
        self.losses: list[float] = []

    def run(self, n_steps: int) -> float:
        begun = time.perf_counter()
        self.losses += self.steps.run(n_steps)
        return (time.perf_counter() - begun) / n_steps


def measure(presets: Sequence[str], flags: argparse.Namespace, grid: Grid | None = None) -> dict[str, Any]:
    """Both measurements and the tuning that follows from them.

    Raises:
        UserError: JAX does not compute on a CPU, or has one device of it; or a variant's losses differ.
    """
    configs = [(preset, *benchmark_config(preset, flags)) for preset in presets]
    with tempfile.TemporaryDirectory() as cache:
        parallel.configure_jax(configs[0][1], Path(cache))
        devices = jax.local_devices()
        if devices[0].platform != "cpu":
            raise UserError(f"--tune-cpu: JAX computes on {devices[0].platform} here; set JAX_PLATFORMS=cpu")
        if len(devices) == 1:
            raise UserError("--tune-cpu: JAX has one CPU device here, so there is nothing to divide a step over")
        microbatches = {
            preset: measure_microbatches(preset, config, vocab_size, flags) for preset, config, vocab_size in configs
        }
        tokens = choose_microbatch_tokens([relative_times(rows) for rows in microbatches.values()], CPU_TUNING)
        points = measure_grid(grid or Grid(), tokens, flags)
    suggested = choose_thresholds(points, replace(CPU_TUNING, microbatch_tokens=tokens))
    return {
        "machine": {"device": cpu_name(), "devices": len(devices), "jax": jax.__version__},
        "microbatches": microbatches,
        "devices": [asdict(point) for point in points],
        "present": asdict(CPU_TUNING),
        "suggested": asdict(suggested),
        "ratio": {
            "microbatches": geometric_mean([relative_times(rows)[tokens] for rows in microbatches.values()]),
            "devices": mean_slowdown(points, suggested) / mean_slowdown(points, CPU_TUNING),
        },
    }


def measure_microbatches(
    preset: str, config: TrainConfig, vocab_size: int, flags: argparse.Namespace
) -> list[dict[str, Any]]:
    """The step of a preset on as many devices as divide its batch, over the sizes of microbatches.

    Candidates with the same number of rows share one row of the result.
    """
    devices = _most_devices(config.batch_size)
    if len(devices) == 1:
        raise UserError(f"--batch-size {config.batch_size}: does not divide over this CPU's cores; give an even number")
    objective = _objective(config, vocab_size)
    local_rows, block_size = config.batch_size // len(devices), config.model.block_size
    candidates: dict[int, list[int | None]] = {}
    for tokens in sorted(
        {*MICROBATCH_TOKENS, CPU_TUNING.microbatch_tokens}, key=lambda t: math.inf if t is None else t
    ):
        candidates.setdefault(microbatch_rows(local_rows, block_size, tokens), []).append(tokens)
    tokens_N = random_tokens(vocab_size)
    variants = {
        n_rows: InProcess(
            f"microbatches of {n_rows} rows",
            MicrobatchedSteps(Executor(objective, devices), tokens_N, tokens[0]),
        )
        for n_rows, tokens in candidates.items()
    }
    present = microbatch_rows(local_rows, block_size, CPU_TUNING.microbatch_tokens)
    _measure(list(variants.values()), variants[present], flags, f"{preset}, microbatches", objective)
    return [
        {
            "rows": n_rows,
            "microbatch_tokens": candidates[n_rows],
            "devices": len(devices),
            "ms_per_step": 1e3 * statistics.median(variant.step_seconds),
            "over_present": statistics.median(ratios),
            "over_present_range": [min(ratios), max(ratios)],
        }
        for n_rows, variant in variants.items()
        for ratios in [_ratios(variant, variants[present])]
    ]


def measure_grid(grid: Grid, microbatch_tokens: int | None, flags: argparse.Namespace) -> list[GridPoint]:
    """The step of each model and batch on one device and on every number of them that divides the batch."""
    return [
        _measure_point(
            TrainConfig(batch_size=batch_size, model=model, dtype=flags.dtype), vocab_size, microbatch_tokens, flags
        )
        for (model, vocab_size), batch_size in itertools.product(grid.models, grid.batch_sizes)
    ]


def _measure_point(
    config: TrainConfig, vocab_size: int, microbatch_tokens: int | None, flags: argparse.Namespace
) -> GridPoint:
    objective, tokens_N = _objective(config, vocab_size), random_tokens(vocab_size)
    n_params = sum(math.prod(p.shape) for p in objective.param_shapes.values())
    devices = _most_devices(config.batch_size)
    variants = {
        n: InProcess(
            f"{n} devices",
            MicrobatchedSteps(Executor(objective, devices[:n]), tokens_N, microbatch_tokens if n > 1 else None),
        )
        for n in range(1, len(devices) + 1)
        if config.batch_size % n == 0
    }
    label = f"{n_params / 1e6:.1f} million parameters, {config.tokens_per_step} tokens per step"
    _measure(list(variants.values()), variants[1], flags, label, objective)
    relative_time = {n: statistics.median(_ratios(variant, variants[1])) for n, variant in variants.items()}
    return GridPoint(n_params, config.batch_size, config.tokens_per_step, relative_time)


def _objective(config: TrainConfig, vocab_size: int) -> LanguageModelingObjective:
    return LanguageModelingObjective(config, vocab_size, parallel.numerics(config))


def _most_devices(batch_size: int) -> list[Any]:
    devices = jax.local_devices()
    return devices[: max(n for n in range(1, len(devices) + 1) if batch_size % n == 0)]


def _measure(
    variants: list[InProcess],
    reference: InProcess,
    flags: argparse.Namespace,
    label: str,
    objective: LanguageModelingObjective,
) -> None:
    """Runs the variants' rounds and compares their losses with the reference's."""
    say(f"{label}: compiling {len(variants)} variants")
    measure_alternately(variants, flags, label)
    for variant in variants:
        dtype = objective.numerics.compute_dtype.name
        require_same_losses(f"--tune-cpu: {label}, {variant.name}", variant.losses, reference.losses, dtype)


def _ratios(variant: InProcess, reference: InProcess) -> list[float]:
    """The time over the reference's, of each round."""
    return [a / b for a, b in zip(variant.step_seconds, reference.step_seconds, strict=True)]


def relative_times(rows: list[dict[str, Any]]) -> dict[int | None, float]:
    """By candidate, a preset's time over that with the present value: from the rows of `measure_microbatches`."""
    return {tokens: row["over_present"] for row in rows for tokens in row["microbatch_tokens"]}


def choose_microbatch_tokens(times: Sequence[dict[int | None, float]], present: CpuTuning) -> int | None:
    """The candidate with the least time, geometric mean over presets; the present value unless it is beaten clearly.

    Of equally fast ones it is that nearest to the present value.

    Args:
        times: of each preset, by candidate, the time over that with the present value.
    """
    mean = {tokens: geometric_mean([time[tokens] for time in times]) for tokens in times[0]}
    if min(mean.values()) > 1 - MIN_GAIN:
        return present.microbatch_tokens
    return min(mean, key=lambda tokens: (mean[tokens], _distance(tokens, present.microbatch_tokens)))


def choose_thresholds(points: Sequence[GridPoint], present: CpuTuning) -> CpuTuning:
    """The thresholds with the least mean slowdown over the grid; the present ones unless they are beaten clearly.

    Of those that decide alike for all points, they are the nearest to the present ones.
    """
    candidates = [
        replace(present, min_device_tokens=tokens, params_per_token=per_token, max_params=most)
        for tokens, per_token, most in itertools.product(
            {*MIN_DEVICE_TOKENS, present.min_device_tokens},
            {*PARAMS_PER_TOKEN, present.params_per_token},
            {*MAX_PARAMS, present.max_params},
        )
    ]

    def distance(tuning: CpuTuning) -> float:
        ours, theirs = asdict(tuning), asdict(present)
        return sum(_distance(ours[name], theirs[name]) for name in ours)

    best = min(candidates, key=lambda tuning: (mean_slowdown(points, tuning), distance(tuning)))
    gain = 1 - mean_slowdown(points, best) / mean_slowdown(points, present)
    return best if gain > MIN_GAIN else present


def mean_slowdown(points: Sequence[GridPoint], tuning: CpuTuning) -> float:
    """The geometric mean over the grid of `GridPoint.slowdown`."""
    return geometric_mean([point.slowdown(tuning) for point in points])


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values))


def _distance(a: int | None, b: int | None) -> float:
    """How many octaves two thresholds differ by; None has no limit, and is the farthest."""
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    return abs(math.log2(a / b))


def show(result: dict[str, Any]) -> None:
    """Prints both measurements as tables, and the suggestion."""
    print(f"{result['machine']['device']}, jax {result['machine']['jax']}: thresholds of jaxgpt.parallel.CpuTuning")
    print("\nstep time over the size of a microbatch")
    print(f"  {'preset':<14} {'microbatch_tokens':<24} {'rows':>5} {'devices':>8} {'ms/step':>9}  over present (range)")
    for preset, rows in result["microbatches"].items():
        for row in rows:
            least, most = row["over_present_range"]
            candidates = ", ".join("all" if tokens is None else str(tokens) for tokens in row["microbatch_tokens"])
            print(
                f"  {preset:<14} {candidates:<24} {row['rows']:5} {row['devices']:8} {row['ms_per_step']:9.2f} "
                f" {row['over_present']:.2f} ({least:.2f} to {most:.2f})"
            )
    print("\nstep time over that on one device")
    counts = sorted({n for point in result["devices"] for n in point["relative_time"]})
    print(f"  {'parameters':>12} {'tokens/step':>12}" + "".join(f"{f'{n} devices':>12}" for n in counts if n > 1))
    for point in result["devices"]:
        times = (f"{point['relative_time'][n]:12.2f}" if n in point["relative_time"] else 12 * " " for n in counts[1:])
        print(f"  {point['n_params']:12,} {point['tokens_per_step']:12,}" + "".join(times))
    print(f"\npresent:   {CpuTuning(**result['present'])}")
    print(f"suggested: {CpuTuning(**result['suggested'])}")
    print(
        f"time with the suggested values over the present: {result['ratio']['microbatches']:.2f} by microbatches, "
        f"{result['ratio']['devices']:.2f} by devices"
    )
