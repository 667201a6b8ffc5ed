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
from jaxgpt.train_step import SINGLE_DEVICE, state_shapes, train_step

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
        end_of_text = 299 if config.within_documents else None
        objective = LanguageModelingObjective(config, 300, parallel.numerics(config, device), end_of_text)
        state = state_shapes(objective)
        batch = (jax.ShapeDtypeStruct((2, config.n_time), jnp.int32),) * 2
        step = jax.jit(lambda state, *batch: train_step(objective, state, batch, SINGLE_DEVICE), donate_argnums=0)
        lowering = step.trace(state, *batch).lower(lowering_platforms=(device.platform,))
        return lowering.as_text(), len(jax.tree.leaves(state))

    return lower


ODD = dataclasses.replace(CONFIG.model, block_size=65)  # for which there is no kernel on a TPU


@pytest.mark.parametrize(
    ("device", "fields"),
    [
        (H100, {}),
        pytest.param(H100, {"packing": "documents", "tokenizer": "gpt2"}, marks=pytest.mark.slow),
        (H100, {"packing": "documents", "tokenizer": "gpt2", "model": ODD}),
        (TPU, {}),
        pytest.param(TPU, {"packing": "documents", "tokenizer": "gpt2"}, marks=pytest.mark.slow),
        (TPU, {"model": ODD}),
    ],
    ids=["H100", "H100 documents", "H100 written out", "TPU", "TPU documents", "TPU written out"],
)
def test_every_product_takes_bfloat16(lowered, device, fields):
    text, _ = lowered(device, **fields)
    products = list(DOT.finditer(text))
    assert len(products) == text.count("stablehlo.dot_general") > 20
    wider = [match.group() for match in products if match.groups()[:2] != ("bf16", "bf16")]
    # The backward pass of splash attention sums the rows of an elementwise product; XLA compiles no matrix product.
    row_sum = "batching_dims = [0, 1, 2] x [0, 1, 2], contracting_dims = [3] x [3]"
    assert [product for product in wider if row_sum not in product] == []


def runs(text: str, custom_call: str) -> int:
    """How often the program runs a custom call: the layers share private functions."""
    functions = {re.search(r"@(\w+)", part)[1]: part for part in text.split("func.func ")[1:]}

    def called(name: str) -> int:
        if name == "main":
            return 1
        return sum(
            len(re.findall(rf"\bcall @{name}\(", part)) * called(caller)
            for caller, part in functions.items()
            if f"call @{name}(" in part
        )

    return sum(len(re.findall(custom_call, part)) * called(name) for name, part in functions.items())


@pytest.mark.parametrize(
    "fields",
    [{}, {"remat": "block"}, {"packing": "documents", "tokenizer": "gpt2"}],
    ids=["as it is", "recomputed", "packed documents"],
)
@pytest.mark.parametrize(
    ("device", "forward", "backward"),
    [
        (H100, r"@__cudnn\$fmha(ScaleBias)?Softmax\(", r"@__cudnn\$fmha(ScaleBias)?SoftmaxBackward\("),
        (TPU, r"@tpu_custom_call\(.*splash_mha_fwd", r"@tpu_custom_call\(.*splash_mha_dkv"),
    ],
    ids=["cuDNN", "splash"],
)
def test_a_kernel_computes_attention_in_every_layer_forward_and_backward(lowered, device, forward, backward, fields):
    text, _ = lowered(device, **fields)
    counts = runs(text, forward), runs(text, backward)
    n_layer = CONFIG.model.n_layer
    assert counts == (n_layer * (2 if "remat" in fields else 1), n_layer)


@pytest.mark.parametrize("device", [H100, TPU], ids=["H100", "TPU"])
def test_no_barrier_for_a_cpu_and_no_callback_is_left(lowered, device):
    """But for the branches that only a CPU takes, which XLA removes: the index of the branch is a constant."""
    text, _ = lowered(device)
    # One a layer stands before the bfloat16 from which the backward pass recomputes GELU.
    barriers = re.findall(r"optimization_barrier .* : (.*)", text)
    assert barriers == ["tensor<256x512xbf16>"] * CONFIG.model.n_layer
    assert "callback" not in text and "infeed" not in text and "outfeed" not in text


@pytest.mark.parametrize("device", [H100, TPU], ids=["H100", "TPU"])
def test_all_state_is_donated(lowered, device):
    text, n_arrays = lowered(device)
    assert len(re.findall(r"tf\.aliasing_output|jax\.buffer_donor", text)) == n_arrays
