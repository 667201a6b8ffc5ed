"""How a training step's memory and communication grow with the model and the number of devices, by formula.

The figures follow from the parameters' shapes alone, for any number of devices. What the compiler makes of a
step it tells itself (`plan`); tests hold these formulas against that.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxgpt import parallel
from jaxgpt.config import ModelConfig, TrainConfig
from jaxgpt.memory import n_moments
from jaxgpt.model.gpt import Numerics

STATISTICS = 4  # of each token in a block: mean and reciprocal deviation of both norms


class Footprint(NamedTuple):
    """A training step's memory and communication on each device, in bytes."""

    weights: int
    moments: int
    gradients: int
    gathered: int  # of sharded parameters: those outside of the blocks whole, and one block with its gradients
    activations: int  # what the backward pass finds saved of all blocks
    loss: int  # hidden states and their gradient, a chunk of logits with its gradient, and the head's gradient
    all_gather: int
    reduce_scatter: int
    all_reduce: int
    sent: float  # of all three by a ring: an all-reduce sends each byte twice, the others once
    accumulates: bool = False  # over several microbatches

    @property
    def state(self) -> int:
        return self.weights + self.moments

    @property
    def peak(self) -> int:
        """The most at a time. Gradients appear while activations go: the largest is at one end of the backward pass."""
        of_accumulation = self.gradients if self.accumulates else 0
        return self.state + self.gathered + of_accumulation + max(self.activations + self.loss, self.gradients)


def footprint(config: TrainConfig, numerics: Numerics, shapes: Mapping[str, Any], data: int, fsdp: int) -> Footprint:
    """The footprint of a step on a mesh of data x fsdp devices, in whose layers a flash-attention kernel computes.

    With P parameters of p bytes (4), of which S in matrices that `parallel.shard_axis` shards and W whole ones, and c
    bytes (2) of the compute dtype: weights and gradients take p (W + S/fsdp), the moments of Adam twice that. A step
    gathers the S of the blocks in the compute dtype, forward and backward, and the others once: c 2 S' + p S''. It
    reduce-scatters p S, and all-reduces p S/fsdp over data and p W over all devices. Each of several microbatches
    gathers and scatters anew.

    Args:
        shapes: of the parameters by name, as `Objective.param_shapes`.
    """
    model = config.model
    p, c = _item_sizes(numerics)
    sharded = {name for name, x in shapes.items() if parallel.shard_axis(x.shape, fsdp) is not None}
    n_whole = sum(x.size for name, x in shapes.items() if name not in sharded)
    of_blocks = sum(shapes[name].size for name in sharded if name.startswith("blocks."))
    of_rest = sum(shapes[name].size for name in sharded) - of_blocks
    n_sharded = of_blocks + of_rest

    weights = p * (n_whole + n_sharded // fsdp)
    tokens = config.tokens_per_step // (data * fsdp * config.grad_accum)  # of a microbatch on a device
    all_gather = config.grad_accum * (2 * c * of_blocks + p * of_rest)
    reduce_scatter = config.grad_accum * p * n_sharded
    of_shards = p * n_sharded // fsdp if data > 1 else 0
    of_whole = p * n_whole if data * fsdp > 1 else 0
    return Footprint(
        weights=weights,
        moments=n_moments(config) * weights,
        gradients=weights,
        gathered=p * of_rest + (c + p) * of_blocks // model.n_layer,
        activations=tokens * model.n_layer * block_bytes(model, numerics),
        loss=loss_bytes(model, numerics, shapes["token_emb.embedding"].shape[0], tokens),
        all_gather=all_gather,
        reduce_scatter=reduce_scatter,
        all_reduce=of_shards + of_whole,
        sent=_ring(fsdp) * (all_gather + reduce_scatter)
        + 2 * (_ring(data) * of_shards + _ring(data * fsdp) * of_whole),
        accumulates=config.grad_accum > 1,
    )


def block_bytes(model: ModelConfig, numerics: Numerics) -> int:
    """What the backward pass finds saved of a block, for each token; attention is a flash-attention kernel.

    Of `remat` none: the residual stream before both norms, in p bytes a channel; in c bytes the inputs of the four
    products (C, C, C and 4C channels), query, key and value, and the hidden layer before GELU (4C); statistics of norms
    and softmax. "dots": the block's input and the products that are needed again, "block": its input.
    """
    p, c = _item_sizes(numerics)
    if numerics.remat == "block":
        return p * model.n_embd
    if numerics.remat == "dots":
        return (p + 8 * c) * model.n_embd  # query, key, value; attention's projection; the hidden layer
    return (2 * p + 14 * c) * model.n_embd + 4 * model.n_head + p * STATISTICS


def loss_bytes(model: ModelConfig, numerics: Numerics, n_vocab: int, tokens: int) -> int:
    """What final norm, head and loss take at a time (`loss.head_cross_entropy`), for the tokens of a microbatch."""
    p, c = _item_sizes(numerics)
    n_time = model.block_size
    width = n_vocab + -n_vocab % numerics.head_multiple
    n_chunks = min(n_time, math.ceil(tokens * n_vocab / numerics.chunk_logits))
    of_chunk = tokens // n_time * math.ceil(n_time / n_chunks) * width
    return 3 * p * model.n_embd * tokens + (p + c) * of_chunk + p * model.n_embd * width


def _item_sizes(numerics: Numerics) -> tuple[int, int]:
    """The bytes of a parameter, and of an operand of the products."""
    return np.dtype(numerics.param_dtype).itemsize, np.dtype(numerics.compute_dtype).itemsize


def _ring(n: int) -> float:
    """The share of a payload that each of n devices in a ring sends on."""
    return (n - 1) / n
