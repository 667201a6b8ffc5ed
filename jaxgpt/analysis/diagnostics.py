"""What happens inside a model: gradient statistics, attention maps, the probability of each token.

Axes: B batch, T time (queries), S time (keys), L layers, H heads, V vocabulary, K most likely tokens.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxgpt.data.sampler import BatchSource
from jaxgpt.model.gpt import GPT, Params
from jaxgpt.objective import Objective
from jaxgpt.train_step import StepContext, TrainState, train_step

VANISHING = 1e-8  # Adam's default epsilon: below it an update is no longer of the learning rate's size
EXPLODING = 1.0  # nats per unit of every single weight; healthy means are 1e-5 to 1e-2
LIKELIEST = 3  # K


class Flow(NamedTuple):
    """One tensor's gradient on one batch, before the clip, and its update relative to the weights."""

    name: str
    shape: tuple[int, ...]
    mean_abs: float  # mean |g|, nats per unit of the weight
    std: float  # of g over the tensor's n elements, divided by n - 1 as in torch; 0 for a single element
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


def gradient_flow(objective: Objective, state: TrainState, source: BatchSource, ctx: StepContext) -> dict[str, Array]:
    """The gradient statistics of every tensor by name: mean |g|, standard deviation of g, update ratio, as [3].

    The gradient is that of the source's first batch, with dropout if the run has any, before the clip. The update is
    the optimizer's, with clip, moments, decay and learning rate. The state does not change.
    """
    _, result = train_step(objective, state, objective.batch(source, jnp.int32(0), ctx.local_rows), ctx)

    def statistics(g: Array, update: Array, p: Array) -> Array:
        std = jnp.std(g, ddof=1) if g.size > 1 else jnp.zeros_like(g).sum()
        return jnp.stack([jnp.mean(jnp.abs(g)), std, jnp.linalg.norm(update) / jnp.linalg.norm(p)])

    return jax.tree.map(statistics, result.grads, result.updates, state.params)


def flows(statistics: Mapping[str, Any], params: Params) -> list[Flow]:
    """The result of `gradient_flow` on the host, from the embeddings up to the head."""
    shapes = {name: tuple(p.shape) for name, p in params.items()}
    return [Flow(name, shapes[name], *np.asarray(statistics[name], np.float64).tolist()) for name in in_order(shapes)]


def in_order(names: Iterable[str]) -> list[str]:
    """Parameter names from the embeddings up: blocks by number, within a block as data flows."""
    within = ("ln1", "attn.Wq", "attn.Wk", "attn.Wv", "attn.Wo", "ln2", "mlp.fc", "mlp.proj")

    def place(name: str) -> tuple[Any, ...]:
        parts = name.split(".")
        if parts[0] == "blocks":
            return 1, int(parts[1]), within.index(".".join(parts[2:-1])), name.endswith("bias")
        if parts[0].endswith("_emb"):
            return 0, parts[0] == "pos_emb"
        return 2, parts[0] != "ln_f", name.endswith("bias")

    return sorted(names, key=place)


def table(flows: list[Flow]) -> str:
    """A line for each tensor, the counts of the verdicts, and the thresholds."""
    width = max(len(flow.name) for flow in flows)
    lines = [f"{'tensor':<{width}}  {'shape':>12}  {'mean |g|':>9}  {'std':>9}  {'update/weight':>13}  verdict"]
    for flow in flows:
        shape = "x".join(map(str, flow.shape))
        figures = f"{flow.mean_abs:9.2e}  {flow.std:9.2e}  {flow.update_ratio:13.2e}"
        lines.append(f"{flow.name:<{width}}  {shape:>12}  {figures}  {flow.verdict}")
    counts = {verdict: sum(f.verdict == verdict for f in flows) for verdict in ("healthy", "vanishing", "exploding")}
    n_by_design = len(flows) - sum(counts.values())
    counted = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    return "\n".join(
        [
            *lines,
            f"{counted}, {n_by_design} zero by design (a key's bias shifts all scores of a query alike)",
            f"vanishing: mean |g| below {VANISHING:g}; exploding: above {EXPLODING:g}, or not finite; "
            "update/weight of about 1e-3 is usual",
        ]
    )


def record(step: int, flows: list[Flow]) -> dict[str, Any]:
    """A line of diagnostics.jsonl: the statistics at update `step`, and the tensors that vanish or explode."""

    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None  # JSON has no infinity

    tensors = {
        flow.name: {name: number(getattr(flow, name)) for name in ("mean_abs", "std", "update_ratio")} for flow in flows
    }
    unhealthy = {verdict: [f.name for f in flows if f.verdict == verdict] for verdict in ("vanishing", "exploding")}
    return {"step": step, **unhealthy, "tensors": tensors}


def attention_maps(objective: Objective, params: Params, idx_T: np.ndarray) -> np.ndarray:
    """The attention weight of each query on each key, [L, H, T, S] in the parameters' dtype.

    Args:
        idx_T: token ids, 1 to a block of them.
    """
    assert 1 <= len(idx_T) <= objective.config.model.block_size
    return np.asarray(_compiled_maps(objective.exact_model)(params, np.asarray(idx_T, np.int32)[None]))[0]


@lru_cache(1)
def _compiled_maps(model: Callable[[Params], GPT]) -> Callable[[Params, Any], Array]:
    """The compiled function of one model, cached because a training run calls it again and again."""
    return jax.jit(lambda params, idx_1T: model(params).attention_maps(idx_1T))


class TokenProbabilities(NamedTuple):
    """The model's probability of each token of a text but the first, and its K most likely tokens there."""

    probability_T: np.ndarray  # [T - 1]
    likeliest_TK: np.ndarray  # [T - 1, K] token ids, the most likely first
    likeliest_probability_TK: np.ndarray

    @property
    def surprisal_T(self) -> np.ndarray:
        """The surprisal -log p of each token in nats, [T - 1]; its mean is the text's loss."""
        with np.errstate(divide="ignore"):
            return -np.log(self.probability_T)


def token_probabilities(objective: Objective, params: Params, idx_T: np.ndarray) -> TokenProbabilities:
    """The probability of each next token of a text.

    Args:
        idx_T: token ids, 2 to a block of them.
    """
    assert 2 <= len(idx_T) <= objective.config.model.block_size

    @jax.jit
    def compute(params: Params, idx_T: Array) -> tuple[Array, Array, Array]:
        probability_TV = jax.nn.softmax(objective.exact_model(params)(idx_T[None, :-1])[0], axis=-1)
        likeliest = jax.lax.top_k(probability_TV, min(LIKELIEST, objective.vocab_size))
        return jnp.take_along_axis(probability_TV, idx_T[1:, None], axis=1)[:, 0], *likeliest

    probability_T, top_TK, ids_TK = compute(params, np.asarray(idx_T, np.int32))
    return TokenProbabilities(np.asarray(probability_T), np.asarray(ids_TK), np.asarray(top_TK))
