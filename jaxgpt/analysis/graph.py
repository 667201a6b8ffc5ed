"""The computation graph of a training loss, by module or by operation.

Both are read from the traced program: `jax.make_jaxpr` gives the operations, and a name scope around each module's call
says which module they belong to. Nothing is computed, so a model of any size can be drawn.
"""

import dataclasses
import re
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.extend.core import Literal as Constant

from jaxgpt.analysis.dot import Graph, Node, require_output, to_dot, write
from jaxgpt.config import FinetuneConfig
from jaxgpt.objective import Objective

Level = Literal["block", "op"]
MAX_BLOCKS = 8  # of more, those between the first two and the last are drawn as one node

INLINED = {"jit", "custom_jvp_call", "custom_vjp_call", "scan"}  # drawn as the operations that they contain
LAYOUT_OPS = {"reshape", "transpose", "broadcast_in_dim", "convert_element_type", "squeeze", "pad"}


def write_graph(out: Path, objective: Objective, level: Level, title: str) -> tuple[Path, str | None]:
    """Draws the graph of an objective's loss for one batch.

    Args:
        out: a .dot, .svg or .png. A picture falls back to the .dot of the same name where Graphviz is not installed.
        level: "block" for modules with shapes, "op" for every operation, forward and backward.

    Returns:
        The file written, and if it is not `out`, a line for the user that says why and how to get `out`.

    Raises:
        UserError: nothing can be written to `out`, or Graphviz fails.
    """
    require_output(out)
    return write(out, to_dot(block_graph(objective) if level == "block" else op_graph(objective), title))


def block_graph(objective: Objective) -> Graph:
    """The graph of the modules and of what the model computes between them; operations that only change a layout are
    left out."""
    trace, graph, model = _Trace(objective, gradient=False), Graph(), objective.config.model
    named_inputs = list(zip(trace.inputs, trace.names, strict=False))
    unplaced = {value: name for value, name in named_inputs if name in trace.params}
    node_of: dict[int, int] = {}  # value -> the node that computes it
    n_rows, n_time = trace.avals[trace.inputs[len(unplaced)]].shape
    for value, name in named_inputs[len(unplaced) :][:2]:
        node_of[value] = graph.add(Node((name, str([*trace.avals[value].shape])), "input"))
    trainable: set[int] = set()  # nodes that depend on parameters
    relaid: dict[int, int] = {}  # a value in another layout -> the value it was made from
    loss, previous = trace.results[0], ""
    assert loss is not None

    def module_of(op: _Op) -> tuple[str, bool]:
        return op.owner, op.name == "dot_general" and not op.owner  # the product with the head is no module's call

    for (owner, is_head), group in groupby(trace.needed([loss]), module_of):
        ops = list(group)
        if all(op.name in LAYOUT_OPS for op in ops):
            for op in ops:
                if op.inputs:
                    relaid[op.outputs[0]] = relaid.get(op.inputs[0], op.inputs[0])
            continue
        inputs = dict.fromkeys(relaid.get(value, value) for op in ops for value in op.inputs)
        own = {value: unplaced.pop(value) for value in list(inputs) if value in unplaced}
        incoming = [value for value in inputs if value in node_of]
        differentiable = {
            value
            for value in incoming
            if node_of[value] in trainable and jnp.issubdtype(trace.avals[value].dtype, jnp.floating)
        }
        outputs = {value for op in ops for value in op.outputs}
        after = "the loss" if loss in outputs else previous if differentiable or own else ""
        lines = [_title(objective, owner, trace.classes.get(owner, ""), is_head, after)]
        if any(op.name == "random_bits" for op in ops):
            lines[0] += f", dropout {model.attention_dropout if owner.endswith('attn') else model.dropout:g}"
        lines += [loop for loop in ops[-1].loops if loop != _loop(1)]
        if own:
            lines.append(", ".join(f"{name.rsplit('.')[-1]} {[*trace.avals[v].shape]}" for v, name in own.items()))
            lines.append(f"{sum(trace.avals[v].size for v in own):,} parameters")
        kind = "parameters" if own else "result" if loss in outputs else "forward"
        block = re.match(r"blocks\.\d+", owner)
        number = graph.add(Node(tuple(lines), kind, (block[0],) if block else (), tuple(own.values())))
        for value in incoming:
            edge, shape = (node_of[value], number), _shape(trace.avals[value].shape, n_rows, n_time)
            graph.edges[edge] = ", ".join(dict.fromkeys([*filter(None, [graph.edges.get(edge)]), shape]))
            if value in differentiable:
                graph.gradient_edges.add(edge)
        if own or differentiable:
            trainable.add(number)
        # The node's own parameters too: where another node uses one again, as a tied head does, an edge leads there.
        node_of |= dict.fromkeys([*outputs, *own], number)
        previous = owner or previous
    assert not unplaced, f"parameters that the loss does not depend on: {unplaced}"
    total = sum(p.size for p in trace.params.values())
    graph.legend += [
        f"{n_rows} rows (B), {n_time} positions (T), {model.n_embd} channels (C), vocabulary of {objective.vocab_size} "
        f"(V); {n_rows}\u00b7{n_time}: B and T as one axis",
        f"{total:,} parameters; the gradient goes back from the loss along the red edges",
    ]
    return _fold_blocks(graph, trace.params, model.n_layer) if model.n_layer > MAX_BLOCKS else graph


def op_graph(objective: Objective) -> Graph:
    """The graph of every operation of the loss and its gradient, from the parameters to their gradients."""
    trace, graph = _Trace(objective, gradient=True), Graph()
    node_of: dict[int | None, int] = {}  # value -> the node that computes it

    def clusters_of(owner: str, backward: bool = False) -> tuple[str, ...]:
        parts = owner.split(".")
        paths = (".".join(parts[:n]) for n in range(1, len(parts) + 1))
        return tuple("backward of " * backward + path for path in paths if path in trace.classes)

    for value, name in zip(trace.inputs, trace.names, strict=False):
        kind, own = ("parameters", (name,)) if name in trace.params else ("input", ())
        node_of[value] = graph.add(Node((name, trace.avals[value].str_short()), kind, clusters_of(name), own))
    ops = trace.needed(trace.results)
    for op in ops:
        shapes = (trace.avals[value].str_short() for value in op.outputs)
        kind, clusters = "backward" if op.backward else "forward", clusters_of(op.owner, op.backward) + op.loops
        number = graph.add(Node((op.name, *shapes), kind, clusters))
        graph.edges |= {(node_of[value], number): "" for value in op.inputs if value in node_of}
        node_of |= dict.fromkeys(op.outputs, number)
    titles = ["loss, summed", "number of targets", *(f"gradient of {name}" for name in sorted(trace.params))]
    owners = ["", "", *sorted(trace.params)]
    for value, title, owner in zip(trace.results, titles, owners, strict=True):
        graph.edges[node_of[value], graph.add(Node((title,), "result", clusters_of(owner, backward=True)))] = ""
    graph.legend.append(f"{len(ops):,} operations; yellow: parameters, white: forward, red: backward")
    return graph


@dataclass(frozen=True)
class _Op:
    """A primitive operation. Its inputs and outputs are indices into `_Trace.avals`."""

    name: str
    owner: str  # path of the module that it belongs to; "": the model itself, or the loss
    backward: bool
    loops: tuple[str, ...]  # the loops around it
    inputs: list[int]
    outputs: list[int]


class _Trace:
    """The operations of `Objective.loss_sum` for one batch, or of its value and gradient, in order and inlined.

    Inputs are the parameters by name, token ids, targets or labels, and the dropout keys if there is dropout. Results
    are the loss, the number of targets, and the gradients.
    """

    def __init__(self, objective: Objective, gradient: bool):
        config = objective.config
        self.params = objective.param_shapes
        self.classes: dict[str, str] = {}  # path of each module -> its class
        self.ops: list[_Op] = []
        self.avals: list[Any] = []  # shape and dtype of each value
        is_classifier = isinstance(config, FinetuneConfig)
        n_time = config.max_tokens if is_classifier else config.model.block_size
        idx_BT = jax.ShapeDtypeStruct((config.batch_size, n_time), jnp.int32)
        target = jax.ShapeDtypeStruct(idx_BT.shape[:1], jnp.int32) if is_classifier else idx_BT
        row_key_B = jax.eval_shape(lambda: objective.dropout_keys(jnp.int32(0)))
        scoped = dataclasses.replace(objective)
        # `model` is a cached property: a value in the instance's dictionary takes its place.
        scoped.__dict__["model"] = lambda *params: self._with_name_scopes(objective.model(*params))
        loss = jax.value_and_grad(scoped.loss_sum, has_aux=True) if gradient else scoped.loss_sum
        jaxpr = jax.make_jaxpr(loss)(self.params, idx_BT, target, row_key_B).jaxpr
        self.inputs = self._new_values(jaxpr.invars)
        self.results = self._inline(jaxpr, self.inputs, "", ())
        self.names = [*sorted(self.params), "token ids", "labels" if is_classifier else "targets", "dropout keys"]

    def needed(self, results: list[int | None]) -> list[_Op]:
        """The operations that the results depend on."""
        values, ops = set(results), []
        for op in reversed(self.ops):
            if values.intersection(op.outputs):
                values.update(op.inputs)
                ops.append(op)
        return ops[::-1]

    def _with_name_scopes(self, model: Any) -> Any:
        """The model, with each module that is called put into a name scope of its path."""
        paths = {tuple(name.split(".")[:n]) for name in self.params for n in range(1, name.count(".") + 1)}
        for path in sorted(paths):
            parent = model
            for part in path[:-1]:
                parent = _child(parent, part)
            module, name = _child(parent, path[-1]), ".".join(path)
            if callable(module):  # not the list of blocks
                self.classes[name] = type(module).__name__
                scoped = _NameScope(module, name)
                if path[-1].isdecimal():
                    parent[int(path[-1])] = scoped
                else:
                    setattr(parent, path[-1], scoped)
        return model

    def _inline(
        self, jaxpr: Any, inputs: list[int] | list[int | None], scope: str, loops: tuple[str, ...]
    ) -> list[int | None]:
        """Appends a jaxpr's operations, and those of the calls in it; returns its results, None for a constant."""
        values: dict[Any, int | None] = dict(zip(jaxpr.constvars, self._new_values(jaxpr.constvars), strict=True))
        values |= zip(jaxpr.invars, inputs, strict=True)

        def value_of(variables: Any) -> list[int | None]:
            return [None if isinstance(v, Constant) else values[v] for v in variables]

        for eqn in jaxpr.eqns:
            name, arguments = eqn.primitive.name, value_of(eqn.invars)
            path = f"{scope}/{eqn.source_info.name_stack}"
            if name in INLINED:
                inner = eqn.params["call_jaxpr" if name.startswith("custom") else "jaxpr"].jaxpr
                loop = (_loop(eqn.params["length"]),) if name == "scan" else ()
                outputs = self._inline(inner, arguments, path, loops + loop)
            else:
                outputs = self._new_values(eqn.outvars)
                owner = max((w for w in re.findall(r"[\w.]+", path) if w in self.classes), key=len, default="")
                operands = [value for value in arguments if value is not None]
                self.ops.append(_Op(name, owner, "transpose(" in path, loops, operands, outputs))
            values |= zip(eqn.outvars, outputs, strict=True)
        return value_of(jaxpr.outvars)

    def _new_values(self, variables: Any) -> list[int]:
        self.avals += [v.aval for v in variables]
        return list(range(len(self.avals) - len(variables), len(self.avals)))


class _NameScope:
    """A module, whose calls are traced in a name scope; its attributes are the module's."""

    def __init__(self, module: Any, name: str):
        self._module, self._name = module, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with jax.named_scope(self._name):
            return self._module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _child(module: Any, name: str) -> Any:
    """A module's submodule, without its name scope."""
    child = module[int(name)] if name.isdecimal() else getattr(module, name)
    return child._module if isinstance(child, _NameScope) else child


def _loop(length: int) -> str:
    return f"a loop of {length}"


def _title(objective: Objective, owner: str, class_name: str, is_head: bool, after: str) -> str:
    """What a node computes.

    Args:
        owner: path of its module; "" for what the model computes itself.
        class_name: of that module.
        is_head: whether it is the product with the head's matrix.
        after: path of the module that the model called before, or "the loss".
    """
    config, within = objective.config, " within documents" * objective.config.within_documents
    model = config.model
    if class_name == "Attention":
        return f"causal attention{within}, {model.n_head} heads of {model.n_embd // model.n_head}"
    if class_name in ("Block", "MLP"):
        return "residual sum" if class_name == "Block" else f"GELU ({model.gelu})"
    if owner:
        return f"{re.sub(r'^blocks[.][0-9]+[.]', '', owner)} ({class_name})"
    if is_head:
        return "lm_head, the token embedding's matrix" if model.tied_head else "lm_head"
    is_classifier = isinstance(config, FinetuneConfig)
    first, counted = ("padding, positions", "texts") if is_classifier else (f"positions{within}", "tokens")
    titles = {"": first, "pos_emb": "sum", "the loss": f"cross-entropy loss, summed over {counted}"}
    return titles.get(after) or f"pool: {config.pool}"


def _shape(shape: tuple[int, ...], n_rows: int, n_time: int) -> str:
    """[B*T, C] as [B·T, C]."""
    if len(shape) == 2 and shape[0] == n_rows * n_time:
        return f"[{n_rows}\u00b7{n_time}, {shape[1]}]"
    return str([*shape])


def _fold_blocks(graph: Graph, shapes: Any, n_layer: int) -> Graph:
    """The graph with the blocks between the first two and the last, which must be identical, as one node."""
    blocks = [[i for i, node in enumerate(graph.nodes) if f"blocks.{b}" in node.clusters] for b in range(n_layer)]

    def structure(block: list[int]) -> Any:
        inner = {(block.index(a), block.index(b), s) for (a, b), s in graph.edges.items() if a in block and b in block}
        return [graph.nodes[i].lines for i in block], inner

    middle = blocks[2:-1]
    assert all(structure(block) == structure(blocks[1]) for block in middle), "the blocks differ"
    params = tuple(name for block in middle for i in block for name in graph.nodes[i].params)
    title = f"blocks.2 to blocks.{n_layer - 2}: {len(middle)} blocks, each the same as blocks.1"
    count = f"{sum(shapes[name].size for name in params):,} parameters"
    inside = {i for block in middle for i in block}
    folded = Graph(graph.legend)
    new_index = {i: folded.add(node) for i, node in enumerate(graph.nodes) if i not in inside}
    new_index |= dict.fromkeys(inside, folded.add(Node((title, count), "parameters", (), params)))
    for edge, label in graph.edges.items():
        a, b = (new_index[i] for i in edge)
        if a != b:
            folded.edges[a, b] = label
            if edge in graph.gradient_edges:
                folded.gradient_edges.add((a, b))
    return folded
