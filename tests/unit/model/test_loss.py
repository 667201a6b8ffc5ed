"""Cross-entropy as sum and count, the chunked loss, perplexity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.model.loss import cross_entropy, head_cross_entropy, mean_of_batches, perplexity

VOCAB = 7


def test_loss_is_sum_and_count():
    draw = np.random.default_rng(0)
    logits_NV, target_N = draw.standard_normal((5, VOCAB)).astype(np.float32), np.array([0, 6, 3, 3, 1])
    p = np.exp(logits_NV.astype(float))
    expected = -np.log(p[range(5), target_N] / p.sum(axis=1))
    total, count = cross_entropy(jnp.asarray(logits_NV), jnp.asarray(target_N))
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-6)
    assert count == 5
    weight = jnp.array([1, 0, 1, 1, 0])
    total, count = cross_entropy(jnp.asarray(logits_NV), jnp.asarray(target_N), weight)
    np.testing.assert_allclose(total, expected[[0, 2, 3]].sum(), rtol=1e-6)
    assert count == 3


def test_perplexity():
    assert perplexity(1.0) == np.e and perplexity(1e4) == np.inf
    assert mean_of_batches(np.array([[6.0, 3], [2.0, 2]])) == 1.5


def test_a_target_outside_the_vocabulary_gives_nan():
    logits_NV = jnp.zeros((2, VOCAB))
    assert np.isnan(cross_entropy(logits_NV, jnp.asarray([0, VOCAB]))[0])
    assert np.isnan(cross_entropy(logits_NV, jnp.asarray([0, -1]))[0])


@pytest.mark.parametrize("chunk_logits, head_multiple", [(1, 1), (2 * VOCAB * 3, 4), (10**6, 128)])
def test_the_chunked_loss_and_its_gradients_are_those_of_all_logits(chunk_logits, head_multiple):
    """float32: chunks add up in another order, a few units in the last place."""
    draw = np.random.default_rng(0)
    x_BTC, head_CV = (jnp.asarray(draw.standard_normal(s), jnp.float32) for s in ((2, 5, 3), (3, VOCAB)))
    target_BT = jnp.asarray(draw.integers(0, VOCAB, (2, 5)))
    weight_BT = jnp.asarray(draw.integers(0, 2, (2, 5)))

    def chunked(x_BTC, head_CV):
        options = dict(compute_dtype=jnp.float32, chunk_logits=chunk_logits, head_multiple=head_multiple)
        return head_cross_entropy(x_BTC, head_CV, target_BT, weight_BT, **options)

    def whole(x_BTC, head_CV):
        return cross_entropy((x_BTC @ head_CV).reshape(-1, VOCAB), target_BT.reshape(-1), weight_BT.reshape(-1))

    (loss, count), grads = jax.value_and_grad(chunked, (0, 1), has_aux=True)(x_BTC, head_CV)
    (true_loss, true_count), true_grads = jax.value_and_grad(whole, (0, 1), has_aux=True)(x_BTC, head_CV)
    assert count == true_count and loss == pytest.approx(float(true_loss), rel=1e-6)
    for grad, true_grad in zip(grads, true_grads, strict=True):
        np.testing.assert_allclose(grad, true_grad, atol=1e-6)
