"""Schedules at every corner, the decay mask by name, the clip, SGD."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.config import TrainConfig
from jaxgpt.optimizer import SkipState, decay_mask, learning_rate, make_optimizer, optax_schedule

PARAMS = {
    "token_emb.embedding": jnp.ones((3, 2)),
    "blocks.0.ln1.scale": jnp.ones(2),
    "blocks.0.attn.Wq.kernel": jnp.ones((2, 2)),
    "blocks.0.attn.Wq.bias": jnp.ones(2),
    "ln_f.bias": jnp.ones(2),
}


def test_cosine_falls_from_lr_to_min_lr():
    config = TrainConfig(schedule="cosine", steps=100, lr=3e-4, min_lr=3e-5)
    assert learning_rate(config, 0) == 3e-4
    assert learning_rate(config, 50) == pytest.approx((3e-4 + 3e-5) / 2, rel=1e-15)
    assert [learning_rate(config, s) for s in (100, 101, 5000)] == [3e-5] * 3


def test_warmup_cosine_is_the_documented_one():
    """Section 3 of docs/loops.md: 3e-4 s/200 (0 at step 0), cosine to 3e-5 at 2000, 3e-5 after."""
    config = TrainConfig(schedule="warmup-cosine", steps=5000, warmup_steps=200, decay_steps=2000, min_lr=3e-5)
    for step in range(0, 2100):
        if step < 200:
            expected = 3e-4 * step / 200
        elif step < 2000:
            expected = 3e-5 + 0.5 * (3e-4 - 3e-5) * (1 + math.cos(math.pi * (step - 200) / 1800))
        else:
            expected = 3e-5
        assert learning_rate(config, step) == pytest.approx(expected, rel=1e-15), step


@pytest.mark.parametrize("schedule", ["constant", "cosine", "warmup-cosine"])
def test_the_device_sees_the_same_rate(schedule):
    flags = {"warmup_steps": 7} if schedule == "warmup-cosine" else {}
    config = TrainConfig(schedule=schedule, steps=30, **flags)
    on_device = jax.jit(optax_schedule(config)) if schedule != "constant" else optax_schedule(config)
    for step in range(33):
        assert np.float32(on_device(jnp.int32(step))) == np.float32(learning_rate(config, step)), step


def test_masks():
    assert all(decay_mask(PARAMS, "all").values())
    decayed = [name for name, yes in decay_mask(PARAMS, "matrices").items() if yes]
    assert decayed == ["token_emb.embedding", "blocks.0.attn.Wq.kernel"]


def first_update(**fields):
    tx = make_optimizer(TrainConfig(lr=0.1, **fields))
    grads = jax.tree.map(lambda p: jnp.full_like(p, 2.0), PARAMS)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    return {name: float(u.ravel()[0]) for name, u in updates.items()}


def test_adamw_decays_what_the_mask_names():
    """To 1e-5: optax's bias correction 1 - 0.999 keeps five digits in float32; PyTorch has it in double."""
    updates = first_update(weight_decay=0.5, decay_mask="matrices")
    assert updates["blocks.0.attn.Wq.kernel"] == pytest.approx(-0.1 - 0.1 * 0.5, rel=1e-5)
    assert updates["blocks.0.attn.Wq.bias"] == pytest.approx(-0.1, rel=1e-5)


def test_sgd_adds_decay_to_the_gradient_as_torch_does():
    updates = first_update(optimizer="sgd", weight_decay=0.5, decay_mask="matrices")
    assert updates["blocks.0.attn.Wq.kernel"] == pytest.approx(-0.1 * 2.5, rel=1e-6)
    assert updates["ln_f.bias"] == pytest.approx(-0.1 * 2.0, rel=1e-6)


def test_adam_adds_decay_to_the_gradient_as_torch_does():
    """Adam's first step is the rate whatever the gradient's size: a decay shows only in where the gradient is 0."""
    tx = make_optimizer(TrainConfig(optimizer="adam", lr=0.1, weight_decay=0.5, decay_mask="matrices"))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, PARAMS), tx.init(PARAMS), PARAMS)
    assert float(updates["blocks.0.attn.Wq.kernel"].ravel()[0]) == pytest.approx(-0.1, rel=1e-5)
    assert float(updates["ln_f.bias"][0]) == 0


def test_clip_scales_the_whole_gradient_to_the_limit():
    n = sum(p.size for p in PARAMS.values())
    updates = first_update(optimizer="sgd", clip=1.0)
    assert all(u == pytest.approx(-0.1 / math.sqrt(n), rel=1e-6) for u in updates.values())
    assert first_update(optimizer="sgd", clip=1e3) == first_update(optimizer="sgd")


def test_momentum_accumulates():
    tx = make_optimizer(TrainConfig(optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=0.0))
    state = tx.init(PARAMS)
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    for expected in (-0.1, -0.19, -0.271):
        updates, state = tx.update(grads, state, PARAMS)
        assert float(updates["ln_f.bias"][0]) == pytest.approx(expected, rel=1e-6)


SKIPPING = TrainConfig(lr=0.1, on_nonfinite="skip", skip_spikes=4.0)
N_PARAMS = sum(p.size for p in PARAMS.values())


def grads_of_norm(norm):
    return jax.tree.map(lambda p: jnp.full_like(p, norm / math.sqrt(N_PARAMS)), PARAMS)


@pytest.mark.parametrize(
    "loss, norm", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf), (1.0, 1e25)]
)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_step_that_is_not_finite_changes_nothing(optimizer, loss, norm):
    """A norm of 1e25 overflows in its sum of squares. Minus zero stays minus zero."""
    tx = make_optimizer(TrainConfig(lr=0.1, optimizer=optimizer, on_nonfinite="skip"))
    params = {**PARAMS, "ln_f.bias": jnp.array([-0.0, 0.0])}
    _, state = tx.update(grads_of_norm(1.0), tx.init(params), params, value=jnp.float32(1))
    updates, after = jax.jit(tx.update)(grads_of_norm(norm), state, params, value=jnp.float32(loss))
    for name, p in params.items():
        assert (p + updates[name]).tobytes() == p.tobytes(), name
    jax.tree.map(np.testing.assert_array_equal, after.optimizer, state.optimizer)
    assert (after.applied, after.skipped, after.in_a_row, after.norm_mean) == (1, 1, 1, state.norm_mean)
    _, again = tx.update(grads_of_norm(1.0), after, params, value=jnp.float32(1))
    assert (again.applied, again.skipped, again.in_a_row) == (2, 1, 0)


def test_spikes_are_skipped_by_the_running_mean():
    """The mean by its definition, in Python; 5 is above 4 times the mean, but only from the 26th applied update on."""
    tx = make_optimizer(SKIPPING)
    update = jax.jit(lambda norm, state: tx.update(grads_of_norm(norm), state, PARAMS, value=jnp.float32(1))[1])
    state, norms, mean = tx.init(PARAMS), [], None
    draw = np.random.default_rng(0)
    for step in range(60):
        norm = 5.0 if step in (10, 40, 41, 55) else draw.uniform(0.5, 1.0)
        before, state = state, update(norm, state)
        if norm == 5.0 and step > 10:
            assert state.in_a_row == before.in_a_row + 1 and state.norm_mean == before.norm_mean
            continue
        norms.append(norm)
        mean = np.mean(norms) if len(norms) <= 25 else 0.97 * mean + 0.03 * norm
        assert state.in_a_row == 0 and state.norm_mean == pytest.approx(mean, rel=1e-5)
    assert (state.applied, state.skipped) == (57, 3)


def test_a_loss_that_is_not_finite_is_no_spike():
    tx = make_optimizer(TrainConfig(skip_spikes=4.0))
    _, state = tx.update(grads_of_norm(1.0), tx.init(PARAMS), PARAMS, value=jnp.float32(math.nan))
    assert state.applied == 1


def test_the_state_of_a_default_optimizer_counts_no_skips():
    assert not isinstance(make_optimizer(TrainConfig()).init(PARAMS), SkipState)
