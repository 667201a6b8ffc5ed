"""Graphs as DOT source and as pictures: written whole, drawn by Graphviz or by what stands in its place here."""

import os
import re
import shutil
from pathlib import Path

import pytest

from jaxgpt.analysis import dot
from jaxgpt.analysis.dot import Graph, Node, to_dot
from jaxgpt.analysis.graph import block_graph, write_graph
from jaxgpt.config import ModelConfig, TrainConfig
from jaxgpt.errors import UserError
from jaxgpt.model.gpt import Numerics
from jaxgpt.objective import LanguageModelingObjective

MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=8, block_size=16)
OBJECTIVE = LanguageModelingObjective(TrainConfig(batch_size=3, model=MODEL), 11, Numerics())

# The part of the DOT language that a graph is written in: quotes and backslashes within a string are escaped.
ID = r'(?:\w+|\d+\.\d+|"(?:[^"\\\n]|\\["\\n])*")'
ATTRIBUTES = rf"\[{ID}={ID}(?: {ID}={ID})*\]"
LINE = re.compile(
    rf"digraph {{|\t*(}}|(n\d+|graph|node|edge) {ATTRIBUTES}|n\d+ -> n\d+ {ATTRIBUTES}|subgraph cluster_\d+ {{)"
)


@pytest.mark.parametrize("level", ["block", "op"])
def test_the_source_is_in_the_dot_language(level, tmp_path):
    out = tmp_path / "graph.dot"
    title = 'a "quoted" \\n \\ run\nin two lines'
    assert write_graph(out, OBJECTIVE, level, title) == (out, None)
    text = out.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert all(LINE.fullmatch(line) for line in lines)
    assert [os.fspath(p) for p in tmp_path.iterdir()] == [os.fspath(out)]
    assert lines[-1] == "}" and sum(line.endswith("{") for line in lines) == sum(line.strip() == "}" for line in lines)
    assert '"a \\"quoted\\" \\\\n \\\\ run\\nin two lines\\n' in lines[1]
    nodes = re.findall(r"^\t*(n\d+) \[", text, re.M)
    assert len(nodes) == len(set(nodes))
    assert set(re.findall(r"\bn\d+\b(?= -> )|(?<= -> )n\d+\b", text)) == set(nodes)


def test_an_edge_that_carries_a_gradient_is_red():
    graph = Graph(nodes=[Node(("a",), "input"), Node(("b",), "result")], edges={(0, 1): "[2]"}, gradient_edges={(0, 1)})
    assert f'n0 -> n1 [label="[2]" color="{dot.GRADIENT_COLOR}"]' in to_dot(graph, "")


def test_a_label_is_literal_text():
    graph = Graph(nodes=[Node(("<b>", "graph", "\0x\r"), "input", ("\\N", "<i>"))])
    lines = [line.strip() for line in to_dot(graph, "<title>").splitlines()]
    assert 'n0 [label="<b>\\ngraph\\nx" fillcolor="#dfe7f2"]' in lines
    assert 'label="<title>"' in lines[1] and all(LINE.fullmatch(line) for line in lines)
    frames = [line for line in lines if "#b0b0b0" in line]
    assert ['label="\\\\N"' in frames[0], 'label="<i>"' in frames[1]] == [True, True]


def test_a_large_graph_gets_the_coarse_layout():
    small, large = (Graph(nodes=[Node(("a",), "input")] * n) for n in (dot.MANY_NODES, dot.MANY_NODES + 1))
    assert "splines=polyline" not in to_dot(small, "") and "splines=polyline" in to_dot(large, "")


@pytest.fixture
def graphviz(tmp_path, monkeypatch):
    """Installs a script as `dot`."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def install(script: str) -> None:
        (folder / "dot").write_text(script)
        (folder / "dot").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    return install


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_graphviz_draws(graphviz, kind, tmp_path):
    graphviz('#!/bin/sh\necho "$@"\necho a warning >&2\ncat\n')
    out = tmp_path / f"graph.{kind}"
    out.write_text("an older one")
    assert write_graph(out, OBJECTIVE, "block", "title") == (out, None)
    asked, text = out.read_text(encoding="utf-8").split("\n", 1)
    assert asked == f"-T{kind}" and text == to_dot(block_graph(OBJECTIVE), "title")
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*.dot"))


@pytest.mark.parametrize(
    "script, said",
    [
        ("#!/bin/sh\ncat >/dev/null\necho half\necho Error: no memory >&2\necho more >&2\nexit 1\n", "no memory)"),
        ("#!/bin/sh\ncat >/dev/null\n", "exit code 0"),
        ("#!/bin/sh\nexec sleep 60\n", "took more than 0.2 s"),
        ("no program", "cannot be run"),
    ],
)
def test_graphviz_fails(graphviz, script, said, tmp_path, monkeypatch):
    monkeypatch.setattr(dot, "LAYOUT_SECONDS", 0.2 if "sleep" in script else 60)
    graphviz(script)
    with pytest.raises(UserError, match=re.escape(said)) as error:
        write_graph(tmp_path / "graph.svg", OBJECTIVE, "block", "title")
    assert f"--graph {tmp_path / 'graph.svg'}" in str(error.value) and "graph.dot" in str(error.value)
    assert "more\n" not in str(error.value) and [p.name for p in tmp_path.iterdir()] == ["bin"]


def test_without_graphviz_the_dot_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    path, line = write_graph(tmp_path / "graph.svg", OBJECTIVE, "block", "title")
    assert path == tmp_path / "graph.dot" and [path] == list(tmp_path.iterdir())
    assert path.read_text(encoding="utf-8") == to_dot(block_graph(OBJECTIVE), "title")
    assert "apt install graphviz" in line and f"dot -Tsvg {path} -o {tmp_path / 'graph.svg'}" in line


@pytest.mark.skipif(shutil.which("dot") is None, reason="needs Graphviz")
def test_the_real_graphviz(tmp_path):
    out, line = write_graph(tmp_path / "graph.svg", OBJECTIVE, "op", "the title")
    assert line is None and "<svg" in out.read_text() and "the title" in out.read_text()


@pytest.mark.parametrize(
    "name, remedy",
    [
        ("graph.pdf", "ends in .dot, .svg, .png"),
        ("graph", "ends in .dot, .svg, .png"),
        ("none/graph.svg", "no such folder; create it"),
        ("folder.dot", "choose another"),
        (f"{'x' * 300}.dot", "shorter name"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused(name, remedy, tmp_path):
    (tmp_path / "folder.dot").mkdir()
    with pytest.raises(UserError, match=re.escape(remedy)) as error:
        write_graph(tmp_path / name, OBJECTIVE, "block", "title")
    assert str(error.value).startswith(f"--graph {Path(tmp_path, name)}: ")
    assert [p.name for p in tmp_path.iterdir()] == ["folder.dot"] and not list((tmp_path / "folder.dot").iterdir())
