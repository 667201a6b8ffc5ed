"""The training state, and pure functions over it: one update, K updates in one program, the loss of one batch.

Nothing here knows how many devices there are: what a step needs of them comes in as `Shards` from `parallel.py`.
Axes: B rows of the global batch (of this program's share after `shards.rows`), T time, K steps of one dispatch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from jaxgpt import batches
from jaxgpt.batches import Feed, Resident
from jaxgpt.config import TrainConfig
from jaxgpt.loss import head_cross_entropy
from jaxgpt.model import GPT, Numerics, Params, bind, init_params
from jaxgpt.optimizer import make_optimizer


class TrainState(NamedTuple):
    """All that training changes. Without a device axis; random numbers come from (seed, step), so there is no key."""

    step: Array  # int32 scalar: updates done
    params: dict[str, Array]
    opt_state: Any


@dataclass(frozen=True)
class Shards:
    """What one program among several does with a batch: take its rows, and add up over all."""

    rows: Callable[[Array], Array]  # the global batch's rows [B, ...] -> those of this program
    total: Callable[[Any], Any]  # a tree of sums over this program's rows -> over all rows
    tokens_at_once: int | None = None  # its rows are computed in parts of about so many tokens; None: all at once

    def rows_at_once(self, n_rows: int, n_time: int) -> int:
        """Of `n_rows` rows of this program, T tokens each, how many are computed together; it divides them.

        As many as fit, at least one; where no more than half of that divides the rows, the next number that does.
        """
        if self.tokens_at_once is None:
            return n_rows
        most = max(1, self.tokens_at_once // n_time)
        divisors = [n for n in range(1, n_rows + 1) if n_rows % n == 0]
        fitting = max(n for n in divisors if n <= most)
        return fitting if 2 * fitting >= most or fitting == n_rows else min(n for n in divisors if n > most)

    def summed(self, sums: Callable[..., Any], *batch: Array | None) -> Any:
        """The sums over a batch: over this program's rows part by part, then over those of all programs.

        Args:
            sums: of a batch's arrays, its sums over the rows as a tree.
            batch: this program's rows, [B, T] the first; an array may be absent.
        """
        n_rows, n_time = jnp.shape(batch[0])
        together = self.rows_at_once(n_rows, n_time)
        if together == n_rows:
            return self.total(sums(*batch))
        parts = jax.tree.map(lambda x: x.reshape(-1, together, *x.shape[1:]), batch)

        def add(total: Any, part: tuple[Array | None, ...]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, sums(*part)), None

        shapes = jax.eval_shape(sums, *jax.tree.map(lambda x: x[0], parts))
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return self.total(lax.scan(add, nothing, parts)[0])


ALONE = Shards(rows=lambda x_B: x_B, total=lambda tree: tree)  # one program that has all rows


@dataclass(frozen=True)
class Program:
    """The pure functions of one configuration, over a model with `vocab_size` tokens.

    `end_of_text`: with --packing documents, the token that ends one.
    """

    config: TrainConfig
    vocab_size: int
    numerics: Numerics
    end_of_text: int | None = None

    @cached_property
    def model(self) -> Callable[[Params], GPT]:
        """Parameters -> the model that trains."""
        return bind(self.config.model, self.vocab_size, self.numerics)

    @cached_property
    def exact_model(self) -> Callable[[Params], GPT]:
        """Parameters -> the model for evaluation and generation: all in the parameters' dtype, as documented."""
        dtype = self.numerics.param_dtype
        return bind(self.config.model, self.vocab_size, Numerics(dtype, dtype))

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return make_optimizer(self.config)

    def init_state(self) -> TrainState:
        """The state before the first update, a function of the seed."""
        params = self.init_params()
        return TrainState(jnp.zeros((), jnp.int32), params, self.optimizer.init(params))

    @cached_property
    def state_shapes(self) -> TrainState:
        """The state's shapes and dtypes, without computing it."""
        return jax.eval_shape(self.init_state)

    def init_params(self) -> dict[str, Array]:
        """The initial parameters, a function of the seed."""
        key = batches.stream_key(self.config.seed, batches.INIT)
        return init_params(key, self.config.model, self.vocab_size, self.numerics)

    def loss_sum(self, params: Params, idx_BT: Array, target_BT: Array, row_key_B: Array | None) -> tuple[Array, Array]:
        """The sum of a batch's loss, and its number of tokens."""
        return self._token_loss(self.model(params), idx_BT, target_BT, row_key_B, None)

    def _token_loss(
        self, model: GPT, idx_BT: Array, target_BT: Array, row_key_B: Array | None, counts_BT: Array | None
    ) -> tuple[Array, Array]:
        document_BT = position_BT = None
        if self.config.within_documents:
            assert self.end_of_text is not None
            document_BT, position_BT = batches.documents(idx_BT, self.end_of_text)
            within_BT = idx_BT != self.end_of_text  # what follows the end of a text is not to be told from it
            counts_BT = within_BT if counts_BT is None else counts_BT & within_BT
        x_BTC, _ = model.hidden(idx_BT, row_key_B, document_BT=document_BT, position_BT=position_BT)
        return head_cross_entropy(
            x_BTC,
            model.head_CV,
            target_BT,
            counts_BT,
            compute_dtype=model.compute_dtype,
            logits_at_once=self.numerics.logits_at_once,
            head_multiple=self.numerics.head_multiple,
        )

    def loss_and_grads(
        self, params: Params, idx_BT: Array, target_BT: Array, row_key_B: Array | None, shards: Shards
    ) -> tuple[Array, Params]:
        """The mean loss over the whole batch, and its gradient by name."""
        loss_and_grads = partial(jax.value_and_grad(self.loss_sum, has_aux=True), params)
        # Sums over all devices first, one division, and only then the clip: it must see the whole batch's gradient.
        (loss, count), grads = shards.summed(loss_and_grads, idx_BT, target_BT, row_key_B)
        return loss / count, jax.tree.map(lambda g: g / count, grads)

    def update(
        self, state: TrainState, idx_BT: Array, target_BT: Array, row_key_B: Array | None, shards: Shards
    ) -> tuple[TrainState, Array]:
        """One update on one batch.

        Returns:
            The new state, and [2]: the mean loss before the update, and the gradients' global norm before the clip.
        """
        loss, grads = self.loss_and_grads(state.params, idx_BT, target_BT, row_key_B, shards)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = jnp.stack([loss, optax.tree.norm(grads)])
        return TrainState(state.step + 1, params, opt_state), metrics

    def dropout_keys(self, step: Array, shards: Shards) -> Array | None:
        """A step's dropout keys, one for each of this program's rows; None without dropout."""
        if not self.config.model.dropout:
            return None
        step_key = jax.random.fold_in(batches.stream_key(self.config.seed, batches.DROPOUT), step)
        row_B = shards.rows(jnp.arange(self.config.batch_size))
        return jax.vmap(jax.random.fold_in, (None, 0))(step_key, row_B)

    def updates(self, state: TrainState, feed: Feed, n_steps: Array, shards: Shards) -> tuple[TrainState, Array]:
        """`n_steps` updates on the batches of a feed, the first of which is that of step `state.step`.

        A loop with a traced bound: what `lax.scan` compiles to, without its fixed length, so that one program serves
        every number of steps. Within one dispatch the temporary buffers are kept, which halves a step's time on CPU.

        Returns:
            The new state, and [K, 2] of `update`'s metrics, of which the first n_steps rows count.
        """

        def body(k: Array, carry: tuple[TrainState, Array]) -> tuple[TrainState, Array]:
            state, metrics_K2 = carry
            idx_BT, target_BT = self.batch(feed, k, shards)
            row_key_B = self.dropout_keys(state.step, shards)
            state, metrics = self.update(state, idx_BT, target_BT, row_key_B, shards)
            return state, metrics_K2.at[k].set(metrics)

        metrics_K2 = jnp.zeros((len(feed[-1]), 2), self.numerics.param_dtype)
        return lax.fori_loop(0, n_steps, body, (state, metrics_K2))

    def batch(self, feed: Feed, k: Array, shards: Shards) -> tuple[Array, Array]:
        """This program's rows of the inputs and targets of a feed's step k."""
        if isinstance(feed, Resident):
            start_B = shards.rows(feed.start_KB[k])
            return batches.inputs_and_targets(batches.windows(feed.tokens_N, start_B, self.config.model.block_size))
        return batches.inputs_and_targets(shards.rows(feed.window_KBT[k]))

    def evaluate(self, params: Params, window_BT: Array, counts_BT: Array, shards: Shards) -> tuple[Array, Array]:
        """Sum of the loss over the targets of windows that count, and their number."""
        model = self.exact_model(params)

        def sums(idx_BT: Array, target_BT: Array, counts_BT: Array) -> tuple[Array, Array]:
            return self._token_loss(model, idx_BT, target_BT, None, counts_BT)

        return shards.summed(sums, *batches.inputs_and_targets(shards.rows(window_BT)), shards.rows(counts_BT))
