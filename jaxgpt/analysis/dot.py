"""A graph of nodes and edges, its text in Graphviz' DOT language, and the picture of it. Imports no jax."""

import itertools
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import graphviz

from jaxgpt.data.files import atomic_replace
from jaxgpt.errors import UserError, require_writable

SUFFIXES = (".dot", ".svg", ".png")
LAYOUT_SECONDS = 300.0
MANY_NODES = 300  # above which the layout may be coarser: minigpt's operations then take 7 s in place of 96 s
COARSE_LAYOUT = dict(splines="polyline", nslimit="1", nslimit1="1", mclimit="0.2")

FILL = {"input": "#dfe7f2", "parameters": "#fdf3d0", "forward": "#ffffff", "backward": "#fbe3df", "result": "#e3b7ae"}
GRADIENT_COLOR = "#b03a2e"


@dataclass(frozen=True)
class Node:
    """A box of a graph."""

    lines: tuple[str, ...]  # its text
    kind: str  # a key of FILL
    clusters: tuple[str, ...] = ()  # the frames around it, the outermost first
    params: tuple[str, ...] = ()  # names of the parameters that it stands for


@dataclass
class Graph:
    """Nodes, identified by their index, and edges (from, to) in the direction of the forward pass, with labels."""

    legend: list[str] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    edges: dict[tuple[int, int], str] = field(default_factory=dict)
    gradient_edges: set[tuple[int, int]] = field(default_factory=set)  # those that carry a gradient back

    def add(self, node: Node) -> int:
        """Adds a node and returns its index."""
        self.nodes.append(node)
        return len(self.nodes) - 1


def to_dot(graph: Graph, title: str) -> str:
    """The DOT source of a graph, with the data flowing upward: the embeddings at the bottom, the loss at the top."""
    layout = COARSE_LAYOUT if len(graph.nodes) > MANY_NODES else {}
    digraph = graphviz.Digraph(
        graph_attr=dict(rankdir="BT", labelloc="t", fontname="Helvetica", label=_label(title, *graph.legend), **layout),
        node_attr=dict(shape="box", style="rounded,filled", color="#707070", fontname="Helvetica", fontsize="11"),
        edge_attr=dict(color="#909090", fontname="Helvetica", fontsize="9"),
    )
    cluster_numbers = itertools.count()

    def add_nodes(parent: graphviz.Digraph, indices: list[int], depth: int) -> None:
        clusters: dict[str, list[int]] = {}
        for index in indices:
            node = graph.nodes[index]
            if len(node.clusters) > depth:
                clusters.setdefault(node.clusters[depth], []).append(index)
            else:
                parent.node(f"n{index}", _label(*node.lines), fillcolor=FILL[node.kind])
        for name, members in clusters.items():
            frame = dict(label=_label(name), color="#b0b0b0", style="rounded")
            cluster = graphviz.Digraph(f"cluster_{next(cluster_numbers)}", graph_attr=frame)
            add_nodes(cluster, members, depth + 1)
            parent.subgraph(cluster)

    add_nodes(digraph, list(range(len(graph.nodes))), 0)
    for (a, b), label in graph.edges.items():
        color = {"color": GRADIENT_COLOR} if (a, b) in graph.gradient_edges else {}
        digraph.edge(f"n{a}", f"n{b}", _label(label), **color)
    return digraph.source


def _label(*lines: str) -> str:
    """Lines of literal text as a label: none of it is an escape sequence or HTML."""
    text = "\n".join(lines).replace("\0", "").replace("\r", "")
    return graphviz.nohtml(graphviz.escape(text).replace("\n", r"\n"))


def require_output(out: Path) -> None:
    """Raises `UserError` if no graph can be written to `out`. Commands call this before they do the work."""
    if out.suffix.lower() not in SUFFIXES:
        raise UserError(f"--graph {out}: unknown kind of file; give a name that ends in {', '.join(SUFFIXES)}")
    require_writable("--graph", out)


def write(out: Path, source: str) -> tuple[Path, str | None]:
    """Writes DOT source, or the picture that Graphviz draws of it. An existing file is replaced atomically.

    Args:
        out: a .dot, .svg or .png. A picture falls back to the .dot of the same name where Graphviz is not installed.
        source: text in the DOT language.

    Returns:
        The file written, and if it is not `out`, a line for the user that says why and how to get `out`.

    Raises:
        UserError: `dot` fails or takes more than LAYOUT_SECONDS, or the file cannot be written.
    """
    kind, dot = out.suffix.lower()[1:], shutil.which("dot")
    data = source.encode("utf-8", "replace")
    if kind == "dot":
        return _write_bytes(out, data), None
    if dot is None:
        path = _write_bytes(out.with_suffix(".dot"), data)
        return path, (
            f"{path} written in place of {out.name}: Graphviz is not installed; install it (apt install graphviz, "
            f"brew install graphviz), then: dot -T{kind} {shlex.quote(str(path))} -o {shlex.quote(str(out))}"
        )
    return _write_bytes(out, _render(dot, kind, data, out)), None


def _render(dot: str, kind: str, data: bytes, out: Path) -> bytes:
    """The picture that `dot` draws. It is run here because `graphviz.pipe` cannot be given a time limit."""
    remedy = f"give --graph {out.with_suffix('.dot')} for its text"
    try:
        done = subprocess.run([dot, f"-T{kind}"], input=data, capture_output=True, timeout=LAYOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError(f"--graph {out}: Graphviz took more than {LAYOUT_SECONDS:g} s; {remedy}") from None
    except OSError as e:
        raise UserError(f"--graph {out}: {dot} cannot be run ({e}); {remedy}") from None
    if done.returncode or not done.stdout:
        reason = done.stderr.decode(errors="replace").strip().split("\n")[0] or f"exit code {done.returncode}"
        raise UserError(f"--graph {out}: Graphviz failed ({reason}); {remedy}")
    return done.stdout


def _write_bytes(path: Path, data: bytes) -> Path:
    try:
        with atomic_replace(path) as partial:
            partial.write_bytes(data)
    except OSError as e:
        raise UserError(f"--graph {path}: cannot be written ({e}); choose another place") from None
    return path
