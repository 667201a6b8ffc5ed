"""Operations and one block, each with its vector-Jacobian product.

Ours are taken out of the model that trains (`Objective.model`), so what is compared is what runs. PyTorch's are its
own functions, attention included: a second reference beside the written-out one of torch_ref.
Axes: N tokens, B batch, T time, C n_embd, F 4C, H heads, D head size, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn import functional as F

from jaxgpt.config import ModelConfig
from jaxgpt.model import gpt, loss
from jaxgpt.model.attention import MIN_BLOCK
from jaxgpt.parity.harness import Row, max_abs, own_errors, relative_l2, tensor_ratios, worst_tensor
from jaxgpt.parity.jax_side import precision_of
from parity_tests.cases import (
    BATCH,
    SIZES,
    TORCH_DTYPES,
    VOCAB,
    Case,
    flax_params,
    objective_of,
    small,
    torch_model,
)
from parity_tests.tolerances import error_row, ratio_row, row

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Op:
    """One operation in both frameworks.

    Args:
        inputs: what it is differentiated by, float32 by name; a name of a Flax parameter replaces that parameter.
        ours: (the bound model, the inputs) -> the result.
        torch: (the inputs) -> the result, in ours' layout; kernels arrive as [in, out].
    """

    name: str
    inputs: Arrays
    ours: Callable[[Any, dict[str, Any]], Any]
    torch: Callable[[dict[str, Any]], Any]
    model: ModelConfig = SIZES
    ill: bool = field(default=False)  # ill-conditioned: loses digits in both frameworks

    def case(self) -> Case:
        return small(f"op {self.name}", model=self.model)


@cache
def ops(model_config: ModelConfig = SIZES, n_rows: int = BATCH, seed: int = 0) -> list[Op]:
    """The operations at the given sizes, with inputs as inside a trained model."""
    draw = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return draw.normal(0, scale, shape).astype(np.float32)

    C, H, T = model_config.n_embd, model_config.n_head, model_config.block_size
    N, D, B, V = n_rows * T, C // H, n_rows, VOCAB
    idx_BT = draw.integers(0, V, (B, T)).astype(np.int32)
    target_N = draw.integers(0, V, N).astype(np.int32)
    layer_norm = {"blocks.0.ln1.scale": 1 + normal(C, scale=0.1), "blocks.0.ln1.bias": normal(C, scale=0.1)}
    linear = {"blocks.0.attn.Wq.kernel": normal(C, C, scale=0.2), "blocks.0.attn.Wq.bias": normal(C, scale=0.1)}
    mlp = {
        "blocks.0.mlp.fc.kernel": normal(C, 4 * C, scale=0.2),
        "blocks.0.mlp.fc.bias": normal(4 * C, scale=0.1),
        "blocks.0.mlp.proj.kernel": normal(4 * C, C, scale=0.1),
        "blocks.0.mlp.proj.bias": normal(C, scale=0.1),
    }
    x_NC = normal(N, C)

    def torch_layer_norm(p: dict[str, Any]) -> Any:
        return F.layer_norm(p["x"], (C,), p["blocks.0.ln1.scale"], p["blocks.0.ln1.bias"], 1e-5)

    def torch_mlp(p: dict[str, Any], approximate: str) -> Any:
        hidden = F.linear(p["x"], p["blocks.0.mlp.fc.kernel"].T, p["blocks.0.mlp.fc.bias"])
        hidden = F.gelu(hidden, approximate=approximate)
        return F.linear(hidden, p["blocks.0.mlp.proj.kernel"].T, p["blocks.0.mlp.proj.bias"])

    def torch_attention(p: dict[str, Any]) -> Any:
        heads = (p[name].transpose(1, 2) for name in "qkv")
        return F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)

    def our_attention(_: Any, p: dict[str, Any]) -> Any:
        return gpt.causal_attention(p["q"], p["k"], p["v"], 0, "xla")

    def our_cross_entropy(_: Any, p: dict[str, Any]) -> Any:  # token by token, so that its error has a spread
        return jax.vmap(lambda x_V, t: loss.cross_entropy(x_V[None], t[None])[0])(p["logits"], jnp.asarray(target_N))

    def our_head(_: Any, p: dict[str, Any], chunk_logits: int, head_multiple: int) -> Any:  # row by row: a spread
        def row_loss(x_TC: Any, target_T: Any, weight_T: Any) -> Any:
            return loss.head_cross_entropy(
                x_TC[None],
                p["head"],
                target_T[None],
                weight_T[None],
                compute_dtype=p["x"].dtype,
                chunk_logits=chunk_logits,
                head_multiple=head_multiple,
            )[0]

        return jax.vmap(row_loss)(p["x"], jnp.asarray(head_target_RT), jnp.asarray(counts_RT))

    def torch_head(p: dict[str, Any]) -> Any:
        target_RT, counts = torch.from_numpy(head_target_RT).long(), torch.from_numpy(counts_RT)
        loss_RT = F.cross_entropy((p["x"] @ p["head"]).transpose(1, 2), target_RT, reduction="none")
        return (loss_RT * counts).sum(1)

    head_target_RT = draw.integers(0, V, (16, T)).astype(np.int32)
    counts_RT = draw.random((16, T)) < 0.8
    head = {"x": normal(16, T, C), "head": normal(C, V, scale=0.3)}
    return [
        Op(
            "layernorm", {"x": x_NC, **layer_norm}, lambda m, p: m.blocks[0].ln1(p["x"]), torch_layer_norm, model_config
        ),
        Op(
            "layernorm far from 0",
            {"x": 100 + x_NC, **layer_norm},
            lambda m, p: m.blocks[0].ln1(p["x"]),
            torch_layer_norm,
            model_config,
            ill=True,
        ),
        Op(
            "linear",
            {"x": x_NC, **linear},
            lambda m, p: m.blocks[0].attn.Wq(p["x"]),
            lambda p: F.linear(p["x"], p["blocks.0.attn.Wq.kernel"].T, p["blocks.0.attn.Wq.bias"]),
            model_config,
        ),
        Op(
            "mlp, GELU erf",
            {"x": x_NC, **mlp},
            lambda m, p: m.blocks[0].mlp(p["x"]),
            lambda p: torch_mlp(p, "none"),
            dataclasses.replace(model_config, gelu="erf"),
        ),
        Op(
            "mlp, GELU tanh",
            {"x": x_NC, **mlp},
            lambda m, p: m.blocks[0].mlp(p["x"]),
            lambda p: torch_mlp(p, "tanh"),
            dataclasses.replace(model_config, gelu="tanh"),
        ),
        Op(
            "attention",
            {name: normal(B, T, H, D) for name in "qkv"},
            our_attention,
            torch_attention,
            model_config,
        ),
        Op(
            "embedding",
            {"token_emb.embedding": normal(V, C)},
            lambda m, p: m.token_emb(jnp.asarray(idx_BT)),
            lambda p: F.embedding(torch.from_numpy(idx_BT).long(), p["token_emb.embedding"]),
            model_config,
        ),
        Op(
            "cross-entropy",
            {"logits": normal(N, V, scale=3.0)},
            our_cross_entropy,
            lambda p: F.cross_entropy(p["logits"], torch.from_numpy(target_N).long(), reduction="none"),
            model_config,
        ),
        Op(
            "attention, uneven blocks",
            {name: normal(2, 2 * MIN_BLOCK + 3, H, D) for name in "qkv"},
            our_attention,
            torch_attention,
            model_config,
        ),
        Op("head and loss at once", head, partial(our_head, chunk_logits=T * V, head_multiple=1), torch_head),
        Op(
            "head and loss in uneven chunks",
            head,
            partial(our_head, chunk_logits=T * V // 3, head_multiple=1),
            torch_head,
        ),
        Op(
            "head and loss, wider head",
            head,
            partial(our_head, chunk_logits=T * V // 3, head_multiple=128),
            torch_head,
        ),
    ]


def torch_vjp(op: Op, precision: str) -> tuple[np.ndarray, Arrays]:
    """The value, and the gradient by each input of its sum weighted with the cotangent."""
    dtype = TORCH_DTYPES[precision]
    inputs = {name: torch.tensor(a, dtype=dtype, requires_grad=True) for name, a in op.inputs.items()}
    value = op.torch(inputs)
    value.backward(torch.tensor(cotangent(value.shape), dtype=dtype))
    return value.detach().numpy(), {name: a.grad.numpy() for name, a in inputs.items()}


def flax_vjp(op: Op, precision: str) -> tuple[np.ndarray, Arrays]:
    """The same on our side."""
    objective = objective_of(op.case(), precision)
    params = flax_params(op.case(), objective)
    dtype = np.dtype(precision)

    @jax.jit
    def compute(inputs: dict[str, Any]) -> Any:
        def value_of(inputs: dict[str, Any]) -> Any:
            return op.ours(objective.model({**params, **{n: a for n, a in inputs.items() if n in params}}), inputs)

        value, vjp = jax.vjp(value_of, inputs)
        return value, vjp(jnp.asarray(cotangent(value.shape), dtype))[0]

    value, grads = compute({name: a.astype(dtype) for name, a in op.inputs.items()})
    return np.asarray(value), {name: np.asarray(g) for name, g in grads.items()}


def cotangent(shape: tuple[int, ...]) -> np.ndarray:
    """Random weights of the result's elements, float32."""
    return np.random.default_rng(1).normal(size=tuple(shape)).astype(np.float32)


def compare_op(op: Op, precisions: tuple[str, ...] = ("float64", "float32")) -> Iterator[Row]:
    """An operation's values and gradients."""
    truth, true_grads = torch_vjp(op, "float64")
    suffix = ", far from 0" if op.ill else ""
    for precision in precisions:
        with precision_of(precision):
            value, grads = flax_vjp(op, precision)
        if precision == "float64":
            yield error_row(f"op value{suffix}", precision, op.name, partial(relative_l2, value, truth))
        else:
            torch_value, torch_grads = torch_vjp(op, precision)
            yield ratio_row("op value", precision, op.name, partial(own_errors, value, torch_value, truth))
        error, where = worst_tensor(grads, true_grads, precision)
        yield row(f"op gradients{suffix}", precision, op.name, error, note=where)
        if precision == "float32":
            ratios = tensor_ratios(grads, torch_grads, true_grads)
            where = max(ratios, key=ratios.get)
            yield row("op gradients, R", precision, op.name, ratio=ratios[where], note=where)


def check_ops(quick: bool) -> Iterator[Row]:
    """Operations with their vector-Jacobian products."""
    for op in ops():
        yield from compare_op(op, ("float64",) if quick else ("float64", "float32"))


def check_out_of_range(quick: bool) -> Iterator[Row]:
    """Token ids outside the vocabulary: PyTorch raises; ours must give NaN, never a plausible number."""
    case = small("ids outside the vocabulary")
    objective = objective_of(case, "float32")
    outside = np.array([[case.vocab_size, case.vocab_size + 7]], np.int32)
    try:
        F.embedding(torch.from_numpy(outside).long(), torch.zeros(case.vocab_size, 2))
    except IndexError:
        pass
    else:
        raise AssertionError("PyTorch took an id outside the vocabulary")
    logits = objective.model(flax_params(case, objective))(outside)
    yield row("ids out of range", "float32", case.name, float(np.isfinite(np.asarray(logits)).mean()))


def check_block(quick: bool) -> Iterator[Row]:
    """One block, and its gradient by its input."""
    yield from compare_block(small("block"))


def compare_block(case: Case, precisions: tuple[str, ...] = ("float64", "float32")) -> Iterator[Row]:
    shape_BTC = (case.config.batch_size, case.config.model.block_size, case.config.model.n_embd)
    x_BTC = np.random.default_rng(case.seed).normal(size=shape_BTC).astype(np.float32)

    def torch_side(precision: str) -> tuple[np.ndarray, np.ndarray]:
        x = torch.tensor(x_BTC, dtype=TORCH_DTYPES[precision], requires_grad=True)
        value = torch_model(case, precision).blocks[0](x, None, None)
        value.backward(torch.tensor(cotangent(value.shape), dtype=x.dtype))
        return value.detach().numpy(), x.grad.numpy()

    def flax_side(precision: str) -> tuple[np.ndarray, np.ndarray]:
        objective = objective_of(case, precision)
        params = flax_params(case, objective)

        @jax.jit
        def compute(x_BTC: Any) -> Any:
            def value_of(x_BTC: Any) -> Any:
                block = objective.model(params).blocks[0]
                return block(x_BTC.reshape(-1, shape_BTC[2]), shape_BTC[0], None, None, 0)[0].reshape(shape_BTC)

            value, vjp = jax.vjp(value_of, x_BTC)
            return value, vjp(jnp.asarray(cotangent(value.shape), x_BTC.dtype))[0]

        return tuple(np.asarray(a) for a in compute(x_BTC.astype(precision)))

    truth, true_grad = torch_side("float64")
    by_input = f"{case.name}, by its input"
    for precision in precisions:
        with precision_of(precision):
            value, grad = flax_side(precision)
        if precision == "float64":
            yield error_row("block", precision, case.name, partial(max_abs, value, truth))
            yield error_row("gradients", precision, by_input, partial(relative_l2, grad, true_grad))
        else:
            torch_value, torch_grad = torch_side(precision)
            yield ratio_row("block", precision, case.name, partial(own_errors, value, torch_value, truth))
            yield ratio_row("gradients, R worst", precision, by_input, partial(own_errors, grad, torch_grad, true_grad))
