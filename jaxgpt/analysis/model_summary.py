"""A summary of a model before it is trained: layers, shapes, parameters, FLOP and memory."""

import math
from collections.abc import Mapping
from typing import Any

from jaxgpt.analysis.diagnostics import in_order
from jaxgpt.config import ModelConfig
from jaxgpt.memory import size_text
from jaxgpt.parallel import Executor


def lookup_tables(model: ModelConfig) -> tuple[str, ...]:
    """The parameters that no product multiplies by. A tied head multiplies by the token embedding."""
    return ("pos_emb.embedding",) if model.tied_head else ("pos_emb.embedding", "token_emb.embedding")


def summary(executor: Executor, source: Any) -> str:
    """A table of the layers, and the FLOP and memory of a training step.

    Compiles the step, and reports the memory that the compiler has planned for it.

    Args:
        source: a source of the training batches, for its shapes.
    """
    config = executor.objective.config
    model, batch_size = config.model, config.batch_size
    params = executor.abstract_state().params
    rows = [("layer", "output", "parameters")]
    for layer, shapes in _layers(params).items():
        if layer.startswith("blocks.") and not layer.startswith("blocks.0."):
            continue
        output = f"{batch_size} x {model.block_size} x {shapes[-1][-1]}"  # parameters end in the output's width
        rows.append((layer, output, f"{sum(map(math.prod, shapes)):>13,}  {' + '.join(map(_shape, shapes))}"))
        if layer == "blocks.0.mlp.proj" and model.n_layer > 1:
            each = sum(math.prod(p.shape) for name, p in params.items() if name.startswith("blocks.0."))
            same = "blocks.1" if model.n_layer == 2 else f"blocks.1 to blocks.{model.n_layer - 1}"
            rows.append((same, "as blocks.0", f"{each:>13,}  each"))
    if model.tied_head:
        rows.append(("head", f"{batch_size} x {model.block_size} x {executor.objective.vocab_size}", f"{'tied':>13}"))
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    table = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows]
    total = sum(math.prod(p.shape) for p in params.values())
    multiplied = total - sum(math.prod(params[name].shape) for name in lookup_tables(model))
    flop = model.flop_per_token(multiplied)
    tokens = batch_size * model.block_size
    memory = executor.memory(source)
    parts = ", ".join(f"{name} {size_text(n)}" for name, n in memory.items())
    return "\n".join(
        [
            *table,
            f"{total:,} parameters, {multiplied:,} of them multiplied by (N)",
            f"{flop['F12']:,} FLOP per token (6 N + 12 L T C), {flop['F6']:,} with attention's causal half alone; "
            f"a step of {tokens:,} tokens: {flop['F12'] * tokens / 1e9:,.3g} GFLOP",
            f"memory on each device as the compiler plans it: {size_text(sum(memory.values()))} ({parts}), beside what "
            "Python and JAX themselves take",
        ]
    )


def _layers(params: Mapping[str, Any]) -> dict[str, list[tuple[int, ...]]]:
    """The shapes of each layer's parameters by the layer's path, from the embeddings up."""
    layers: dict[str, list[tuple[int, ...]]] = {}
    for name in in_order(params):
        layers.setdefault(name.rsplit(".", 1)[0], []).append(tuple(params[name].shape))
    return layers


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
