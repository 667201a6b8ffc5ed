"""The checks at their smallest: what is run on a mutant."""

import dataclasses
from collections.abc import Iterator

from jaxgpt.parity.harness import Row
from jaxgpt.parity.mutants import Probe
from parity_tests.cases import SIZES, small
from parity_tests.checks import (
    bfloat16,
    classification,
    data,
    devices,
    files,
    gpt2,
    inside,
    kernels,
    ops,
    packing,
    randomness,
    trajectories,
    whole_model,
)
from parity_tests.checks import optimizer as optimizer_checks


def _optimizer() -> Iterator[Row]:
    configurations = optimizer_checks.configurations()
    for name in ("b2 0.999, decay matrices", "warm-up and cosine", "Adam, decay in the gradient", "SGD, momentum"):
        yield from optimizer_checks.compare_optimizer(optimizer_checks.case_of(name, configurations[name]), (1, 2))


PROBES: dict[str, Probe] = {
    "ops": lambda: (row for op in ops.ops() for row in ops.compare_op(op, ("float64",))),
    "ops float32": lambda: (row for op in ops.ops()[:3] for row in ops.compare_op(op, ("float32",))),
    "out_of_range": lambda: ops.check_out_of_range(True),
    "splash attention": lambda: kernels.check_splash_attention(True),
    "block": lambda: ops.compare_block(small("block"), ("float64",)),
    "model": lambda: whole_model.compare_model(small("small"), "float64"),
    "model, dropout": lambda: whole_model.compare_model(
        small("dropout", model=dataclasses.replace(SIZES, dropout=0.3)), "float64"
    ),
    "model, attention dropout": lambda: whole_model.compare_model(
        small("attention dropout", model=whole_model.ATTENTION_DROPOUT), "float64"
    ),
    "model, tied head": lambda: whole_model.compare_model(
        small("tied head", model=dataclasses.replace(SIZES, tied_head=True)), "float64"
    ),
    "whole_split": lambda: whole_model.check_whole_split(True),
    "optimizer": _optimizer,
    "tiny_gradients": lambda: optimizer_checks.check_tiny_gradients(True),
    "clip": lambda: optimizer_checks.check_clip(True),
    "decay_mask": lambda: optimizer_checks.check_decay_mask(True),
    "schedules": lambda: optimizer_checks.check_schedules(True),
    "trajectory": lambda: trajectories.compare_float64(trajectories.cases(True)[0], perturbed=False),
    "initial_weights": lambda: randomness.check_initial_weights(True),
    "dropout": lambda: randomness.check_dropout(True),
    "text": lambda: randomness.check_text(True),
    "g_test": lambda: randomness.check_g_test(True),
    "conversion": lambda: files.check_conversion(True),
    "resume_across": lambda: files.check_resume_across(True),
    "gpt2": lambda: gpt2.check_gpt2(True),
    "packing": lambda: packing.check_packing(True),
    "data": lambda: data.check_data(True),
    "packed documents": lambda: whole_model.compare_model(packing.documents_case(), "float64"),
    "devices": lambda: devices.compare_batch("jit", "float64"),
    "sharded state": lambda: devices.compare_updates(devices.FSDP),
    "classification": lambda: classification.compare_batch("last_token", ("float64",)),
    "classification, mean": lambda: classification.compare_batch("mean", ("float64",)),
    "classification, accuracy": lambda: classification.compare_accuracy("last_token"),
    "gradient_report": lambda: inside.check_gradient_report(True),
    "maps": lambda: inside.check_maps(True),
    "early_stopping": lambda: inside.check_early_stopping(True),
    "bfloat16": lambda: bfloat16.compare_casts(bfloat16.cases()[:4]),
}
