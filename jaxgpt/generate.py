"""Sampling text, with a key/value cache while the text fits the block and a sliding window after.

Axes: T time, V vocabulary, H heads, D head size; the batch is one text.
"""

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxgpt import batches
from jaxgpt.config import ModelConfig, SamplingConfig
from jaxgpt.model import GPT, Cache, Params


def choose(logits_V: Array, key: Array, temperature: Array, top_k: Array, top_p: Array) -> Array:
    """One token: softmax sampling at a temperature, among the top_k tokens, among those that make up top_p.

    In this order, as usual: temperature, top_k, top_p. Of tokens with equal logits at a limit, all stay.

    Args:
        logits_V: [V]; temperature, top_k (V for all), top_p: scalars.
    """
    greedy = jnp.argmax(logits_V)
    # From the maximum down, so that a small temperature overflows only to -inf.
    logits_V = (logits_V - logits_V.max()) / jnp.where(temperature == 0, 1, temperature)
    sorted_V = jnp.sort(logits_V, descending=True)
    at_least = sorted_V[top_k - 1]
    sorted_V = jnp.where(sorted_V >= at_least, sorted_V, -jnp.inf)
    probability_V = jax.nn.softmax(sorted_V)
    # A token stays while those before it have not yet reached top_p; so the most likely one always does.
    stays_V = (jnp.cumsum(probability_V) - probability_V < top_p).at[0].set(True)
    at_least = jnp.where(top_p < 1, jnp.min(jnp.where(stays_V, sorted_V, jnp.inf)), at_least)
    sampled = jax.random.categorical(key, jnp.where(logits_V >= at_least, logits_V, -jnp.inf))
    return jnp.where(temperature == 0, greedy, sampled)


def generate(
    model: Callable[[Params], GPT],
    params: Params,
    config: ModelConfig,
    prompt: np.ndarray,
    sampling: SamplingConfig,
) -> Iterator[int]:
    """Yields the new tokens one by one, as they are computed.

    Args:
        model: parameters -> model, from `Program.exact_model`.
        prompt: int [T], at least one token; of a prompt longer than the block, the last block counts.
    """
    assert len(prompt) >= 1
    block_size = config.block_size
    context = [int(i) for i in prompt[-block_size:]]
    vocab_size = len(params["token_emb.embedding"])
    top_k = min(sampling.top_k or vocab_size, vocab_size)
    temperature = sampling.temperature if sampling.temperature >= 1e-6 else 0.0
    pick = partial(choose, temperature=temperature, top_k=top_k, top_p=sampling.top_p)
    key = batches.stream_key(sampling.seed, batches.SAMPLE)

    @jax.jit
    def read_window(params: Params, window_T: Array, length: Array, key: Array) -> tuple[Array, Cache]:
        """The token after the first `length` of a window, padded to a block, and the window's keys and values."""
        bound = model(params)
        x_1TC, cache = bound.hidden(window_T[None], cache=empty_cache(params, config))
        x_C = lax.dynamic_index_in_dim(x_1TC[0], length - 1, keepdims=False)
        return pick(bound.logits(x_C), key), cache

    @partial(jax.jit, donate_argnums=2)
    def read_token(params: Params, token: Array, cache: Cache, at: Array, key: Array) -> tuple[Array, Cache]:
        """The token after `token` at position `at`, whose predecessors are in the cache."""
        bound = model(params)
        x_11C, cache = bound.hidden(token[None, None], cache=cache, start=at)
        return pick(bound.logits(x_11C[0, 0]), key), cache

    cache = None
    for i in range(sampling.max_new_tokens):
        step_key = jax.random.fold_in(key, i)
        if cache is not None and len(context) <= block_size:
            token, cache = read_token(params, jnp.int32(context[-1]), cache, jnp.int32(len(context) - 1), step_key)
        else:
            # The first token; and past the block's end, where each token moves the window by one and so changes every
            # position embedding: nothing cached holds, and the window is read anew, as documented.
            context = context[-block_size:]
            window_T = np.zeros(block_size, np.int32)
            window_T[: len(context)] = context
            token, cache = read_window(params, window_T, jnp.int32(len(context)), step_key)
        context.append(int(token))
        yield context[-1]


def empty_cache(params: Params, config: ModelConfig) -> Cache:
    """Room for the keys and values of a block, [1, T, H, D] each per layer, in the parameters' dtype."""
    shape = (1, config.block_size, config.n_head, config.n_embd // config.n_head)
    dtype = params["token_emb.embedding"].dtype
    return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.n_layer)]
