"""The computation graph: all of the model is in it, and it is written whole, as text or by Graphviz."""

import dataclasses
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxgpt import dot
from jaxgpt.classifier import ClassifierProgram
from jaxgpt.config import FinetuneConfig, ModelConfig, TrainConfig
from jaxgpt.dot import Graph, Node, to_dot
from jaxgpt.errors import UserError
from jaxgpt.graph import block_graph, op_graph, write_graph
from jaxgpt.model import Numerics
from jaxgpt.train_step import ALONE, Program

MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=8, block_size=16)
VOCAB = 11


def program(numerics=None, end_of_text=None, n_layer=1, model=None, **config):
    model = dataclasses.replace(MODEL, n_layer=n_layer, **model or {})
    return Program(TrainConfig(batch_size=3, model=model, **config), VOCAB, numerics or Numerics(), end_of_text)


def classifier(pool):
    return ClassifierProgram(
        FinetuneConfig(batch_size=3, max_tokens=12, pool=pool, model=MODEL), VOCAB, Numerics(), n_classes=4
    )


PROGRAMS = {
    "plain": program(),
    "three blocks, dropout": program(n_layer=3, model=dict(dropout=0.1)),
    "tied": program(model=dict(tied_head=True, gelu="tanh")),
    "documents": program(end_of_text=0, tokenizer="gpt2", packing="documents"),
    "bfloat16, loss in chunks": program(
        Numerics(compute_dtype=jnp.bfloat16, logits_at_once=100, head_multiple=16, fused_qkv=True)
    ),
    "many blocks": program(n_layer=9),
    "last": classifier("last"),
    "last_token": classifier("last_token"),
    "mean": classifier("mean"),
}
each_program = pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)


def names(program):
    return sorted(jax.eval_shape(program.init_params))


def upstream(edges, start):
    """All nodes from which `start` is reached."""
    found, waiting = set(start), list(start)
    while waiting:
        node = waiting.pop()
        new = {a for a, b in edges if b == node} - found
        found |= new
        waiting += new
    return found


def results(graph):
    return [i for i, node in enumerate(graph.nodes) if node.kind == "result"]


@each_program
def test_each_parameter_is_once_in_the_blocks_and_the_gradient_comes_to_it(program):
    graph = block_graph(program)
    assert sorted(name for node in graph.nodes for name in node.params) == names(program)
    (loss,) = results(graph)
    assert upstream(graph.edges, [loss]) == set(range(len(graph.nodes)))
    reached = upstream(graph.flows_back, [loss])
    without = {graph.nodes[i].lines[0] for i in range(len(graph.nodes)) if i not in reached}
    assert {i for i, node in enumerate(graph.nodes) if node.params} <= reached
    assert without <= {
        "token ids",
        "targets",
        "labels",
        "positions",
        "positions within documents",
        "padding, positions",
    }
    assert graph.flows_back < set(graph.edges) and all(a != b for a, b in graph.edges) and all(graph.edges.values())


def edges_of(graph):
    title = [" ".join([*node.clusters, node.lines[0]]) for node in graph.nodes]
    return sorted((title[a], title[b], label) for (a, b), label in graph.edges.items())


def test_the_blocks_are_the_models():
    c, wide = "[3\u00b716, 8]", "[3\u00b716, 32]"
    assert edges_of(block_graph(PROGRAMS["plain"])) == sorted(
        [
            ("token ids", "token_emb (Embed)", "[3, 16]"),
            ("positions", "pos_emb (Embed)", "[16]"),
            ("token_emb (Embed)", "sum", "[3, 16, 8]"),
            ("pos_emb (Embed)", "sum", "[16, 8]"),
            ("sum", "blocks.0 ln1 (LayerNorm)", c),
            *(("blocks.0 ln1 (LayerNorm)", f"blocks.0 attn.{W} (Linear)", c) for W in ("Wq", "Wk", "Wv")),
            *(
                (f"blocks.0 attn.{W} (Linear)", "blocks.0 causal attention, 2 heads of 4", c)
                for W in ("Wq", "Wk", "Wv")
            ),
            ("blocks.0 causal attention, 2 heads of 4", "blocks.0 attn.Wo (Linear)", c),
            ("sum", "blocks.0 residual sum", c),
            ("blocks.0 attn.Wo (Linear)", "blocks.0 residual sum", c),
            ("blocks.0 residual sum", "blocks.0 ln2 (LayerNorm)", c),
            ("blocks.0 ln2 (LayerNorm)", "blocks.0 mlp.fc (Linear)", c),
            ("blocks.0 mlp.fc (Linear)", "blocks.0 GELU (erf)", wide),
            ("blocks.0 GELU (erf)", "blocks.0 mlp.proj (Linear)", wide),
            ("blocks.0 residual sum", "blocks.0 residual sum", c),
            ("blocks.0 mlp.proj (Linear)", "blocks.0 residual sum", c),
            ("blocks.0 residual sum", "ln_f (LayerNorm)", c),
            ("ln_f (LayerNorm)", "lm_head", c),
            ("lm_head", "cross-entropy loss, summed over tokens", "[3, 16, 11]"),
            ("targets", "cross-entropy loss, summed over tokens", "[3, 16]"),
        ]
    )


@pytest.mark.parametrize(
    "name, edges",
    [
        (
            "tied",
            [
                ("token_emb (Embed)", "lm_head, the token embedding's matrix", "[11, 8]"),
                ("blocks.0 mlp.fc (Linear)", "blocks.0 GELU (tanh)", "[3\u00b716, 32]"),
            ],
        ),
        ("three blocks, dropout", [("sum, dropout 0.1", "blocks.0 residual sum, dropout 0.1", "[3\u00b716, 8]")]),
        (
            "documents",
            [
                ("positions within documents", "pos_emb (Embed)", "[3, 16]"),
                ("positions within documents", "blocks.0 causal attention within documents, 2 heads of 4", "[3, 16]"),
                ("positions within documents", "cross-entropy loss, summed over tokens", "[3, 16]"),
            ],
        ),
        # 3 x 16 x 11 logits in six chunks of time, the head widened to 16
        ("bfloat16, loss in chunks", [("lm_head", "cross-entropy loss, summed over tokens", "[3, 3, 16]")]),
        (
            "last",
            [
                ("ln_f (LayerNorm)", "pool: last", "[3\u00b712, 8]"),
                ("pool: last", "classifier (Linear)", "[3, 8]"),
                ("classifier (Linear)", "cross-entropy loss, summed over texts", "[3, 4]"),
                ("labels", "cross-entropy loss, summed over texts", "[3]"),
            ],
        ),
        ("last_token", [("padding, positions", "pool: last_token", "[3]")]),
        ("mean", [("pool: mean", "classifier (Linear)", "[3, 8]")]),
    ],
)
def test_options_show(name, edges):
    assert set(edges) <= set(edges_of(block_graph(PROGRAMS[name])))


def test_a_nodes_parameters_have_their_shapes_and_number():
    lines = {node.lines for node in block_graph(PROGRAMS["plain"]).nodes}
    assert ("mlp.fc (Linear)", "kernel [8, 32], bias [32]", "288 parameters") in lines
    assert ("lm_head", "kernel [8, 11]", "88 parameters") in lines


def test_the_same_blocks_of_many_are_one_node():
    graph = block_graph(PROGRAMS["many blocks"])
    assert {cluster for node in graph.nodes for cluster in node.clusters} == {"blocks.0", "blocks.1", "blocks.8"}
    (folded,) = (node for node in graph.nodes if "blocks.2.ln1.scale" in node.params)
    assert folded.lines[0] == "blocks.2 to blocks.7: 6 blocks, each the same as blocks.1"
    assert folded.lines[1] == f"{6 * 872:,} parameters"  # 12 C^2 + 13 C
    assert ("blocks.1 residual sum", folded.lines[0], "[3\u00b716, 8]") in edges_of(graph)
    assert (folded.lines[0], "blocks.8 ln1 (LayerNorm)", "[3\u00b716, 8]") in edges_of(graph)


@each_program
def test_each_parameter_and_each_gradient_is_once_among_the_operations(program):
    graph = op_graph(program)
    assert sorted(name for node in graph.nodes for name in node.params) == names(program)
    wanted = ["loss, summed", "number of targets", *(f"gradient of {name}" for name in names(program))]
    ends = results(graph)
    assert sorted(graph.nodes[i].lines[0] for i in ends) == sorted(wanted)
    dead = set(range(len(graph.nodes))) - upstream(graph.edges, ends)
    assert not dead
    (loss,) = (i for i in ends if graph.nodes[i].lines[0] == "loss, summed")
    params = {i for i, node in enumerate(graph.nodes) if node.params}
    assert params <= upstream(graph.edges, [loss])
    assert not any(graph.nodes[i].kind == "backward" for i in upstream(graph.edges, [loss]))


def test_every_product_of_the_step_is_among_the_operations():
    program = PROGRAMS["plain"]
    products = [node for node in op_graph(program).nodes if node.lines[0] == "dot_general"]
    idx_BT = jax.ShapeDtypeStruct((3, 16), jnp.int32)
    step = jax.make_jaxpr(lambda *args: program.loss_and_grads(*args, None, ALONE))
    assert len(products) == str(step(jax.eval_shape(program.init_params), idx_BT, idx_BT)).count("dot_general[")
    # Six Linears, the scores, the mixing and the head; going back two of each, as each product has two factors.
    assert len(products) == 3 * (6 + 1 + 1 + 1)
    fc = [node for node in products if node.clusters[-1:] == ("blocks.0.mlp.fc",)]
    assert [node.lines[1] for node in fc] == ["float32[48,32]"]
    back = [node for node in products if node.clusters[-1:] == ("backward of blocks.0.mlp.fc",)]
    assert sorted(node.lines[1] for node in back) in (
        ["float32[48,8]", "float32[8,32]"],
        ["float32[32,8]", "float32[48,8]"],
    )


QUOTED = r'"(?:[^"\\\n]|\\["\\n])*"'
LINE = re.compile(
    rf"digraph {{|}}|(n\d+|graph|node|edge) \[.*\];|(n\d+) -> (n\d+) \[label={QUOTED}(, color={QUOTED})?\];"
    rf"|subgraph cluster_\d+ {{ label={QUOTED}; color={QUOTED}; style=rounded;"
)


@pytest.mark.parametrize("level", ["block", "op"])
def test_the_text_is_graphviz(level, tmp_path):
    out = tmp_path / "graph.dot"
    title = 'a "quoted" \\n \\ run\nin two lines'
    assert write_graph(out, PROGRAMS["plain"], level, title) == (out, None)
    text = out.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert all(LINE.fullmatch(line) for line in lines)
    assert [os.fspath(p) for p in tmp_path.iterdir()] == [os.fspath(out)]
    assert lines[-1] == "}" and sum(line.endswith(("{", "rounded;")) for line in lines) == lines.count("}")
    assert '"a \\"quoted\\" \\\\n \\\\ run\\nin two lines\\n' in lines[1]
    nodes = re.findall(r"^(n\d+) \[", text, re.M)
    assert len(nodes) == len(set(nodes))
    assert set(re.findall(r"\bn\d+\b(?= -> )|(?<= -> )n\d+\b", text)) == set(nodes)


def test_a_gradient_s_way_is_red():
    graph = Graph(nodes=[Node(("a",), "input"), Node(("b",), "result")], edges={(0, 1): "[2]"}, flows_back={(0, 1)})
    assert f'n0 -> n1 [label="[2]", color="{dot.GRADIENT}"];' in to_dot(graph, "")


@pytest.fixture
def graphviz(tmp_path, monkeypatch):
    """Puts a program of ours in the place of Graphviz's."""
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
    assert write_graph(out, PROGRAMS["plain"], "block", "title") == (out, None)
    asked, text = out.read_text(encoding="utf-8").split("\n", 1)
    assert asked == f"-T{kind}" and text == to_dot(block_graph(PROGRAMS["plain"]), "title")
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
        write_graph(tmp_path / "graph.svg", PROGRAMS["plain"], "block", "title")
    assert f"--graph {tmp_path / 'graph.svg'}" in str(error.value) and "graph.dot" in str(error.value)
    assert "more\n" not in str(error.value) and [p.name for p in tmp_path.iterdir()] == ["bin"]


def test_without_graphviz_the_text_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    path, line = write_graph(tmp_path / "graph.svg", PROGRAMS["plain"], "block", "title")
    assert path == tmp_path / "graph.dot" and [path] == list(tmp_path.iterdir())
    assert path.read_text(encoding="utf-8") == to_dot(block_graph(PROGRAMS["plain"]), "title")
    assert "apt install graphviz" in line and f"dot -Tsvg {path} -o {tmp_path / 'graph.svg'}" in line


@pytest.mark.skipif(shutil.which("dot") is None, reason="needs Graphviz")
def test_the_real_graphviz(tmp_path):
    out, line = write_graph(tmp_path / "graph.svg", PROGRAMS["plain"], "op", "the title")
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
def test_a_bad_place_is_told(name, remedy, tmp_path):
    (tmp_path / "folder.dot").mkdir()
    with pytest.raises(UserError, match=re.escape(remedy)) as error:
        write_graph(tmp_path / name, PROGRAMS["plain"], "block", "title")
    assert str(error.value).startswith(f"--graph {Path(tmp_path, name)}: ")
    assert [p.name for p in tmp_path.iterdir()] == ["folder.dot"] and not list((tmp_path / "folder.dot").iterdir())
