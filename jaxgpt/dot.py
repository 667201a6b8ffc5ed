"""Graphs as text for Graphviz, and as the pictures that its `dot` makes of it. Imports no jax."""

import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from jaxgpt.data_files import replacing
from jaxgpt.errors import UserError

SUFFIXES = (".dot", ".svg", ".png")
LAYOUT_SECONDS = 300.0
MANY = 300  # nodes, above which the layout may be coarser: that of minigpt's operations takes 7 s in place of 96 s

FILL = {"input": "#dfe7f2", "parameters": "#fdf3d0", "forward": "#ffffff", "backward": "#fbe3df", "result": "#e3b7ae"}
GRADIENT = "#b03a2e"


@dataclass(frozen=True)
class Node:
    """A box: its text, a key of FILL, the clusters it lies in from the outermost, and the parameters that it has."""

    lines: tuple[str, ...]
    kind: str
    clusters: tuple[str, ...] = ()
    params: tuple[str, ...] = ()


@dataclass
class Graph:
    """Nodes, known by their place in the list, and edges (from, to) in the direction of the data, with their labels."""

    legend: list[str] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    edges: dict[tuple[int, int], str] = field(default_factory=dict)
    flows_back: set[tuple[int, int]] = field(default_factory=set)  # edges that the gradient takes the other way

    def add(self, node: Node) -> int:
        self.nodes.append(node)
        return len(self.nodes) - 1


def to_dot(graph: Graph, title: str) -> str:
    """The graph in Graphviz's language, data going upward: the loss above, the embeddings below."""
    quick = ", splines=polyline, nslimit=1, nslimit1=1, mclimit=0.2" if len(graph.nodes) > MANY else ""
    lines = [
        "digraph {",
        f"graph [rankdir=BT, labelloc=t, fontname=Helvetica, label={_quoted(title, *graph.legend)}{quick}];",
        'node [shape=box, style="rounded,filled", color="#707070", fontname=Helvetica, fontsize=11];',
        'edge [color="#909090", fontname=Helvetica, fontsize=9];',
    ]
    n_clusters = 0

    def put(numbers: list[int], depth: int) -> None:
        nonlocal n_clusters
        inner: dict[str, list[int]] = {}
        for number in numbers:
            node = graph.nodes[number]
            if len(node.clusters) > depth:
                inner.setdefault(node.clusters[depth], []).append(number)
            else:
                lines.append(f'n{number} [label={_quoted(*node.lines)}, fillcolor="{FILL[node.kind]}"];')
        for name, members in inner.items():
            lines.append(f'subgraph cluster_{n_clusters} {{ label={_quoted(name)}; color="#b0b0b0"; style=rounded;')
            n_clusters += 1
            put(members, depth + 1)
            lines.append("}")

    put(list(range(len(graph.nodes))), 0)
    for (a, b), label in graph.edges.items():
        style = f', color="{GRADIENT}"' if (a, b) in graph.flows_back else ""
        lines.append(f"n{a} -> n{b} [label={_quoted(label)}{style}];")
    return "\n".join([*lines, "}\n"])


def _quoted(*lines: str) -> str:
    text = "\n".join(lines).replace("\0", "")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\r", "").replace("\n", "\\n") + '"'


def require_place(out: Path) -> None:
    """Raises `UserError` if no graph can be written to `out`: for before the work."""
    if out.suffix.lower() not in SUFFIXES:
        raise UserError(f"--graph {out}: unknown kind of file; give a name that ends in {', '.join(SUFFIXES)}")
    if not os.path.isdir(out.parent):
        raise UserError(f"--graph {out}: no such folder; create it first")
    if os.path.isdir(out) or not os.access(out.parent, os.W_OK) or len(os.fsencode(out.name)) > 240:
        raise UserError(f"--graph {out}: cannot be written; choose another, shorter name in a writable folder")


def write(out: Path, text: str) -> tuple[Path, str | None]:
    """Writes a graph's text, or the picture of it; a file of that name is replaced, whole or not at all.

    Args:
        out: a .dot, or a .svg or .png. Where Graphviz is not installed, the .dot of the same name is written.

    Returns:
        The file written, and if it is not `out`, a line for the user that says why and how to get that.

    Raises:
        UserError: `dot` fails or takes more than LAYOUT_SECONDS, or the file cannot be written.
    """
    kind, dot = out.suffix.lower()[1:], shutil.which("dot")
    data = text.encode("utf-8", "replace")
    if kind == "dot":
        return _put(out, data), None
    if dot is None:
        path = _put(out.with_suffix(".dot"), data)
        return path, (
            f"{path} written in place of {out.name}: Graphviz is not installed; install it (apt install graphviz, "
            f"brew install graphviz), then: dot -T{kind} {shlex.quote(str(path))} -o {shlex.quote(str(out))}"
        )
    return _put(out, _drawn(dot, kind, data, out)), None


def _drawn(dot: str, kind: str, text: bytes, out: Path) -> bytes:
    remedy = f"give --graph {out.with_suffix('.dot')} for its text"
    try:
        done = subprocess.run([dot, f"-T{kind}"], input=text, capture_output=True, timeout=LAYOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError(f"--graph {out}: Graphviz took more than {LAYOUT_SECONDS:g} s; {remedy}") from None
    except OSError as e:
        raise UserError(f"--graph {out}: {dot} cannot be run ({e}); {remedy}") from None
    if done.returncode or not done.stdout:
        said = done.stderr.decode(errors="replace").strip().split("\n")[0] or f"exit code {done.returncode}"
        raise UserError(f"--graph {out}: Graphviz failed ({said}); {remedy}")
    return done.stdout


def _put(path: Path, data: bytes) -> Path:
    try:
        with replacing(path) as partial:
            partial.write_bytes(data)
    except OSError as e:
        raise UserError(f"--graph {path}: cannot be written ({e}); choose another place") from None
    return path
