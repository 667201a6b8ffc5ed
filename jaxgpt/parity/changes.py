"""Changes of the PyTorch side: the mistakes that ports make, made on purpose.

Each change edits some operations of a recorded forward pass: another epsilon, a transposed weight, a mask left out. The
diagnosis tries which of them makes the difference to the JAX side vanish; the mutants show that each makes one.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from jaxgpt.parity.torch_side import Call, Edit, Operation, OperationMode

EPSILONS = (1e-3, 1e-5, 1e-6, 1e-8, 1e-12, 0.0)
ROTARY_BASES = (10_000.0, 500_000.0, 1_000_000.0, 100_000.0)
MOMENTA = (0.1, 0.9, 0.01, 0.99)

# The parameters of functions that PyTorch takes by position.
SIGNATURES: dict[str, tuple[str, ...]] = {
    "linear": ("input", "weight", "bias"),
    "addmm": ("input", "mat1", "mat2"),
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    "conv1d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "conv2d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "conv3d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "conv_transpose2d": ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
    "embedding": ("input", "weight"),
    "scaled_dot_product_attention": ("query", "key", "value", "attn_mask", "dropout_p", "is_causal"),
    "cross_entropy": (
        "input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing"
    ),
    "mse_loss": ("input", "target", "size_average", "reduce", "reduction"),
    "max_pool2d": ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    "avg_pool2d": ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"),
    "lstm": ("input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first"),
    "gru": ("input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first"),
}  # fmt: skip
NORMS = ("layer_norm", "rms_norm", "group_norm", "batch_norm")
WEIGHTED = ("linear", "addmm", "matmul", "conv1d", "conv2d", "conv3d", "conv_transpose2d")
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "GELU of erf": F.gelu,
    "GELU of tanh": lambda x: F.gelu(x, approximate="tanh"),
    "GELU of the sigmoid": lambda x: x * torch.sigmoid(1.702 * x),
    "ReLU": torch.relu,
    "SiLU": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "ELU": F.elu,
    "leaky ReLU": F.leaky_relu,
    "no activation": lambda x: x,
}
Form = Callable[[torch.Tensor], torch.Tensor]
ACTIVATION_FUNCTIONS = ("gelu", "relu", "relu_", "silu", "tanh", "sigmoid", "elu", "leaky_relu", "mish", "softplus")


@dataclass(frozen=True)
class Change:
    """One mistake.

    Attributes:
        cause: its kind: "epsilon".
        layer: the module that it is in; several, or a pattern with `*` for the layers' numbers.
        detail: what is changed to what.
        edits: the edited operations.
    """

    cause: str
    layer: str
    detail: str
    edits: Mapping[int, Edit]

    @property
    def name(self) -> str:
        return f"{self.cause}: {self.detail} in {self.layer or 'the model'}"


def bound(call: Call | Operation) -> dict[str, Any]:
    """The arguments of a call by name; a function without an entry in SIGNATURES has numbers for names."""
    name = call.name if isinstance(call, Operation) else getattr(call.function, "__name__", "")
    names = SIGNATURES.get(name, ())
    by_position = {names[i] if i < len(names) else str(i): value for i, value in enumerate(call.args)}
    return by_position | call.kwargs


def with_arguments(**changes: Any) -> Edit:
    """Calls the function with some arguments changed; a change that is a function is given the old value."""

    def edit(call: Call) -> Any:
        arguments = bound(call)
        for name, value in changes.items():
            arguments[name] = value(arguments.get(name)) if callable(value) else value
        return call.function(**arguments)

    return edit


def with_parameters(changes: Mapping[str, Callable[[Mapping[str, torch.Tensor]], torch.Tensor]]) -> Edit:
    """Calls the function with other tensors in place of some parameters of the model, by their names."""

    def edit(call: Call) -> Any:
        def changed(tree: Any) -> Any:
            if isinstance(tree, torch.Tensor):
                name = call.mode.names.get(id(tree), "")
                return changes[name](call.mode.tensors) if name in changes else tree
            if type(tree) in (tuple, list):
                return type(tree)(changed(item) for item in tree)
            return tree

        kwargs = {name: changed(value) for name, value in call.kwargs.items()}
        return call.function(*changed(call.args), **kwargs)

    return edit


def after(function: Callable[[Any], Any]) -> Edit:
    """Changes the output of the function."""
    return lambda call: function(call.original())


def all_changes(record: OperationMode) -> list[Change]:
    """Every change of a recorded forward pass: in one place, in all places of a pattern, and in all places."""
    single = [change for find in FINDERS for change in find(record)]
    return [*single, *grouped(single)]


def grouped(single: Sequence[Change]) -> list[Change]:
    """The same change in all layers of a pattern, and wherever it can be made."""
    found = []
    for key in (lambda c: (c.cause, c.detail, _pattern(c.layer)), lambda c: (c.cause, c.detail)):
        groups: dict[Any, list[Change]] = {}
        for change in single:
            groups.setdefault(key(change), []).append(change)
        for members in groups.values():
            edits: dict[int, Edit] = {}
            for change in members:
                edits.update({at: edit for at, edit in change.edits.items() if at not in edits})
            if len({change.layer for change in members}) > 1:
                layers = ", ".join(dict.fromkeys(_pattern(change.layer) for change in members))
                change = Change(members[0].cause, layers, members[0].detail, edits)
                if not any(set(change.edits) == set(other.edits) and other.name == change.name for other in found):
                    found.append(change)
    return found


def _pattern(layer: str) -> str:
    return re.sub(r"\d+", "*", layer)


# ------------------------------------------------------------------------------------------------------------ norms


@dataclass(frozen=True)
class Norm:
    """A normalization: one operation, or the operations of a module that ends in one.

    Attributes:
        at: the operation that gives the result.
        epsilon_at: the operation that takes the epsilon.
        input: the operation whose output is normalized.
        kind: "layer", "rms", "group", "batch".
    """

    layer: str
    at: int
    epsilon_at: int
    epsilon: float
    input: int | None
    kind: str


def norms(record: OperationMode) -> list[Norm]:
    """The norms of a forward pass."""
    found = []
    for op in record.operations:
        if op.name in NORMS and op.trained:
            epsilon = bound(op).get("eps")
            kind = op.name.removesuffix("_norm")
            source = record.source_of(bound(op)["input"])
            found.append(Norm(op.module, op.index, op.index, 1e-5 if epsilon is None else epsilon, source, kind))
        elif op.name in ("rsqrt", "sqrt") and op.inputs and (added := record.operations[op.inputs[0]]).name == "add":
            scalars = [a for a in added.args if isinstance(a, float) and 0 < a < 0.01]
            call = record.call_around(op.index)
            if scalars and call is not None and call.input is not None and call.name:
                found.append(Norm(op.module, call.end - 1, added.index, scalars[0], call.input, "rms"))
    return found


def epsilon(record: OperationMode) -> Iterator[Change]:
    for norm in norms(record):
        for value in EPSILONS:
            if value != norm.epsilon:
                if norm.at == norm.epsilon_at:
                    edit = with_arguments(eps=value)
                else:
                    edit = after(lambda out, by=value - norm.epsilon: out + by)
                yield Change("epsilon", norm.layer, f"eps {value:g} for {norm.epsilon:g}", {norm.epsilon_at: edit})


def norm_forms(record: OperationMode) -> Iterator[Change]:
    """A norm left out, or with another formula."""
    for norm in norms(record):
        layer, at, source = norm.layer, norm.at, norm.input
        op = record.operations[at]
        weights = [name for name in op.parameters if name.endswith(("weight", "scale", "gamma"))]
        if source is not None:
            yield Change("norm missing", layer, "no norm", {at: lambda call, i=source: call.output_of(i)})
        if weights:
            plus_one = with_parameters({weights[0]: lambda tensors, n=weights[0]: 1 + tensors[n]})
            yield Change("scale plus one", layer, "1 + weight for weight", {at: plus_one})
            ones = with_parameters({weights[0]: lambda tensors, n=weights[0]: torch.ones_like(tensors[n])})
            yield Change("scale missing", layer, "no weight", {at: ones})
        if norm.kind == "layer":
            yield Change("mean not subtracted", layer, "RMSNorm for LayerNorm", {at: _rms_for_layer_norm})
            yield Change("variance unbiased", layer, "variance over n - 1", {at: _unbiased_layer_norm})
        if norm.kind == "rms" and source is not None:

            def subtracted(call: Call, i: int = source, eps: float = norm.epsilon) -> torch.Tensor:
                x = call.output_of(i)
                tensors = [t for t in call.args if isinstance(t, torch.nn.Parameter)]
                return F.layer_norm(x, x.shape[-1:], tensors[0] if tensors else None, None, eps)

            yield Change("mean subtracted", layer, "LayerNorm for RMSNorm", {at: subtracted})
        if norm.kind == "batch":
            yield Change(
                "batch statistics", layer, "the other statistics", {at: with_arguments(training=lambda on: not on)}
            )


def _rms_for_layer_norm(call: Call) -> torch.Tensor:
    a = bound(call)
    x = a["input"]
    scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + a.get("eps", 1e-5))
    scaled = scaled if a.get("weight") is None else scaled * a["weight"]
    return scaled if a.get("bias") is None else scaled + a["bias"]


def _unbiased_layer_norm(call: Call) -> torch.Tensor:
    a = bound(call)
    x = a["input"]
    scaled = (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + a.get("eps", 1e-5))
    scaled = scaled if a.get("weight") is None else scaled * a["weight"]
    return scaled if a.get("bias") is None else scaled + a["bias"]


def norm_placement(record: OperationMode) -> Iterator[Change]:
    """N(x + f) becomes x + N(f); x + f(N(x)) becomes N(x + f(x))."""
    adds = {op.index: op for op in record.operations if _is_residual(record, op)}
    for norm in norms(record):
        if norm.input is None or norm.kind == "batch":
            continue
        before = record.skip_back(norm.input)
        if before in adds:
            x, branch = adds[before].args[:2]
            inputs = (record.source_of(x), record.source_of(branch))
            if None not in inputs:
                around = {norm.at: _around(inputs)}
                yield Change("norm placement", norm.layer, "x + norm(f) for norm(x + f)", around)
        for add in adds.values():
            if (
                add.index > norm.at
                and norm.input in [record.source_of(a) for a in add.args[:2]]
                and norm.at == norm.epsilon_at
            ):
                function = record.operations[norm.at]
                edits = {
                    norm.at: lambda call, i=norm.input: call.output_of(i),
                    add.index: lambda call, op=function: _again(op, call.original()),
                }
                yield Change("norm placement", norm.layer, "norm(x + f(x)) for x + f(norm(x))", edits)
                break


def _around(inputs: tuple[int | None, ...]) -> Edit:
    def edit(call: Call) -> Any:
        x, branch = (call.output_of(i) for i in inputs if i is not None)
        arguments = bound(call)
        return x + call.function(**{**arguments, "input": branch})

    return edit


def _again(op: Operation, x: torch.Tensor) -> torch.Tensor:
    return getattr(F, op.name)(**{**bound(op), "input": x})


# ------------------------------------------------------------------------------------------------------ activations


def activation(record: OperationMode) -> Iterator[Change]:
    sites: list[tuple[str, int, str, Callable[[Call], torch.Tensor]]] = []
    inside: set[int] = set()
    for call in record.calls:
        ops = record.operations[call.first : call.end]
        if call.input is None or len(ops) < 2 or any(op.parameters for op in ops):
            continue
        if re.search("gelu|activation|swish|silu|mish|act$", f"{call.kind} {call.name}".lower()):
            sites.append((call.name, call.end - 1, call.kind, lambda c, i=call.input: c.output_of(i)))
            inside.update(range(call.first, call.end))
    for op in record.operations:
        if op.name in ACTIVATION_FUNCTIONS and op.trained and op.index not in inside:
            sites.append(
                (op.module, op.index, _activation_name(op), lambda c: c.args[0] if c.args else c.kwargs["input"])
            )
    for layer, at, own, source in sites:
        for name, function in ACTIVATIONS.items():
            if name != own:
                edit = lambda c, f=function, s=source: f(s(c).clone())  # noqa: E731
                yield Change("activation", layer, f"{name} for {own}", {at: edit})


def _first_argument(call: Call) -> torch.Tensor:
    return call.args[0] if call.args else call.kwargs["input"]


def _activation_name(op: Operation) -> str:
    if op.name == "gelu":
        return "GELU of tanh" if op.kwargs.get("approximate") == "tanh" else "GELU of erf"
    return {"relu": "ReLU", "relu_": "ReLU", "silu": "SiLU", "elu": "ELU"}.get(op.name, op.name)


# ---------------------------------------------------------------------------------------------------------- weights


def weights(record: OperationMode) -> Iterator[Change]:
    """Weights transposed or flipped, biases left out."""
    for op in record.operations:
        if op.name in WEIGHTED:
            for name in op.parameters:
                tensor = record.tensors[name]
                if tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1]:
                    yield _reformed(op, name, "kernel transposed", "its transpose", lambda w: w.T)
                if tensor.ndim == 4 and tensor.shape[-1] > 1:
                    cause = "kernel's spatial axes transposed"
                    yield _reformed(op, name, cause, "width for height", lambda w: w.transpose(-1, -2))
                    yield _reformed(op, name, "kernel flipped", "both axes flipped", lambda w: w.flip(-1, -2))
                if tensor.ndim == 4 and tensor.shape[0] == tensor.shape[1]:
                    yield _reformed(op, name, "kernel transposed", "inputs for outputs", lambda w: w.transpose(0, 1))
        if op.name in (*WEIGHTED, *NORMS):
            for name in op.parameters:
                if record.tensors[name].ndim == 1 and re.search("bias|beta", name.rpartition(".")[2]):
                    yield _reformed(op, name, "bias missing", "no bias", torch.zeros_like)


def _reformed(
    op: Operation, name: str, cause: str, detail: str, form: Callable[[torch.Tensor], torch.Tensor]
) -> Change:
    edit = with_parameters({name: lambda tensors: form(tensors[name])})
    return Change(cause, name.rpartition(".")[0], detail, {op.index: edit})


def swaps(record: OperationMode) -> Iterator[Change]:
    """The weights of two modules exchanged: neighbours in one parent, or two layers of a list."""
    by_module: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in record.tensors.items():
        module, _, leaf = name.rpartition(".")
        by_module.setdefault(module, {})[leaf] = tensor
    by_parent: dict[str, list[str]] = {}
    for module, tensors in by_module.items():
        if any(t.ndim > 1 for t in tensors.values()):
            by_parent.setdefault(module.rpartition(".")[0], []).append(module)
    for modules in by_parent.values():
        for a, b in itertools.combinations(modules, 2):
            if _shapes(by_module[a]) == _shapes(by_module[b]):
                names = [(f"{a}.{leaf}", f"{b}.{leaf}") for leaf in by_module[a]]
                yield from _swap(record, names, "weights swapped", f"{a}, {b}", f"{_last(a)} for {_last(b)}")
    stacks: dict[str, dict[int, list[str]]] = {}
    for name in record.tensors:
        if found := re.search(r"^(.*?)\.(\d+)\.", name):
            stacks.setdefault(found[1], {}).setdefault(int(found[2]), []).append(name)
    for prefix, layers in stacks.items():
        for i, j in itertools.combinations(sorted(layers), 2):
            names = [(a, a.replace(f"{prefix}.{i}.", f"{prefix}.{j}.", 1)) for a in layers[i]]
            if len(layers[i]) == len(layers[j]) and all(
                b in record.tensors and record.tensors[a].shape == record.tensors[b].shape for a, b in names
            ):
                yield from _swap(record, names, "layers swapped", f"{prefix}.{i}, {prefix}.{j}", f"{i} for {j}")


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {leaf: tensor.shape for leaf, tensor in tensors.items()}


def _swap(record: OperationMode, names: list[tuple[str, str]], cause: str, layer: str, detail: str) -> Iterator[Change]:
    other = dict(names) | {b: a for a, b in names}
    edit = with_parameters({name: lambda tensors, n=n: tensors[n] for name, n in other.items()})
    edits = {op.index: edit for op in record.operations if set(op.parameters) & set(other)}
    if edits:
        yield Change(cause, layer, detail, edits)


def fused(record: OperationMode) -> Iterator[Change]:
    """Parts of a fused projection in another order: queries, keys and values; the gates of an LSTM or GRU."""
    for op in record.operations:
        if op.name in ("linear", "addmm") and op.parameters:
            out, width = op.arrays[0].shape[-1], record.operations[op.inputs[0]].arrays if op.inputs else ()
            if width and width[0].ndim and out == 3 * width[0].shape[-1]:
                for order in itertools.permutations(range(3)):
                    if order != (0, 1, 2):
                        detail = "".join("qkv"[i] for i in order) + " for qkv"
                        edit = after(lambda y, o=order: torch.cat([y.chunk(3, -1)[i] for i in o], -1))
                        yield Change("weights swapped", op.module, detail, {op.index: edit})
        if op.name in ("lstm", "gru"):
            yield from _recurrent(op)


def _recurrent(op: Operation) -> Iterator[Change]:
    n_gates, letters = (4, "ifgo") if op.name == "lstm" else (3, "rzn")
    for order in itertools.permutations(range(n_gates)):
        if order != tuple(range(n_gates)):
            detail = "".join(letters[i] for i in order) + f" for {letters}"
            edit = _with_flat(lambda w, o=order, n=n_gates: torch.cat([w.chunk(n)[i] for i in o]))
            yield Change("gate order", op.module, detail, {op.index: edit})
    for leaf in ("bias_ih", "bias_hh"):
        names = [name for name in op.parameters if f".{leaf}" in f".{name}"]
        zero = {name: lambda tensors, n=name: torch.zeros_like(tensors[n]) for name in names}
        yield Change("bias missing", op.module, f"no {leaf}", {op.index: with_parameters(zero)})
    if op.name == "lstm":
        names = [name for name in op.parameters if ".bias_ih" in f".{name}"]
        plus = {name: lambda tensors, n=name: _forget_plus_one(tensors[n]) for name in names}
        yield Change("forget bias", op.module, "1 added to the forget gate", {op.index: with_parameters(plus)})


def _forget_plus_one(bias: torch.Tensor) -> torch.Tensor:
    i, f, g, o = bias.chunk(4)
    return torch.cat([i, f + 1, g, o])


def _with_flat(form: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    def edit(call: Call) -> Any:
        args = [[form(w) for w in a] if type(a) in (list, tuple) and len(a) > 2 else a for a in call.args]
        return call.function(*args, **call.kwargs)

    return edit


# -------------------------------------------------------------------------------------------------------- attention


def heads(record: OperationMode) -> Iterator[Change]:
    """The features of a head read in another order, or two heads exchanged."""
    for op in attentions(record):
        yield from _heads_of(record, op)


def _heads_of(record: OperationMode, op: Operation) -> Iterator[Change]:
    n_head, size = op.arrays[0].shape[1], op.arrays[0].shape[-1]
    n_kv = bound(op)["key"].shape[1]

    def interleaved(n: int) -> Form:
        return lambda y: y.unflatten(-1, (size, n)).transpose(-1, -2).flatten(-2)

    into = [record.projection_before(bound(op)[name]) for name in ("query", "key", "value")]
    out = record.projection_after(op)
    edits: dict[int, Edit] = {}
    for at, n in zip(into, (n_head, n_kv, n_kv), strict=True):
        if at is not None and record.operations[at].arrays[0].shape[-1] == n * size:
            edits[at] = after(interleaved(n))
    cause, detail = "heads interleaved", "[D, H] for [H, D]"
    if edits and out is not None:
        both = {**edits, out: _before(interleaved(n_head))}
        yield Change(cause, op.module, f"{detail} in queries, keys, values and output", both)
    if edits:
        yield Change(cause, op.module, f"{detail} in queries, keys and values", edits)
    for at, edit in edits.items():
        yield Change(cause, op.module, f"{detail} in {_last(record.operations[at].module)}", {at: edit})
    if out is not None:
        yield Change(cause, op.module, f"{detail} in the output", {out: _before(interleaved(n_head))})
    if (at := into[0]) is None:
        return
    width = record.operations[at].arrays[0].shape[-1]
    if width == 3 * n_head * size:
        split = after(lambda y: y.unflatten(-1, (n_head, 3, size)).transpose(-2, -3).flatten(-3))
        yield Change(cause, op.module, "[H, 3, D] for [3, H, D]", {at: split})
    if n_head > 1 and width == n_head * size:
        order = [1, 0, *range(2, n_head)]
        swap = after(lambda y: y.unflatten(-1, (n_head, size))[..., order, :].flatten(-2))
        yield Change("heads swapped", op.module, "two heads of the queries", {at: swap})


def _before(form: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    """Changes the input of a projection."""

    def edit(call: Call) -> Any:
        arguments = bound(call)
        name = "mat1" if "mat1" in arguments else "input"
        return call.function(**{**arguments, name: form(arguments[name])})

    return edit


def attentions(record: OperationMode) -> list[Operation]:
    return [op for op in record.operations if op.name == "scaled_dot_product_attention"]


def attention(record: OperationMode) -> Iterator[Change]:
    """Another scale, mask or softmax, in `scaled_dot_product_attention`."""
    for op in attentions(record):
        a = bound(op)
        size, n_head, n_kv = a["query"].shape[-1], a["query"].shape[1], a["key"].shape[1]
        own = a.get("scale") or size**-0.5
        for text, scale in (
            ("1 / D", 1 / size),
            ("1", 1.0),
            ("1 / sqrt(n_embd)", (n_head * size) ** -0.5),
            ("sqrt(D)", size**0.5),
            ("1 / sqrt(D)", size**-0.5),
        ):
            if not math.isclose(scale, own):
                yield Change("attention scale", op.module, f"{text} for {own:.4g}", {op.index: _attention(scale=scale)})
        mask, causal = a.get("attn_mask"), a.get("is_causal", False)
        is_square = a["query"].shape[-2] == a["key"].shape[-2]
        if causal or mask is not None:
            yield Change("causal mask missing", op.module, "no causal mask", {op.index: _attention(causal="none")})
            yield Change("mask off by one", op.module, "sees one token ahead", {op.index: _attention(causal=1)})
            yield Change("mask off by one", op.module, "does not see its own token", {op.index: _attention(causal=-1)})
        elif is_square:
            yield Change("causal mask added", op.module, "a causal mask", {op.index: _attention(causal=0)})
        if mask is not None:
            yield Change("padding mask missing", op.module, "no mask", {op.index: _attention(mask="none")})
        if n_kv < n_head:
            cause = "key and value heads tiled"
            yield Change(cause, op.module, "tiled for repeated", {op.index: _attention(tiled=True)})
        for dtype in (torch.bfloat16, torch.float16):
            for what in ("scores", "softmax", "weights"):
                cause, detail = f"rounded to {_last(str(dtype))}", f"the {what} of attention"
                yield Change(cause, op.module, detail, {op.index: _attention(rounding=(what, dtype))})


def _attention(
    scale: float | None = None,
    causal: int | str | None = None,
    mask: str | None = None,
    tiled: bool = False,
    rounding: tuple[str, torch.dtype] | None = None,
) -> Edit:
    """Attention written out, with a change."""

    def edit(call: Call) -> torch.Tensor:
        a = bound(call)
        q, k, v = a["query"], a["key"], a["value"]
        repeats = q.shape[1] // k.shape[1]
        if repeats > 1:
            k, v = (x.repeat(1, repeats, 1, 1) if tiled else x.repeat_interleave(repeats, 1) for x in (k, v))
        given = a.get("attn_mask")
        n_query, n_key = q.shape[-2], k.shape[-2]
        bias = torch.zeros(n_query, n_key, dtype=q.dtype)
        triangle = torch.ones(n_query, n_key, dtype=torch.bool)
        if given is not None and mask != "none":
            bias = torch.where(given, 0.0, -torch.inf).to(q.dtype) if given.dtype == torch.bool else given
        if isinstance(causal, int):
            # The mask's own causal part gives way to the changed one; what no query sees is padding.
            bias = bias.max(-2, keepdim=True).values if given is not None else bias
            triangle = triangle.tril(causal)
        elif causal == "none":
            bias = bias.max(-2, keepdim=True).values if given is not None else bias
        elif a.get("is_causal"):
            triangle = triangle.tril()
        score = q @ k.transpose(-1, -2) * (scale or a.get("scale") or q.shape[-1] ** -0.5)
        score = score.masked_fill(~triangle, -torch.inf) + bias
        what, dtype = rounding or ("", q.dtype)
        if what == "scores":
            score = score.to(dtype).to(q.dtype)
        weight = torch.softmax(score.to(dtype), -1).to(q.dtype) if what == "softmax" else torch.softmax(score, -1)
        if what == "weights":
            weight = weight.to(dtype).to(q.dtype)
        return weight @ v

    return edit


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
    layer = ", ".join(dict.fromkeys(map(_pattern, layers)))
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


# ------------------------------------------------------------------------------------------- sums, tables, constants


def _is_residual(record: OperationMode, op: Operation) -> bool:
    if op.name not in ("add", "add_", "__add__", "__iadd__") or not op.trained or len(op.args) < 2:
        return False
    return all(isinstance(a, torch.Tensor) and record.source_of(a) is not None for a in op.args[:2])


def sums(record: OperationMode) -> Iterator[Change]:
    """One side of a sum left out."""
    for op in record.operations:
        if not _is_residual(record, op):
            continue
        shapes = [a.shape for a in op.args[:2]]
        for kept, lost in ((1, 0), (0, 1)):
            at = record.source_of(op.args[lost])
            assert at is not None, "a residual's operands come from operations"
            source = record.operations[record.skip_back(at)]
            cause = "embedding missing" if source.name == "embedding" else "residual missing"
            edit = lambda call, k=kept, s=op.arrays[0].shape: call.args[k].expand(s).clone()  # noqa: E731
            detail = f"without the output of {source.module or source.name}"
            if shapes[kept] == op.arrays[0].shape:
                yield Change(cause, op.module, detail, {op.index: edit})


def tables(record: OperationMode) -> Iterator[Change]:
    """Embeddings looked up one position off, or scaled."""
    for op in record.operations:
        if op.name == "embedding":
            ids = bound(op)["input"]
            rows = record.tensors[op.parameters[0]].shape[0] if op.parameters else 0
            ordered = ids.ndim and ids.shape[-1] > 2 and bool((ids.diff() == 1).all())
            if ordered:
                for by in (1, -1):
                    edit = with_arguments(input=lambda i, by=by, n=rows: (i + by).clamp(0, n - 1))
                    yield Change("positions shifted", op.module, f"positions {by:+d}", {op.index: edit})
            width = op.arrays[0].shape[-1]
            for text, factor in (("times sqrt(n_embd)", width**0.5), ("over sqrt(n_embd)", width**-0.5)):
                yield Change("embedding scale", op.module, text, {op.index: after(lambda y, f=factor: y * f)})
        if op.name == "arange" and not op.trained:
            for by in (1, -1):
                yield Change(
                    "positions shifted", op.module, f"positions {by:+d}", {op.index: after(lambda y, b=by: y + b)}
                )


def constants(record: OperationMode) -> Iterator[Change]:
    """A factor left out or inverted."""
    for op in record.operations:
        if op.name in ("mul", "div", "__mul__", "__truediv__", "__rmul__") and op.trained:
            factors = [a for a in op.args if isinstance(a, int | float) and not isinstance(a, bool) and a not in (0, 1)]
            tensors = [a for a in op.args if isinstance(a, torch.Tensor)]
            if len(factors) == 1 and len(tensors) == 1:
                edit = lambda call: next(a for a in call.args if isinstance(a, torch.Tensor)).clone()  # noqa: E731
                scores = op.arrays and op.arrays[0].ndim == 4
                cause = "attention scale" if scores else "factor missing"
                yield Change(cause, op.module, f"no factor {factors[0]:.4g}", {op.index: edit})


def rounding(record: OperationMode) -> Iterator[Change]:
    """An output rounded to bfloat16."""
    names = (*WEIGHTED, *NORMS, "embedding", "softmax", "scaled_dot_product_attention", "lstm", "gru", "bmm")
    for op in record.operations:
        if op.trained and op.name in names and op.arrays and isinstance(op.output, torch.Tensor):
            edit = after(lambda y: y.to(torch.bfloat16).to(y.dtype))
            yield Change("rounded to bfloat16", op.module, f"the output of {op.name}", {op.index: edit})


# --------------------------------------------------------------------------------------------------------- pictures


def padding(record: OperationMode) -> Iterator[Change]:
    """XLA's "SAME", which pads the end more than the beginning, in place of PyTorch's equal padding."""
    for op in record.operations:
        if op.name in ("conv2d", "max_pool2d", "avg_pool2d"):
            a = bound(op)
            x = a["input"]
            kernel = tuple(a["weight"].shape[-2:]) if "weight" in a else _two(a["kernel_size"])
            stride, pads = _two(a.get("stride") or kernel), a.get("padding", 0)
            if isinstance(pads, str):
                continue
            pads = _two(pads)
            same = []
            for n, k, s in zip(x.shape[-2:], kernel, stride, strict=True):
                total = max((math.ceil(n / s) - 1) * s + k - n, 0)
                same.append((total // 2, total - total // 2))
            fill = -math.inf if op.name == "max_pool2d" else 0.0
            if any(lo != p or hi != p for (lo, hi), p in zip(same, pads, strict=True)):
                edges = (*same[1], *same[0])
                edit = _padded(edges, fill)
                yield Change("padding", op.module, f'"SAME", {same[0]} for {pads[0]}', {op.index: edit})
            if op.name == "max_pool2d" and any(pads):
                edges = (pads[1], pads[1], pads[0], pads[0])
                yield Change("padding", op.module, "0 for -inf", {op.index: _padded(edges, 0.0)})
        if op.name == "avg_pool2d":
            edit = with_arguments(count_include_pad=lambda on: on is False)
            yield Change("padding", op.module, "padding counted or not", {op.index: edit})


def _two(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value) * (2 // len(value))


def _padded(edges: tuple[int, ...], fill: float) -> Edit:
    def edit(call: Call) -> Any:
        a = bound(call)
        return call.function(**{**a, "input": F.pad(a["input"], edges, value=fill), "padding": 0})

    return edit


# ------------------------------------------------------------------------------------------------------------- loss


def losses(record: OperationMode) -> Iterator[Change]:
    """Other targets, another mean."""
    for op in record.operations:
        if op.name in ("mse_loss", "l1_loss", "binary_cross_entropy_with_logits", "nll_loss"):
            yield from _reductions(op)
        if op.name != "cross_entropy":
            continue
        yield from _reductions(op)
        a = bound(op)
        target, ignored = a["target"], a.get("ignore_index", -100)
        for smoothing in (0.1, 0.0):
            if smoothing != a.get("label_smoothing", 0.0):
                edit = with_arguments(label_smoothing=smoothing)
                yield Change("label smoothing", _of_loss(op), f"label smoothing {smoothing:g}", {op.index: edit})
        if target.is_floating_point():
            continue
        if (target == ignored).any():

            def counted(call: Call) -> torch.Tensor:
                b = bound(call)
                return call.function(**{**b, "reduction": "sum"}) / b["target"].numel()

            yield Change("ignored labels counted", _of_loss(op), "the mean over all positions", {op.index: counted})
            for label in (0, a["input"].shape[1] - 1):
                edit = with_arguments(target=lambda t, i=ignored, n=label: torch.where(t == i, n, t))
                yield Change("ignored labels counted", _of_loss(op), f"as label {label}", {op.index: edit})
        n_time = record.time_of(a["input"])
        if n_time and target.numel() % n_time == 0:
            rows = target.numel() // n_time
            total = with_arguments(reduction="sum")
            edit = {op.index: lambda call, total=total, n=rows: total(call) / n}
            yield Change("loss reduction", _of_loss(op), "the sum over each row", edit)
            for text, last in (("last", True), ("first", False)):
                edit = with_arguments(target=lambda t, n=n_time, i=ignored, last=last: _without_end(t, n, i, last))
                yield Change(f"{text} token dropped", _of_loss(op), f"no {text} target of a row", {op.index: edit})
            for text, by in (("the token itself", 1), ("the token after the next", -1)):
                edit = with_arguments(target=lambda t, n=n_time, i=ignored, by=by: _shifted(t, n, i, by))
                yield Change("label shift missing", _of_loss(op), f"{text} as target", {op.index: edit})
            for labels in record.integers(target.numel() // n_time, n_time):
                edit = with_arguments(target=lambda t, y=labels: y.reshape(t.shape))
                yield Change("label shift missing", _of_loss(op), "the labels as they are", {op.index: edit})
                shifted = torch.full_like(labels, ignored)
                shifted[:, :-1] = labels[:, 1:]
                edit = with_arguments(target=lambda t, y=shifted: y.reshape(t.shape))
                yield Change("label shift missing", _of_loss(op), "the labels shifted once more", {op.index: edit})


def _reductions(op: Operation) -> Iterator[Change]:
    own = bound(op).get("reduction", "mean")
    other = "sum" if own == "mean" else "mean"
    yield Change("loss reduction", _of_loss(op), f"{other} for {own}", {op.index: with_arguments(reduction=other)})


def _of_loss(op: Operation) -> str:
    return op.module or "loss"


def _without_end(target: torch.Tensor, n_time: int, ignored: int, last: bool) -> torch.Tensor:
    """Targets [B * T] of which each row's last (or first) counted one is ignored."""
    rows = target.reshape(-1, n_time).clone()
    counted = rows != ignored
    positions = torch.arange(n_time).expand_as(rows)
    ends = torch.where(counted, positions, -1).amax(1) if last else torch.where(counted, positions, n_time).amin(1)
    ends = ends.clamp(0, n_time - 1)
    rows[torch.arange(len(rows)), ends] = ignored
    return rows.reshape(target.shape)


def _shifted(target: torch.Tensor, n_time: int, ignored: int, by: int) -> torch.Tensor:
    rows = torch.full_like(target, ignored).reshape(-1, n_time)
    of = target.reshape(-1, n_time)
    if by > 0:
        rows[:, by:] = of[:, :-by]
    else:
        rows[:, :by] = of[:, -by:]
    return rows.reshape(target.shape)


def running_statistics(record: OperationMode) -> Iterator[Change]:
    """Other running averages of batch norm, which only updates show."""
    for op in record.operations:
        if op.name == "batch_norm" and bound(op).get("training"):
            own = bound(op).get("momentum", 0.1)
            for momentum in MOMENTA:
                if momentum != own:
                    edit = with_arguments(momentum=momentum)
                    detail = f"momentum {momentum:g} for {own:g}"
                    yield Change("batch norm momentum", op.module, detail, {op.index: edit})
            edit = {op.index: _biased_variance}
            yield Change("running variance biased", op.module, "variance over n for n - 1", edit)


def _biased_variance(call: Call) -> torch.Tensor:
    a = bound(call)
    before = a["running_var"].clone()
    out = call.original()
    x = a["input"]
    n = x.numel() / x.shape[1]
    with torch.no_grad():
        unbiased_part = a["running_var"] - (1 - a["momentum"]) * before
        a["running_var"].copy_((1 - a["momentum"]) * before + unbiased_part * (n - 1) / n)
    return out


FINDERS = (
    epsilon,
    norm_forms,
    norm_placement,
    activation,
    weights,
    swaps,
    fused,
    heads,
    attention,
    rotary,
    sums,
    tables,
    constants,
    padding,
    losses,
    rounding,
)


# -------------------------------------------------------------------------------------------------------- gradients


def gradient_changes(record: OperationMode, factors: Sequence[float]) -> list[Change]:
    """Gradients stopped or scaled at each operation, whose outputs stay as they are."""
    found = []
    for op in record.operations:
        if op.trained and op.arrays and isinstance(op.output, torch.Tensor):
            found.append(Change("stop gradient", op.module, f"after {op.name}", {op.index: after(torch.Tensor.detach)}))
            for factor in factors:
                edit = after(lambda y, k=factor: y.detach() + k * (y - y.detach()))
                detail = f"times {factor:.4g} after {op.name}"
                found.append(Change("gradient scaled", op.module, detail, {op.index: edit}))
    by_module: dict[str, list[str]] = {}
    for name, tensor in record.tensors.items():
        if isinstance(tensor, torch.nn.Parameter):
            by_module.setdefault(name.rpartition(".")[0], []).append(name)
    for module, names in by_module.items():
        for stopped in [names, *([n] for n in names if len(names) > 1)]:
            edit = with_parameters({name: lambda tensors, n=name: tensors[n].detach() for name in stopped})
            edits = {op.index: edit for op in record.operations if set(op.parameters) & set(stopped)}
            if edits:
                detail = f"of {', '.join(name.rpartition('.')[2] for name in stopped)}"
                found.append(Change("stop gradient", module, detail, edits))
    for name in dict.fromkeys(n for op in record.operations for n in op.parameters):
        uses = [op for op in record.operations if name in op.parameters]
        if len(uses) > 1:
            for op in uses:
                edit = with_parameters({name: lambda tensors, n=name: tensors[n].detach()})
                detail = f"{name} without its use in {op.name}"
                found.append(Change("tie cut", op.module, detail, {op.index: edit}))
    return [*found, *grouped(found)]
