"""Labeled texts: rows and labels from files, the holdout split, and encoded texts."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import write_labeled

from jaxgpt.config import FinetuneConfig, ModelConfig
from jaxgpt.data.labeled import choose, encode, eval_batches, holdout_split, load_labeled
from jaxgpt.data.sampler import PADDING
from jaxgpt.data.tokenizer import ByteTokenizer
from jaxgpt.errors import UserError

SHARED = Path(__file__).resolve().parents[4] / "shared/data"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_labeled(tmp_path_factory.mktemp("labeled") / "texts.csv")


def load(path, **values):
    model = ModelConfig(block_size=64)
    return load_labeled(FinetuneConfig(dataset=f"file:{path}", model=model, **values), None, lambda line: None)


@pytest.mark.parametrize(
    "name, content, part",
    [
        ("x.csv", "text,label\na b,1\n ,2\n", "row 2 has an empty text"),
        ("x.csv", "text,label\na b,1\nc,\n", "row 2 has no label"),
        ("x.csv", "text,label\na b,1\nc,1\n", "1 classes"),
        ("x.csv", "text,label\n", "no rows"),
        ("x.csv", "txt,label\na,1\n", "no column 'text'.*did you mean txt"),
        ("x.jsonl", '{"text": "a", "label": 1.5}\n', "row 1 has the label 1.5"),
        ("x.jsonl", '{"text": 3, "label": 1}\n', "row 1 holds 3, not text"),
        ("x.jsonl", '{"text": "a", "label": "\\ud800"}\n', "line 1 holds half of a surrogate pair"),
        ("x.jsonl", '{"text": "a", "label": [1]}\n', "row 1 has the label .1."),
        ("x.csv", f"text,label\na,{'1' * 5000}\n", "1 classes"),
        ("x.txt", "a\n", "no file of rows"),
    ],
)
def test_rows_that_are_wrong(tmp_path, name, content, part):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match=part):
        load(path)


def test_a_test_label_outside_the_classes_is_named(texts, tmp_path):
    test = write_labeled(tmp_path / "test.csv", 5, label=lambda at, name: "up" if at == 3 else name)
    with pytest.raises(UserError, match="--test-dataset .*row 4 has the label 'up', outside the classes east, north"):
        load(texts, test_dataset=f"file:{test}")


def test_classes_named_by_numbers(tmp_path):
    """A number in the released rows counts the classes; in a user's own rows it is the name of a class."""
    (tmp_path / "ag_news").mkdir()
    (tmp_path / "ag_news/classes.txt").write_text("2\n1\n")
    (tmp_path / "ag_news/test.csv").write_text('"1","a","b"\n"2","c","d"\n' * 5)
    own = write_labeled(tmp_path / "own.csv", 4, label=lambda at, name: 1 + at % 2)
    config = FinetuneConfig(model=ModelConfig(), test_dataset=f"file:{own}")
    data = load_labeled(config, tmp_path, print)
    assert [label for _, label in data.train] == [0, 1] * 5 and [label for _, label in data.test] == [1, 0, 1, 0]


def test_labels_equal_as_numbers_only_are_different_classes(tmp_path):
    (tmp_path / "x.csv").write_text("text,label\n" + "a,1\nb,01\nc, 1\nd,0\n" * 5)
    assert load(tmp_path / "x.csv").labels == ("0", "01", "1")
    rows = [("a", True), ("b", 1), ("c", "1"), ("d", False)] * 5
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": a, "label": b}) + "\n" for a, b in rows))
    data = load(tmp_path / "x.jsonl")
    assert data.labels == ("1", "False", "True")
    assert {text: data.labels[label] for text, label in data.train} == {"a": "True", "b": "1", "c": "1", "d": "False"}


def test_released_labels_outside_the_classes_are_named(tmp_path):
    (tmp_path / "ag_news").mkdir()
    (tmp_path / "ag_news/classes.txt").write_text("World\nSports\n")
    (tmp_path / "ag_news/test.csv").write_text('"1","a","b"\n"3","c","d"\n')
    with pytest.raises(UserError, match="row 2 has the label '3', outside the classes World, Sports"):
        load_labeled(FinetuneConfig(model=ModelConfig()), tmp_path, print)


def test_the_holdout_split_does_not_change():
    examples = [(str(at), 0) for at in range(20)]
    train, test = holdout_split(examples)
    assert sorted(train + test, key=lambda e: int(e[0])) == examples and len(test) == 4
    assert [text for text, _ in test] == PINNED_TEST
    drawn = choose(examples, 5, seed=0)
    assert len(set(drawn)) == 5 and drawn == choose(examples, 5, seed=0) != choose(examples, 5, seed=1)
    assert choose(examples, 0, seed=0) == examples


PINNED_TEST = ["4", "6", "14", "17"]


@pytest.mark.skipif(not (SHARED / "ag_news").is_dir(), reason="needs AG News")
def test_ag_news_has_its_classes_in_every_part():
    data = load_labeled(FinetuneConfig(model=ModelConfig()), SHARED, lambda line: None)
    assert data.labels == ("World", "Sports", "Business", "Sci/Tech")
    if len(data.train) == 6080:  # only test.csv is at hand
        assert np.bincount([label for _, label in data.test]).min() > 300 and len(data.test) == 1520
        assert not {text for text, _ in data.test} <= {text for text, _ in data.train}


def test_texts_are_cut_and_padded():
    idx_NT = encode(["abc", "abcdef"], ByteTokenizer(), 4)
    assert idx_NT.tolist() == [[97, 98, 99, PADDING], [97, 98, 99, 100]]
    (first, last) = eval_batches(idx_NT[[0, 1, 0]], np.array([1, 0, 1]), 2)
    assert last[1].tolist() == [1, PADDING] and last[0].shape == (2, 4) and first[1].tolist() == [1, 0]
