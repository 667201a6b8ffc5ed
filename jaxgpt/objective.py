"""Training objectives: the model, loss, batches and evaluation of one configuration, as pure functions.

`LanguageModelingObjective` predicts next tokens, `ClassificationObjective` the classes of texts. `train_step.py` trains
either. An objective knows nothing of devices: `local_rows` maps the global batch's rows [B, ...] to those of one.
Axes: B rows of the global batch, or of one device's share of it; T time; K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxgpt import rng
from jaxgpt.config import FinetuneConfig, TrainConfig
from jaxgpt.data import sampler
from jaxgpt.data.sampler import PADDING, BatchSource, ExampleSource, RowSource, TokenSource
from jaxgpt.model.gpt import GPT, Gather, GPTClassifier, Numerics, Params, bind, init_params
from jaxgpt.model.loss import cross_entropy, head_cross_entropy
from jaxgpt.optimizer import make_optimizer

LocalRows = Callable[[Array], Array]


def whole_batch(rows_B: Array) -> Array:
    """All rows of the batch: those of a single device."""
    return rows_B


@dataclass(frozen=True)
class Objective:
    """What both objectives share: the model, the optimizer, the initial parameters, dropout keys.

    Args:
        vocab_size: the tokenizer's number of tokens.
        numerics: the dtypes and the attention of this machine, as `parallel.numerics` chooses them.
    """

    config: Any  # TrainConfig or FinetuneConfig
    vocab_size: int
    numerics: Numerics

    @property
    def n_classes(self) -> int | None:
        """The size of the classifier's head; None for a language model."""
        return None

    @cached_property
    def model(self) -> Callable[..., Any]:
        """Parameters -> the model that trains; see `model.gpt.bind`."""
        return bind(self.config.model, self.vocab_size, self.numerics, self.n_classes)

    @cached_property
    def exact_model(self) -> Callable[..., Any]:
        """Parameters -> the model for evaluation and generation: all in the parameters' dtype, as documented."""
        dtype = self.numerics.param_dtype
        return bind(self.config.model, self.vocab_size, Numerics(dtype, dtype), self.n_classes)

    @cached_property
    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        return make_optimizer(self.config)

    def init_params(self) -> dict[str, Array]:
        """The initial parameters, a function of the seed."""
        key = rng.stream_key(self.config.seed, rng.INIT)
        return init_params(key, self.config.model, self.vocab_size, self.numerics, self.n_classes)

    @cached_property
    def param_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The parameters' shapes and dtypes, by one trace that computes nothing."""
        return jax.eval_shape(self.init_params)

    def dropout_keys(self, step: Array, local_rows: LocalRows = whole_batch) -> Array | None:
        """A step's dropout keys, one for each of the device's rows; None without dropout."""
        if not self.config.model.has_dropout:
            return None
        return rng.row_keys(self.config.seed, step, local_rows(jnp.arange(self.config.batch_size)))

    def loss_sum(
        self, params: Params, inputs: Array, targets: Array, row_key_B: Array | None, gather: Gather | None = None
    ) -> tuple[Array, Array]:
        """The sum of the losses of some rows, and how many losses there are: scalars of the parameters' dtype.

        Args:
            gather: of sharded parameters, makes a whole one from this device's shard.
        """
        raise NotImplementedError

    def batch(self, source: Any, k: Array, local_rows: LocalRows = whole_batch) -> tuple[Array, Array]:
        """The device's rows of the inputs and targets of a source's k-th batch: what `loss_sum` takes."""
        raise NotImplementedError

    def eval_batch(self, batch: tuple[Array, ...], local_rows: LocalRows = whole_batch) -> tuple[Array, ...]:
        """The device's rows of one batch of a split: what `eval_sums` takes."""
        raise NotImplementedError

    def eval_sums(self, params: Params, *rows: Array, gather: Gather | None = None) -> Any:
        """Sums over some rows of a split, in evaluation mode: the loss, the number of losses, and more."""
        raise NotImplementedError


@dataclass(frozen=True)
class LanguageModelingObjective(Objective):
    """Next-token cross-entropy over windows of tokens.

    Args:
        end_of_text: with --packing documents, the token that ends one.
    """

    config: TrainConfig
    end_of_text: int | None = None

    def loss_sum(
        self, params: Params, idx_BT: Array, target_BT: Array, row_key_B: Array | None, gather: Gather | None = None
    ) -> tuple[Array, Array]:
        """The sum of the tokens' losses, and their number."""
        return self.token_loss(self.model(params, gather), idx_BT, target_BT, row_key_B, None)

    def token_loss(
        self, model: GPT, idx_BT: Array, target_BT: Array, row_key_B: Array | None, counts_BT: Array | None
    ) -> tuple[Array, Array]:
        """The sum of the losses of the tokens that count (None: all), and their number."""
        document_BT = position_BT = None
        if self.config.within_documents:
            assert self.end_of_text is not None
            document_BT, position_BT = sampler.documents(idx_BT, self.end_of_text)
            within_BT = idx_BT != self.end_of_text  # the next document cannot be predicted across the boundary
            counts_BT = within_BT if counts_BT is None else counts_BT & within_BT
        x_BTC, _ = model.hidden(idx_BT, row_key_B, document_BT=document_BT, position_BT=position_BT)
        return head_cross_entropy(
            x_BTC,
            model.head_CV,
            target_BT,
            counts_BT,
            compute_dtype=model.compute_dtype,
            chunk_logits=self.numerics.chunk_logits,
            head_multiple=self.numerics.head_multiple,
        )

    def batch(self, source: BatchSource, k: Array, local_rows: LocalRows = whole_batch) -> tuple[Array, Array]:
        if isinstance(source, TokenSource):
            start_B = local_rows(source.start_KB[k])
            return sampler.inputs_and_targets(sampler.windows(source.tokens_N, start_B, self.config.model.block_size))
        if isinstance(source, RowSource):  # divided already
            return sampler.inputs_and_targets(source.window_KBT[k])
        return sampler.inputs_and_targets(local_rows(source.window_KBT[k]))

    def eval_batch(self, batch: tuple[Array, ...], local_rows: LocalRows = whole_batch) -> tuple[Array, Array, Array]:
        window_BT, counts_BT = batch
        return *sampler.inputs_and_targets(local_rows(window_BT)), local_rows(counts_BT)

    def eval_sums(
        self, params: Params, idx_BT: Array, target_BT: Array, counts_BT: Array, gather: Gather | None = None
    ) -> tuple[Array, Array]:
        """The sum of the loss over the targets that count, and their number."""
        return self.token_loss(self.exact_model(params, gather), idx_BT, target_BT, None, counts_BT)


@dataclass(frozen=True)
class ClassificationObjective(Objective):
    """Cross-entropy over classes, of texts padded with PADDING.

    Args:
        pad_token: the token that stands for PADDING in the model's input.
    """

    config: FinetuneConfig
    n_classes: int = 0
    pad_token: int = 0

    def logits(self, model: GPTClassifier, idx_BT: Array, row_key_B: Array | None = None) -> Array:
        """[B, classes] of texts padded with PADDING."""
        length_B = jnp.sum(idx_BT != PADDING, axis=1)
        return model(jnp.where(idx_BT == PADDING, self.pad_token, idx_BT), length_B, self.config.pool, row_key_B)

    def loss_sum(
        self, params: Params, idx_BT: Array, label_B: Array, row_key_B: Array | None, gather: Gather | None = None
    ) -> tuple[Array, Array]:
        """The sum of the texts' losses, and their number; PADDING labels count nothing."""
        logits_BK = self.logits(self.model(params, gather), idx_BT, row_key_B)
        return cross_entropy(logits_BK, jnp.maximum(label_B, 0), label_B != PADDING)

    def batch(self, source: ExampleSource, k: Array, local_rows: LocalRows = whole_batch) -> tuple[Array, Array]:
        row_B = local_rows(source.row_KB[k])
        return source.idx_NT[row_B], jnp.where(row_B == PADDING, PADDING, source.label_N[row_B])

    def eval_batch(self, batch: tuple[Array, ...], local_rows: LocalRows = whole_batch) -> tuple[Array, Array]:
        idx_BT, label_B = batch
        return local_rows(idx_BT), local_rows(label_B)

    def eval_sums(
        self, params: Params, idx_BT: Array, label_B: Array, gather: Gather | None = None
    ) -> tuple[Array, Array, Array]:
        """The sum of the loss over the texts whose label is not PADDING, their number, and the confusion matrix [class,
        predicted]."""
        logits_BK = self.logits(self.exact_model(params, gather), idx_BT)
        loss, count = cross_entropy(logits_BK, jnp.maximum(label_B, 0), label_B != PADDING)
        true_BK = jax.nn.one_hot(label_B, self.n_classes)  # a row of zeros for PADDING
        predicted_BK = jax.nn.one_hot(jnp.argmax(logits_BK, -1), self.n_classes)
        return loss, count, true_BK.T @ predicted_BK
