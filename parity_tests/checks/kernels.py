"""The attention kernels of TPUs, interpreted on this machine's CPU, against PyTorch's attention.

The kernels compute in float32 whatever their inputs are, so float32 inputs show every digit that they have. A sequence
of one block takes other code than one of several: the softmax over blocks, and a second kernel of the backward pass.
Axes: B batch, T time, H heads, D head size.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from jaxgpt.model import attention
from jaxgpt.parity.harness import Row, own_errors, tensor_ratios, worst_tensor
from parity_tests.checks.ops import Op, flax_vjp, torch_vjp
from parity_tests.tolerances import ratio_row, row

N_HEAD, HEAD_SIZE = 3, 16
N_TIMES = {"one block": 128, "three blocks": 384}  # of 128
ENDS = (0.1, 0.4)  # of documents, as shares of the row: within blocks


def splash_op(n_time: int, documents: bool) -> Op:
    """Splash attention of rows of which each has other documents, or one."""
    draw = np.random.default_rng(0)
    inputs = {name: draw.normal(size=(2, n_time, N_HEAD, HEAD_SIZE)).astype(np.float32) for name in "qkv"}
    document_BT = np.zeros((2, n_time), np.int32)
    if documents:
        for document_T, shift in zip(document_BT, (0, 0.2), strict=True):
            for end in ENDS:
                document_T[round((end + shift) * n_time) :] += 1
    seen_B1TS = (np.tri(n_time, dtype=bool) & (document_BT[:, :, None] == document_BT[:, None, :]))[:, None]

    def ours(_: Any, p: dict[str, Any]) -> Any:
        return attention.splash_attention(p["q"], p["k"], p["v"], document_BT if documents else None, interpret=True)

    def torch_attention(p: dict[str, Any]) -> Any:
        heads = (p[name].transpose(1, 2) for name in "qkv")
        return F.scaled_dot_product_attention(*heads, attn_mask=torch.from_numpy(seen_B1TS)).transpose(1, 2)

    return Op("splash attention", inputs, ours, torch_attention)


def check_splash_attention(quick: bool) -> Iterator[Row]:
    """Values and gradients, causal and within documents, of sequences of one block and of several."""
    yield from compare_splash("three blocks", documents=True)
    if not quick:
        yield from compare_splash("three blocks", documents=False)
        yield from compare_splash("one block", documents=True)
        yield from compare_splash("one block", documents=False)


def compare_splash(blocks: str, documents: bool) -> Iterator[Row]:
    op, case = splash_op(N_TIMES[blocks], documents), f"{blocks}, {'documents' if documents else 'causal'}"
    truth, true_grads = torch_vjp(op, "float64")
    torch_value, torch_grads = torch_vjp(op, "float32")
    value, grads = flax_vjp(op, "float32")
    yield ratio_row("splash attention", "float32", case, partial(own_errors, value, torch_value, truth))
    error, where = worst_tensor(grads, true_grads, "float32")
    yield row("splash attention, gradients", "float32", case, error, note=where)
    ratios = tensor_ratios(grads, torch_grads, true_grads)
    where = max(ratios, key=ratios.get)
    yield row("splash attention, gradients, R", "float32", case, ratio=ratios[where], note=where)
