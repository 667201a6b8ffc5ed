"""The computation graph of a training loss: as text for Graphviz, or as a picture.

Both levels are read from the traced program, not drawn by hand: `jax.make_jaxpr` gives the operations, and a name scope
around each module's call tells whose they are. Nothing is computed, so a model of any size will do.
"""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.extend.core import Literal as Constant

from jaxgpt.config import FinetuneConfig
from jaxgpt.dot import Graph, Node, require_place, to_dot, write
from jaxgpt.train_step import ALONE, Program

Level = Literal["block", "op"]
MOST_BLOCKS = 8  # of more, those between the first two and the last are one node

CALLS = {"jit", "custom_jvp_call", "custom_vjp_call", "scan"}  # what they hold is drawn in their place
LAYOUT = {"reshape", "transpose", "broadcast_in_dim", "convert_element_type", "squeeze", "pad"}


@dataclass(frozen=True)
class _Op:
    """A primitive operation; its inputs and outputs are places in the list of the trace's values."""

    name: str
    owner: str  # the module that it belongs to; "" is the model itself, and the loss
    backward: bool
    loops: tuple[str, ...]
    inputs: list[int]
    outputs: list[int]


class _Trace:
    """The operations of `Program.loss_sum` for one batch, or of it and its gradient, in order, calls and loops opened.

    Inputs are the parameters by name, token ids, targets or labels, and with dropout its keys; results the loss, the
    number of targets, and the gradients.
    """

    def __init__(self, program: Program, gradient: bool):
        config = program.config
        self.params = jax.eval_shape(program.init_params)
        self.classes: dict[str, str] = {}  # of each module by its path
        self.ops: list[_Op] = []
        self.avals: list[Any] = []  # of each value
        classifies = isinstance(config, FinetuneConfig)
        n_time = config.max_tokens if classifies else config.model.block_size
        idx_BT = jax.ShapeDtypeStruct((config.batch_size, n_time), jnp.int32)
        target = jax.ShapeDtypeStruct(idx_BT.shape[:1], jnp.int32) if classifies else idx_BT
        row_key_B = jax.eval_shape(lambda: program.dropout_keys(jnp.int32(0), ALONE))
        scoped = dataclasses.replace(program)
        scoped.__dict__["model"] = lambda params: self._scoped(program.model(params))  # in the cached property's place
        loss = jax.value_and_grad(scoped.loss_sum, has_aux=True) if gradient else scoped.loss_sum
        jaxpr = jax.make_jaxpr(loss)(self.params, idx_BT, target, row_key_B).jaxpr
        self.inputs = self._new(jaxpr.invars)
        self.results = self._open(jaxpr, self.inputs, "", ())
        self.names = [*sorted(self.params), "token ids", "labels" if classifies else "targets", "dropout keys"]

    def needed(self, results: list[int]) -> list[_Op]:
        """The operations that the results depend on."""
        values, ops = set(results), []
        for op in reversed(self.ops):
            if values.intersection(op.outputs):
                values.update(op.inputs)
                ops.append(op)
        return ops[::-1]

    def _scoped(self, model: Any) -> Any:
        """The model, each module's call in a name scope of its path."""
        for path in sorted({tuple(name.split(".")[:n]) for name in self.params for n in range(1, name.count(".") + 1)}):
            module, name = model, ".".join(path)
            for part in path:
                module = module[int(part)] if part.isdecimal() else getattr(module, part)
            kind = type(module)
            if callable(module):  # not the list of blocks
                self.classes[name] = kind.__name__
                # Python looks for __call__ on the class. This object alone gets another, and lives no longer than we.
                named = type(kind.__name__, (kind,), {"__call__": _in_scope(kind, name)})
                object.__setattr__(module, "__class__", named)
        return model

    def _new(self, variables: Any) -> list[int]:
        self.avals += [v.aval for v in variables]
        return list(range(len(self.avals) - len(variables), len(self.avals)))

    def _open(self, jaxpr: Any, inputs: list[int | None], scope: str, loops: tuple[str, ...]) -> list[int | None]:
        values: dict[Any, int | None] = dict(zip(jaxpr.constvars, self._new(jaxpr.constvars), strict=True))
        values |= zip(jaxpr.invars, inputs, strict=True)

        def known(variables: Any) -> list[int | None]:
            return [None if isinstance(v, Constant) else values[v] for v in variables]

        for eqn in jaxpr.eqns:
            name, inputs = eqn.primitive.name, known(eqn.invars)
            here = f"{scope}/{eqn.source_info.name_stack}"
            if name in CALLS:
                inner = eqn.params["call_jaxpr" if name.startswith("custom") else "jaxpr"].jaxpr
                times = (_loop(eqn.params["length"]),) if name == "scan" else ()
                outputs = self._open(inner, inputs, here, loops + times)
            else:
                outputs = self._new(eqn.outvars)
                owner = max((w for w in re.findall(r"[\w.]+", here) if w in self.classes), key=len, default="")
                inputs = [value for value in inputs if value is not None]
                self.ops.append(_Op(name, owner, "transpose(" in here, loops, inputs, outputs))
            values |= zip(eqn.outvars, outputs, strict=True)
        return known(jaxpr.outvars)


def _loop(length: int) -> str:
    return f"a loop of {length}"


def _in_scope(kind: type, name: str) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with jax.named_scope(name):
            return kind.__call__(self, *args, **kwargs)

    return call


def op_graph(program: Program) -> Graph:
    """Every operation of the loss and of its gradient. A parameter is an input, its gradient a result."""
    trace, graph = _Trace(program, gradient=True), Graph()
    made: dict[int | None, int] = {}  # value -> its node

    def within(owner: str, backward: bool = False) -> tuple[str, ...]:
        parts = owner.split(".")
        paths = (".".join(parts[:n]) for n in range(1, len(parts) + 1))
        return tuple("backward of " * backward + path for path in paths if path in trace.classes)

    for value, name in zip(trace.inputs, trace.names, strict=False):
        kind, own = ("parameters", (name,)) if name in trace.params else ("input", ())
        made[value] = graph.add(Node((name, trace.avals[value].str_short()), kind, within(name), own))
    ops = trace.needed(trace.results)
    for op in ops:
        shapes = (trace.avals[value].str_short() for value in op.outputs)
        kind, clusters = "backward" if op.backward else "forward", within(op.owner, op.backward) + op.loops
        number = graph.add(Node((op.name, *shapes), kind, clusters))
        graph.edges |= {(made[value], number): "" for value in op.inputs if value in made}
        made |= dict.fromkeys(op.outputs, number)
    for value, name in zip(trace.results, ["", "", *sorted(trace.params)], strict=True):
        title = f"gradient of {name}" if name else "loss, summed" if value == trace.results[0] else "number of targets"
        graph.edges[made[value], graph.add(Node((title,), "result", within(name, backward=True)))] = ""
    graph.legend.append(f"{len(ops):,} operations; yellow: parameters, white: forward, red: backward")
    return graph


def block_graph(program: Program) -> Graph:
    """The modules and what lies between them, each a node. Operations that only change a layout are left out."""
    trace, graph, model = _Trace(program, gradient=False), Graph(), program.config.model
    unplaced = {value: name for value, name in zip(trace.inputs, trace.names, strict=False) if name in trace.params}
    made: dict[int, int] = {}  # value -> its node
    n_rows, n_time = trace.avals[trace.inputs[len(unplaced)]].shape
    for value, name in list(zip(trace.inputs, trace.names, strict=False))[len(unplaced) :][:2]:
        made[value] = graph.add(Node((name, str([*trace.avals[value].shape])), "input"))
    trained: set[int] = set()  # nodes that depend on parameters
    unlaid: dict[int, int] = {}  # a value in another layout -> as it was
    loss, previous = trace.results[0], ""
    assert loss is not None

    def run_of(op: _Op) -> tuple[str, bool]:
        return op.owner, op.name == "dot_general" and not op.owner  # the product with the head is no module's call

    for (owner, product), run in groupby(trace.needed([loss]), run_of):
        ops = list(run)
        if all(op.name in LAYOUT for op in ops):
            for op in ops:
                if op.inputs:
                    unlaid[op.outputs[0]] = unlaid.get(op.inputs[0], op.inputs[0])
            continue
        inputs = dict.fromkeys(unlaid.get(value, value) for op in ops for value in op.inputs)
        own = {value: unplaced.pop(value) for value in list(inputs) if value in unplaced}
        arriving = [value for value in inputs if value in made]
        back = {v for v in arriving if made[v] in trained and jnp.issubdtype(trace.avals[v].dtype, jnp.floating)}
        values = {value for op in ops for value in op.outputs}
        block = re.match(r"blocks\.\d+", owner)
        after = "the loss" if loss in values else previous if back or own else ""
        lines = [_title(program, owner, trace.classes.get(owner, ""), product, after)]
        if any(op.name == "random_bits" for op in ops):
            lines[0] += f", dropout {model.dropout:g}"
        lines += [loop for loop in ops[-1].loops if loop != _loop(1)]
        if own:
            lines.append(", ".join(f"{name.rsplit('.')[-1]} {[*trace.avals[v].shape]}" for v, name in own.items()))
            lines.append(f"{sum(trace.avals[v].size for v in own):,} parameters")
        kind = "parameters" if own else "result" if loss in values else "forward"
        number = graph.add(Node(tuple(lines), kind, (block[0],) if block else (), tuple(own.values())))
        for value in arriving:
            edge, shape = (made[value], number), _shape(trace.avals[value].shape, n_rows, n_time)
            graph.edges[edge] = ", ".join(dict.fromkeys([*filter(None, [graph.edges.get(edge)]), shape]))
            graph.flows_back |= {edge} if value in back else set()
        trained |= {number} if own or back else set()
        made |= dict.fromkeys([*values, *own], number)  # a parameter taken again, as by a tied head, comes from here
        previous = owner or previous
    assert not unplaced, f"parameters that the loss does not depend on: {unplaced}"
    total = sum(p.size for p in trace.params.values())
    graph.legend += [
        f"{n_rows} rows (B), {n_time} positions (T), {model.n_embd} channels (C), vocabulary of {program.vocab_size} "
        f"(V); {n_rows}\u00b7{n_time}: B and T as one axis",
        f"{total:,} parameters; the gradient goes back from the loss along the red edges",
    ]
    return _folded(graph, trace.params, model.n_layer) if model.n_layer > MOST_BLOCKS else graph


def _title(program: Program, owner: str, kind: str, product: bool, after: str) -> str:
    """What a node does: that of a module, or what the model does itself after the module `after`."""
    config, within = program.config, " within documents" * program.config.within_documents
    model = config.model
    if kind == "Attention":
        return f"causal attention{within}, {model.n_head} heads of {model.n_embd // model.n_head}"
    if kind in ("Block", "MLP"):
        return "residual sum" if kind == "Block" else f"GELU ({model.gelu})"
    if owner:
        return f"{re.sub(r'^blocks[.][0-9]+[.]', '', owner)} ({kind})"
    classifies = isinstance(config, FinetuneConfig)
    first, counted = ("padding, positions", "texts") if classifies else (f"positions{within}", "tokens")
    if product:
        return "lm_head, the token embedding's matrix" if model.tied_head else "lm_head"
    does = {"": first, "pos_emb": "sum", "the loss": f"cross-entropy loss, summed over {counted}"}
    return does.get(after) or f"pool: {config.pool}"


def _shape(shape: tuple[int, ...], n_rows: int, n_time: int) -> str:
    """[B*T, C] as [B·T, C]."""
    if len(shape) == 2 and shape[0] == n_rows * n_time:
        return f"[{n_rows}\u00b7{n_time}, {shape[1]}]"
    return str([*shape])


def _folded(graph: Graph, shapes: Any, n_layer: int) -> Graph:
    """The blocks between the first two and the last as one node; they have to be the same."""
    blocks = [[i for i, node in enumerate(graph.nodes) if f"blocks.{b}" in node.clusters] for b in range(n_layer)]

    def structure(block: list[int]) -> Any:
        inner = {(block.index(a), block.index(b), s) for (a, b), s in graph.edges.items() if a in block and b in block}
        return [graph.nodes[i].lines for i in block], inner

    middle = blocks[2:-1]
    assert all(structure(block) == structure(blocks[1]) for block in middle), "blocks that are not the same"
    params = tuple(name for block in middle for i in block for name in graph.nodes[i].params)
    title = f"blocks.2 to blocks.{n_layer - 2}: {len(middle)} blocks, each the same as blocks.1"
    count = f"{sum(shapes[name].size for name in params):,} parameters"
    inside = {i for block in middle for i in block}
    folded = Graph(graph.legend)
    place = {i: folded.add(node) for i, node in enumerate(graph.nodes) if i not in inside}
    place |= dict.fromkeys(inside, folded.add(Node((title, count), "parameters", (), params)))
    for edge, label in graph.edges.items():
        a, b = (place[i] for i in edge)
        if a != b:
            folded.edges[a, b] = label
            folded.flows_back |= {(a, b)} if edge in graph.flows_back else set()
    return folded


def write_graph(out: Path, program: Program, level: Level, title: str) -> tuple[Path, str | None]:
    """Draws the graph of a program's loss for one batch, as `dot.write` does.

    Args:
        out: a .dot, .svg or .png.
        level: "block" for modules with shapes, "op" for every operation, forward and backward.

    Returns:
        The file written, and if it is not `out`, a line for the user that says why and how to get that.

    Raises:
        UserError: the place is not good, or Graphviz fails.
    """
    require_place(out)
    return write(out, to_dot(block_graph(program) if level == "block" else op_graph(program), title))
