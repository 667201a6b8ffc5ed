"""One training step, K of them in one compiled program, and the evaluation of one batch.

Everything here is a pure function over a `TrainState`. A step knows nothing of devices: what it needs of them comes in
as a `StepContext` from `parallel.py`. What is trained comes in as an `Objective` from `objective.py`.
Axes: B rows of the global batch, or of this device's share after `ctx.local_rows`; T time; K steps of one dispatch; M
metrics of a step.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from jaxgpt.model.gpt import Gather, Params
from jaxgpt.objective import LocalRows, Objective, whole_batch
from jaxgpt.optimizer import SkipState


class TrainState(NamedTuple):
    """All that training changes. Without a device axis; random numbers come from (seed, step), so there is no key."""

    step: Array  # int32 scalar: updates done
    params: Any  # arrays by dotted name
    opt_state: Any


class StepContext(NamedTuple):
    """How a batch is divided: over devices (data parallelism), and on each into microbatches (accumulation).

    With fully sharded parameters, `params` and `grads` are this device's shards of them.
    """

    local_rows: LocalRows  # the global batch's rows [B, ...] -> those of this device
    all_reduce: Callable[[Any], Any]  # a tree of sums over this device's rows -> over all rows
    microbatch_tokens: int | None = None  # about how many tokens a microbatch has; None: the rows are one microbatch
    global_norm: Callable[[Params], Array] = optax.tree.norm  # of gradients, over all their shards
    gather: Gather | None = None  # makes a whole parameter of shards; None: they are whole


SINGLE_DEVICE = StepContext(local_rows=whole_batch, all_reduce=lambda sums: sums)


class StepResult(NamedTuple):
    """What one step computed. A caller that uses a part of it pays for that part alone: XLA drops the rest."""

    loss: Array  # scalar: the mean over the global batch, before the update
    grad_norm: Array  # scalar: global norm of the gradients, before the clip
    grads: Params  # of the mean loss, before the clip
    updates: Any  # what the optimizer added to the parameters, by name
    skipped: Array | None = None  # bool scalar: whether it skipped the update; None where it never does


def train_step(
    objective: Objective, state: TrainState, batch: tuple[Array, ...], ctx: StepContext
) -> tuple[TrainState, StepResult]:
    """One update on one batch.

    Args:
        batch: this device's rows, [B, ...] each, as `objective.batch` gives them.

    Returns:
        The new state, and what was computed on the way to it.
    """

    def microbatch_loss_and_grads(*microbatch: Array | None) -> Any:  # ((sum of losses, number of them), gradients)
        loss_sum = partial(objective.loss_sum, gather=ctx.gather)
        return jax.value_and_grad(loss_sum, has_aux=True)(state.params, *microbatch)

    rows = (*batch, objective.dropout_keys(state.step, ctx.local_rows))
    sums = accumulate(microbatch_loss_and_grads, rows, ctx.microbatch_tokens, objective.config.grad_accum)
    # All-reduce the sums, divide once, and only then clip: the clip must see the gradient of the whole batch.
    (loss_sum, count), grad_sums = ctx.all_reduce(sums)
    loss, grads = loss_sum / count, jax.tree.map(lambda g: g / count, grad_sums)
    grad_norm = ctx.global_norm(grads)
    # Clip by global norm, AdamW with masked decay, schedule: `optimizer.py`.
    updates, opt_state = objective.optimizer.update(
        grads, state.opt_state, state.params, value=loss, grad_norm=grad_norm
    )
    params = optax.apply_updates(state.params, updates)
    new_state = TrainState(state.step + 1, params, opt_state)
    skipped = opt_state.in_a_row > 0 if isinstance(opt_state, SkipState) else None
    return new_state, StepResult(loss, grad_norm, grads, updates, skipped)


def train_steps(
    objective: Objective, state: TrainState, source: Any, n_steps: Array, ctx: StepContext
) -> tuple[TrainState, Array]:
    """`n_steps` updates on the batches of a source, whose first batch is that of step `state.step`.

    A loop with a traced bound: what `lax.scan` compiles to, without its fixed length, so one program serves every
    number of steps. Within one dispatch XLA keeps the temporary buffers, which halves a step's time on a CPU.

    Returns:
        The new state, and the metrics M of each step, [K, M], of which the first `n_steps` rows count: loss, gradient
        norm, and where an update may be skipped, whether it was (1 or 0).
    """

    def body(k: Array, carry: tuple[TrainState, Array]) -> tuple[TrainState, Array]:
        state, metrics_KM = carry
        state, result = train_step(objective, state, objective.batch(source, k, ctx.local_rows), ctx)
        metrics = [result.loss, result.grad_norm, result.skipped][:n_metrics]
        return state, metrics_KM.at[k].set(jnp.stack(metrics))

    n_metrics = 3 if objective.config.skips_updates else 2
    metrics_KM = jnp.zeros((len(source[-1]), n_metrics), objective.numerics.param_dtype)
    return lax.fori_loop(0, n_steps, body, (state, metrics_KM))


def eval_step(objective: Objective, params: Params, batch: tuple[Array, ...], ctx: StepContext) -> Any:
    """The sums of `objective.eval_sums` over the whole batch."""
    rows = objective.eval_batch(batch, ctx.local_rows)
    eval_sums = partial(objective.eval_sums, params, gather=ctx.gather)
    return ctx.all_reduce(accumulate(eval_sums, rows, ctx.microbatch_tokens, objective.config.grad_accum))


def init_state(objective: Objective) -> TrainState:
    """The state before the first update, a function of the seed."""
    return state_before_training(objective, objective.init_params())


def state_shapes(objective: Objective) -> TrainState:
    """The state's shapes and dtypes, without computing it."""
    return jax.eval_shape(partial(state_before_training, objective), objective.param_shapes)


def state_before_training(objective: Objective, params: Params) -> TrainState:
    """The state of given parameters before the first update: step 0, and the optimizer's initial state."""
    return TrainState(jnp.zeros((), jnp.int32), params, objective.optimizer.init(params))


def accumulate(
    sums: Callable[..., Any], batch: tuple[Any, ...], microbatch_tokens: int | None, grad_accum: int = 1
) -> Any:
    """The sums over this device's rows of a batch, added up microbatch by microbatch.

    Args:
        sums: of a microbatch's arrays, its sums over the rows as a tree.
        batch: this device's rows, an array [B, T] the first; others may be None.
        grad_accum: how many microbatches there are at least; it divides the rows.
    """
    n_rows, n_time = jnp.shape(batch[0])
    n_together = microbatch_rows(n_rows // grad_accum, n_time, microbatch_tokens)
    if n_together == n_rows:
        return sums(*batch)
    microbatches = jax.tree.map(lambda x: x.reshape(-1, n_together, *x.shape[1:]), batch)

    def add(total: Any, microbatch: tuple[Any, ...]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, sums(*microbatch)), None

    shapes = jax.eval_shape(sums, *jax.tree.map(lambda x: x[0], microbatches))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return lax.scan(add, zeros, microbatches)[0]


def microbatch_rows(n_rows: int, n_time: int, microbatch_tokens: int | None) -> int:
    """How many of a device's `n_rows` rows of T tokens make a microbatch; it divides them.

    As many as fit, at least one. Where no more than half of that divides the rows, the next number that does.
    """
    if microbatch_tokens is None:
        return n_rows
    most = max(1, microbatch_tokens // n_time)
    divisors = [n for n in range(1, n_rows + 1) if n_rows % n == 0]
    fitting = max(n for n in divisors if n <= most)
    return fitting if 2 * fitting >= most or fitting == n_rows else min(n for n in divisors if n > most)
