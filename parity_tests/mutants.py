"""The mutants of this GPT: faults patched into the JAX side alone, and the probe that must catch each.

`scripts/parity.py --mutants` prints what each probe said.
"""

import dataclasses
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

from jaxgpt import objective, optimizer, train_step, trainer
from jaxgpt.analysis import diagnostics
from jaxgpt.data import labeled, sampler, token_cache
from jaxgpt.errors import UserError
from jaxgpt.interop import torch_names
from jaxgpt.model import attention, fused_ops, gpt, loss
from jaxgpt.model.gpt import GPT
from jaxgpt.objective import LanguageModelingObjective
from jaxgpt.parity import mutants as engine
from jaxgpt.parity.harness import Row
from jaxgpt.parity.mutants import Mutant, put, wrap
from parity_tests import device_faults, faults
from parity_tests.probes import PROBES

MODEL, UPDATE = ("model", "block", "trajectory"), ("optimizer", "trajectory")

MUTANTS = [
    # The rows of the first table of docs/parity.md.
    Mutant(
        "products rounded to TF32",
        faults.linear_call(lambda x, w, b: faults.rounded(x, 10) @ faults.rounded(w, 10) + b),
        ("ops", *MODEL),
    ),
    Mutant("float64 model with float32 weights", wrap(objective, "bind", faults.float32_params), ("model",)),
    Mutant("LayerNorm eps 1e-6", faults.layer_norm(epsilon=1e-6), ("ops", *MODEL)),
    Mutant(
        "LayerNorm variance as E[x^2] - E[x]^2",
        faults.layer_norm(use_fast_variance=True),
        ("ops float32", "ops", "model"),
    ),
    Mutant(
        "LayerNorm's gradient with its variance held constant",
        wrap(fused_ops, "layer_norm", faults.variance_held),
        ("ops", *MODEL),
    ),
    Mutant(
        "GELU tanh for erf, erf for tanh",
        wrap(gpt, "gelu", lambda real: lambda x, kind: real(x, {"erf": "tanh", "tanh": "erf"}[kind])),
        ("ops", *MODEL),
    ),
    Mutant("square kernels transposed", faults.linear_call(faults.square_transposed), ("ops", *MODEL)),
    Mutant("Linear without bias", faults.linear_call(lambda x, w, b: x @ w), ("ops", *MODEL)),
    Mutant(
        "bias initialised to 0",
        put(gpt, "linear_bias_init", lambda config, fan_in: nnx.initializers.zeros_init()),
        ("initial_weights",),
    ),
    Mutant(
        "weights initialised as in Flax",
        put(gpt, "weight_init", nnx.initializers.lecun_normal()),
        ("initial_weights",),
    ),
    Mutant(
        "GPT-2's residual scaling left out",
        put(gpt, "residual_init", lambda config: gpt.weight_init),
        ("initial_weights",),
    ),
    Mutant(
        "ids outside the vocabulary clamped",
        put(nnx.Embed, "__call__", lambda self, idx: jnp.take(self.embedding[...], idx, axis=0, mode="clip")),
        ("out_of_range",),
    ),
    Mutant(
        "cross-entropy of bfloat16 logits",
        wrap(loss, "cross_entropy", lambda real: lambda x, *rest: real(x.astype(jnp.bfloat16).astype(x.dtype), *rest)),
        ("ops", "model", "trajectory"),
    ),
    Mutant(
        "sum in place of the mean",
        wrap(LanguageModelingObjective, "loss_sum", faults.sum_for_mean),
        ("model", "trajectory"),
    ),
    Mutant(
        "a chunk's gradient for the sum of all",
        wrap(loss._chunked_loss, "fwd", faults.last_chunk_only),
        ("ops",),
    ),
    Mutant(
        "the loss's gradient not scaled",
        put(loss._chunked_loss, "bwd", lambda V, dtype, grads, scale: (*grads, None)),
        ("ops",),
    ),
    Mutant("the wider head's padding in the loss", wrap(loss, "_loss_of_logits", faults.padding_counts), ("ops",)),
    Mutant(
        "ragged last batch counted as full",
        wrap(objective, "head_cross_entropy", faults.every_target_counts),
        ("whole_split",),
    ),
    Mutant(
        "decay 1e-4, optax's default",
        wrap(optax, "add_decayed_weights", lambda real: lambda decay, mask=None: real(1e-4, mask)),
        UPDATE,
    ),
    Mutant("decay added to the gradient", put(optimizer, "_update_rule", faults.coupled_decay), UPDATE),
    Mutant("no bias correction", faults.adam_without_correction, UPDATE),
    Mutant("optax's bias correction in float32", put(optimizer, "scale_by_adam", optax.scale_by_adam), UPDATE),
    Mutant("epsilon inside the root", faults.adam_eps_inside_root, UPDATE),
    Mutant(
        "clip divides by norm + 1e-6",
        faults.clip(lambda g, c, n: g * jnp.minimum(1, c / (n + 1e-6))),
        ("clip", "trajectory"),
    ),
    Mutant(
        "clip of each tensor by itself",
        faults.clip(lambda g, c, n: g * jnp.minimum(1, c / jnp.sqrt((g**2).sum()))),
        ("clip", "trajectory"),
    ),
    Mutant("clip also scales up", faults.clip(lambda g, c, n: g * (c / n)), ("clip", "trajectory")),
    Mutant(
        "warm-up from 1",
        wrap(optimizer, "optax_schedule", lambda real: lambda config: lambda count: real(config)(count + 1)),
        ("schedules", *UPDATE),
    ),
    Mutant(
        "learning rate one step late",
        wrap(optimizer, "optax_schedule", lambda real: lambda c: lambda count: real(c)(jnp.maximum(count - 1, 0))),
        ("schedules", *UPDATE),
    ),
    Mutant("cosine in float32", put(optimizer, "optax_schedule", faults.float32_cosine), ("schedules", *UPDATE)),
    Mutant(
        "decay_steps without the warm-up",
        wrap(optimizer, "learning_rate", faults.decay_steps_after_warmup),
        ("schedules", *UPDATE),
    ),
    Mutant(
        "one dropout mask for all rows",
        wrap(gpt, "keep_mask", lambda real: lambda keys, *rest: real(jnp.repeat(keys[:1], len(keys)), *rest)),
        ("dropout", "model, dropout", "trajectory"),
    ),
    Mutant(
        "one dropout mask for all layers",
        wrap(gpt, "keep_mask", lambda real: lambda keys, site, *rest: real(keys, 0, *rest)),
        ("dropout", "model, dropout", "trajectory"),
    ),
    Mutant(
        "one dropout mask for all steps",
        wrap(
            LanguageModelingObjective,
            "dropout_keys",
            lambda real: lambda self, step, *rows: real(self, jnp.int32(0), *rows),
        ),
        ("dropout", "trajectory"),
    ),
    Mutant(
        "dropout without its scale",
        wrap(gpt, "dropout", lambda real: lambda x, rate, *rest: jnp.where(real(x, rate, *rest) == 0, 0, x)),
        ("dropout", "model, dropout", "trajectory"),
    ),
    Mutant(
        "dropout keeps with the rate",
        wrap(gpt, "keep_mask", lambda real: lambda keys, site, shape, rate: real(keys, site, shape, 1 - rate)),
        ("dropout", "model, dropout", "trajectory"),
    ),
    Mutant(
        "attention dropout left out",
        wrap(gpt, "dropout", lambda real: lambda x, *rest: x if x.ndim == 4 else real(x, *rest)),
        ("model, attention dropout",),
    ),
    Mutant("layer_norm_eps reaches no norm", faults.layer_norm(), ("model, attention dropout",)),
    Mutant("residual stream in bfloat16", faults.block_call(faults.bfloat16_stream), ("bfloat16", "block", "model")),
    Mutant("biases added in bfloat16, as in nnx.Linear", put(gpt, "Linear", nnx.Linear), ("bfloat16",)),
    Mutant("GELU in bfloat16", wrap(gpt, "gelu", faults.gelu_in_bfloat16), ("bfloat16", "ops")),
    Mutant("gradients in float32", wrap(train_step, "accumulate", faults.float32_gradients), ("model",)),
    Mutant("NaN in a key bias' gradient", wrap(train_step, "accumulate", faults.nan_in_key_bias), ("model",)),
    Mutant("key bias with a gradient", faults.scores(faults.softmax_with_sink), ("model", "ops")),
    Mutant(
        "small gradients flushed to 0", wrap(optimizer, "scale_by_adam", faults.flushed_gradients), ("tiny_gradients",)
    ),
    Mutant(
        "Gumbel noise with the wrong sign",
        put(jax.random, "categorical", lambda key, x: jnp.argmax(x - jax.random.gumbel(key, x.shape, x.dtype))),
        ("g_test", "text"),
    ),
    # The list below it, and more.
    Mutant(
        "sign-flipped update",
        wrap(optax, "scale_by_learning_rate", lambda real: lambda rate: real(rate, flip_sign=False)),
        UPDATE,
    ),
    Mutant(
        "decay mask: all",
        wrap(optimizer, "decay_mask", lambda real: lambda p, which: real(p, "all")),
        ("decay_mask", *UPDATE),
    ),
    Mutant(
        "decay mask: no embeddings", wrap(optimizer, "decay_mask", faults.without_embeddings), ("decay_mask", *UPDATE)
    ),
    Mutant(
        "causal mask off by one: sees the next",
        wrap(gpt, "causal_attention", lambda real: lambda q, k, v, s, i: real(q, k, v, s + 1, i)),
        ("ops", *MODEL),
    ),
    Mutant("causal mask off by one: not itself", faults.scores(faults.softmax_without_itself), ("ops", *MODEL)),
    Mutant("NaN in one element", faults.logits(lambda x: x.at[(0,) * x.ndim].set(jnp.nan)), ("model", "trajectory")),
    Mutant(
        "query and key swapped",
        wrap(gpt, "causal_attention", lambda real: lambda q, k, v, s, i: real(k, q, v, s, i)),
        ("ops", *MODEL),
    ),
    Mutant("softmax in bfloat16", faults.scores(faults.softmax_in_bfloat16), ("bfloat16", "ops", *MODEL)),
    Mutant(
        "scale 1/sqrt(C)", faults.scores(lambda s, seen, D, C: faults.masked_softmax(s, seen, C**-0.5)), ("ops", *MODEL)
    ),
    Mutant("heads split as [D, H]", wrap(gpt, "causal_attention", faults.heads_interleaved), ("ops", *MODEL)),
    Mutant("a missing residual", faults.block_call(faults.without_mlp_residual), ("block", "model")),
    Mutant("norm after the branch", faults.block_call(faults.post_norm), ("block", "model")),
    Mutant("positions from 1", put(nnx.Embed, "__call__", faults.positions_from_1), ("model", "text")),
    Mutant(
        "no final norm",
        wrap(GPT, "hidden", faults.without_final_norm),
        ("model", "trajectory"),
    ),
    Mutant(
        "tied head without its gradient", put(GPT, "head_CV", property(faults.tied_head_cut)), ("model, tied head",)
    ),
    Mutant(
        "targets not shifted",
        wrap(sampler, "inputs_and_targets", lambda real: lambda window: (real(window)[0],) * 2),
        ("trajectory", "whole_split"),
    ),
    Mutant(
        "the next step's batch",
        wrap(sampler, "window_starts", lambda real: lambda key, step, *rest: real(key, step + 1, *rest)),
        ("trajectory",),
    ),
    Mutant("perplexity as 2 to the loss", put(loss, "perplexity", lambda mean: 2**mean), ("model",)),
    Mutant(
        "Nesterov momentum",
        wrap(optax, "sgd", lambda real: lambda lr, m=None: real(lr, m, nesterov=True)),
        ("optimizer",),
    ),
    Mutant("temperature left out", faults.choose(lambda vocab_size, t, k, p: (1.0, k, p)), ("g_test", "text")),
    Mutant(
        "top-k one too many",
        faults.choose(lambda vocab_size, t, k, p: (t, min(k + 1, vocab_size), p)),
        ("g_test", "text"),
    ),
    Mutant("top-p left out", faults.choose(lambda vocab_size, t, k, p: (t, k, 1.0)), ("g_test", "text")),
    Mutant(
        "cached token at the next position",
        faults.hidden(lambda idx, keys, cache, start: (idx, keys, cache, start + (idx.shape[1] == 1))),
        ("text",),
    ),
    Mutant(
        "conversion without transposing",
        wrap(torch_names, "_transposed", faults.square_as_it_is),
        ("conversion", "model"),
    ),
    Mutant("conversion with moments swapped", faults.moments_swapped, ("resume_across", "conversion")),
    Mutant(
        "conversion with the count off by one",
        wrap(torch_names, "optimizer_from_torch", faults.count_off_by_one),
        ("resume_across", "conversion"),
    ),
    Mutant(
        "packed documents see each other",
        wrap(gpt, "causal_attention", faults.documents_not_separated),
        ("packed documents",),
    ),
    Mutant(
        "splash attention's documents see each other",
        wrap(attention, "_splash_kernels", lambda real: lambda q, k, v, documents, *rest: real(q, k, v, None, *rest)),
        ("splash attention",),
    ),
    Mutant(
        "splash attention sees the next token",
        wrap(splash_attention_mask, "CausalMask", lambda real: lambda shape: real(shape, offset=1)),
        ("splash attention",),
    ),
    Mutant(
        "splash attention without its scale",
        wrap(
            attention,
            "_splash_kernels",
            lambda real: lambda q, *rest: real(q * q.shape[-1] ** 0.5, *rest),
        ),
        ("splash attention",),
    ),
    Mutant("positions go on over documents", wrap(sampler, "documents", faults.positions_go_on), ("packed documents",)),
    Mutant(
        "the end of a text begins the next",
        wrap(sampler, "documents", faults.ends_of_texts_one_late),
        ("packed documents",),
    ),
    Mutant(
        "loss over the ends of texts",
        wrap(objective, "head_cross_entropy", faults.every_target_counts),
        ("packed documents", "packing"),
    ),
    Mutant(
        "every epoch in one order", wrap(sampler.BatchSampler, "_starts", faults.one_order_for_all_epochs), ("packing",)
    ),
    Mutant(
        "chunks at stride T + 1", wrap(sampler.BatchSampler, "_starts", faults.chunks_beside_each_other), ("packing",)
    ),
    Mutant(
        "a stride's overlap counted again", wrap(sampler, "whole_split", faults.overlap_counted_again), ("packing",)
    ),
    Mutant(
        "mean over tokens for the mean of batches",
        put(loss, "mean_of_batches", lambda sums: float(sums[:, 0].sum() / sums[:, 1].sum())),
        ("packing",),
    ),
    Mutant("train and validation cut at 80 %", put(token_cache, "TRAIN_FRACTION", 0.8), ("data",)),
    Mutant(
        "documents without an end of text", wrap(token_cache, "make_tokenizer", faults.without_end_of_text), ("data",)
    ),
    Mutant(
        "documents of exactly --min-chars kept", wrap(token_cache, "split_tokens", faults.short_texts_kept), ("data",)
    ),
    Mutant(
        "the first fifth as the holdout split",
        put(labeled, "holdout_split", lambda texts: (texts[len(texts) // 5 :], texts[: len(texts) // 5])),
        ("data",),
    ),
    Mutant("pooled at the padding", faults.pooled(lambda length, pool, T: (length, "last")), ("classification",)),
    Mutant("pooled one token early", faults.pooled(lambda length, pool, T: (length - 1, pool)), ("classification",)),
    Mutant(
        "mean over the padding too",
        faults.pooled(lambda length, pool, T: (length * 0 + T, pool)),
        ("classification, mean",),
    ),
    Mutant(
        "padding rows count",
        wrap(objective, "cross_entropy", lambda real: lambda logits, label, weight=None: real(logits, label)),
        ("classification", "classification, accuracy"),
    ),
    Mutant(
        "Adam with AdamW's decay",
        wrap(
            optimizer,
            "_update_rule",
            lambda real: (
                lambda c, rate: real(dataclasses.replace(c, optimizer="adamw") if c.optimizer == "adam" else c, rate)
            ),
        ),
        ("optimizer",),
    ),
    Mutant(
        "standard deviation over n",
        wrap(jnp, "std", lambda real: lambda g, ddof: real(g)),
        ("gradient_report",),
    ),
    Mutant(
        "gradient report of the next batch",
        wrap(
            diagnostics,
            "gradient_flow",
            lambda real: lambda p, s, source, ctx: real(p, s, source._replace(start_KB=source.start_KB + 1), ctx),
        ),
        ("gradient_report",),
    ),
    Mutant(
        "maps of keys over queries",
        wrap(gpt, "attention_weights", lambda real: lambda q, k: real(k, q)),
        ("maps",),
    ),
    Mutant(
        "a loss as good as the best counts as better",
        wrap(trainer, "reports_without_gain", lambda real: lambda losses, delta: real(losses, delta - 1e-9)),
        ("early_stopping",),
    ),
    Mutant(
        "c_attn split as key, query, value", wrap(torch_names, "tutorial_names", faults.key_before_query), ("gpt2",)
    ),
    *(Mutant(name, patch, ("devices",)) for name, patch in device_faults.FAULTS.items()),
    *(Mutant(name, patch, ("sharded state",)) for name, patch in device_faults.SHARD_FAULTS.items()),
]


def find(name: str) -> Mutant:
    """The mutant of that name, or the only one whose name contains it. Raises `UserError`."""
    try:
        return engine.find(MUTANTS, name)
    except LookupError as e:
        raise UserError(f"--mutant {name}: {e}") from None


def planted(name: str) -> AbstractContextManager[Any]:
    """A context with the fault of that name in place."""
    return find(name).patch()


def run(name: str) -> tuple[str, dict[str, Row]]:
    """The mutant's name and the worst row of each of its probes. Takes the name: a mutant cannot be pickled."""
    return name, engine.run(find(name), PROBES)
