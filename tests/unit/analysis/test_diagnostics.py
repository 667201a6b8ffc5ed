"""Diagnostics: the verdicts on gradients, surprisal, and attention maps of a trained model."""

import json

import numpy as np
import pytest

from jaxgpt.analysis import diagnostics
from jaxgpt.analysis.diagnostics import Flow
from jaxgpt.runs.restore import restore_language_model


@pytest.mark.parametrize(
    "mean_abs, verdict",
    [
        (1e-4, "healthy"),
        (0.9e-8, "vanishing"),
        (0.0, "vanishing"),
        (1.1, "exploding"),
        (float("inf"), "exploding"),
        (float("nan"), "exploding"),
    ],
)
def test_the_verdict_is_by_the_mean(mean_abs, verdict):
    assert Flow("lm_head.kernel", (3,), mean_abs, mean_abs, 1e-3).verdict == verdict


@pytest.mark.parametrize(
    "mean_abs, verdict",
    [(0.0, "zero by design"), (1.1, "exploding"), (float("inf"), "exploding"), (float("nan"), "exploding")],
)
def test_the_verdict_on_a_keys_bias(mean_abs, verdict):
    assert Flow("blocks.0.attn.Wk.bias", (3,), mean_abs, mean_abs, 1e-3).verdict == verdict


def test_a_record_has_no_number_that_json_lacks():
    flows = [Flow("ln_f.bias", (3,), float("nan"), float("nan"), float("inf"))]
    record = json.loads(json.dumps(diagnostics.record(7, flows), allow_nan=False))
    assert record["exploding"] == ["ln_f.bias"] and record["tensors"]["ln_f.bias"]["mean_abs"] is None


@pytest.fixture(scope="module")
def restored(trained):
    return restore_language_model(trained, "result")


@pytest.fixture(scope="module")
def ids_T(restored, text):
    return restored.run.tokenizer.encode(text[:16])


def test_the_mean_surprisal_is_the_loss(restored, ids_T):
    _, executor, state = restored
    result = diagnostics.token_probabilities(executor.objective, state.params, ids_T)
    total, count = executor.objective.loss_sum(state.params, ids_T[None, :-1], ids_T[None, 1:], None)
    assert -np.log(result.probability_T).mean() == pytest.approx(float(total / count), rel=1e-5)
    np.testing.assert_array_equal(result.surprisal_T, -np.log(result.probability_T))
    assert (np.diff(result.likeliest_probability_TK, axis=1) <= 0).all()


def test_attention_maps_are_causal_distributions(restored, ids_T):
    _, executor, state = restored
    maps_LHTS = diagnostics.attention_maps(executor.objective, state.params, ids_T)
    assert maps_LHTS.shape == (1, 2, 16, 16)
    np.testing.assert_allclose(maps_LHTS.sum(-1), 1, rtol=1e-5)
    assert not np.triu(maps_LHTS, 1).any()
