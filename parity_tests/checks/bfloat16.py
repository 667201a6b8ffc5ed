"""bfloat16 products with the same casts on both sides.

Compiling as the trainer does, XLA leaves out casts to bfloat16 and back where it may keep more digits; there ours is
held to the float64 truth, as R. With that freedom taken from the compiler every cast is made, and ours is held to
PyTorch's bfloat16 itself, nearly digit by digit.
"""

import dataclasses
import statistics
from collections.abc import Iterator

import numpy as np

from jaxgpt.parity.harness import Row, checked, own_errors, ratio, rms
from jaxgpt.parity.jax_side import precision_of
from parity_tests.cases import Case, Results, flax_results_of, small, torch_results
from parity_tests.checks.whole_model import FLOOR
from parity_tests.tolerances import error_row, ratio_row, row

DRAWS = 16  # of weights and batch
T_999 = 4.073  # of Student's t with 15 degrees of freedom, two-sided 99.9 %


def cases() -> list[Case]:
    return [dataclasses.replace(small("small"), seed=seed) for seed in range(DRAWS)]


def compare_casts(draws: list[Case]) -> Iterator[Row]:
    """Logits with every cast made: how far from PyTorch's, in units of how far those are from the truth."""
    theirs, truth = ([torch_results(case, p).logits for case in draws] for p in ("bfloat16", "float64"))
    with precision_of("bfloat16"):
        results = flax_results_of(draws, "bfloat16", compiler_options={"xla_allow_excess_precision": False})

    def distance() -> float:
        ours, reference = checked(np.stack([r.logits for r in results]), np.stack(theirs))
        return rms(ours - reference) / rms(reference - np.stack(truth))

    yield error_row("bfloat16 logits, every cast made", "bfloat16", f"{len(draws)} draws", distance)


def check_bfloat16(quick: bool) -> Iterator[Row]:
    """Logits, loss and gradients pooled over draws; and whether the mean signed error is 0."""
    draws = cases()
    yield from compare_casts(draws[: 4 if quick else 8])
    if quick:
        return
    truth = [torch_results(case, "float64") for case in draws]
    theirs = [torch_results(case, "bfloat16") for case in draws]
    with precision_of("bfloat16"):
        ours = flax_results_of(draws, "bfloat16")
    label = f"{DRAWS} draws"

    def pooled(results: list[Results]) -> np.ndarray:
        return np.stack([r.logits for r in results])

    yield ratio_row(
        "bfloat16 logits", "bfloat16", label, lambda: own_errors(pooled(ours), pooled(theirs), pooled(truth))
    )
    losses = [np.array([r.loss for r in results]) for results in (ours, theirs, truth)]
    yield ratio_row("bfloat16 loss", "bfloat16", label, lambda: own_errors(*losses))
    ratios = {}
    for name in truth[0].grads:
        if not name.endswith("Wk.bias"):
            grads = [np.stack([r.grads[name] for r in results]) for results in (ours, theirs, truth)]
            ratios[name] = ratio(own_errors(*grads, floor=FLOOR))
    where = max(ratios, key=ratios.get)
    yield row("bfloat16 gradients, R median", "bfloat16", label, ratio=statistics.median(ratios.values()))
    yield row("bfloat16 gradients, R worst", "bfloat16", label, ratio=ratios[where], note=where)
    leaning = [_t_of_mean(results, truth) for results in (ours, theirs)]
    yield row("bfloat16 logits, mean signed error", "bfloat16", label, *leaning, note="in units of its standard error")


def _t_of_mean(results: list[Results], truth: list[Results]) -> float:
    """Student's t of the draws' mean signed errors."""
    means = [float((r.logits - t.logits).mean()) for r, t in zip(results, truth, strict=True)]
    return abs(statistics.mean(means)) / (statistics.stdev(means) / len(means) ** 0.5)
