"""The training step: microbatches, the mean over all of them, and what a step returns."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt.config import ModelConfig, TrainConfig
from jaxgpt.model.gpt import Numerics
from jaxgpt.objective import LanguageModelingObjective
from jaxgpt.train_step import SINGLE_DEVICE, TrainState, accumulate, init_state, microbatch_rows, train_step

CONFIG = TrainConfig(batch_size=6, clip=0.1, model=ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8))
OBJECTIVE = LanguageModelingObjective(CONFIG, 50, Numerics())


@partial(jax.jit, static_argnums=0, static_argnames="microbatch_tokens")
def step_of(objective, state, batch, microbatch_tokens=None):
    return train_step(objective, state, batch, SINGLE_DEVICE._replace(microbatch_tokens=microbatch_tokens))


@pytest.fixture(scope="module")
def state() -> TrainState:
    return init_state(OBJECTIVE)


@pytest.fixture(scope="module")
def batch():
    window_BT = np.random.default_rng(0).integers(0, 50, (6, 9))
    return jnp.asarray(window_BT[:, :-1]), jnp.asarray(window_BT[:, 1:])


def test_microbatches_divide_the_rows():
    found = {(16, 128): 1, (6, 64): 2, (16, 24): 4, (3, 1024): 1, (5, 8): 5, (31, 64): 1}
    found |= {(7, 32): 7, (31, 8): 31, (62, 8): 31}  # one row at a time would be slower
    assert {shape: microbatch_rows(*shape, 128) for shape in found} == found
    assert microbatch_rows(16, 128, None) == 16


def test_accumulation_adds_up_every_row_once():
    rows_BT = jnp.arange(12.0).reshape(6, 2)
    for microbatch_tokens in (None, 2, 4, 6):
        total, count = accumulate(lambda x, absent: (x.sum(0), jnp.size(x)), (rows_BT, None), microbatch_tokens)
        np.testing.assert_array_equal(total, rows_BT.sum(0))
        assert count == 12


def test_a_step_over_microbatches_is_that_of_the_whole_batch(state, batch):
    """float32: sums in another order, a few units in the last place."""
    whole_state, whole = step_of(OBJECTIVE, state, batch)
    parts_state, parts = step_of(OBJECTIVE, state, batch, microbatch_tokens=16)
    assert parts.loss == pytest.approx(float(whole.loss), rel=1e-6)
    assert parts.grad_norm == pytest.approx(float(whole.grad_norm), rel=1e-5)
    for name, grad in whole.grads.items():
        np.testing.assert_allclose(parts.grads[name], grad, atol=1e-6 * float(whole.grad_norm), err_msg=name)
    assert parts_state.step == whole_state.step == 1


def test_a_step_applies_the_updates_that_it_returns(state, batch):
    new, result = step_of(OBJECTIVE, state, batch)
    for name, p in state.params.items():
        np.testing.assert_allclose(new.params[name], p + result.updates[name], atol=1e-7)
    assert result.grad_norm == pytest.approx(float(optax.tree.norm(result.grads)), rel=1e-6)
    assert result.grad_norm > CONFIG.clip  # it is the norm before the clip


def test_the_gradient_is_that_of_the_mean_loss(state, batch):
    def mean_loss(params):
        loss_sum, count = OBJECTIVE.loss_sum(params, *batch, None)
        return loss_sum / count

    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(state.params)
    _, result = step_of(OBJECTIVE, state, batch)
    assert result.loss == pytest.approx(float(loss), rel=1e-6)
    for name, grad in grads.items():
        np.testing.assert_allclose(result.grads[name], grad, atol=1e-6, err_msg=name)
