"""Faults, each patched into the JAX side alone, that the ladder must catch with a signal of at least ten gates.

The rungs are trusted because they are shown to fail. A mutant names the rungs that are run on it, the one that must
catch it first; `scripts/parity.py --mutants` prints what each said.
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxgpt import batches, classifier, convert, diagnostics, elementwise, loss, model, optimizer, train_step, trainer
from jaxgpt.errors import UserError
from jaxgpt.model import GPT
from jaxgpt.train_step import Program
from parity_tests import device_faults
from parity_tests.faults import (
    Patch,
    adam_eps_inside_root,
    adam_without_correction,
    bfloat16_stream,
    block_call,
    choose,
    chunks_beside_each_other,
    clip,
    count_off_by_one,
    coupled_decay,
    decay_steps_after_warmup,
    documents_not_told_apart,
    ends_of_texts_one_late,
    every_target_counts,
    float32_cosine,
    float32_gradients,
    float32_params,
    flushed_gradients,
    gelu_in_bfloat16,
    heads_interleaved,
    hidden,
    key_before_query,
    last_chunk_only,
    layer_norm,
    linear_call,
    logits,
    masked_softmax,
    moments_swapped,
    nan_in_key_bias,
    one_order_for_all_epochs,
    overlap_counted_again,
    padding_counts,
    pooled,
    positions_from_1,
    positions_go_on,
    post_norm,
    put,
    rounded,
    scores,
    softmax_in_bfloat16,
    softmax_with_sink,
    softmax_without_itself,
    spread_held,
    square_as_it_is,
    square_transposed,
    sum_for_mean,
    tied_head_cut,
    without_embeddings,
    without_final_norm,
    without_mlp_residual,
    wrap,
)
from parity_tests.harness import Row
from parity_tests.ladder import RAISED
from parity_tests.probes import probe

ENOUGH = 10.0  # gates


@dataclass(frozen=True)
class Mutant:
    """One fault. `rungs`: names of `PROBES`; the first must catch it."""

    name: str
    patch: Patch
    rungs: tuple[str, ...]


def find(name: str) -> Mutant:
    """The mutant of that name, or the only one whose name holds it. Raises `UserError`."""
    matching = [m for m in MUTANTS if name.lower() in m.name.lower()]
    matching = [m for m in matching if m.name == name] or matching
    if len(matching) != 1:
        names = "; ".join(m.name for m in matching or MUTANTS)
        raise UserError(f"--mutant {name}: {'several match' if matching else 'unknown'}; choose of: {names}")
    return matching[0]


def run(mutant: Mutant) -> dict[str, Row]:
    """The worst row of every rung that is run on the mutant."""
    with mutant.patch():
        return {rung: probe(rung) for rung in mutant.rungs}


def run_named(name: str) -> tuple[str, dict[str, Row]]:
    """`run` by name: what a process of the pool is told."""
    return name, run(find(name))


def caught(mutant: Mutant, rows: dict[str, Row]) -> bool:
    """Whether the rung that must catch it did, with enough signal."""
    row = rows[mutant.rungs[0]]
    return row.signal >= ENOUGH and row.rung != RAISED  # an error of another kind catches nothing


MODEL, UPDATE = ("model", "block", "trajectory"), ("optimizer", "trajectory")

MUTANTS = [
    # The rows of the first table of docs/parity.md.
    Mutant(
        "products rounded to TF32", linear_call(lambda x, w, b: rounded(x, 10) @ rounded(w, 10) + b), ("ops", *MODEL)
    ),
    Mutant("float64 model with float32 weights", wrap(train_step, "bind", float32_params), ("model",)),
    Mutant("LayerNorm eps 1e-6", layer_norm(epsilon=1e-6), ("ops", *MODEL)),
    Mutant(
        "LayerNorm variance as E[x^2] - E[x]^2", layer_norm(use_fast_variance=True), ("ops float32", "ops", "model")
    ),
    Mutant("LayerNorm's gradient with its spread held", wrap(elementwise, "layer_norm", spread_held), ("ops", *MODEL)),
    Mutant(
        "GELU tanh for erf, erf for tanh",
        wrap(model, "gelu", lambda real: lambda x, kind: real(x, {"erf": "tanh", "tanh": "erf"}[kind])),
        ("ops", *MODEL),
    ),
    Mutant("square kernels transposed", linear_call(square_transposed), ("ops", *MODEL)),
    Mutant("Linear without bias", linear_call(lambda x, w, b: x @ w), ("ops", *MODEL)),
    Mutant(
        "bias initialised to 0",
        put(model, "linear_bias_init", lambda config, fan_in: nnx.initializers.zeros_init()),
        ("initial_weights",),
    ),
    Mutant(
        "weights initialised as in Flax",
        put(model, "weight_init", nnx.initializers.lecun_normal()),
        ("initial_weights",),
    ),
    Mutant(
        "GPT-2's residual scaling left out",
        put(model, "residual_init", lambda config: model.weight_init),
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
    Mutant("sum in place of the mean", wrap(Program, "loss_and_grads", sum_for_mean), ("model", "trajectory")),
    Mutant(
        "a chunk's gradient for the sum of all",
        wrap(loss._chunked_loss, "fwd", last_chunk_only),
        ("ops",),
    ),
    Mutant(
        "the loss's gradient not scaled",
        put(loss._chunked_loss, "bwd", lambda V, dtype, grads, scale: (*grads, None)),
        ("ops",),
    ),
    Mutant("the wider head's padding in the loss", wrap(loss, "_loss_of_logits", padding_counts), ("ops",)),
    Mutant(
        "ragged last batch counted as full",
        wrap(train_step, "head_cross_entropy", every_target_counts),
        ("whole_split",),
    ),
    Mutant(
        "decay 1e-4, optax's default",
        wrap(optax, "add_decayed_weights", lambda real: lambda decay, mask=None: real(1e-4, mask)),
        UPDATE,
    ),
    Mutant("decay added to the gradient", put(optimizer, "_update_rule", coupled_decay), UPDATE),
    Mutant("no bias correction", adam_without_correction, UPDATE),
    Mutant("optax's bias correction in float32", put(optimizer, "scale_by_adam", optax.scale_by_adam), UPDATE),
    Mutant("epsilon inside the root", adam_eps_inside_root, UPDATE),
    Mutant(
        "clip divides by norm + 1e-6", clip(lambda g, c, n: g * jnp.minimum(1, c / (n + 1e-6))), ("clip", "trajectory")
    ),
    Mutant(
        "clip of each tensor by itself",
        clip(lambda g, c, n: g * jnp.minimum(1, c / jnp.sqrt((g**2).sum()))),
        ("clip", "trajectory"),
    ),
    Mutant("clip also scales up", clip(lambda g, c, n: g * (c / n)), ("clip", "trajectory")),
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
    Mutant("cosine in float32", put(optimizer, "optax_schedule", float32_cosine), ("schedules", *UPDATE)),
    Mutant(
        "decay_steps without the warm-up",
        wrap(optimizer, "learning_rate", decay_steps_after_warmup),
        ("schedules", *UPDATE),
    ),
    Mutant(
        "one dropout mask for all rows",
        wrap(model, "keep_mask", lambda real: lambda keys, *rest: real(jnp.repeat(keys[:1], len(keys)), *rest)),
        ("dropout", "model, dropout", "trajectory"),
    ),
    Mutant(
        "one dropout mask for all layers",
        wrap(model, "keep_mask", lambda real: lambda keys, site, *rest: real(keys, 0, *rest)),
        ("dropout", "model, dropout", "trajectory"),
    ),
    Mutant(
        "one dropout mask for all steps",
        wrap(Program, "dropout_keys", lambda real: lambda self, step, shards: real(self, jnp.int32(0), shards)),
        ("dropout", "trajectory"),
    ),
    Mutant(
        "dropout without its scale",
        wrap(model, "dropout", lambda real: lambda x, rate, *rest: jnp.where(real(x, rate, *rest) == 0, 0, x)),
        ("dropout", "model, dropout", "trajectory"),
    ),
    Mutant(
        "dropout keeps with the rate",
        wrap(model, "keep_mask", lambda real: lambda keys, site, shape, rate: real(keys, site, shape, 1 - rate)),
        ("dropout", "model, dropout", "trajectory"),
    ),
    Mutant("residual stream in bfloat16", block_call(bfloat16_stream), ("bfloat16", "block", "model")),
    Mutant("biases added in bfloat16, as in nnx.Linear", put(model, "Linear", nnx.Linear), ("bfloat16",)),
    Mutant("GELU in bfloat16", wrap(model, "gelu", gelu_in_bfloat16), ("bfloat16", "ops")),
    Mutant("gradients in float32", wrap(Program, "loss_and_grads", float32_gradients), ("model",)),
    Mutant("NaN in a key bias' gradient", wrap(Program, "loss_and_grads", nan_in_key_bias), ("model",)),
    Mutant("key bias with a gradient", scores(softmax_with_sink), ("model", "ops")),
    Mutant("small gradients flushed to 0", wrap(optimizer, "scale_by_adam", flushed_gradients), ("tiny_gradients",)),
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
    Mutant("decay mask: no embeddings", wrap(optimizer, "decay_mask", without_embeddings), ("decay_mask", *UPDATE)),
    Mutant(
        "causal mask off by one: sees the next",
        wrap(model, "causal_attention", lambda real: lambda q, k, v, s, i: real(q, k, v, s + 1, i)),
        ("ops", *MODEL),
    ),
    Mutant("causal mask off by one: not itself", scores(softmax_without_itself), ("ops", *MODEL)),
    Mutant("NaN in one element", logits(lambda x: x.at[(0,) * x.ndim].set(jnp.nan)), ("model", "trajectory")),
    Mutant(
        "query and key swapped",
        wrap(model, "causal_attention", lambda real: lambda q, k, v, s, i: real(k, q, v, s, i)),
        ("ops", *MODEL),
    ),
    Mutant("softmax in bfloat16", scores(softmax_in_bfloat16), ("bfloat16", "ops", *MODEL)),
    Mutant("scale 1/sqrt(C)", scores(lambda s, seen, D, C: masked_softmax(s, seen, C**-0.5)), ("ops", *MODEL)),
    Mutant("heads split as [D, H]", wrap(model, "causal_attention", heads_interleaved), ("ops", *MODEL)),
    Mutant("a missing residual", block_call(without_mlp_residual), ("block", "model")),
    Mutant("norm after the branch", block_call(post_norm), ("block", "model")),
    Mutant("positions from 1", put(nnx.Embed, "__call__", positions_from_1), ("model", "text")),
    Mutant(
        "no final norm",
        wrap(GPT, "hidden", without_final_norm),
        ("model", "trajectory"),
    ),
    Mutant("tied head without its gradient", put(GPT, "head_CV", property(tied_head_cut)), ("model, tied head",)),
    Mutant(
        "targets not shifted",
        wrap(batches, "inputs_and_targets", lambda real: lambda window: (real(window)[0],) * 2),
        ("trajectory", "whole_split"),
    ),
    Mutant(
        "the next step's batch",
        wrap(batches, "window_starts", lambda real: lambda key, step, *rest: real(key, step + 1, *rest)),
        ("trajectory",),
    ),
    Mutant("perplexity as 2 to the loss", put(loss, "perplexity", lambda mean: 2**mean), ("model",)),
    Mutant(
        "Nesterov momentum",
        wrap(optax, "sgd", lambda real: lambda lr, m=None: real(lr, m, nesterov=True)),
        ("optimizer",),
    ),
    Mutant("temperature left out", choose(lambda vocab_size, t, k, p: (1.0, k, p)), ("g_test", "text")),
    Mutant(
        "top-k one too many", choose(lambda vocab_size, t, k, p: (t, min(k + 1, vocab_size), p)), ("g_test", "text")
    ),
    Mutant("top-p left out", choose(lambda vocab_size, t, k, p: (t, k, 1.0)), ("g_test", "text")),
    Mutant(
        "cached token at the next position",
        hidden(lambda idx, keys, cache, start: (idx, keys, cache, start + (idx.shape[1] == 1))),
        ("text",),
    ),
    Mutant("conversion without transposing", wrap(convert, "_turned", square_as_it_is), ("conversion", "model")),
    Mutant("conversion with moments swapped", moments_swapped, ("resume_across", "conversion")),
    Mutant(
        "conversion with the count off by one",
        wrap(convert, "optimizer_from_torch", count_off_by_one),
        ("resume_across", "conversion"),
    ),
    Mutant(
        "packed documents see each other",
        wrap(model, "causal_attention", documents_not_told_apart),
        ("packed documents",),
    ),
    Mutant("positions go on over documents", wrap(batches, "documents", positions_go_on), ("packed documents",)),
    Mutant(
        "the end of a text begins the next", wrap(batches, "documents", ends_of_texts_one_late), ("packed documents",)
    ),
    Mutant(
        "loss over the ends of texts",
        wrap(train_step, "head_cross_entropy", every_target_counts),
        ("packed documents", "packing"),
    ),
    Mutant("every epoch in one order", wrap(batches.Order, "_starts", one_order_for_all_epochs), ("packing",)),
    Mutant("chunks at stride T + 1", wrap(batches.Order, "_starts", chunks_beside_each_other), ("packing",)),
    Mutant("a stride's overlap counted again", wrap(batches, "whole_split", overlap_counted_again), ("packing",)),
    Mutant(
        "mean over tokens for the mean of batches",
        put(loss, "mean_of_batches", lambda sums: float(sums[:, 0].sum() / sums[:, 1].sum())),
        ("packing",),
    ),
    Mutant("pooled at the padding", pooled(lambda length, pool, T: (length, "last")), ("classification",)),
    Mutant("pooled one token early", pooled(lambda length, pool, T: (length - 1, pool)), ("classification",)),
    Mutant(
        "mean over the padding too", pooled(lambda length, pool, T: (length * 0 + T, pool)), ("classification, mean",)
    ),
    Mutant(
        "absent texts count",
        wrap(classifier, "cross_entropy", lambda real: lambda logits, label, weight=None: real(logits, label)),
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
            lambda real: lambda p, s, feed, shards: real(p, s, feed._replace(start_KB=feed.start_KB + 1), shards),
        ),
        ("gradient_report",),
    ),
    Mutant(
        "maps of keys over queries",
        wrap(model, "attention_weights", lambda real: lambda q, k: real(k, q)),
        ("maps",),
    ),
    Mutant(
        "a loss as good as the best counts as better",
        wrap(trainer, "reports_without_gain", lambda real: lambda losses, delta: real(losses, delta - 1e-9)),
        ("early_stopping",),
    ),
    Mutant("c_attn split as key, query, value", wrap(convert, "writeup_names", key_before_query), ("gpt2",)),
    *(Mutant(name, patch, ("devices",)) for name, patch in device_faults.FAULTS.items()),
]
