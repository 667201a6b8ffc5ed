"""Sampling text: with a key/value cache while the text fits the block, with a sliding window after that.

Axes: B texts, T time, S the context so far, W a block, C n_embd, V vocabulary, H heads, D head size.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxgpt import rng
from jaxgpt.config import ModelConfig, SamplingConfig
from jaxgpt.model.gpt import GPT, Cache, Params


def choose(logits_V: Array, key: Array, temperature: float, top_k: int, top_p: float) -> Array:
    """Samples one token id: temperature, then top-k, then nucleus sampling (top-p), in the usual order.

    Tokens whose logits tie at a limit all stay.

    Args:
        logits_V: the logits of the next token.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keeps the k most likely tokens; V keeps all.
        top_p: keeps the most likely tokens that together reach this probability; 1 keeps all.
    """
    if temperature == 0:
        return jnp.argmax(logits_V)
    # Subtract the maximum, so that a small temperature overflows to -inf only.
    logits_V = (logits_V - logits_V.max()) / temperature
    threshold = -jnp.inf
    if top_k < len(logits_V):
        threshold = lax.top_k(logits_V, top_k)[0].min()  # indexing [-1] makes XLA sort all of them on a CPU
    if top_p < 1:  # the only part that sorts: 50,257 logits on a CPU take as long as a small model
        sorted_V = jnp.sort(logits_V, descending=True)
        sorted_V = jnp.where(sorted_V >= threshold, sorted_V, -jnp.inf)
        probability_V = jax.nn.softmax(sorted_V)
        # A token stays while those before it have not yet reached top_p; the most likely one always stays.
        stays_V = (jnp.cumsum(probability_V) - probability_V < top_p).at[0].set(True)
        threshold = jnp.min(jnp.where(stays_V, sorted_V, jnp.inf))
    return jax.random.categorical(key, jnp.where(logits_V >= threshold, logits_V, -jnp.inf))


def generate(
    model: Callable[[Params], GPT],
    params: Params,
    config: ModelConfig,
    prompt: np.ndarray,
    sampling: SamplingConfig,
) -> Iterator[int]:
    """Yields the new token ids of one text as they are computed: `generate_batch` of a single row.

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
    """Yields the rows' next token ids, int32 [B], as they are computed.

    Row b draws with the seed `sampling.seed` + b alone, so its text does not depend on the other rows (but for the last
    digits of a product, which may depend on the batch size and then decide between tokens of nearly equal logits).

    Args:
        model: parameters -> model, from `LanguageModelingObjective.exact_model`.
        prompt_BT: int [B, T], at least one token each; the model reads the last block of a longer prompt.
    """
    n_rows, n_time = prompt_BT.shape
    assert n_rows and n_time
    block_size = config.block_size
    prefill, decode = _compiled(model, config, n_rows, sampling)
    context_BS, cache = np.asarray(prompt_BT, np.int32)[:, -block_size:], None
    for i in range(sampling.max_new_tokens):
        n_read = context_BS.shape[1]
        if cache is not None and n_read <= block_size:
            token_B, cache = decode(params, context_BS[:, -1], cache, np.int32(n_read - 1), np.int32(i))
        else:
            # The first token. And past the block's end: each token shifts the window by one and so changes every
            # position embedding, which invalidates the cache, so the model reads the whole window, as documented.
            context_BS = context_BS[:, -block_size:]
            n_read = context_BS.shape[1]
            window_BW = np.pad(context_BS, ((0, 0), (0, block_size - n_read)))
            token_B, cache = prefill(params, window_BW, np.int32(n_read), np.int32(i))
        token_B = np.asarray(token_B, np.int32)
        context_BS = np.concatenate([context_BS, token_B[:, None]], axis=1)
        yield token_B


@lru_cache(2)
def _compiled(
    model: Callable[[Params], GPT], config: ModelConfig, n_rows: int, sampling: SamplingConfig
) -> tuple[Callable, Callable]:
    """The compiled prefill and decode steps. Cached, because training samples again and again."""
    temperature = sampling.temperature if sampling.temperature >= 1e-6 else 0.0
    key_B = jnp.stack([rng.stream_key(sampling.seed + row, rng.SAMPLE) for row in range(n_rows)])

    def next_token(bound: GPT, x_BC: Array, i: Array) -> Array:
        """The i-th new token of each row, [B], from the hidden states [B, C]."""
        logits_BV = bound.logits(x_BC)
        vocab_size = logits_BV.shape[-1]
        top_k = min(sampling.top_k or vocab_size, vocab_size)
        pick = partial(choose, temperature=temperature, top_k=top_k, top_p=sampling.top_p)
        step_key_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, i)
        return jax.vmap(pick)(logits_BV, step_key_B)

    @jax.jit
    def prefill(params: Params, window_BT: Array, length: Array, i: Array) -> tuple[Array, Cache]:
        """The tokens after the first `length` of windows padded to a block, and the cache of the windows."""
        bound = model(params)
        x_BTC, cache = bound.hidden(window_BT, cache=empty_cache(params, config, n_rows))
        assert cache is not None
        return next_token(bound, lax.dynamic_index_in_dim(x_BTC, length - 1, axis=1, keepdims=False), i), cache

    @partial(jax.jit, donate_argnums=2)
    def decode(params: Params, token_B: Array, cache: Cache, at: Array, i: Array) -> tuple[Array, Cache]:
        """The tokens after `token_B` at position `at`; the cache holds the positions before."""
        bound = model(params)
        x_B1C, new_cache = bound.hidden(token_B[:, None], cache=cache, start=at)
        assert new_cache is not None
        return next_token(bound, x_B1C[:, 0], i), new_cache

    return prefill, decode


def empty_cache(params: Params, config: ModelConfig, n_rows: int) -> Cache:
    """A key/value cache of zeros for a block: per layer, keys and values [B, T, H, D] in the parameters' dtype."""
    shape = (n_rows, config.block_size, config.n_head, config.n_embd // config.n_head)
    dtype = params["token_emb.embedding"].dtype
    return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.n_layer)]
