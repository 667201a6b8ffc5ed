"""The objectives' losses."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import parallel
from jaxgpt.config import FinetuneConfig, ModelConfig, TrainConfig
from jaxgpt.data.sampler import PADDING, documents
from jaxgpt.model.gpt import Numerics
from jaxgpt.objective import ClassificationObjective, LanguageModelingObjective

SMALL = TrainConfig(batch_size=4, model=ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=12))


def test_packed_documents_are_as_each_alone():
    """Logits of two documents in one window are those of each by itself, and what follows an end does not count."""
    config = dataclasses.replace(SMALL, packing="documents", tokenizer="gpt2", dtype="float64", batch_size=1)
    with jax.enable_x64(True):
        objective = LanguageModelingObjective(config, 50, parallel.numerics(config), end_of_text=49)
        params = objective.init_params()
        first, second = np.array([[3, 1, 4, 49]]), np.array([[5, 9, 2, 6, 5, 49]])
        both = np.concatenate([first, second], 1)
        logits = jax.jit(lambda *batch: objective.model(params)(*batch))
        packed = logits(both, None, *documents(both, 49))
        alone = np.concatenate([logits(idx) for idx in (first, second)], 1)
        np.testing.assert_allclose(packed, alone, atol=1e-15)  # a few units in the last place of logits of 0.1
        target = np.roll(both, -1, 1)
        loss, count = jax.jit(objective.loss_sum)(params, both, target, None)
        nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(alone)), target[..., None], -1)[0, :, 0]
        assert count == 8 and loss == pytest.approx(nll[both[0] != 49].sum(), rel=1e-14)


def test_padding_labels_count_nothing():
    config = FinetuneConfig(batch_size=3, max_tokens=5, model=SMALL.model)
    objective = ClassificationObjective(config, 50, Numerics(), n_classes=2)
    params = objective.init_params()
    idx_BT = jnp.asarray([[1, 2, 3, PADDING, PADDING], [4, 5, PADDING, PADDING, PADDING], [6, 7, 8, 9, 10]])
    loss_sum = jax.jit(partial(objective.loss_sum, params))
    two, count = loss_sum(idx_BT, jnp.asarray([0, 1, PADDING]), None)
    alone = sum(loss_sum(idx_BT[i : i + 1], jnp.asarray([i]), None)[0] for i in (0, 1))
    assert count == 2 and two == pytest.approx(float(alone), rel=1e-6)


def test_dropout_keys_belong_to_rows():
    dropout = dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, dropout=0.1))
    objective = LanguageModelingObjective(dropout, 50, Numerics())
    keys = jax.random.key_data(objective.dropout_keys(jnp.int32(3)))
    half = jax.random.key_data(objective.dropout_keys(jnp.int32(3), lambda rows_B: rows_B[2:]))
    np.testing.assert_array_equal(half, keys[2:])
    assert len({tuple(key) for key in keys.tolist()}) == 4
    assert LanguageModelingObjective(SMALL, 50, Numerics()).dropout_keys(jnp.int32(3)) is None
