"""A hundred updates from the same weights on the same batches, ours by the trainer's own compiled dispatches."""

import dataclasses
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from jaxgpt.parity.harness import Row, own_errors, ratio, rms, worst_tensor
from jaxgpt.parity.jax_side import precision_of
from jaxgpt.presets import PRESETS
from parity_tests.cases import SIZES, Case, FlaxTraining, TorchTraining, preset_case, preset_cases, small
from parity_tests.checks.optimizer import without_epsilon
from parity_tests.checks.packing import documents_case
from parity_tests.tolerances import row

STEPS = 100
DISPATCHES = (1, 30, 69)  # K steps each: several programs' worth of calls, one compiled program
SEEDS = 5
BATCH = 3  # of the float32 rows: most of their time is PyTorch's in float64
TIMES = (1, 2, 5, 10, 20, 50, 100)


@dataclass(frozen=True)
class Trajectory:
    """The loss of every step, and weights by torch name after some of them."""

    losses: list[float]
    params: dict[int, dict[str, np.ndarray]]


def cases(quick: bool) -> list[Case]:
    """Every preset, and at small sizes what no preset has yet. All start as documented."""
    modern = small(
        "modern recipe, dropout",
        model=dataclasses.replace(SIZES, dropout=0.1),
        steps=90,
        schedule="warmup-cosine",
        warmup_steps=10,
        min_lr=3e-5,
        beta2=0.95,
        weight_decay=0.1,
        decay_mask="matrices",
        clip=0.5,
    )
    more = [
        small("cosine", steps=90, schedule="cosine", lr=3e-3),
        small("SGD, momentum", optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=0.01),
        small("Adam", optimizer="adam"),
        # Without decay: PyTorch's rounding of 1 - lr * decay would count as a difference of ours (docs/parity.md).
        small("tied head, clip", model=dataclasses.replace(SIZES, tied_head=True), clip=1.0, weight_decay=0.0),
    ]
    # The modern preset at the small sizes: its own take minutes in float64, and check_model has them.
    presets = [case for case in preset_cases() if case.name != "wikitext2"]
    # The variants that the tutorial adds to minigpt.
    for name, changes in (("cosine", {"schedule": "cosine", "steps": STEPS}), ("clip 1", {"clip": 1.0})):
        presets.append(preset_case("minigpt", name, **changes))
    presets += [small("wikitext2, small", "wikitext2", dataclasses.replace(SIZES, dropout=0.1)), documents_case()]
    chosen = [modern] if quick else [modern, *more, *presets]
    return [dataclasses.replace(case, weights="documented") for case in chosen]


def run(side: Any, dispatches: tuple[int, ...]) -> Trajectory:
    """The trajectory of either side, its weights kept after each dispatch."""
    losses: list[float] = []
    params = {}
    for n_steps in dispatches:
        losses += side.run(n_steps)
        params[len(losses)] = side.params()
    return Trajectory(losses, params)


@cache
def torch_trajectory(case: Case, precision: str, documented_clip: bool = False, perturbed: bool = False) -> Trajectory:
    """The reference's. `perturbed`: from weights moved by one unit in the last place, up or down at random."""
    clip = {} if documented_clip else {"clip": without_epsilon}
    side = TorchTraining(case, precision, **clip)
    if perturbed:
        draw = np.random.default_rng(0)
        for p in side.model.parameters():
            values = p.detach().numpy()
            values[...] = np.nextafter(values, np.where(draw.random(values.shape) < 0.5, -np.inf, np.inf))
    return run(side, _dispatches(TIMES) if precision == "float32" or case.seed else DISPATCHES)


def _dispatches(times: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(np.diff((0, *times)).tolist())


def flax_float64(case: Case) -> Trajectory:
    """Ours in float64."""
    with precision_of("float64"):
        return run(FlaxTraining(case, "float64"), DISPATCHES)


def check_trajectory_float64(quick: bool) -> Iterator[Row]:
    """Every loss and, at the end, every parameter."""
    for case in cases(quick):
        yield from compare_float64(case, perturbed=not quick)


def compare_float64(case: Case, perturbed: bool = True) -> Iterator[Row]:
    truth, ours = torch_trajectory(case, "float64"), flax_float64(case)
    yield from _losses_and_params("", case, ours, truth)
    if case.config.clip:
        yield from _losses_and_params(", clip_grad_norm_", case, ours, torch_trajectory(case, "float64", True))
    if perturbed:
        other = torch_trajectory(case, "float64", perturbed=True)
        distance = [_distance(t.params[STEPS], truth.params[STEPS]) for t in (ours, other)]
        yield row(
            "trajectory, against a one-ulp perturbed run", "float64", case.name, *distance, ratio(tuple(distance))
        )


def _losses_and_params(suffix: str, case: Case, ours: Trajectory, truth: Trajectory) -> Iterator[Row]:
    errors = np.abs(np.array(ours.losses) / np.array(truth.losses) - 1)
    note = f"step {int(errors.argmax())}"
    yield row(f"trajectory, every loss{suffix}", "float64", case.name, float(errors.max()), note=note)
    # A key bias that does not decay stays where it started, near 0 or not, in both: it is compared as all others.
    error, where = worst_tensor(ours.params[STEPS], truth.params[STEPS], "float64")
    yield row(f"trajectory, every parameter{suffix}", "float64", case.name, error, note=where)


def _distance(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    return rms(np.concatenate([(a[name] - b[name]).ravel() for name in b]))


def float32_case(seed: int, quick: bool) -> Case:
    """`minigpt` with a smaller batch (quick: small sizes too), from its documented start, by seed."""
    config = dataclasses.replace(PRESETS["minigpt"], batch_size=BATCH, seed=seed)
    if quick:
        config = dataclasses.replace(config, model=SIZES)
    return Case("small" if quick else "minigpt", config, 65, "documented", seed)


@cache
def float32_trajectories(seed: int, quick: bool) -> tuple[Trajectory, Trajectory, Trajectory]:
    """Ours and PyTorch's in float32, and the truth in float64."""
    case, dispatches = float32_case(seed, quick), _dispatches(TIMES)
    with precision_of("float32"):
        ours = run(FlaxTraining(case, "float32"), dispatches)
    theirs, truth = (run(TorchTraining(case, precision), dispatches) for precision in ("float32", "float64"))
    return ours, theirs, truth


def check_trajectory_float32(quick: bool) -> Iterator[Row]:
    """Five seeds: how far each side has moved from the float64 trajectory, and the first ten losses."""
    ratios: dict[str, float] = {}
    for seed in range(1 if quick else SEEDS):
        ours, theirs, truth = float32_trajectories(seed, quick)
        name = float32_case(seed, quick).name
        early = np.abs(np.array(ours.losses[:10]) / np.array(truth.losses[:10]) - 1)
        torch_early = np.abs(np.array(theirs.losses[:10]) / np.array(truth.losses[:10]) - 1)
        yield row(
            "trajectory, first ten losses",
            "float32",
            f"{name}, seed {seed}",
            float(early.max()),
            float(torch_early.max()),
        )
        for t in TIMES:
            # Adam turns the rounding of a key bias' gradient, whose true value is 0, into whole steps.
            flat = [_flat(side.params[t]) for side in (ours, theirs, truth)]
            ratios[f"seed {seed}, t = {t}"] = ratio(own_errors(*flat))
    where = max(ratios, key=ratios.get)
    seeds = f"{name}, {1 if quick else SEEDS} seeds"
    yield row("trajectory, R(t) median", "float32", seeds, ratio=statistics.median(ratios.values()))
    yield row("trajectory, R(t) worst", "float32", seeds, ratio=ratios[where], note=where)


def _flat(params: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([p.ravel() for name, p in sorted(params.items()) if not name.endswith("Wk.bias")])
