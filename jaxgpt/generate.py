"""Sampling text, with a key/value cache while the text fits the block and a sliding window after.

Axes: B texts, T time, C width, V vocabulary, H heads, D head size.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxgpt import batches
from jaxgpt.config import ModelConfig, SamplingConfig
from jaxgpt.model import GPT, Cache, Params


def choose(logits_V: Array, key: Array, temperature: float, top_k: int, top_p: float) -> Array:
    """One token: softmax sampling at a temperature, among the top_k tokens, among those that make up top_p.

    In this order, as usual: temperature, top_k, top_p. Of tokens with equal logits at a limit, all stay.

    Args:
        logits_V: [V]; temperature: 0 for the most likely token; top_k: V for all; top_p: 1 for all.
    """
    if temperature == 0:
        return jnp.argmax(logits_V)
    # From the maximum down, so that a small temperature overflows only to -inf.
    logits_V = (logits_V - logits_V.max()) / temperature
    at_least = -jnp.inf
    if top_k < len(logits_V):
        at_least = lax.top_k(logits_V, top_k)[0].min()  # [-1] makes XLA sort all on CPU
    if top_p < 1:  # only this needs all in order: to sort 50,257 logits on a CPU takes as long as a small model
        sorted_V = jnp.sort(logits_V, descending=True)
        sorted_V = jnp.where(sorted_V >= at_least, sorted_V, -jnp.inf)
        probability_V = jax.nn.softmax(sorted_V)
        # A token stays while those before it have not yet reached top_p; so the most likely one always does.
        stays_V = (jnp.cumsum(probability_V) - probability_V < top_p).at[0].set(True)
        at_least = jnp.min(jnp.where(stays_V, sorted_V, jnp.inf))
    return jax.random.categorical(key, jnp.where(logits_V >= at_least, logits_V, -jnp.inf))


def generate(
    model: Callable[[Params], GPT],
    params: Params,
    config: ModelConfig,
    prompt: np.ndarray,
    sampling: SamplingConfig,
) -> Iterator[int]:
    """Yields the new tokens of one text one by one, as they are computed: `generate_batch` of a single row.

    Args:
        prompt: int [T], at least one token.
    """
    for token_B in generate_batch(model, params, config, np.asarray(prompt)[None], sampling):
        yield int(token_B[0])


def generate_batch(
    model: Callable[[Params], GPT],
    params: Params,
    config: ModelConfig,
    prompt_BT: np.ndarray,
    sampling: SamplingConfig,
) -> Iterator[np.ndarray]:
    """Yields the rows' next tokens, int32 [B], as they are computed.

    Row b draws with the seed `sampling.seed` + b alone, so it is the text of that seed whatever the other rows are (but
    for the last digits of a product, which may depend on the batch and then decide between tokens all but equal).

    Args:
        model: parameters -> model, from `Program.exact_model`.
        prompt_BT: int [B, T], at least one token each; of prompts longer than the block, the last block counts.
    """
    n_rows, n_time = prompt_BT.shape
    assert n_rows and n_time
    block_size = config.block_size
    read_window, read_token = _compiled(model, config, n_rows, sampling)
    context_BT, cache = np.asarray(prompt_BT, np.int32)[:, -block_size:], None
    for i in range(sampling.max_new_tokens):
        n_read = context_BT.shape[1]
        if cache is not None and n_read <= block_size:
            token_B, cache = read_token(params, context_BT[:, -1], cache, np.int32(n_read - 1), np.int32(i))
        else:
            # The first token; and past the block's end, where each token moves the window by one and so changes every
            # position embedding: nothing cached holds, and the window is read anew, as documented.
            context_BT = context_BT[:, -block_size:]
            n_read = context_BT.shape[1]
            window_BT = np.pad(context_BT, ((0, 0), (0, block_size - n_read)))
            token_B, cache = read_window(params, window_BT, np.int32(n_read), np.int32(i))
        token_B = np.asarray(token_B, np.int32)
        context_BT = np.concatenate([context_BT, token_B[:, None]], axis=1)
        yield token_B


@lru_cache(2)
def _compiled(
    model: Callable[[Params], GPT], config: ModelConfig, n_rows: int, sampling: SamplingConfig
) -> tuple[Callable, Callable]:
    """The two programs that read: a whole window, and one more token. Kept, as training samples again and again."""
    temperature = sampling.temperature if sampling.temperature >= 1e-6 else 0.0
    key_B = jnp.stack([batches.stream_key(sampling.seed + row, batches.SAMPLE) for row in range(n_rows)])

    def next_token(bound: GPT, x_BC: Array, i: Array) -> Array:
        """[B], the i-th new token of each row after the hidden states [B, C]."""
        logits_BV = bound.logits(x_BC)
        vocab_size = logits_BV.shape[-1]
        top_k = min(sampling.top_k or vocab_size, vocab_size)
        pick = partial(choose, temperature=temperature, top_k=top_k, top_p=sampling.top_p)
        step_key_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, i)
        return jax.vmap(pick)(logits_BV, step_key_B)

    @jax.jit
    def read_window(params: Params, window_BT: Array, length: Array, i: Array) -> tuple[Array, Cache]:
        """The tokens after the first `length` of windows padded to a block, and the windows' keys and values."""
        bound = model(params)
        x_BTC, cache = bound.hidden(window_BT, cache=empty_cache(params, config, n_rows))
        return next_token(bound, lax.dynamic_index_in_dim(x_BTC, length - 1, axis=1, keepdims=False), i), cache

    @partial(jax.jit, donate_argnums=2)
    def read_token(params: Params, token_B: Array, cache: Cache, at: Array, i: Array) -> tuple[Array, Cache]:
        """The tokens after `token_B` at position `at`, whose predecessors are in the cache."""
        bound = model(params)
        x_B1C, cache = bound.hidden(token_B[:, None], cache=cache, start=at)
        return next_token(bound, x_B1C[:, 0], i), cache

    return read_window, read_token


def empty_cache(params: Params, config: ModelConfig, n_rows: int) -> Cache:
    """Room for the keys and values of a block, [B, T, H, D] each per layer, in the parameters' dtype."""
    shape = (n_rows, config.block_size, config.n_head, config.n_embd // config.n_head)
    dtype = params["token_emb.embedding"].dtype
    return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.n_layer)]
