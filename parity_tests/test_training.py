"""The trainer's own compiled step against the PyTorch reference: logits, loss, gradients, updates, perplexity.

The same weights and the same batches on both sides. The sizes B, T, C, H, D and V all differ, so that no swapped axis
passes.
"""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from harness import relative_l2

from jaxgpt import batches, parallel
from jaxgpt.config import PRESETS, ModelConfig, TrainConfig
from jaxgpt.convert import from_torch, to_torch
from jaxgpt.loss import cross_entropy, perplexity
from jaxgpt.optimizer import learning_rate
from jaxgpt.train_step import Program
from torch_ref.model import GPT, mean_loss
from torch_ref.train_step import make_optimizer, update

VOCAB = 29
TOKENS = np.random.default_rng(0).integers(0, VOCAB, 2000).astype(np.uint8)
SIZES = ModelConfig(n_layer=2, n_head=5, n_embd=20, block_size=17)
CONFIGS = {
    "tinygpt": dataclasses.replace(PRESETS["tinygpt"], batch_size=6, model=SIZES),
    "minigpt": dataclasses.replace(PRESETS["minigpt"], batch_size=6, model=SIZES),
    "modern": TrainConfig(
        batch_size=6,
        steps=60,
        clip=0.5,
        schedule="warmup-cosine",
        warmup_steps=10,
        min_lr=3e-5,
        beta2=0.95,
        weight_decay=0.1,
        decay_mask="matrices",
        model=SIZES,
    ),
    "sgd": TrainConfig(batch_size=6, optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=0.01, model=SIZES),
    "cosine": TrainConfig(batch_size=6, steps=60, schedule="cosine", lr=3e-3, model=SIZES),
}


class Pair:
    """The two sides, started from the same weights.

    `sharpen` multiplies the matrices: at the documented start attention is flat and its gradients are near zero.
    """

    def __init__(self, config: TrainConfig, dtype: str, sharpen: float = 1.0):
        self.config = dataclasses.replace(config, dtype=dtype)
        self.program = Program(self.config, VOCAB, parallel.numerics(self.config))
        self.executor = parallel.Executor(self.program, jax.devices()[:1])
        self.state = self.executor.init_state()
        params = {name: np.array(p) for name, p in self.state.params.items()}
        self.params = {name: p * p.dtype.type(sharpen) if p.ndim == 2 else p for name, p in params.items()}
        self.torch = GPT(config.model, VOCAB).to(getattr(torch, dtype))
        self.torch.load_state_dict({k: torch.tensor(v) for k, v in to_torch(self.params).items()})
        self.optimizer = make_optimizer(self.torch, config)

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The batch that the trainer's step takes."""
        key = batches.stream_key(self.config.seed, batches.TRAIN)
        size, block = self.config.batch_size, self.config.model.block_size
        start_B = batches.window_starts(key, step, len(TOKENS), size, block)
        return tuple(np.asarray(x) for x in batches.windows(jax.numpy.asarray(TOKENS), start_B, block))

    def torch_params(self) -> dict[str, np.ndarray]:
        return {name: p.detach().numpy() for name, p in self.torch.named_parameters()}


@pytest.fixture(params=["float64", "float32"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


# float64: two orders of sums of a few hundred terms, about 1e-15 each; measured below 2e-15.
# float32: the same at 6e-8; measured below 6e-7.
VALUE_GATE = {"float64": 1e-13, "float32": 2e-6}
# Gradients add up all tokens; measured below 4e-15 and 9e-7. The documented gates.
GRADIENT_GATE = {"float64": 1e-12, "float32": 2e-6}


def test_weights_go_to_torch_and_back_bitwise(dtype):
    pair = Pair(CONFIGS["minigpt"], dtype)
    back = from_torch(pair.torch_params(), like=pair.params)
    assert list(back) == list(pair.params) and len(back) == 2 + 2 * 16 + 2 + 1
    for name, p in pair.params.items():
        np.testing.assert_array_equal(back[name], p)


def test_logits_loss_perplexity_and_gradients(dtype):
    pair = Pair(CONFIGS["minigpt"], dtype, sharpen=8.0)
    idx_BT, target_BT = pair.batch(0)
    reference = pair.torch(torch.tensor(idx_BT).long())
    model = jax.jit(lambda params, idx_BT: pair.program.model(params)(idx_BT))
    logits = model(pair.params, idx_BT)
    assert relative_l2(logits, reference.detach().numpy()) < VALUE_GATE[dtype]

    def loss_of(params):
        logits_BTV = pair.program.model(params)(idx_BT)
        total, count = cross_entropy(logits_BTV.reshape(-1, VOCAB), target_BT.reshape(-1))
        return total / count

    loss, grads = jax.jit(jax.value_and_grad(loss_of))(pair.params)
    torch_loss = mean_loss(pair.torch, torch.tensor(idx_BT).long(), torch.tensor(target_BT).long())
    torch_loss.backward()
    assert abs(float(loss) / torch_loss.item() - 1) < VALUE_GATE[dtype]
    assert abs(perplexity(float(loss)) / np.exp(torch_loss.item()) - 1) < 4 * VALUE_GATE[dtype]  # d exp(x) = x exp(x)
    expected = {name: p.grad.numpy() for name, p in pair.torch.named_parameters()}
    for name, grad in to_torch(grads).items():
        if name.endswith("Wk.bias"):  # its true gradient is 0: softmax does not change when all scores shift
            assert np.abs(grad).max() < 1e-8 and np.abs(expected[name]).max() < 1e-8
        else:
            assert relative_l2(grad, expected[name]) < GRADIENT_GATE[dtype], name


@pytest.mark.parametrize("name", CONFIGS)
def test_sixty_steps_in_float64(name):
    """Every loss, and at the end every parameter, through the dispatches that the trainer makes."""
    with jax.enable_x64(True):
        pair = Pair(CONFIGS[name], "float64")
        tokens_N = pair.executor.put(TOKENS)
        losses = []
        for n_steps in (1, 30, 29):
            pair.state, metrics = pair.executor.updates(pair.state, tokens_N, n_steps)
            losses += metrics[:, 0].tolist()
        for step, loss in enumerate(losses):
            x, y = (torch.tensor(a).long() for a in pair.batch(step))
            reference = update(pair.torch, pair.optimizer, pair.config, learning_rate(pair.config, step), x, y)
            # torch's clip divides by norm + 1e-6, ours (the formula's) by the norm: 60 steps of relative 2e-6 follow.
            gate = 1e-6 if pair.config.clip else 1e-10
            assert abs(loss - reference) < gate, step
        start = to_torch(pair.params)
        for key, p in to_torch(pair.state.params).items():
            expected = pair.torch_params()[key]
            if key.endswith("Wk.bias") and pair.config.decay_mask == "matrices":  # no gradient, no decay: stays
                assert np.abs(p - start[key]).max() < 1e-9 and np.abs(expected - start[key]).max() < 1e-9
                continue
            assert relative_l2(p - start[key], expected - start[key]) < (1e-4 if pair.config.clip else 1e-9), key


def test_first_steps_in_float32():
    """The first ten losses of the documented loop to 1e-6 relative; after that rounding grows as it does in torch."""
    pair = Pair(CONFIGS["minigpt"], "float32")
    pair.state, metrics = pair.executor.updates(pair.state, pair.executor.put(TOKENS), 10)
    for step, loss in enumerate(metrics[:, 0].tolist()):
        x, y = (torch.tensor(a).long() for a in pair.batch(step))
        reference = update(pair.torch, pair.optimizer, pair.config, learning_rate(pair.config, step), x, y)
        assert abs(loss / reference - 1) < 1e-6, step
