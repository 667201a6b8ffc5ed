"""Operations, blocks and updates at sizes and configurations that nobody chose."""

import dataclasses

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxgpt.config import ModelConfig, TrainConfig
from parity_tests.cases import Case
from parity_tests.checks import ops, optimizer

few = settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def models(draw) -> ModelConfig:
    n_head = draw(st.integers(1, 5))
    return ModelConfig(
        n_layer=draw(st.integers(1, 3)),
        n_head=n_head,
        n_embd=n_head * draw(st.integers(1, 9)),
        block_size=draw(st.integers(1, 19)),
        gelu=draw(st.sampled_from(["erf", "tanh"])),
    )


@few
@given(models(), st.integers(1, 5), st.sampled_from(["layernorm", "linear", "mlp, GELU erf", "mlp, GELU tanh"]))
def test_dense_ops(model, n_rows, name):
    # A LayerNorm over one or two channels gives signs: its gradient is 0, and nothing is compared.
    model = dataclasses.replace(model, n_embd=model.n_embd + 3 * model.n_head) if name == "layernorm" else model
    check_op(model, n_rows, name)


@few
@given(models(), st.integers(1, 5), st.sampled_from(["attention", "embedding", "cross-entropy"]))
def test_other_ops(model, n_rows, name):
    # Of a single time step attention's query and key have no gradient.
    model = dataclasses.replace(model, block_size=model.block_size + 2) if name == "attention" else model
    check_op(model, n_rows, name)


def check_op(model: ModelConfig, n_rows: int, name: str) -> None:
    (op,) = (op for op in ops.ops(model, n_rows) if op.name == name)
    for row in ops.compare_op(op, ("float64",)):
        assert row.status == "passed", row


@pytest.mark.slow
@few
@given(models(), st.integers(1, 5))
def test_block(model, n_rows):
    model = dataclasses.replace(model, n_embd=model.n_embd + 3 * model.n_head)
    case = Case("drawn", TrainConfig(batch_size=n_rows, model=model))
    for row in ops.compare_block(case, ("float64",)):
        assert row.status == "passed", row


@pytest.mark.slow
@few
@given(
    st.sampled_from(["adamw", "sgd"]),
    st.floats(1e-5, 1e-2, allow_subnormal=False),
    st.floats(0, 0.99, allow_subnormal=False),
    st.floats(0.5, 0.9999, allow_subnormal=False),
    st.floats(0, 0.3, allow_subnormal=False),
    st.sampled_from(["all", "matrices"]),
    st.sampled_from([0.0, 0.1, 1.0, 10.0]),
    st.sampled_from(["constant", "cosine", "warmup-cosine"]),
    st.integers(1, 12),
)
def test_optimizer(kind, lr, beta1, beta2, decay, mask, clip, schedule, n_steps):
    config = TrainConfig(
        model=optimizer.TINY,
        optimizer=kind,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        momentum=beta1 if kind == "sgd" else 0.0,
        weight_decay=decay,
        decay_mask=mask,
        clip=clip,
        schedule=schedule,
        warmup_steps=3 if schedule == "warmup-cosine" else 0,
        steps=10,
    )
    case = optimizer.case_of("drawn", config)
    for row in optimizer.compare_optimizer(case, (n_steps,), low_precision=False):
        assert row.status == "passed", row
