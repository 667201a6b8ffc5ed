"""Sampling: greedy, top-k, top-p, temperature, and the sliding window."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxgpt.config import ModelConfig, SamplingConfig
from jaxgpt.interop import torch_names
from jaxgpt.model import gpt, sampling
from jaxgpt.model.gpt import Numerics

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=12)
LOGITS = jnp.log(jnp.array([0.5, 0.25, 0.15, 0.1]))


def frequencies(temperature=1.0, top_k=4, top_p=1.0, min_p=0.0, n=20_000):
    pick = jax.vmap(lambda key: sampling.choose(LOGITS, key, temperature, top_k, top_p, min_p))
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
        ({"min_p": 0.29}, [0.5, 0.25, 0.15, 0]),
        ({"min_p": 1.0}, [1, 0, 0, 0]),
        ({"top_p": 0.51, "min_p": 0.4}, [0.5, 0.25, 0, 0]),
    ],
)
def test_choose_follows_the_distribution(kwargs, expected):
    expected = np.array(expected) / np.sum(expected)
    n = 20_000
    tolerance = 5 * np.sqrt(expected * (1 - expected) / n)  # five standard deviations; none where it must be exact
    assert (np.abs(frequencies(**kwargs, n=n) - expected) <= tolerance).all()


@pytest.mark.parametrize(
    "kwargs",
    [
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.1, "penalty": 1.3},
        {"temperature": 1.7, "top_p": 0.6, "min_p": 0.3, "penalty": 0.6},
    ],
)
def test_the_warpers_are_those_of_transformers(kwargs):
    """In their order; the same tokens stay, and the logits that stay differ by a constant alone."""
    process = pytest.importorskip("transformers.generation.logits_process")
    draw = np.random.default_rng(0)
    logits_V, text = draw.normal(0, 2, 50), draw.integers(0, 50, 12)
    penalty, temperature = kwargs.get("penalty", 1.0), kwargs.get("temperature", 1.0)
    warpers = [process.RepetitionPenaltyLogitsProcessor(penalty), process.TemperatureLogitsWarper(temperature)]
    warpers += [process.TopKLogitsWarper(kwargs["top_k"])] if "top_k" in kwargs else []
    warpers += [process.TopPLogitsWarper(kwargs["top_p"])] if "top_p" in kwargs else []
    warpers += [process.MinPLogitsWarper(kwargs["min_p"])] if "min_p" in kwargs else []
    expected = torch.from_numpy(logits_V)[None]
    for warper in warpers:
        expected = warper(torch.from_numpy(text)[None], expected)
    expected = expected[0].numpy()
    with jax.enable_x64(True):
        seen_V = jnp.zeros(50, bool).at[text].set(True)
        penalized_V = sampling.penalize_repetition(jnp.asarray(logits_V), seen_V, penalty)
        limits = (kwargs.get("top_k", 50), kwargs.get("top_p", 1.0), kwargs.get("min_p", 0.0))
        got = np.asarray(sampling.truncate(penalized_V, temperature, *limits))
    stays = np.isfinite(expected)
    assert got.dtype == np.float64 and (np.isfinite(got) == stays).all() and 0 < stays.sum() < 50
    assert np.ptp(got[stays] - expected[stays]) < 1e-14


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedy_text_is_that_of_transformers(penalty):
    """GPT-2 of Hugging Face with random weights, in float64, of two prompts, token for token."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(n_positions=24, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=None, pad_token_id=0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=31, **sizes)).double().eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():  # the positions weigh most, else a text repeats one token
            p.copy_(p * (60 if "wpe" in name else 8) if p.ndim == 2 else p)
    prompts = np.random.default_rng(0).integers(0, 31, (2, 4))
    idx = torch.from_numpy(prompts)
    flags = dict(attention_mask=torch.ones_like(idx), max_new_tokens=20, do_sample=False, repetition_penalty=penalty)
    expected = theirs.generate(idx, **flags)[:, 4:].numpy()
    config = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=24, tied_head=True, gelu="tanh")
    with jax.enable_x64(True):
        numerics = Numerics(jnp.float64, jnp.float64)
        like = jax.eval_shape(lambda key: gpt.init_params(key, config, 31, numerics), jax.random.key(0))
        state = {name: p.numpy() for name, p in theirs.state_dict().items()}
        params = jax.tree.map(jnp.asarray, torch_names.from_torch(torch_names.tutorial_names(state), like))
        sampled = SamplingConfig(max_new_tokens=20, temperature=0, repetition_penalty=penalty)
        steps = list(sampling.generate_batch(gpt.bind(config, 31, numerics), params, config, prompts, sampled))
    assert (np.stack(steps, axis=1) == expected).all() and len(np.unique(expected)) > 5


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


@pytest.mark.slow
@pytest.mark.parametrize("flags", [dict(temperature=0.0), dict(temperature=1.3, top_k=9, repetition_penalty=1.2)])
def test_prompts_of_different_lengths_in_one_batch(bound, flags):
    """Also where the longest text leaves the block before the others, and for a prompt longer than the block."""
    prompts = [[3], [1, 2, 3, 4, 5], list(range(8))] + ([[5, 0] * 9] if "top_k" in flags else [])
    batch = sampling.generate_batch(
        *bound, CONFIG, list(map(np.array, prompts)), SamplingConfig(**flags, max_new_tokens=9), [7] * len(prompts)
    )
    rows = np.stack(list(batch), axis=1).tolist()
    assert rows == [generated(bound, prompt, **flags, max_new_tokens=9, seed=7) for prompt in prompts]
    assert len(set(map(tuple, rows))) == len(rows)


def test_a_short_text_has_a_short_cache(bound, monkeypatch):
    """Of a block of 64 positions only the 16 that the text needs are computed and kept."""
    config = dataclasses.replace(CONFIG, block_size=64)
    params = gpt.init_params(jax.random.key(0), config, 11, Numerics())
    lengths = []
    real = sampling.empty_cache
    monkeypatch.setattr(sampling, "empty_cache", lambda *args: lengths.append(args[-1]) or real(*args))
    flags = SamplingConfig(max_new_tokens=3, temperature=0.0)
    short = list(sampling.generate(gpt.bind(config, 11, Numerics()), params, config, np.array([3, 4]), flags))
    assert lengths == [16] and len(short) == 3
