"""Our step on the accelerator that is here, in float32 and as the trainer computes it in bfloat16.

On a GPU PyTorch computes on it too: float32 without TF32, and bfloat16 with cuDNN's attention where it is allowed. A
TPU is held against PyTorch on the CPU.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxgpt import parallel
from jaxgpt.interop.torch_names import to_torch
from jaxgpt.objective import LanguageModelingObjective
from jaxgpt.parity.harness import Row, own_errors
from jaxgpt.parity.jax_side import precision_of
from jaxgpt.presets import PRESETS
from jaxgpt.train_step import SINGLE_DEVICE, TrainState, train_step
from parity_tests.cases import BATCH, Case, Results, flax_params, flax_results, torch_results
from parity_tests.tolerances import ratio_row, row

CASES = {  # by platform: the precision and the case of the rows
    "GPU": (("float32, GPU", "float32, TF32 off"), ("bfloat16, GPU", "bfloat16, cuDNN attention")),
    "TPU": (("float32, TPU", "float32, full precision"), ("bfloat16, TPU", "bfloat16, splash attention")),
}


def why_not(kind: str) -> str:
    """Why the rows of a kind of accelerator cannot run here; empty if they can."""
    if jax.default_backend() != kind.lower():
        return f"JAX has no {kind} here"
    return "" if kind == "TPU" or torch.cuda.is_available() else "PyTorch has no GPU here"


def check_accelerator(quick: bool) -> Iterator[Row]:
    """Logits, and the worst tensor's gradient, on the accelerator against the float64 truth of the CPU."""
    kind = "TPU" if jax.default_backend() == "tpu" else "GPU"
    if reason := why_not(kind):
        for precision, name in CASES[kind]:
            yield row(f"{kind} logits", precision, name, note=reason, not_run=True)
        return
    case = Case("minigpt", dataclasses.replace(PRESETS["minigpt"], batch_size=BATCH), 65)
    truth = torch_results(case, "float64")
    torch.backends.cuda.matmul.allow_tf32 = False
    for (precision, name), dtype in zip(CASES[kind], ("float32", "bfloat16"), strict=True):
        theirs = torch_results(case, dtype, device="cuda" if kind == "GPU" else "cpu")
        with precision_of(dtype):
            ours = flax_results(case, dtype) if dtype == "float32" else _as_the_trainer(case)
        yield ratio_row(
            f"{kind} logits", precision, name, lambda o=ours, t=theirs: own_errors(o.logits, t.logits, truth.logits)
        )
        compared = [n for n in truth.grads if not n.endswith("Wk.bias")]
        flat = [np.concatenate([r.grads[n].ravel() for n in compared]) for r in (ours, theirs, truth)]
        yield ratio_row(f"{kind} gradients", precision, name, lambda flat=flat: own_errors(*flat, floor=1e-10))


def _as_the_trainer(case: Case) -> Results:
    """bfloat16 with the attention that the trainer would choose on this machine."""
    config = dataclasses.replace(case.config, dtype="bfloat16")
    objective = LanguageModelingObjective(config, case.vocab_size, parallel.numerics(config))

    @jax.jit
    def compute(params: dict[str, jax.Array], idx_BT: jax.Array, target_BT: jax.Array) -> tuple:
        logits_BTV = objective.model(params)(idx_BT)
        state = TrainState(jnp.int32(0), params, objective.optimizer.init(params))
        _, result = train_step(objective, state, (idx_BT, target_BT), SINGLE_DEVICE)
        return logits_BTV, result.loss, result.grads

    logits, loss, grads = compute(flax_params(case, objective), *map(jnp.asarray, case.batch(0)))
    return Results(np.asarray(logits), float(loss), to_torch(grads))
