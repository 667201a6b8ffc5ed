"""Skipped updates: both sides skip the same ones, and go on from the same state."""

import dataclasses
import math

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from jaxgpt import parallel  # noqa: E402
from jaxgpt.config import ModelConfig, TrainConfig  # noqa: E402
from jaxgpt.data.loader import make_loader  # noqa: E402
from jaxgpt.data.sampler import BatchSampler  # noqa: E402
from jaxgpt.interop.torch_names import optimizer_to_torch, to_torch  # noqa: E402
from jaxgpt.model.gpt import Numerics  # noqa: E402
from jaxgpt.objective import LanguageModelingObjective  # noqa: E402
from torch_ref import train_step as reference  # noqa: E402
from torch_ref.model import GPT  # noqa: E402
from torch_ref.train import train  # noqa: E402

VOCAB, INFINITE, LARGE = 12, 10, 11  # tokens 10 and 11: the loss of a batch that has one is infinite, or 1000-fold
INFINITE_STEPS, LARGE_STEPS = (3, 30), (28, 33)
CONFIG = TrainConfig(
    steps=40,
    batch_size=4,
    packing="chunks",
    dtype="float64",
    lr=3e-3,
    schedule="warmup-cosine",
    warmup_steps=8,
    clip=1.0,
    on_nonfinite="skip",
    skip_spikes=50.0,
    model=ModelConfig(n_layer=1, n_head=2, n_embd=8, block_size=6),
)
BATCHES = BatchSampler(CONFIG, 4000)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    tokens_N = np.random.default_rng(0).integers(0, 10, 4000).astype(np.uint8)
    for steps, token in ((INFINITE_STEPS, INFINITE), (LARGE_STEPS, LARGE)):
        for step in steps:
            tokens_N[BATCHES.starts(step, 1)[0][-1] + 1] = token
    return tokens_N


class Poisoned(LanguageModelingObjective):
    def loss_sum(self, params, idx_BT, target_BT, row_key_B, gather=None):
        loss, count = super().loss_sum(params, idx_BT, target_BT, row_key_B, gather)
        factor = jax.numpy.where((idx_BT == INFINITE).any(), math.inf, 1.0)
        return loss * factor * jax.numpy.where((idx_BT == LARGE).any(), 1000.0, 1.0), count


def ours(tokens_N, dispatches, kind="jit", n_devices=1):
    """The weights of before, the state of after some dispatches, and the metrics of all steps."""
    config = dataclasses.replace(CONFIG, parallel=kind)
    with jax.enable_x64(True):
        objective = Poisoned(config, VOCAB, Numerics(np.dtype("float64"), np.dtype("float64")))
        executor = parallel.Executor(objective, jax.devices()[:n_devices])
        loader = make_loader(tokens_N, BATCHES, executor.put, executor.bytes_for_tokens, "device")
        state = executor.init_state()
        before, rows = jax.device_get(state.params), []
        for n_steps in dispatches:
            state, metrics = executor.train_steps(state, loader.take(len(rows), n_steps), n_steps)
            rows += metrics.tolist()
        return before, jax.device_get(state), rows


@pytest.fixture(scope="module")
def one_dispatch(tokens):
    return ours(tokens, [CONFIG.steps])


def test_the_reference_skips_the_same_updates(tokens, one_dispatch, monkeypatch):
    before, state, rows = one_dispatch
    mean_loss = reference.mean_loss

    def poisoned(model, idx_BT, *rest):
        factor = math.inf if (idx_BT == INFINITE).any() else 1000.0 if (idx_BT == LARGE).any() else 1.0
        return mean_loss(model, idx_BT, *rest) * factor

    def batch_of(step):
        window_BT = tokens[BATCHES.starts(step, 1)[0][:, None] + np.arange(CONFIG.model.block_size + 1)]
        return torch.tensor(window_BT[:, :-1], dtype=torch.int64), torch.tensor(window_BT[:, 1:], dtype=torch.int64)

    monkeypatch.setattr(reference, "mean_loss", poisoned)
    model = GPT(CONFIG.model, VOCAB).double()
    model.load_state_dict({name: torch.tensor(np.array(p)) for name, p in to_torch(before).items()})
    optimizer, skipped = reference.make_optimizer(model, CONFIG), reference.SkippedUpdates(CONFIG)
    clip = lambda params, limit: reference_clip(list(params), limit)  # noqa: E731
    steps, losses, skips = range(CONFIG.steps), [], []
    for step, loss in train(model, optimizer, CONFIG, batch_of, steps, clip=clip, skipped=skipped):
        losses.append(loss)
        skips += [step] * (skipped.in_a_row > 0)
    expected = sorted(INFINITE_STEPS + LARGE_STEPS)
    assert skips == [step for step, row in enumerate(rows) if row[2]] == expected
    np.testing.assert_allclose([row[0] for row in rows], losses, rtol=1e-12)
    for name, p in model.state_dict().items():
        np.testing.assert_allclose(to_torch(state.params)[name], p, atol=1e-12, err_msg=name)
    moments = optimizer_to_torch(state.opt_state)
    for name, tensor in reference.optimizer_tensors(model, optimizer, CONFIG, skipped.applied).items():
        np.testing.assert_allclose(moments[name], tensor, atol=1e-12, err_msg=name)
    assert (skipped.total, skipped.applied) == (state.opt_state.skipped, state.opt_state.applied) == (4, 36)
    assert skipped.norm_mean == pytest.approx(float(state.opt_state.norm_mean), rel=1e-12)


def reference_clip(params, limit):
    """optax's clip: PyTorch's divides by norm + 1e-6, which would hide nothing, but move the sixth digit."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in params])
    for p in params:
        p.grad *= min(1.0, limit / norm.item())


@pytest.mark.parametrize("kind, n_devices", [("jit", 1), pytest.param("pmap", 2, marks=pytest.mark.slow)])
def test_any_dispatches_skip_the_same_updates(tokens, one_dispatch, kind, n_devices):
    _, expected, expected_rows = one_dispatch
    _, state, rows = ours(tokens, [3, 1, 24, 1, 11], kind, n_devices)
    assert [row[2] for row in rows] == [row[2] for row in expected_rows]
    same = np.testing.assert_array_equal if n_devices == 1 else partial_allclose
    jax.tree.map(same, state, expected)


def partial_allclose(a, b):
    """Two devices add up in another order."""
    np.testing.assert_allclose(a, b, atol=1e-12)


def test_the_reference_stops_at_the_fifth_in_a_row():
    loss = torch.tensor(math.nan)
    model = torch.nn.Linear(1, 1)
    model(torch.ones(1)).sum().backward()
    skipped = reference.SkippedUpdates(CONFIG)
    for _ in range(4):
        assert skipped.skips(loss, model) and not skipped.reason_to_stop(math.nan)
    assert skipped.skips(loss, model) and "fifth update skipped in a row" in skipped.reason_to_stop(math.nan)
    assert not skipped.skips(torch.tensor(1.0), model) and not skipped.reason_to_stop(1.0)
    default = reference.SkippedUpdates(TrainConfig())
    assert not default.skips(loss, model) and "loss nan" in default.reason_to_stop(math.nan)
