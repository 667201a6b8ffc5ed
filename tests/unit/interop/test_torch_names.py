"""Tensor names and layouts: GPT-2's names, and the optimizer's step."""

import jax
import numpy as np
import optax
import pytest

from jaxgpt.config import TrainConfig
from jaxgpt.errors import UserError
from jaxgpt.interop import torch_names
from jaxgpt.optimizer import make_optimizer


def gpt2_weights(conv1d: bool, prefix: str) -> dict[str, np.ndarray]:
    """One block's weights under GPT-2's names, C = 4; every value is different."""
    C, draw = 4, np.random.default_rng(0)

    def matrix(n_in: int, n_out: int) -> np.ndarray:
        p = draw.standard_normal((n_in, n_out)).astype(np.float32)
        return p if conv1d else np.ascontiguousarray(p.T)

    shapes = {"attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C), "mlp.c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C)}
    weights = {f"transformer.h.0.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
    weights |= {f"transformer.h.0.{name}.bias": np.arange(n_out) for name, (_, n_out) in shapes.items()}
    for name in ("h.0.ln_1", "h.0.ln_2", "ln_f"):
        weights |= {f"transformer.{name}.{part}": np.ones(C) for part in ("weight", "bias")}
    weights["transformer.wte.weight"] = weights["lm_head.weight"] = draw.standard_normal((7, C))
    weights["transformer.wpe.weight"] = draw.standard_normal((5, C))
    weights["transformer.h.0.attn.bias"] = np.ones((1, 1, 5, 5))  # the causal mask, a buffer
    return {prefix + name: p for name, p in weights.items()}


def test_gpt2_names():
    theirs = torch_names.tutorial_names(gpt2_weights(True, ""))
    nanogpt = torch_names.tutorial_names(gpt2_weights(False, "_orig_mod."))
    assert set(theirs) == set(nanogpt) and "lm_head.weight" not in theirs and len(theirs) == 2 + 16 + 2
    for name, p in theirs.items():
        np.testing.assert_array_equal(nanogpt[name], p)
    fused = gpt2_weights(True, "")["transformer.h.0.attn.c_attn.weight"]
    np.testing.assert_array_equal(theirs["blocks.0.attn.Wk.weight"], fused[:, 4:8].T)
    np.testing.assert_array_equal(theirs["blocks.0.attn.Wv.bias"], np.arange(8, 12))
    untied = gpt2_weights(True, "") | {"lm_head.weight": np.ones((7, 4))}
    assert "lm_head.weight" in torch_names.tutorial_names(untied)


@pytest.mark.parametrize("step", [[1, 2], 1.5, -1, True])
def test_the_step_must_be_one_whole_number(step):
    like = optax.ScaleByScheduleState(np.int32(0))
    with pytest.raises(UserError, match="one whole number of updates is needed"):
        torch_names.optimizer_from_torch({"step": np.array(step)}, like)


def test_counts_of_skipped_updates_stay_on_this_side():
    """PyTorch's state has no place for them; the updates applied are the step."""
    config, params = TrainConfig(on_nonfinite="skip"), {"ln_f.bias": np.ones(2, np.float32)}
    tx = make_optimizer(config)
    _, state = tx.update({"ln_f.bias": np.float32([1, 2])}, tx.init(params), params, value=np.float32(1))
    _, state = tx.update({"ln_f.bias": np.float32([np.inf, 2])}, state, params, value=np.float32(1))
    tensors = torch_names.optimizer_to_torch(state)
    assert set(tensors) == {"step", "exp_avg.ln_f.bias", "exp_avg_sq.ln_f.bias"} and tensors["step"] == 1
    back = torch_names.optimizer_from_torch(tensors, state)
    jax.tree.map(np.testing.assert_array_equal, back.optimizer, state.optimizer)
    assert (back.applied, back.skipped, back.in_a_row, back.norm_mean) == (0, 0, 0, 0)
