"""Faults of the model, the step, the optimizer and the data: patches of the JAX side. `mutants.py` has the list."""

import dataclasses
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxgpt import optimizer
from jaxgpt.data import sampler
from jaxgpt.interop import torch_names
from jaxgpt.model import gpt, loss, sampling
from jaxgpt.model.gpt import GPT, Block, Linear
from jaxgpt.objective import LanguageModelingObjective
from jaxgpt.parity.mutants import Patch, put, together, wrap


def layer_norm(**changes: Any) -> Patch:
    def mutated(config: Any, numerics: Any, rngs: Any) -> nnx.LayerNorm:
        dtype = numerics.param_dtype
        options = {"epsilon": 1e-5, "use_bias": config.bias, "use_fast_variance": False, **changes}
        return nnx.LayerNorm(config.n_embd, dtype=dtype, param_dtype=dtype, rngs=rngs, **options)

    return put(gpt, "layer_norm", mutated)


def variance_held(_: Any) -> Any:
    def mutated(x: Any, scale: Any, bias: Any, epsilon: float) -> Any:
        factor = jax.lax.stop_gradient(jax.lax.rsqrt(x.var(-1, keepdims=True) + epsilon))
        scaled = (x - x.mean(-1, keepdims=True)) * factor * scale
        return scaled if bias is None else scaled + bias

    return mutated


def scores(change: Callable[..., Any]) -> Patch:
    """Attention written out once more, with a change: (scores before the mask, mask, head size, width) -> weights."""

    def mutated(q: Any, k: Any, v: Any, start: Any, implementation: str, document: Any = None) -> Any:
        score = jnp.einsum("BTHD,BSHD->BHTS", q, k)
        seen = jnp.arange(k.shape[1]) <= start + jnp.arange(q.shape[1])[:, None]
        if document is not None:
            seen = seen & (document[:, None, :, None] == document[:, None, None, :])
        return jnp.einsum(
            "BHTS,BSHD->BTHD", change(score, seen, q.shape[3], q.shape[2] * q.shape[3]).astype(v.dtype), v
        )

    return put(gpt, "causal_attention", mutated)


def masked_softmax(score: Any, seen: Any, scale: float) -> Any:
    return jax.nn.softmax(jnp.where(seen, score * scale, -jnp.inf), axis=-1)


def softmax_in_bfloat16(score: Any, seen: Any, head_size: int, width: int) -> Any:
    score = jnp.where(seen, score * head_size**-0.5, -jnp.inf).astype(jnp.bfloat16)
    return jax.nn.softmax(score, axis=-1)


def softmax_with_sink(score: Any, seen: Any, head_size: int, width: int) -> Any:
    weight = jnp.where(seen, jnp.exp(score * head_size**-0.5), 0)
    return weight / (1 + weight.sum(-1, keepdims=True))


def rounded(x: Any, mantissa_bits: int) -> Any:
    """Rounded to fewer mantissa bits, as tensor cores round float32 operands to 10 (TF32)."""
    fraction, exponent = jnp.frexp(x)
    return jnp.ldexp(jnp.round(fraction * 2 ** (mantissa_bits + 1)) / 2 ** (mantissa_bits + 1), exponent)


def linear_call(change: Callable[[Any, Any, Any], Any]) -> Patch:
    """Linear with a change: (input, kernel, bias) -> output."""
    return put(
        Linear,
        "__call__",
        lambda self, x: change(x, self.kernel[...], 0 if self.bias is None else self.bias[...]),
    )


def square_transposed(x: Any, kernel: Any, bias: Any) -> Any:
    return x @ (kernel.T if kernel.shape[0] == kernel.shape[1] else kernel) + bias


def block_call(change: Callable[..., Any]) -> Patch:
    """Block with a change: (block, x, its attention, its dropout by site 1 and 2) -> x."""

    def call(self: Block, x: Any, n_rows: int, row_key_B: Any, cache: Any, start: Any, document_BT: Any = None) -> Any:
        drop = lambda branch, site: gpt.dropout(branch, self.dropout, row_key_B, 2 * self.index + site)  # noqa: E731
        return change(self, x, lambda x: self.attn(x, n_rows, cache, start, document_BT, row_key_B)[0], drop), cache

    return put(Block, "__call__", call)


def without_mlp_residual(self: Block, x: Any, attn: Any, drop: Any) -> Any:
    x = x + drop(attn(self.ln1(x)), 1)
    return drop(self.mlp(self.ln2(x)), 2)


def post_norm(self: Block, x: Any, attn: Any, drop: Any) -> Any:
    x = self.ln1(x + drop(attn(x), 1))
    return self.ln2(x + drop(self.mlp(x), 2))


def bfloat16_stream(self: Block, x: Any, attn: Any, drop: Any) -> Any:
    x = (x + drop(attn(self.ln1(x)), 1)).astype(jnp.bfloat16).astype(x.dtype)
    return x + drop(self.mlp(self.ln2(x)), 2)


def logits(change: Callable[[Any], Any]) -> Patch:
    def wrapper(real: Any) -> Any:
        return lambda x, head, dtype: change(real(x, head, dtype))

    return together(wrap(gpt, "head_logits", wrapper), wrap(loss, "head_logits", wrapper))


def every_target_counts(real: Any) -> Any:
    return lambda x, head, target, counts=None, **how: real(x, head, target, None, **how)


def padding_counts(real: Any) -> Any:
    return lambda logits, data, n_vocab: real(logits, data, logits.shape[-1])


def last_chunk_only(real: Any) -> Any:
    def mutated(x: Any, head: Any, data: Any, n_vocab: int, dtype: Any) -> Any:
        sums, (grad_x, _) = real(x, head, data, n_vocab, dtype)
        last = jax.tree.map(lambda a: a[-1:], (x, data))
        return sums, (grad_x, real(last[0], head, last[1], n_vocab, dtype)[1][1])

    return mutated


def sum_for_mean(real: Any) -> Any:
    def mutated(self: LanguageModelingObjective, *args: Any, **kwargs: Any) -> Any:
        loss_sum, count = real(self, *args, **kwargs)
        return loss_sum, jnp.ones_like(count)

    return mutated


def adam_eps_inside_root() -> AbstractContextManager[Any]:
    real = optax.scale_by_adam
    return patch.object(optimizer, "scale_by_adam", lambda b1, b2, eps: real(b1, b2, eps=0.0, eps_root=eps))


def adam_without_correction() -> AbstractContextManager[Any]:
    def mutated(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
        real = optax.scale_by_adam(b1, b2, eps)

        def update(grads: Any, state: Any, params: Any = None) -> Any:
            _, state = real.update(grads, state, params)
            return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), state.mu, state.nu), state

        return optax.GradientTransformation(real.init, update)

    return patch.object(optimizer, "scale_by_adam", mutated)


def flushed_gradients(real: Any) -> Any:
    def mutated(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
        adam = real(b1, b2, eps)
        flush = lambda grads: jax.tree.map(lambda g: jnp.where(jnp.abs(g) < 1e-12, 0, g), grads)  # noqa: E731
        return optax.GradientTransformation(
            adam.init, lambda g, state, params=None: adam.update(flush(g), state, params)
        )

    return mutated


def coupled_decay(config: Any, schedule: Any) -> optax.GradientTransformation:
    adam = optimizer.scale_by_adam(config.beta1, config.beta2, config.eps)
    mask = lambda params: optimizer.decay_mask(params, config.decay_mask)  # noqa: E731
    return optax.chain(optax.add_decayed_weights(config.decay, mask), adam, optax.scale_by_learning_rate(schedule))


def clip(change: Callable[[Any, float, Any], Any]) -> Patch:
    """The clip with a change: (gradient, limit, global norm) -> gradient."""

    def mutated(limit: float) -> optax.GradientTransformation:
        def update(grads: Any, state: Any, params: Any = None) -> Any:
            norm = optax.tree.norm(grads)
            return jax.tree.map(lambda g: change(g, limit, norm), grads), state

        return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

    return put(optimizer, "clip_by_global_norm", mutated)


def float32_cosine(config: Any) -> Any:
    if config.schedule == "constant":
        return optax.constant_schedule(config.lr)
    warmup, end = config.warmup_steps, config.cosine_end

    def schedule(count: Any) -> Any:
        count = count.astype(jnp.float32)
        progress = jnp.clip((count - warmup) / (end - warmup), 0, 1)
        cosine = config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + jnp.cos(jnp.float32(jnp.pi) * progress))
        return jnp.where(count < warmup, config.lr * count / max(warmup, 1), cosine)

    return schedule


def decay_steps_after_warmup(real: Any) -> Any:
    return lambda config, step: real(
        dataclasses.replace(config, decay_steps=config.cosine_end + config.warmup_steps)
        if config.schedule == "warmup-cosine"
        else config,
        step,
    )


def without_embeddings(real: Any) -> Any:
    return lambda params, which: {n: on and (which == "all" or "emb" not in n) for n, on in real(params, which).items()}


def hidden(change: Callable[..., Any]) -> Patch:
    """GPT.hidden with a change of its arguments: (idx, keys, cache, start) -> the same."""

    def wrapper(real: Any) -> Any:
        def mutated(self: GPT, idx: Any, keys: Any = None, cache: Any = None, start: Any = 0, **packed: Any) -> Any:
            return real(self, *change(idx, keys, cache, start), **packed)

        return mutated

    return wrap(GPT, "hidden", wrapper)


def choose(change: Callable[..., Any]) -> Patch:
    """`sampling.choose` with a change: (vocabulary, temperature, top_k, top_p) -> the last three."""

    def wrapper(real: Any) -> Any:
        def mutated(logits_V: Any, key: Any, temperature: Any, top_k: Any, top_p: Any, min_p: Any = 0.0) -> Any:
            return real(logits_V, key, *change(len(logits_V), temperature, top_k, top_p), min_p)

        return mutated

    return wrap(sampling, "choose", wrapper)


def heads_interleaved(real: Any) -> Any:
    """Heads split as [D, H] in place of [H, D], and put together as they should be."""

    def mutated(q: Any, k: Any, v: Any, *rest: Any) -> Any:
        B, T, H, D = q.shape
        q, k, v = (a.reshape(B, T, D, H).swapaxes(2, 3) for a in (q, k, v))
        return real(q, k, v, *rest)

    return mutated


def float32_params(real: Any) -> Any:
    def mutated(*args: Any) -> Any:
        bound = real(*args)
        return lambda params, *rest: bound({name: p.astype(jnp.float32) for name, p in params.items()}, *rest)

    return mutated


def tied_head_cut(self: GPT) -> Any:
    assert self.lm_head is None
    return jax.lax.stop_gradient(self.token_emb.embedding[...].T)


def square_as_it_is(real: Any) -> Any:
    """Square kernels not transposed, whose shape is the same either way."""
    return lambda name, p: p if p.ndim == 2 and p.shape[0] == p.shape[1] else real(name, p)


def key_before_query(real: Any) -> Any:
    def mutated(state_dict: Any) -> Any:
        tensors = real(state_dict)
        swap = {"Wq": "Wk", "Wk": "Wq"}
        return {re.sub("Wq|Wk", lambda m: swap[m[0]], name): p for name, p in tensors.items()}

    return mutated


def positions_from_1(self: nnx.Embed, idx: Any) -> Any:
    """Position embeddings, which are looked up by a plain range, one later; the last stays in the table."""
    table = self.embedding[...]
    return table[jnp.minimum(idx + 1, len(table) - 1) if idx.ndim == 1 else idx]


def softmax_without_itself(score: Any, seen: Any, head_size: int, width: int) -> Any:
    earlier = jnp.roll(seen, 1, axis=0).at[0].set(seen[0])  # the first query sees itself, or it would see nothing
    return masked_softmax(score, earlier, head_size**-0.5)


def gelu_in_bfloat16(real: Any) -> Any:
    return lambda x, kind: real(x.astype(jnp.bfloat16), kind).astype(x.dtype)


def float32_gradients(real: Any) -> Any:
    def mutated(*args: Any) -> Any:
        (loss, count), grads = real(*args)
        # The count too: it is exact in float32, and as float64 it would make the quotients float64 again.
        return (loss, count.astype(jnp.float32)), jax.tree.map(lambda g: g.astype(jnp.float32), grads)

    return mutated


def nan_in_key_bias(real: Any) -> Any:
    """One element of the last block's key bias gradient is NaN."""

    def mutated(*args: Any) -> Any:
        loss_and_count, grads = real(*args)
        name = max(name for name in grads if name.endswith("Wk.bias"))
        return loss_and_count, {**grads, name: grads[name].at[0].set(jnp.nan)}

    return mutated


def count_off_by_one(real: Any) -> Any:
    return lambda tensors, like: real({**tensors, "step": np.asarray(tensors["step"]) + 1}, like)


def moments_swapped() -> AbstractContextManager[Any]:
    return patch.dict(torch_names._MOMENTS, {"mu": "exp_avg_sq", "nu": "exp_avg"})


def documents_not_separated(real: Any) -> Any:
    return lambda *arguments: real(*arguments[:5])


def positions_go_on(real: Any) -> Any:
    def mutated(idx: Any, end_of_text: int) -> Any:
        return real(idx, end_of_text)[0], jnp.broadcast_to(jnp.arange(idx.shape[1]), idx.shape)

    return mutated


def ends_of_texts_one_late(real: Any) -> Any:
    """A document's end-of-text token counted as the next one's first."""

    def mutated(idx: Any, end_of_text: int) -> Any:
        document, position = real(jnp.roll(idx, -1, axis=1), end_of_text)
        return document, position

    return mutated


def one_order_for_all_epochs(real: Any) -> Any:
    return lambda self, step: real(self, step % self.steps_per_epoch)


def chunks_beside_each_other(real: Any) -> Any:
    """At a stride of a block plus one: the target between two chunks is lost."""

    def mutated(self: Any, step: int) -> Any:
        start = real(self, step)
        return start // self.block_size * (self.block_size + 1) % (start.max() + 1)

    return mutated


def overlap_counted_again(real: Any) -> Any:
    def mutated(*arguments: Any) -> Any:
        for window, counts in real(*arguments):
            yield sampler.EvalBatch(window, counts | counts.any(1, keepdims=True))

    return mutated


def without_end_of_text(real: Any) -> Any:
    def mutated(*arguments: Any) -> Any:
        tokenizer = real(*arguments)
        tokenizer.end_of_text = None
        return tokenizer

    return mutated


def short_texts_kept(real: Any) -> Any:
    """Documents of exactly --min-chars characters are kept, where they must be longer."""

    def mutated(corpus: Any, tokenizer: Any, config: Any, *rest: Any) -> Any:
        config = dataclasses.replace(config, min_chars=max(config.min_chars - 1, 0))
        return real(corpus, tokenizer, config, *rest)

    return mutated


def pooled(change: Callable[..., Any]) -> Patch:
    """Classifier with a change of (lengths, pool, padded length) -> (lengths, pool)."""

    def wrapper(real: Any) -> Any:
        def mutated(self: Any, idx: Any, length: Any, pool: str, keys: Any = None) -> Any:
            return real(self, idx, *change(length, pool, idx.shape[1]), keys)

        return mutated

    return wrap(gpt.GPTClassifier, "__call__", wrapper)


def without_final_norm(real: Any) -> Any:
    def mutated(self: GPT, *args: Any, **packed: Any) -> Any:
        with patch.object(self, "ln_f", lambda x: x):
            return real(self, *args, **packed)

    return mutated
