"""Attention: heads read in another order, another scale, mask or softmax, other rotary positions."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from jaxgpt.parity.changes.base import Change, Form, after, before, bound, last, pattern, with_parameters
from jaxgpt.parity.torch_side import PASSING, Call, Edit, Operation, OperationMode

PRODUCTS = ("matmul", "__matmul__", "bmm", "baddbmm")
MASKING = ("add", "add_", "__add__", "masked_fill", "masked_fill_", "where")
MASKED = -1e4  # added to a score: masks are -inf, the smallest number, or as little as this
ROTARY_BASES = (10_000.0, 500_000.0, 1_000_000.0, 100_000.0)


@dataclass(frozen=True)
class Variant:
    """One thing that another attention does. None and True: as the recorded one does it.

    Attributes:
        scale: what the products of queries and keys are multiplied by.
        causal: the diagonal up to which a query sees keys, 0 for its own token; "none" for no causal mask.
        padding: whether keys that no query sees stay masked.
        tiled: key and value heads 0, 1, 0, 1 in place of 0, 0, 1, 1.
        rounding: what is rounded ("scores", "softmax", "weights"), and to which dtype.
    """

    scale: float | None = None
    causal: int | str | None = None
    padding: bool = True
    tiled: bool = False
    rounding: tuple[str, torch.dtype] | None = None


@dataclass(frozen=True)
class Attention:
    """softmax(scale Q K^T + mask) V, in `scaled_dot_product_attention` or written out.

    Attributes:
        at: the operation that gives its result.
        query, key, value: as the operations take them: a key may be transposed.
        n_head, n_kv: heads of the queries, of the keys and values.
        scale: what the products of queries and keys are multiplied by.
        masked: [..., T, S], True where a query does not see a key.
        edits: makes it another.
    """

    layer: str
    at: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    n_head: int
    n_kv: int
    scale: float
    masked: torch.Tensor
    edits: Callable[[Variant], dict[int, Edit]]

    @property
    def size(self) -> int:
        return self.query.shape[-1]

    @property
    def is_square(self) -> bool:
        return self.masked.shape[-1] == self.masked.shape[-2] > 1

    @property
    def is_causal(self) -> bool:
        return self.is_square and bool(self.masked[..., *_above(self.masked)].all())

    @property
    def has_padding(self) -> bool:
        """Whether there are keys that no query sees."""
        return bool(self.masked.all(-2).any())


def _above(masked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = torch.triu_indices(masked.shape[-2], masked.shape[-1], 1)
    return rows, columns


def attentions(record: OperationMode) -> list[Attention]:
    """The attentions of a forward pass."""
    found = []
    for op in record.operations:
        if op.name == "scaled_dot_product_attention":
            found.append(_fused(op))
        elif op.name == "softmax" and op.trained and (written := _written_out(record, op)):
            found.append(written)
    return found


def _fused(op: Operation) -> Attention:
    a = bound(op)
    query, key = a["query"], a["key"]
    own = a.get("scale") or query.shape[-1] ** -0.5

    def edits(variant: Variant) -> dict[int, Edit]:
        def edit(call: Call) -> torch.Tensor:
            a = bound(call)
            q, k, v = a["query"], a["key"], a["value"]
            repeats = q.shape[1] // k.shape[1]
            if repeats > 1:
                tile = lambda x: x.repeat(1, repeats, 1, 1)  # noqa: E731
                k, v = (tile(x) if variant.tiled else x.repeat_interleave(repeats, 1) for x in (k, v))
            return _weights(own * (q @ k.transpose(-1, -2)), _bias(a), own, variant) @ v

        return {op.index: edit}

    n_head, n_kv = query.shape[1], key.shape[1]
    masked = _bias(a) <= MASKED
    return Attention(op.module, op.index, query, key, a["value"], n_head, n_kv, own, masked, edits)


def _bias(a: Mapping[str, Any]) -> torch.Tensor:
    """What `scaled_dot_product_attention` adds to the scores, [..., T, S]."""
    query, given = a["query"], a.get("attn_mask")
    bias = torch.zeros(query.shape[-2], a["key"].shape[-2], dtype=query.dtype)
    if a.get("is_causal"):
        bias = bias.masked_fill(torch.ones_like(bias, dtype=torch.bool).triu(1), -torch.inf)
    if given is None:
        return bias
    return torch.where(given, 0.0, -torch.inf).to(query.dtype) if given.dtype == torch.bool else bias + given


def _written_out(record: OperationMode, softmax: Operation) -> Attention | None:
    """The attention around a softmax: a product before it, and one after."""
    product, scale = _before_softmax(record, softmax)
    product_after = _after_softmax(record, softmax)
    if product is None or product_after is None:
        return None
    query, key = product.args[1:3] if product.name == "baddbmm" else product.args[:2]
    sources = [record.place_of(t) for t in (query, key)]
    if (
        query.ndim < 3
        or query.shape[-1] != key.shape[-2]
        or not all(place and record.operations[place[0]].trained for place in sources)
    ):
        return None
    of_query, of_key = sources
    assert of_query is not None and of_key is not None, "both have a place"
    scale *= product.kwargs.get("alpha", 1.0)
    own = scale * _factor_before(record, of_query[0]) * _factor_before(record, of_key[0])

    def edits(variant: Variant) -> dict[int, Edit]:
        def edit(call: Call) -> torch.Tensor:
            masked_score, *rest = call.args
            score = scale * (call.mode.value_at(of_query) @ call.mode.value_at(of_key))
            weights = _weights(score, masked_score - score, own, variant)
            return weights.to(call.original().dtype)

        return {softmax.index: edit}

    masked = torch.from_numpy(softmax.arrays[0] == 0)
    n_head = query.shape[1] if query.ndim == 4 else _n_heads(record, query)
    return Attention(
        softmax.module, product_after.index, query, key, product_after.args[1], n_head, n_head, own, masked, edits
    )


def _before_softmax(record: OperationMode, softmax: Operation) -> tuple[Operation | None, float]:
    """The product that gives the scores, and the factor between the two."""
    index, scale = record.source_of(softmax.args[0]), 1.0
    while index is not None:
        op = record.operations[index]
        if op.name in PRODUCTS:
            return op, scale
        if factor := _factor(op):
            scale *= factor
        elif op.name not in (*PASSING, *MASKING):
            break
        index = next((i for i in op.inputs if record.operations[i].trained), None)
    return None, scale


def _after_softmax(record: OperationMode, softmax: Operation) -> Operation | None:
    """The product of the weights and the values."""
    reached = {softmax.index}
    for op in record.operations[softmax.index + 1 :]:
        if reached & set(op.inputs):
            if op.name in PRODUCTS and record.source_of(op.args[0]) in reached:
                return op
            if op.name not in PASSING:
                return None
            reached.add(op.index)
    return None


def _factor(op: Operation) -> float | None:
    """The number that an operation multiplies by; None if it is another operation."""
    numbers = [a for a in op.args if isinstance(a, int | float) and not isinstance(a, bool)]
    numbers += [float(a.detach()) for a in op.args if isinstance(a, torch.Tensor) and a.ndim == 0]
    if len(numbers) != 1 or not op.trained or not numbers[0]:
        return None
    if op.name in ("mul", "mul_", "__mul__", "__rmul__"):
        return numbers[0]
    return 1 / numbers[0] if op.name in ("div", "div_", "__truediv__") else None


def _factor_before(record: OperationMode, index: int) -> float:
    """The factor of queries or keys, between their projection and the product."""
    scale, at = 1.0, index
    while (factor := _factor(op := record.operations[at])) or op.name in PASSING:
        scale *= factor or 1.0
        trained = [i for i in op.inputs if record.operations[i].trained]
        if not trained:
            break
        at = trained[0]
    return scale


def _n_heads(record: OperationMode, query: torch.Tensor) -> int:
    """Heads of queries [B * H, T, D]: as many as their projection has room for."""
    at = record.projection_before(query)
    if at is None:
        return 1
    op = record.operations[at]
    width, into = op.arrays[0].shape[-1], bound(op)["mat1" if op.name == "addmm" else "input"].shape[-1]
    return (width // 3 if width == 3 * into else width) // query.shape[-1]


def _weights(score: torch.Tensor, bias: torch.Tensor, own: float, variant: Variant) -> torch.Tensor:
    """The weights of another attention, from scores that are scaled by `own`, and what is added to them."""
    masked = bias <= MASKED
    bias = torch.where(masked, 0.0, bias)
    if variant.causal is not None or not variant.padding:
        padded = masked.all(-2, keepdim=True) if variant.padding else torch.zeros_like(masked)
        triangle = torch.ones_like(masked)
        is_causal = masked.shape[-1] > 1 and bool(masked[..., *_above(masked)].all())
        diagonal = 0 if variant.causal is None and is_causal else variant.causal
        masked = padded | ~triangle.tril(diagonal) if isinstance(diagonal, int) else padded
    score = score * ((variant.scale or own) / own) + bias
    score = score.masked_fill(masked, torch.finfo(score.dtype).min)  # not -inf: a row may see no key
    what, dtype = variant.rounding or ("", score.dtype)
    if what == "scores":
        score = score.to(dtype).to(score.dtype)
    if what == "softmax":
        return torch.softmax(score.to(dtype), -1).to(score.dtype)
    weights = torch.softmax(score, -1)
    return weights.to(dtype).to(weights.dtype) if what == "weights" else weights


def attention(record: OperationMode) -> Iterator[Change]:
    """Another scale, mask or softmax."""
    for site in attentions(record):
        size, own = site.size, site.scale

        def change(cause: str, detail: str, site: Attention = site, **values: Any) -> Change:
            return Change(cause, site.layer, detail, site.edits(Variant(**values)))

        scales = {"1 / D": 1 / size, "1": 1.0, "1 / sqrt(n_embd)": (site.n_head * size) ** -0.5}
        scales |= {"sqrt(D)": size**0.5, "1 / sqrt(D)": size**-0.5}
        for text, scale in scales.items():
            if not math.isclose(scale, own):
                yield change("attention scale", f"{text} for {own:.4g}", scale=scale)
        if site.is_causal:
            yield change("causal mask missing", "no causal mask", causal="none")
            yield change("mask off by one", "sees one token ahead", causal=1)
            yield change("mask off by one", "does not see its own token", causal=-1)
        elif site.is_square:
            yield change("causal mask added", "a causal mask", causal=0)
        if site.has_padding:
            yield change("padding mask missing", "no padding mask", padding=False)
        if site.masked.any():
            yield change("mask missing", "no mask", causal="none", padding=False)
        if site.n_kv < site.n_head:
            yield change("key and value heads tiled", "tiled for repeated", tiled=True)
        for dtype in (torch.bfloat16, torch.float16):
            for what in ("scores", "softmax", "weights"):
                yield change(f"rounded to {last(str(dtype))}", f"the {what} of attention", rounding=(what, dtype))


def heads(record: OperationMode) -> Iterator[Change]:
    """The features of a head read in another order, or two heads exchanged."""
    for site in attentions(record):
        yield from _heads_of(record, site)


def _heads_of(record: OperationMode, site: Attention) -> Iterator[Change]:
    n_head, size, n_kv = site.n_head, site.size, site.n_kv

    def interleaved(n: int) -> Form:
        return lambda y: y.unflatten(-1, (size, n)).transpose(-1, -2).flatten(-2)

    into = [record.projection_before(tensor) for tensor in (site.query, site.key, site.value)]
    out = record.projection_after(record.operations[site.at])
    edits: dict[int, Edit] = {}
    for at, n in zip(into, (n_head, n_kv, n_kv), strict=True):
        if at is not None and record.operations[at].arrays[0].shape[-1] == n * size:
            edits[at] = after(interleaved(n))
    cause, detail = "heads interleaved", "[D, H] for [H, D]"
    if edits and out is not None:
        both = {**edits, out: before(interleaved(n_head))}
        yield Change(cause, site.layer, f"{detail} in queries, keys, values and output", both)
    if edits:
        yield Change(cause, site.layer, f"{detail} in queries, keys and values", edits)
    for at, edit in edits.items():
        yield Change(cause, site.layer, f"{detail} in {last(record.operations[at].module)}", {at: edit})
    if out is not None:
        yield Change(cause, site.layer, f"{detail} in the output", {out: before(interleaved(n_head))})
    if (at := into[0]) is None:
        return
    width = record.operations[at].arrays[0].shape[-1]
    if width == 3 * n_head * size:
        by_part = after(lambda y: y.unflatten(-1, (n_head, 3, size)).transpose(-2, -3).flatten(-3))
        yield Change(cause, site.layer, "[H, 3, D] for [3, H, D]", {at: by_part})
        by_head = after(lambda y: y.unflatten(-1, (3, n_head, size)).transpose(-2, -3).flatten(-3))
        yield Change(cause, site.layer, "[3, H, D] for [H, 3, D]", {at: by_head})
        within = after(lambda y: y.unflatten(-1, (3, size, n_head)).transpose(-1, -2).flatten(-3))
        yield Change(cause, site.layer, f"{detail} in queries, keys and values", {at: within})
    if n_head > 1 and width in (n_head * size, 3 * n_head * size):
        order = [1, 0, *range(2, width // size)]
        swap = after(lambda y: y.unflatten(-1, (-1, size))[..., order, :].flatten(-2))
        yield Change("heads swapped", site.layer, "two heads of the queries", {at: swap})


def rotary(record: OperationMode) -> Iterator[Change]:
    """Rotary position embedding: pairs of neighbours in place of halves, another base, the other direction."""
    edits: dict[int, Edit] = {}
    layers: list[str] = []
    for op in record.operations:
        if op.name == "cat" and type(op.args[0]) in (tuple, list) and len(op.args[0]) == 2:
            first, second = op.args[0]
            if first is second:
                edits[op.index] = lambda call: call.args[0][0].repeat_interleave(2, -1)
                layers.append(op.module)
            elif (at := record.source_of(first)) is not None and record.operations[at].name == "neg":
                edits[op.index] = lambda call: _rotated_pairs(torch.cat([call.args[0][1], -call.args[0][0]], -1))
                layers.append(op.module)
    layer = ", ".join(dict.fromkeys(map(pattern, layers)))
    if edits:
        yield Change("rotary layout", layer, "neighbours for halves", edits)
    for name, tensor in record.tensors.items():
        if name.endswith("inv_freq"):
            using = [op for op in record.operations if record.uses(op, name)]
            for base in ROTARY_BASES:
                exponents = torch.arange(len(tensor), dtype=torch.float64) / len(tensor)
                other = (base**-exponents).to(tensor.dtype)
                if using and not torch.allclose(other, tensor):
                    change = with_parameters({name: lambda tensors, t=other: t})
                    edit = {op.index: change for op in using}
                    yield Change("rotary base", name.rpartition(".")[0], f"base {base:g}", edit)
    sines = [op for op in record.operations if op.name == "sin" and not op.trained]
    if sines:
        edits = {op.index: after(torch.neg) for op in sines}
        yield Change("rotary direction", sines[0].module, "-sin for sin", edits)


def _rotated_pairs(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
