"""The computation graph: all of the model is in it, once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from jaxgpt.analysis.graph import block_graph, op_graph
from jaxgpt.config import FinetuneConfig, ModelConfig, TrainConfig
from jaxgpt.model.gpt import Numerics
from jaxgpt.objective import ClassificationObjective, LanguageModelingObjective
from jaxgpt.train_step import SINGLE_DEVICE, init_state, train_step

MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=8, block_size=16)
VOCAB = 11


def language_model(numerics=None, end_of_text=None, n_layer=1, model=None, **config):
    model = dataclasses.replace(MODEL, n_layer=n_layer, **model or {})
    return LanguageModelingObjective(
        TrainConfig(batch_size=3, model=model, **config), VOCAB, numerics or Numerics(), end_of_text
    )


def classifier(pool):
    return ClassificationObjective(
        FinetuneConfig(batch_size=3, max_tokens=12, pool=pool, model=MODEL), VOCAB, Numerics(), n_classes=4
    )


OBJECTIVES = {
    "plain": language_model(),
    "three blocks, dropout": language_model(n_layer=3, model=dict(dropout=0.1)),
    "tied": language_model(model=dict(tied_head=True, gelu="tanh")),
    "documents": language_model(end_of_text=0, tokenizer="gpt2", packing="documents"),
    "bfloat16, loss in chunks": language_model(
        Numerics(compute_dtype=jnp.bfloat16, chunk_logits=100, head_multiple=16, fused_qkv=True)
    ),
    "many blocks": language_model(n_layer=9),
    "last": classifier("last"),
    "last_token": classifier("last_token"),
    "mean": classifier("mean"),
}
each_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)

cached_block_graph = functools.cache(block_graph)


def names(objective):
    return sorted(jax.eval_shape(objective.init_params))


def upstream(edges, start):
    """All nodes that lead to `start`."""
    found, waiting = set(start), list(start)
    while waiting:
        node = waiting.pop()
        new = {a for a, b in edges if b == node} - found
        found |= new
        waiting += new
    return found


def results(graph):
    return [i for i, node in enumerate(graph.nodes) if node.kind == "result"]


@each_objective
def test_each_parameter_is_once_in_the_blocks_and_gets_a_gradient(objective):
    graph = cached_block_graph(objective)
    assert sorted(name for node in graph.nodes for name in node.params) == names(objective)
    (loss,) = results(graph)
    assert upstream(graph.edges, [loss]) == set(range(len(graph.nodes)))
    reached = upstream(graph.gradient_edges, [loss])
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
    assert graph.gradient_edges < set(graph.edges) and all(a != b for a, b in graph.edges) and all(graph.edges.values())


def edges_of(graph):
    title = [" ".join([*node.clusters, node.lines[0]]) for node in graph.nodes]
    return sorted((title[a], title[b], label) for (a, b), label in graph.edges.items())


def test_block_graph_of_a_plain_model():
    c, wide = "[3\u00b716, 8]", "[3\u00b716, 32]"
    assert edges_of(cached_block_graph(OBJECTIVES["plain"])) == sorted(
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
def test_options_are_shown(name, edges):
    assert set(edges) <= set(edges_of(cached_block_graph(OBJECTIVES[name])))


def test_a_nodes_parameters_have_their_shapes_and_number():
    lines = {node.lines for node in cached_block_graph(OBJECTIVES["plain"]).nodes}
    assert ("mlp.fc (Linear)", "kernel [8, 32], bias [32]", "288 parameters") in lines
    assert ("lm_head", "kernel [8, 11]", "88 parameters") in lines


def test_the_same_blocks_of_many_are_one_node():
    graph = cached_block_graph(OBJECTIVES["many blocks"])
    assert {cluster for node in graph.nodes for cluster in node.clusters} == {"blocks.0", "blocks.1", "blocks.8"}
    (folded,) = (node for node in graph.nodes if "blocks.2.ln1.scale" in node.params)
    assert folded.lines[0] == "blocks.2 to blocks.7: 6 blocks, each the same as blocks.1"
    assert folded.lines[1] == f"{6 * 872:,} parameters"  # 12 C^2 + 13 C
    assert ("blocks.1 residual sum", folded.lines[0], "[3\u00b716, 8]") in edges_of(graph)
    assert (folded.lines[0], "blocks.8 ln1 (LayerNorm)", "[3\u00b716, 8]") in edges_of(graph)


@pytest.mark.parametrize(
    "objective",
    [
        # The operations of many blocks are those of three, again and again.
        pytest.param(objective, id=name, marks=[pytest.mark.slow] if name == "many blocks" else [])
        for name, objective in OBJECTIVES.items()
    ],
)
def test_each_parameter_and_each_gradient_is_once_among_the_operations(objective):
    graph = op_graph(objective)
    assert sorted(name for node in graph.nodes for name in node.params) == names(objective)
    wanted = ["loss, summed", "number of targets", *(f"gradient of {name}" for name in names(objective))]
    ends = results(graph)
    assert sorted(graph.nodes[i].lines[0] for i in ends) == sorted(wanted)
    dead = set(range(len(graph.nodes))) - upstream(graph.edges, ends)
    assert not dead
    (loss,) = (i for i in ends if graph.nodes[i].lines[0] == "loss, summed")
    params = {i for i, node in enumerate(graph.nodes) if node.params}
    assert params <= upstream(graph.edges, [loss])
    assert not any(graph.nodes[i].kind == "backward" for i in upstream(graph.edges, [loss]))


def test_every_product_of_the_step_is_among_the_operations():
    objective = OBJECTIVES["plain"]
    products = [node for node in op_graph(objective).nodes if node.lines[0] == "dot_general"]
    idx_BT = jax.ShapeDtypeStruct((3, 16), jnp.int32)
    step = jax.make_jaxpr(lambda state, *batch: train_step(objective, state, batch, SINGLE_DEVICE))
    state = jax.eval_shape(lambda: init_state(objective))
    assert len(products) == str(step(state, idx_BT, idx_BT)).count("dot_general[")
    # Six Linears, the scores, the mixing and the head; the backward pass has two of each, one for each factor.
    assert len(products) == 3 * (6 + 1 + 1 + 1)
    fc = [node for node in products if node.clusters[-1:] == ("blocks.0.mlp.fc",)]
    assert [node.lines[1] for node in fc] == ["float32[48,32]"]
    back = [node for node in products if node.clusters[-1:] == ("backward of blocks.0.mlp.fc",)]
    assert sorted(node.lines[1] for node in back) in (
        ["float32[48,8]", "float32[8,32]"],
        ["float32[32,8]", "float32[48,8]"],
    )
