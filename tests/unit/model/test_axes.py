"""The names of the tensors tell their axes: `x_BTC` is [B, T, C] wherever it is named so.

A profile function looks at every function of the model and the loss as it returns, and `jaxtyping` checks that all its
tensors with an axis suffix have as many axes as letters, and that a letter is one size within a call. So the model is
run with sizes that all differ.
"""

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Shaped, jaxtyped

from jaxgpt.config import ModelConfig, SamplingConfig
from jaxgpt.model import attention, fused_ops, gpt, loss, sampling
from jaxgpt.model.gpt import Numerics

CONFIG = ModelConfig(n_layer=2, n_head=3, n_embd=12, block_size=10, dropout=0.1)
VOCAB, B, T = 7, 2, 5
FILES = {str(Path(module.__file__).resolve()) for module in (attention, fused_ops, gpt, loss, sampling)}


def tensors_of(frame: FrameType) -> dict[str, Any]:
    """The local variables with an axis suffix that hold an array."""
    found = {}
    for name, value in frame.f_locals.items():
        if re.fullmatch(r".*_[A-Z][A-Z0-9]*", name) and isinstance(value, jax.Array | np.ndarray):
            found[name] = value
    return found


def check(frame: FrameType) -> list[str]:
    """Checks one call's tensors; returns their names."""
    tensors = tensors_of(frame)
    with jaxtyped("context"):
        for name, value in tensors.items():
            axes = " ".join(name.rsplit("_", 1)[1])
            here = {n: v.shape for n, v in tensors.items()}
            assert isinstance(value, Shaped[Any, axes]), f"{frame.f_code.co_qualname}: {name} among {here}"
    return [f"{frame.f_code.co_name}.{name}" for name in tensors]


class Axes:
    """Checks every call that returns while the context is open."""

    def __enter__(self) -> "Axes":
        self.names: set[str] = set()
        self.errors: list[str] = []
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        assert not self.errors, "\n".join(self.errors)

    def _profile(self, frame: FrameType, event: str, result: Any) -> None:
        if event == "return" and result is not None and frame.f_code.co_filename in FILES:
            sys.setprofile(None)
            try:
                self.names.update(check(frame))
            except AssertionError as e:
                self.errors.append(str(e).splitlines()[0])
            finally:
                sys.setprofile(self._profile)


@pytest.fixture(scope="module")
def params():
    return gpt.init_params(jax.random.key(0), CONFIG, VOCAB, Numerics())


def test_the_model_the_loss_and_their_backward_passes(params):
    idx_BT = jnp.arange(B * T).reshape(B, T) % VOCAB
    keys = jax.random.split(jax.random.key(1), B)

    def loss_sum(params):
        model = gpt.bind(CONFIG, VOCAB, Numerics())(params)
        x_BTC, _ = model.hidden(idx_BT, keys)
        options = dict(compute_dtype=jnp.float32, chunk_logits=2 * VOCAB * B, head_multiple=4)
        return loss.head_cross_entropy(x_BTC, model.head_CV, idx_BT, **options)[0]

    with Axes() as axes:
        jax.make_jaxpr(jax.grad(loss_sum))(params)
    assert {
        "hidden.x_NC",
        "_blocked_attention_bwd.grad_GTD",
        "head_cross_entropy.x_BTC",
        "dropout.keep_BTC",
    } <= axes.names
    assert len(axes.names) > 60


def test_packed_documents_maps_and_the_classifier(params):
    idx_BT = jnp.arange(B * T).reshape(B, T) % VOCAB
    document_BT = jnp.asarray([[0, 0, 1, 1, 1]] * B)
    model = gpt.bind(CONFIG, VOCAB, Numerics())(params)
    classifier_params = gpt.init_params(jax.random.key(0), CONFIG, VOCAB, Numerics(), 4)
    classifier = gpt.bind(CONFIG, VOCAB, Numerics(), 4)(classifier_params)
    with Axes() as axes:
        model(idx_BT, None, document_BT, document_BT)
        model.attention_maps(idx_BT)
        for pool in ("last", "last_token", "mean"):
            classifier(idx_BT, jnp.asarray([3, 5]), pool)
    assert {"attention_weights.mask_TS", "__call__.x_BC", "hidden.document_BT"} <= axes.names


def test_sampling(params):
    model = gpt.bind(CONFIG, VOCAB, Numerics())
    options = SamplingConfig(max_new_tokens=8, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.1)
    with Axes() as axes:
        list(sampling.generate_batch(model, params, CONFIG, np.ones((B, T), np.int32), options))
    assert {"prefill.x_BWC", "decode.x_BC", "truncate.sorted_V", "next_token.seen_BV"} <= axes.names


def test_a_wrong_name_is_found():
    def wrong(x_BTC):
        y_BC = x_BTC
        return y_BC

    def profile(frame, event, result):
        if event == "return" and frame.f_code.co_name == "wrong":
            seen.append(frame)

    seen: list[FrameType] = []
    sys.setprofile(profile)
    try:
        wrong(np.zeros((2, 3, 4)))
    finally:
        sys.setprofile(None)
    with pytest.raises(AssertionError, match="y_BC"):
        check(seen[0])
