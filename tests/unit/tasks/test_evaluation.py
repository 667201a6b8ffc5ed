"""Benchmarks: the figures against `transformers`' GPT-2 in float64, a token at a time; and records that do not do."""

import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet

from jaxgpt.config import ModelConfig
from jaxgpt.data import corpora
from jaxgpt.data.tokenizer import ByteTokenizer, CharTokenizer
from jaxgpt.errors import UserError
from jaxgpt.interop import torch_names
from jaxgpt.model import gpt
from jaxgpt.model.gpt import Numerics
from jaxgpt.tasks import evaluation
from jaxgpt.tasks.evaluation import Request
from jaxgpt.tasks.text_generation import TextModel

BLOCK = 24
# As EleutherAI/lambada_openai and Rowan/hellaswag have them; the second is cut to the block by both sides.
LAMBADA = ['"a b c', "he said to her that it was raining again", "one  two", "ends\nhere now", "no né"]
ACTIVITY = {"ind": 24, "activity_label": "Roof", "ctx_a": "A man sits.", "ctx_b": "he", "ctx": "A man sits. he"}
WIKIHOW = {"ind": 3, "activity_label": "Home", "ctx_a": "[header] How [title] Do it.  [step] Go.", "ctx_b": ""}
HELLASWAG = [
    {**ACTIVITY, "endings": ["is up.", "rips [step] tiles off.", "né né", "x"], "label": 3},
    {**ACTIVITY, "endings": ["x", "is up", "rips tiles off.", "go"], "label": "0"},
    {**WIKIHOW, "endings": ["One [title] two.", "[substeps] a.", "b  c", "dd"], "label": 0},
]


@pytest.fixture(scope="module")
def model():
    """A small model of bytes."""
    shape = ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=BLOCK)
    like = jax.eval_shape(lambda key: gpt.init_params(key, shape, 256, Numerics()), jax.random.key(0))
    draw = np.random.default_rng(0)
    params = {name: draw.normal(0, 0.5, p.shape).astype(np.float32) for name, p in like.items()}
    return TextModel(gpt.bind(shape, 256, Numerics()), params, shape, ByteTokenizer())


@pytest.fixture(scope="module")
def pair():
    """A GPT-2 of random weights in float64: here, and as `transformers` has it. Large weights, so that it is sure."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=256, n_positions=BLOCK, n_embd=16, n_layer=2, n_head=2)
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config).double().eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * 0.4)
    shape = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=BLOCK, tied_head=True, gelu="tanh")
    with jax.enable_x64(True):
        numerics = Numerics(jnp.float64, jnp.float64)
        like = jax.eval_shape(lambda key: gpt.init_params(key, shape, 256, numerics), jax.random.key(0))
        named = torch_names.tutorial_names({k: p.numpy() for k, p in theirs.state_dict().items()})
        params = torch_names.from_torch(named, like)
        yield TextModel(gpt.bind(shape, 256, numerics), params, shape, ByteTokenizer()), theirs


def of_torch(theirs, context, target):
    """The log-probability of each byte of `target`, from a forward pass of its own over the bytes before it."""
    totals, greedy, ids = [], [], [*context.encode(), *target.encode()]
    n_context, first = len(context.encode()), max(0, len(ids) - BLOCK - 1)  # the context is cut from the left
    for at in range(n_context, len(ids)):
        with torch.no_grad():
            log_p_V = theirs(torch.tensor([ids[first:at]])).logits[0, -1].log_softmax(0)
        totals.append(float(log_p_V[ids[at]]))
        greedy.append(int(log_p_V.argmax()) == ids[at])
    return math.fsum(totals), all(greedy)


def greedy_word(theirs, context):
    """The two bytes that the model finds the most likely after a context."""
    ids = list(context.encode())
    for _ in range(2):
        with torch.no_grad():
            ids.append(int(theirs(torch.tensor([ids[-BLOCK:]])).logits[0, -1].argmax()))
    return ids[-2:]


@pytest.mark.slow
def test_log_likelihoods_are_those_of_a_pass_for_each_token(pair):
    """Of targets of any length, up to a block, with contexts longer than it; in the order of the requests."""
    model, theirs = pair
    draw = np.random.default_rng(0)
    sizes = [(1, 1), (3, 20), (40, 5), (1, BLOCK), (100, BLOCK), (7, 9), (16, 1), (8, 9)]
    texts = [tuple("".join(map(chr, draw.integers(97, 122, n))) for n in pair_of) for pair_of in sizes]
    found = evaluation.log_likelihoods(
        model, [Request(*(np.frombuffer(text.encode(), np.uint8) for text in one)) for one in texts]
    )
    for one, (context, target) in zip(found, texts, strict=True):
        total, greedy = of_torch(theirs, context, target)
        assert one.total == pytest.approx(total, rel=1e-10) and one.greedy == greedy


@pytest.mark.slow
def test_a_target_of_the_most_likely_tokens_is_greedy(pair):
    model, theirs = pair
    ids = greedy_word(theirs, "la la")
    context = np.frombuffer(b"la la", np.uint8)
    right, wrong = np.array(ids), np.array([ids[0], (ids[1] + 1) % 256])
    found = evaluation.log_likelihoods(model, [Request(context, right), Request(context, wrong)])
    assert [one.greedy for one in found] == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize("stride", [1, 7, BLOCK // 2, BLOCK])
@pytest.mark.parametrize("n_tokens", [BLOCK + 1, 61, BLOCK - 3])
def test_strides_are_those_of_hugging_faces_page(pair, stride, n_tokens):
    """Its windows and labels; the mean is that over all scored tokens."""
    model, theirs = pair
    text = ("la ti mo ru " * 9)[:n_tokens]
    ids, total, count, before = torch.tensor([list(text.encode())]), 0.0, 0, 0
    for start in range(0, n_tokens, stride):
        end = min(start + BLOCK, n_tokens)
        labels = ids[:, start:end].clone()
        labels[:, : -(end - before)] = -100
        n_scored = int((labels[:, 1:] != -100).sum())  # labels are shifted by one in `transformers`
        if n_scored:
            with torch.no_grad():  # the loss of `transformers` is in float32, so it is computed of the logits here
                logits_TV = theirs(ids[:, start:end]).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits_TV, labels[0, 1:], reduction="sum"))
            count += n_scored
        before = end
        if end == n_tokens:
            break
    got = evaluation.wikitext(model, [text], stride, "--file x")
    assert (got["tokens"], got["words"], got["stride"]) == (count, len(text.split()), stride)
    assert got["ppl"] == pytest.approx(math.exp(total / count), rel=1e-10)
    assert got["word_ppl"] == pytest.approx(math.exp(total / len(text.split())), rel=1e-10)


def test_rows_of_any_length_are_padded_without_a_trace(model):
    """Each target's log-likelihood is that of the logits of one text; a long context is cut from the left."""
    text = b"la ti mo ru hala mo ti lu"
    assert len(text) == BLOCK + 1
    ids = np.frombuffer(text, np.uint8).astype(np.int32)
    logits_TV = np.asarray(jax.jit(lambda p, i: model.model(p)(i))(model.params, ids[None, :-1])[0], np.float64)
    log_p_T = (logits_TV - np.log(np.exp(logits_TV).sum(1, keepdims=True)))[np.arange(BLOCK), ids[1:]]
    cuts = [(0, 20, 25), (0, 1, 3), (0, 9, 12), (0, 23, 24)]
    requests = [Request(ids[a:b], ids[b:c]) for a, b, c in cuts]
    requests.append(Request(np.concatenate([ids[::-1], ids[:20]]), ids[20:]))
    found = [one.total for one in evaluation.log_likelihoods(model, requests)]
    expected = [log_p_T[b - 1 : c - 1].sum() for _, b, c in [*cuts, cuts[0]]]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_wikitexts_lines_are_joined_as_the_hubs_rows(model, tmp_path):
    """A row has its line's end, and a line of blanks is an empty row; the file that is not raw is told."""
    path, said = tmp_path / "wiki.test.raw", []
    path.write_text(" \n = A = \n \n b <unk> c \n")
    got = evaluation.evaluate_benchmark(model, "wikitext-2", file=path, say=said.append)
    joined = "\n\n".join(["", " = A = \n", "", " b <unk> c \n"])
    assert got == evaluation.wikitext(model, [joined], BLOCK // 2, "--file x")
    assert len(said) == 1 and "holds <unk>" in said[0]


@pytest.mark.slow
def test_lambada_is_as_of_the_harness(pair, tmp_path):
    model, theirs = pair
    ids = greedy_word(theirs, "la ti")
    texts = list(LAMBADA)
    if bytes(ids).isascii() and ids[0] == 32:  # else no text's last word is the most likely one
        texts.append("la ti" + bytes(ids).decode())
    path = tmp_path / "lambada_test.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    got, expected = evaluation.evaluate_benchmark(model, "lambada", file=path), []
    for text in texts:
        *words, last = text.split(" ")
        context = " ".join(words)
        blanks = len(context) - len(context.rstrip())  # they belong to what is predicted
        expected.append(of_torch(theirs, context.rstrip(), " " * blanks + " " + last))
    assert got["texts"] == len(texts)
    assert got["accuracy"] == sum(greedy for _, greedy in expected) / len(texts)
    assert got["ppl"] == pytest.approx(math.exp(-sum(total for total, _ in expected) / len(texts)), rel=1e-10)


@pytest.mark.slow
def test_hellaswag_is_as_of_the_harness(pair, tmp_path):
    model, theirs = pair

    def cleaned(text):
        return re.sub("\\[.*?\\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    right = right_norm = 0
    for row in HELLASWAG:
        query = cleaned(row["activity_label"] + ": " + row["ctx_a"] + " " + row["ctx_b"].capitalize())
        endings = [cleaned(ending) for ending in row["endings"]]
        blanks = len(query) - len(query.rstrip())
        totals = [of_torch(theirs, query.rstrip(), " " * blanks + " " + ending)[0] for ending in endings]
        right += int(np.argmax(totals)) == int(row["label"])
        right_norm += int(np.argmax([t / len(e) for t, e in zip(totals, endings, strict=True)])) == int(row["label"])
    path = tmp_path / "hellaswag_val.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in HELLASWAG))
    got = evaluation.evaluate_benchmark(model, "hellaswag", file=path)
    assert got == {"accuracy": right / 3, "accuracy_norm": right_norm / 3, "texts": 3}
    assert 0 < right != right_norm  # else another normalisation would pass


def test_the_marks_of_wikihow_are_left_out():
    assert evaluation.without_brackets(" [header] How [title] Do it.  [step] Go. ") == " How. Do it.  Go."


GOOD = {**ACTIVITY, "endings": ["a", "b"], "label": 0}


@pytest.mark.parametrize(
    "benchmark, record, message",
    [
        ("lambada", {"texts": "a b"}, "no column 'text'"),
        ("lambada", {"text": 3}, "record 1: text holds 3"),
        ("lambada", {"text": "word"}, "record 1: the text 'word' has no word before its last"),
        ("lambada", {"text": " word"}, "no word before its last"),
        ("lambada", {"text": "a " + "b" * 30}, "record 1: 31 tokens to predict, and the run's block has 24"),
        ("hellaswag", {k: v for k, v in GOOD.items() if k != "endings"}, "no column 'endings'"),
        ("hellaswag", {**GOOD, "endings": "a"}, "record 1: endings is 'a'"),
        ("hellaswag", {**GOOD, "endings": ["a", None]}, "record 1: endings holds None"),
        ("hellaswag", {**GOOD, "endings": ["a", "[x]"]}, "record 1: an ending is empty"),
        ("hellaswag", {**GOOD, "label": ""}, "record 1: the label is ''"),
        ("hellaswag", {**GOOD, "label": "two"}, "record 1: the label is 'two'"),
        ("hellaswag", {**GOOD, "label": 2}, "give a number from 0 to 1"),
        ("hellaswag", {**GOOD, "label": True}, "the label is True"),
        ("hellaswag", {**GOOD, "ctx_b": None}, "record 1: ctx_b holds None"),
        ("hellaswag", None, "holds no record"),
    ],
)
def test_a_record_that_does_not_do_is_named(model, tmp_path, benchmark, record, message):
    path = tmp_path / "data.jsonl"
    path.write_text("" if record is None else json.dumps(record) + "\n")
    with pytest.raises(UserError, match=f"--file .*{re.escape(message)}"):
        evaluation.evaluate_benchmark(model, benchmark, file=path)


def test_what_the_tokenizer_lacks_is_named_with_its_record(model, tmp_path):
    model = dataclasses.replace(model, tokenizer=CharTokenizer(" ab"))
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a b"}\n{"text": "a z"}\n')
    with pytest.raises(UserError, match=r"record 2: the character 'z'"):
        evaluation.evaluate_benchmark(model, "lambada", file=path)


@pytest.mark.parametrize(
    "benchmark, stride, message",
    [
        ("wikitext-2", 0, "--stride 0"),
        ("wikitext-2", BLOCK + 1, f"--stride {BLOCK + 1}: give a whole number from 1 to the run's block of {BLOCK}"),
        ("lambada", 3, "--stride 3: --benchmark lambada has no windows"),
    ],
)
def test_a_stride_out_of_its_range_is_refused(model, tmp_path, benchmark, stride, message):
    path = tmp_path / "text.txt"
    path.write_text("la la")
    with pytest.raises(UserError, match=message):
        evaluation.evaluate_benchmark(model, benchmark, stride, path)


def test_no_text_is_refused(model, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("")
    with pytest.raises(UserError, match="0 tokens"):
        evaluation.evaluate_benchmark(model, "wikitext-103", file=path)


@pytest.mark.slow
def test_the_hubs_datasets_give_what_their_files_give(model, monkeypatch, tmp_path):
    """Folders laid out as the hub's Parquet datasets, in place of the names on the hub."""
    import datasets.config

    rows = [{**row, "label": str(row["label"])} for row in HELLASWAG]
    lines = ["", " = A = \n", "", " b c \n"]
    for name, split, table in (
        ("lambada", "test", {"text": LAMBADA}),
        ("hellaswag", "validation", {field: [row[field] for row in rows] for field in evaluation.HELLASWAG_FIELDS}),
        ("wikitext-2", "test", {"text": lines}),
    ):
        (tmp_path / name).mkdir()
        parquet.write_table(pyarrow.table(table), tmp_path / name / f"{split}-00000-of-00001.parquet")
        if name in evaluation.HUB_DATASETS:
            monkeypatch.setitem(evaluation.HUB_DATASETS, name, (str(tmp_path / name), split))
    monkeypatch.setattr(corpora, "data_folders", lambda data_dir: [])
    monkeypatch.setitem(corpora.LINE_DATASETS, "wikitext-2", str(tmp_path / "wikitext-2"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "wikitext-2.txt").write_text("".join(line or " \n" for line in lines))
    (tmp_path / "lambada.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in LAMBADA))
    (tmp_path / "hellaswag.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, file in (("lambada", ".jsonl"), ("hellaswag", ".jsonl"), ("wikitext-2", ".txt")):
        got = evaluation.evaluate_benchmark(model, name)
        assert got == evaluation.evaluate_benchmark(model, name, file=tmp_path / f"{name}{file}"), name
    monkeypatch.setitem(evaluation.HUB_DATASETS, "lambada", (str(tmp_path / "lambada"), "validation"))
    with pytest.raises(UserError, match=r"--benchmark lambada: .* has no validation split any more; .* --file PATH"):
        evaluation.evaluate_benchmark(model, "lambada")
