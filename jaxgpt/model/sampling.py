"""Sampling token ids: with a key/value cache while the text fits the block, with a sliding window after that.

Axes: B texts, T time, S time of keys, W a window, C n_embd, V vocabulary, H heads, D head size.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxgpt import rng
from jaxgpt.config import ModelConfig, SamplingConfig
from jaxgpt.model.fused_ops import fusion_barrier
from jaxgpt.model.gpt import GPT, Cache, Params, head_logits

MIN_LENGTH = 16  # the shortest window and cache that is compiled


def penalize_repetition(logits_V: Array, seen_V: Array, penalty: float) -> Array:
    """The logits with those of seen tokens divided by `penalty` where positive, multiplied where negative.

    It is the rule of CTRL (https://arxiv.org/abs/1909.05858, section 4.1) as `transformers` applies it.

    Args:
        seen_V: bool, the tokens that the prompt and the text so far hold.
    """
    return jnp.where(seen_V, jnp.where(logits_V < 0, logits_V * penalty, logits_V / penalty), logits_V)


def truncate(logits_V: Array, temperature: float, top_k: int, top_p: float, min_p: float = 0.0) -> Array:
    """The logits to draw from: temperature, then top-k, nucleus sampling (top-p) and min-p; -inf for dropped tokens.

    The order is that of `transformers`: each limit is of what the one before has left. Tokens whose logits tie at a
    limit all stay.

    Args:
        logits_V: the logits of the next token.
        temperature: divides the logits; above 0.
        top_k: keeps the k most likely tokens; V keeps all.
        top_p: keeps the most likely tokens that together reach this probability; 1 keeps all.
        min_p: keeps tokens of at least this share of the most likely one's probability; 0 keeps all.
    """
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
    logits_V = jnp.where(logits_V >= threshold, logits_V, -jnp.inf)
    if min_p > 0:
        probability_V = jax.nn.softmax(logits_V)
        logits_V = jnp.where(probability_V >= min_p * probability_V.max(), logits_V, -jnp.inf)
    return logits_V


def choose(logits_V: Array, key: Array, temperature: float, top_k: int, top_p: float, min_p: float = 0.0) -> Array:
    """Samples one token id from what `truncate` leaves; at temperature 0 the most likely one."""
    if temperature == 0:
        return jnp.argmax(logits_V)
    return jax.random.categorical(key, truncate(logits_V, temperature, top_k, top_p, min_p))


def next_logits(model: GPT, x_BC: Array) -> Array:
    """The logits [B, V] of one hidden state of each text: `GPT.logits` but for rounding.

    For several texts and a tied head it is the table [V, C] times the hidden states: XLA's CPU backend would transpose
    the table for every token, which takes seven times as long as the product (docs/speed-log.md).
    """
    if model.lm_head is not None or len(x_BC) == 1:
        return model.logits(x_BC)
    (x_CB,) = fusion_barrier((x_BC.T,))  # else XLA folds the transpose back into the product
    table_VC = model.token_emb.embedding[...]
    (logits_VB,) = fusion_barrier((head_logits(table_VC, x_CB, model.compute_dtype),))
    return logits_VB.T


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
    for token_B in generate_batch(model, params, config, [prompt], sampling):
        yield int(token_B[0])


def generate_batch(
    model: Callable[[Params], GPT],
    params: Params,
    config: ModelConfig,
    prompts: Sequence[np.ndarray] | np.ndarray,
    sampling: SamplingConfig,
    seeds: Sequence[int] | None = None,
) -> Iterator[np.ndarray]:
    """Yields the rows' next token ids, int32 [B], as they are computed.

    A row's text depends on its prompt and seed, not on the other rows (but for the last digits of a product, which may
    depend on the batch size and then decide between tokens of nearly equal logits).

    Shorter prompts are padded on the right: causal attention sees no padding, and each row's next token overwrites the
    padding in the cache at the row's own position.

    Args:
        model: parameters -> model, from `LanguageModelingObjective.exact_model`.
        prompts: int [T] each, of any lengths, at least one token; the model reads the last block of a longer prompt.
        sampling: the fields about tokens; `stop`, `ignore_end_of_text` and `samples` are of texts
            (`tasks.text_generation`).
        seeds: of the rows; by default `sampling.seed`, and one more for each further row.
    """
    texts = [list(map(int, prompt)) for prompt in prompts]
    length_B = np.array([len(text) for text in texts], np.int32)
    assert len(length_B) and length_B.min()
    n_rows, longest, n_new, block_size = len(texts), int(length_B.max()), sampling.max_new_tokens, config.block_size
    steps = _compiled(model, config, _Choice.of(sampling))
    key_B = _row_keys(tuple(range(sampling.seed, sampling.seed + n_rows) if seeds is None else seeds))
    seen_BV = None if sampling.repetition_penalty == 1 else _seen(texts, params["token_emb.embedding"].shape[0])
    cache_length = rounded_up(longest + n_new - 1, block_size)

    def read_windows(i: int, seen_BV: Array | None) -> tuple[Array, Cache, Array | None]:
        """The i-th new tokens, from the last block of each text, and the cache of these windows."""
        read_B = np.minimum(length_B + i, block_size)
        window_BW = np.zeros((n_rows, rounded_up(int(read_B.max()), block_size)), np.int32)
        for window_W, text, n_read in zip(window_BW, texts, read_B, strict=True):
            window_W[:n_read] = text[-n_read:]
        return steps.prefill(params, window_BW, read_B, key_B, np.int32(i), seen_BV, cache_length)

    token_B, cache, seen_BV = read_windows(0, seen_BV)
    next_B = token_B
    for i in range(1, n_new + 1):
        fits = longest + i <= block_size
        if fits and i < n_new:
            # Dispatched before the host waits for the tokens before it, so that the device does not wait for the host.
            at_B = length_B + np.int32(i - 1)
            next_B, cache, seen_BV = steps.decode(params, token_B, cache, at_B, key_B, np.int32(i), seen_BV)
        new_B = np.asarray(token_B)
        for text, token in zip(texts, new_B.tolist(), strict=True):
            text.append(token)
        yield new_B
        if not fits and i < n_new:
            # Past the block's end each token shifts the window by one and so changes every position embedding, which
            # invalidates the cache, so the model reads the whole window, as documented.
            next_B, _, seen_BV = read_windows(i, seen_BV)
        token_B = next_B


@dataclass(frozen=True)
class _Choice:
    """How a token is chosen: what of a `SamplingConfig` is compiled into the program."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float

    @classmethod
    def of(cls, sampling: SamplingConfig) -> "_Choice":
        temperature = sampling.temperature if sampling.temperature >= 1e-6 else 0.0
        return cls(temperature, sampling.top_k, sampling.top_p, sampling.min_p, sampling.repetition_penalty)


class _Steps(NamedTuple):
    """The compiled functions of one model and one way to choose."""

    prefill: Callable[..., tuple[Array, Cache, Array | None]]
    decode: Callable[..., tuple[Array, Cache, Array | None]]


@lru_cache(4)
def _compiled(model: Callable[[Params], GPT], config: ModelConfig, choice: _Choice) -> _Steps:
    """The compiled steps. Cached, because training samples again and again."""

    def next_token(bound: GPT, x_BC: Array, key_B: Array, i: Array, seen_BV: Array | None):
        """The i-th new token of each row, int32 [B], from the hidden states [B, C]; and `seen_BV` with it."""
        logits_BV = next_logits(bound, x_BC)
        if seen_BV is not None:
            penalize = partial(penalize_repetition, penalty=choice.repetition_penalty)
            logits_BV = jax.vmap(penalize)(logits_BV, seen_BV)
        vocab_size = logits_BV.shape[-1]
        top_k = min(choice.top_k or vocab_size, vocab_size)
        pick = partial(choose, temperature=choice.temperature, top_k=top_k, top_p=choice.top_p, min_p=choice.min_p)
        step_key_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, i)
        token_B = jax.vmap(pick)(logits_BV, step_key_B).astype(jnp.int32)
        if seen_BV is not None:
            seen_BV = seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)
        return token_B, seen_BV

    @partial(jax.jit, static_argnums=6)
    def prefill(
        params: Params, window_BW: Array, length_B: Array, key_B: Array, i: Array, seen_BV: Array | None, length: int
    ):
        """The tokens after the first `length_B` of padded windows, and the windows' cache, of `length` positions."""
        bound = model(params)
        cache = empty_cache(params, config, len(window_BW), length)
        x_BWC, cache = bound.hidden(window_BW, cache=cache)
        x_BC = jnp.take_along_axis(x_BWC, (length_B - 1)[:, None, None], axis=1)[:, 0]
        token_B, seen_BV = next_token(bound, x_BC, key_B, i, seen_BV)
        return token_B, cache, seen_BV

    @partial(jax.jit, donate_argnums=2)
    def decode(
        params: Params, token_B: Array, cache: Cache, at_B: Array, key_B: Array, i: Array, seen_BV: Array | None
    ):
        """The tokens after `token_B` at the positions `at_B`; the cache holds what is before."""
        bound = model(params)

        # By rows, also where all positions are the same: the update of the cache is then a scatter, which XLA does in
        # place. A slice that it updates it fuses on a CPU with what reads the cache, which it copies for that.
        def hidden_of_row(token: Array, cache_of_row: Cache, at: Array) -> tuple[Array, Cache]:
            one_row = jax.tree.map(lambda x_SHD: x_SHD[None], cache_of_row)
            x_11C, one_row = bound.hidden(token[None, None], cache=one_row, start=at)
            return x_11C[0, 0], jax.tree.map(lambda x_1SHD: x_1SHD[0], one_row)

        x_BC, new_cache = jax.vmap(hidden_of_row)(token_B, cache, at_B)
        token_B, seen_BV = next_token(bound, x_BC, key_B, i, seen_BV)
        return token_B, new_cache, seen_BV

    return _Steps(prefill, decode)


@lru_cache(4)
def _row_keys(seeds: tuple[int, ...]) -> Array:
    """The random key of each row."""
    return jnp.stack([rng.stream_key(seed, rng.SAMPLE) for seed in seeds])


def _seen(texts: Sequence[Sequence[int]], vocab_size: int) -> Array:
    """Which tokens each text holds, bool [B, V]."""
    seen_BV = np.zeros((len(texts), vocab_size), bool)
    for row_V, text in zip(seen_BV, texts, strict=True):
        row_V[text] = True
    return jnp.asarray(seen_BV)


def rounded_up(length: int, block_size: int) -> int:
    """A power of two of at least `length`, or a block if that is less: so that few lengths are compiled.

    The model reads no more than it must: of a block of 1,024 positions a short text would leave most empty.
    """
    return min(max(MIN_LENGTH, 1 << (length - 1).bit_length()), block_size)


def empty_cache(params: Params, config: ModelConfig, n_rows: int, length: int | None = None) -> Cache:
    """A key/value cache of zeros: per layer, keys and values [B, S, H, D] in the parameters' dtype.

    Args:
        length: S, how many positions; a block by default.
    """
    shape = (n_rows, length or config.block_size, config.n_head, config.n_embd // config.n_head)
    dtype = params["token_emb.embedding"].dtype
    return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.n_layer)]
