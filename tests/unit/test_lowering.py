"""The step as lowered for accelerators, which this machine need not have: dtypes, attention, donation, barriers."""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from jaxgpt import parallel
from jaxgpt.config import ModelConfig, TrainConfig
from jaxgpt.objective import LanguageModelingObjective
from jaxgpt.train_step import SINGLE_DEVICE, state_before_training, train_step

H100 = types.SimpleNamespace(platform="cuda", compute_capability="9.0")
TPU = types.SimpleNamespace(platform="tpu")
CONFIG = TrainConfig(batch_size=2, model=ModelConfig(n_layer=2, n_head=2, n_embd=128, block_size=128))
DOT = re.compile(r"stablehlo\.dot_general .*: \(tensor<\S*x(\w+)>, tensor<\S*x(\w+)>\) -> tensor<\S*x(\w+)>")


@pytest.fixture
def lowered(monkeypatch):
    """A training step's StableHLO for a device, with and without names."""
    # The version is asked of the process's own cuDNN; nothing is built or run here.
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)

    def lower(device, **fields):
        config = dataclasses.replace(CONFIG, **fields)
        objective = LanguageModelingObjective(config, 300, parallel.numerics(config, device))
        state = jax.eval_shape(lambda params: state_before_training(objective, params), objective.param_shapes)
        batch = (jax.ShapeDtypeStruct((2, 128), jnp.int32),) * 2
        step = jax.jit(lambda state, *batch: train_step(objective, state, batch, SINGLE_DEVICE), donate_argnums=0)
        lowering = step.trace(state, *batch).lower(lowering_platforms=(device.platform,))
        return lowering.as_text(), len(jax.tree.leaves(state))

    return lower


@pytest.mark.parametrize("device", [H100, TPU], ids=["H100", "TPU"])
def test_every_product_takes_bfloat16(lowered, device):
    text, _ = lowered(device)
    operands = [(a, b) for a, b, _ in DOT.findall(text)]
    assert len(operands) == text.count("stablehlo.dot_general") > 20
    written_out = [pair for pair in operands if pair != ("bf16", "bf16")]
    # On a TPU the attention is written out: its softmax is float32, and two products a layer of its backward pass take
    # the gradient of the float32 scores.
    assert len(written_out) == (0 if device is H100 else 2 * CONFIG.model.n_layer), written_out


@pytest.mark.parametrize("fields", [{}, {"remat": "block"}], ids=["as it is", "recomputed"])
def test_cudnn_attention_runs_in_every_layer_forward_and_backward(lowered, fields):
    text, _ = lowered(H100, **fields)
    n_layer = CONFIG.model.n_layer
    forward = len(re.findall(r"@__cudnn\$fmhaSoftmax\(", text))
    backward = len(re.findall(r"@__cudnn\$fmhaSoftmaxBackward\(", text))
    assert (forward, backward) == (n_layer * (2 if fields else 1), n_layer)


@pytest.mark.parametrize("device", [H100, TPU], ids=["H100", "TPU"])
def test_no_barrier_for_a_cpu_and_no_callback_is_left(lowered, device):
    """But for the branches that only a CPU takes, which XLA removes: the index of the branch is a constant."""
    text, _ = lowered(device)
    assert "optimization_barrier" not in text
    assert "callback" not in text and "infeed" not in text and "outfeed" not in text


@pytest.mark.parametrize("device", [H100, TPU], ids=["H100", "TPU"])
def test_all_state_is_donated(lowered, device):
    text, n_arrays = lowered(device)
    assert len(re.findall(r"tf\.aliasing_output|jax\.buffer_donor", text)) == n_arrays
