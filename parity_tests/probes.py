"""The ladder's own comparisons, at their smallest: what is run on a mutant."""

import dataclasses
from collections.abc import Callable, Iterator

from parity_tests.harness import Row
from parity_tests.ladder import RAISED
from parity_tests.rungs import (
    bfloat16,
    classification,
    devices,
    files,
    gpt2,
    inside,
    ops,
    packing,
    randomness,
    trajectories,
    whole_model,
)
from parity_tests.rungs import optimizer as optimizer_rungs
from parity_tests.sides import SIZES, small


def _optimizer() -> Iterator[Row]:
    configurations = optimizer_rungs.configurations()
    for name in ("b2 0.999, decay matrices", "warm-up and cosine", "Adam, decay in the gradient", "SGD, momentum"):
        yield from optimizer_rungs.compare_optimizer(optimizer_rungs.case_of(name, configurations[name]), (1, 2))


PROBES: dict[str, Callable[[], Iterator[Row]]] = {
    "ops": lambda: (row for op in ops.ops() for row in ops.compare_op(op, ("float64",))),
    "ops float32": lambda: (row for op in ops.ops()[:3] for row in ops.compare_op(op, ("float32",))),
    "out_of_range": lambda: ops.rung_out_of_range(True),
    "block": lambda: ops.compare_block(small("block"), ("float64",)),
    "model": lambda: whole_model.compare_model(small("small"), "float64"),
    "model, dropout": lambda: whole_model.compare_model(
        small("dropout", model=dataclasses.replace(SIZES, dropout=0.3)), "float64"
    ),
    "model, tied head": lambda: whole_model.compare_model(
        small("tied head", model=dataclasses.replace(SIZES, tied_head=True)), "float64"
    ),
    "whole_split": lambda: whole_model.rung_whole_split(True),
    "optimizer": _optimizer,
    "tiny_gradients": lambda: optimizer_rungs.rung_tiny_gradients(True),
    "clip": lambda: optimizer_rungs.rung_clip(True),
    "decay_mask": lambda: optimizer_rungs.rung_decay_mask(True),
    "schedules": lambda: optimizer_rungs.rung_schedules(True),
    "trajectory": lambda: trajectories.compare_float64(trajectories.cases(True)[0], twin=False),
    "initial_weights": lambda: randomness.rung_initial_weights(True),
    "dropout": lambda: randomness.rung_dropout(True),
    "text": lambda: randomness.rung_text(True),
    "g_test": lambda: randomness.rung_g_test(True),
    "conversion": lambda: files.rung_conversion(True),
    "resume_across": lambda: files.rung_resume_across(True),
    "gpt2": lambda: gpt2.rung_gpt2(True),
    "packing": lambda: packing.rung_packing(True),
    "packed documents": lambda: whole_model.compare_model(packing.documents_case(), "float64"),
    "devices": lambda: devices.compare_batch("jit", "float64"),
    "classification": lambda: classification.compare_batch("last_token", ("float64",)),
    "classification, mean": lambda: classification.compare_batch("mean", ("float64",)),
    "classification, accuracy": lambda: classification.compare_accuracy("last_token"),
    "gradient_report": lambda: inside.rung_gradient_report(True),
    "maps": lambda: inside.rung_maps(True),
    "early_stopping": lambda: inside.rung_early_stopping(True),
    "bfloat16": lambda: bfloat16.compare_casts(bfloat16.cases()[:4]),
}


def probe(rung: str) -> Row:
    """The worst row of one rung; what raises has failed with an infinite signal."""
    try:
        return max((row for row in PROBES[rung]() if not row.not_run), key=lambda row: row.signal)
    except Exception as e:
        return Row(RAISED, "any", rung, float("inf"), note=f"{type(e).__name__}: {str(e)[:80]}")
