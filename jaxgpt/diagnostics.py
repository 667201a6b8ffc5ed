"""What happens inside a model: the flow of gradients, attention maps, the probability of each token.

Axes: B batch, T time (queries), S time (keys), L layers, H heads, K the most likely tokens.
"""

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxgpt.batches import Feed
from jaxgpt.model import GPT, Params
from jaxgpt.train_step import Program, Shards, TrainState

VANISHING = 1e-8  # Adam's default epsilon: below it an update is no longer of the learning rate's size
EXPLODING = 1.0  # nats per unit of every single weight; healthy means are 1e-5 to 1e-2
LIKELIEST = 3


class Flow(NamedTuple):
    """One tensor's gradient on one batch, before the clip, and what the update makes of it."""

    name: str
    shape: tuple[int, ...]
    mean_abs: float  # mean |g|, nats per unit of the weight
    std: float  # of g over the tensor's elements, as torch's: over n - 1; 0 for a single element
    update_ratio: float  # norm of the update over the norm of the weights; infinite for weights of 0

    @property
    def verdict(self) -> str:
        """ "vanishing", "healthy" or "exploding", by mean |g|.

        "zero by design" for a key's bias: softmax does not change when all scores of a query shift by the same.
        """
        if not self.mean_abs <= EXPLODING:  # NaN too
            return "exploding"
        if self.name.endswith("attn.Wk.bias"):
            return "zero by design"
        return "vanishing" if self.mean_abs < VANISHING else "healthy"


def gradient_flow(program: Program, state: TrainState, feed: Feed, shards: Shards) -> dict[str, Array]:
    """Of every tensor, by name, [3]: mean |g|, standard deviation of g, and the norm of its update over its own.

    The gradient is that of the feed's first batch, with dropout if the run has any, before the clip; the update what
    the optimiser would make of it, clip, moments, decay and rate included. The state stays as it is.
    """
    idx_BT, target_BT = program.batch(feed, jnp.int32(0), shards)
    row_key_B = program.dropout_keys(state.step, shards)
    _, grads = program.loss_and_grads(state.params, idx_BT, target_BT, row_key_B, shards)
    updates, _ = program.optimizer.update(grads, state.opt_state, state.params)

    def figures(g: Array, update: Array, p: Array) -> Array:
        std = jnp.std(g, ddof=1) if g.size > 1 else jnp.zeros_like(g).sum()
        return jnp.stack([jnp.mean(jnp.abs(g)), std, jnp.linalg.norm(update) / jnp.linalg.norm(p)])

    return jax.tree.map(figures, grads, updates, state.params)


def flows(figures: Mapping[str, Any], params: Params) -> list[Flow]:
    """The result of `gradient_flow` on the host, from the embeddings up to the head."""
    shapes = {name: tuple(p.shape) for name, p in params.items()}
    return [Flow(name, shapes[name], *np.asarray(figures[name], np.float64).tolist()) for name in in_order(shapes)]


def in_order(names: Any) -> list[str]:
    """Parameters' names from the embeddings up: blocks by number, within a block as data flows."""
    within = ("ln1", "attn.Wq", "attn.Wk", "attn.Wv", "attn.Wo", "ln2", "mlp.fc", "mlp.proj")

    def place(name: str) -> tuple[Any, ...]:
        parts = name.split(".")
        if parts[0] == "blocks":
            return 1, int(parts[1]), within.index(".".join(parts[2:-1])), name.endswith("bias")
        return (
            (0, parts[0] == "pos_emb") if parts[0].endswith("_emb") else (2, parts[0] != "ln_f", name.endswith("bias"))
        )

    return sorted(names, key=place)


def record(step: int, found: list[Flow]) -> dict[str, Any]:
    """A line of diagnostics.jsonl: the gradient of update `step`, and which tensors are not healthy."""

    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None  # JSON knows no infinity

    tensors = {
        flow.name: {name: number(getattr(flow, name)) for name in ("mean_abs", "std", "update_ratio")} for flow in found
    }
    told = {verdict: [f.name for f in found if f.verdict == verdict] for verdict in ("vanishing", "exploding")}
    return {"step": step, **told, "tensors": tensors}


def table(found: list[Flow]) -> str:
    """A line a tensor, and the thresholds."""
    width = max(len(flow.name) for flow in found)
    lines = [f"{'tensor':<{width}}  {'shape':>12}  {'mean |g|':>9}  {'std':>9}  {'update/weight':>13}  verdict"]
    for flow in found:
        shape = "x".join(map(str, flow.shape))
        figures = f"{flow.mean_abs:9.2e}  {flow.std:9.2e}  {flow.update_ratio:13.2e}"
        lines.append(f"{flow.name:<{width}}  {shape:>12}  {figures}  {flow.verdict}")
    counts = {verdict: sum(f.verdict == verdict for f in found) for verdict in ("healthy", "vanishing", "exploding")}
    designed = len(found) - sum(counts.values())
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    return "\n".join(
        [
            *lines,
            f"{told}, {designed} zero by design (a key's bias shifts all scores of a query alike)",
            f"vanishing: mean |g| below {VANISHING:g}; exploding: above {EXPLODING:g}, or not finite; "
            "update/weight of about 1e-3 is usual",
        ]
    )


def attention_maps(program: Program, params: Params, idx_T: np.ndarray) -> np.ndarray:
    """How much each token attends to each, [L, H, T, S] in the parameters' dtype, T at most a block."""
    assert 1 <= len(idx_T) <= program.config.model.block_size
    return np.asarray(_compiled_maps(program.exact_model)(params, np.asarray(idx_T, np.int32)[None]))[0]


@lru_cache(1)
def _compiled_maps(model: Callable[[Params], GPT]) -> Callable[[Params, Any], Array]:
    """Kept, as training looks again and again; as in generation, for this very model and not for an equal one."""
    return jax.jit(lambda params, idx_1T: model(params).attention_maps(idx_1T))


class Surprise(NamedTuple):
    """Of every token but the first what the model gave it, and what it held most likely there."""

    probability_T: np.ndarray  # [T - 1]
    likeliest_TK: np.ndarray  # [T - 1, K] token ids, the most likely first
    likeliest_probability_TK: np.ndarray


def surprise(program: Program, params: Params, idx_T: np.ndarray) -> Surprise:
    """The probability of each next token of a text of 2 .. block tokens."""
    assert 2 <= len(idx_T) <= program.config.model.block_size

    @jax.jit
    def compute(params: Params, idx_T: Array) -> tuple[Array, Array, Array]:
        probability_TV = jax.nn.softmax(program.exact_model(params)(idx_T[None, :-1])[0], axis=-1)
        likeliest = jax.lax.top_k(probability_TV, min(LIKELIEST, program.vocab_size))
        return jnp.take_along_axis(probability_TV, idx_T[1:, None], axis=1)[:, 0], *likeliest

    probability_T, top_TK, ids_TK = compute(params, np.asarray(idx_T, np.int32))
    return Surprise(np.asarray(probability_T), np.asarray(ids_TK), np.asarray(top_TK))
