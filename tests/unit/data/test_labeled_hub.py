"""Labeled texts from the hub, through a local folder with the layout of a hub dataset."""

import datasets
import pytest

from jaxgpt.config import FinetuneConfig, ModelConfig
from jaxgpt.data.labeled import load_labeled
from jaxgpt.errors import UserError


def hub_folder(folder, **splits):
    """A Parquet file per split of (text, label) rows. The labels 0 and 1 are the classes "no" and "yes"."""
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"]))
    folder.mkdir()
    for split, rows in splits.items():
        columns = {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
        data = datasets.Dataset.from_dict(columns, features=features)
        data.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def load(folder, **values):
    said = []
    config = FinetuneConfig(dataset=f"hf:{folder}", model=ModelConfig(), **values)
    return load_labeled(config, None, said.append), said


def test_the_classes_have_the_names_of_the_dataset(tmp_path):
    data, said = load(hub_folder(tmp_path / "hub", train=[("a", 1), ("b", 0)], test=[("c", 1)]))
    assert data.labels == ("no", "yes")
    assert (data.train, data.test) == ([("a", 1), ("b", 0)], [("c", 1)])
    assert data.name == data.source == f"hf:{tmp_path}/hub"
    assert not said


def test_a_test_split_without_labels_is_not_used(tmp_path):
    folder = hub_folder(tmp_path / "hub", train=[("a", 1), ("b", 0)], test=[("c", -1)], validation=[("d", 0)])
    assert load(folder)[0].test == [("d", 0)]


def test_without_a_test_split_a_fifth_is_held_out(tmp_path):
    rows = [(str(number), number % 2) for number in range(20)]
    data, said = load(hub_folder(tmp_path / "hub", train=rows))
    assert [text for text, _ in data.test] == ["4", "6", "14", "17"]
    assert said == [f"hf:{tmp_path}/hub: no test split; 4 of its texts are held out as the test split"]


def test_a_missing_column_is_reported(tmp_path):
    folder = hub_folder(tmp_path / "hub", train=[("a", 1), ("b", 0)])
    with pytest.raises(UserError, match="no column 'body'; it has 'text', 'label'"):
        load(folder, text_column="body")
