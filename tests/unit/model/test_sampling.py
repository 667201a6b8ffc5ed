"""Sampling: greedy, top-k, top-p, temperature, and the sliding window."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.config import ModelConfig, SamplingConfig
from jaxgpt.model import gpt, sampling
from jaxgpt.model.gpt import Numerics

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=12)
LOGITS = jnp.log(jnp.array([0.5, 0.25, 0.15, 0.1]))


def frequencies(temperature=1.0, top_k=4, top_p=1.0, n=20_000):
    pick = jax.vmap(lambda key: sampling.choose(LOGITS, key, temperature, top_k, top_p))
    return np.bincount(pick(jax.random.split(jax.random.key(0), n)), minlength=4) / n


@pytest.mark.parametrize(
    "kwargs, expected",
    [
        ({}, [0.5, 0.25, 0.15, 0.1]),
        ({"temperature": 0.5}, [0.25, 0.0625, 0.0225, 0.01]),
        ({"temperature": 0.0}, [1, 0, 0, 0]),
        ({"temperature": 1e-6}, [1, 0, 0, 0]),
        ({"temperature": 1e30}, [1, 1, 1, 1]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_k": 2}, [0.5, 0.25, 0, 0]),
        ({"top_p": 0.4}, [1, 0, 0, 0]),
        ({"top_p": 1e-46}, [1, 0, 0, 0]),
        ({"top_p": 0.51}, [0.5, 0.25, 0, 0]),
        ({"top_p": 0.8}, [0.5, 0.25, 0.15, 0]),
        ({"top_k": 3, "top_p": 0.56}, [0.5, 0.25, 0, 0]),  # 0.5 / 0.9 = 0.555...: top_p is of what top_k left
    ],
)
def test_choose_follows_the_distribution(kwargs, expected):
    expected = np.array(expected) / np.sum(expected)
    n = 20_000
    tolerance = 5 * np.sqrt(expected * (1 - expected) / n)  # five standard deviations; none where it must be exact
    assert (np.abs(frequencies(**kwargs, n=n) - expected) <= tolerance).all()


@pytest.fixture(scope="module")
def bound():
    params = gpt.init_params(jax.random.key(0), CONFIG, 11, Numerics())
    params = jax.tree.map(lambda p: p * 20 if p.ndim == 2 else p, params)  # far from uniform, so that texts differ
    return gpt.bind(CONFIG, 11, Numerics()), params


def generated(bound, prompt, **flags):
    return list(sampling.generate(*bound, CONFIG, np.array(prompt), SamplingConfig(**flags)))


@pytest.mark.parametrize("prompt", [[3], [1, 2, 3, 4, 5], list(range(11)) + [3], [5, 0] * 15])
def test_greedy_with_cache_equals_the_documented_cropping(bound, prompt):
    """The documented loop: read the last block of the text anew for each token (padded behind, which nothing sees)."""
    read = jax.jit(lambda idx_T: bound[0](bound[1])(idx_T[None])[0])
    text = list(prompt)
    for _ in range(30):
        window = text[-CONFIG.block_size :]
        logits_TV = read(np.array(window + [0] * (CONFIG.block_size - len(window))))
        text.append(int(logits_TV[len(window) - 1].argmax()))
    got = generated(bound, prompt, max_new_tokens=30, temperature=0.0)
    assert got == text[len(prompt) :] and len(set(got)) > 1


def test_a_vanishing_temperature_is_greedy(bound):
    assert generated(bound, [3], temperature=1e-42) == generated(bound, [3], temperature=0.0)


def test_seeds(bound):
    a, b, c = (generated(bound, [3], max_new_tokens=40, seed=s) for s in (0, 0, 1))
    assert a == b != c and all(0 <= i < 11 for i in a)


@pytest.mark.slow
def test_a_row_of_a_batch_is_the_text_of_its_seed_alone(bound):
    """Past the block's end too; and what a seed gives is what it gave when texts were sampled one at a time."""
    prompts, flags = np.array([[3], [3], [7]]), dict(max_new_tokens=24, temperature=1.3, top_k=9, top_p=0.95)
    steps = list(sampling.generate_batch(*bound, CONFIG, prompts, SamplingConfig(**flags, seed=1)))
    rows = np.stack(steps, axis=1).tolist()
    assert rows == [generated(bound, prompt, **flags, seed=1 + row) for row, prompt in enumerate(prompts)]
    assert rows[0] == [10, 0, 10, 7, 8, 5, 10, 0, 3, 3, 4, 3, 5, 10, 5, 5, 10, 10, 5, 5, 5, 3, 8, 5]
    assert rows[1] == [4, 5, 3, 5, 10, 0, 5, 5, 3, 3, 3, 8, 3, 1, 1, 10, 10, 10, 5, 5, 5, 5, 5, 3]
