"""Any configuration trains a step, or is refused in one line before anything is written."""

from collections import Counter

import pytest

from jaxgpt.cli.args import config_of, parse_train_flags
from jaxgpt.data.corpora import load_corpus
from jaxgpt.errors import UserError
from jaxgpt.runtime import build_language_modeling
from tests.faults.configurations import check_each, flags, make_folder, train_by_each


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("configurations") / "given")


@pytest.mark.parametrize("n_examples", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_is_refused_or_builds_an_objective(folder, monkeypatch, tmp_path, n_examples):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    outcomes = Counter()

    def check(words: list[str]) -> None:
        try:
            given = parse_train_flags(words, None, "jaxgpt train")
            corpus = load_corpus(given.dataset, None, lambda line: None, given.text_column)
            build_language_modeling(config_of(given), corpus)[1].abstract_state()
        except UserError as e:
            assert str(e).strip(), words
            outcomes["refused"] += 1
        else:
            outcomes["built"] += 1

    check_each(flags("train", 20), n_examples, check)
    assert len(outcomes) == 2 and min(outcomes.values()) > n_examples / 10, outcomes


@pytest.mark.slow
def test_is_refused_or_trains(cli, folder):
    codes = Counter()
    train_by_each(cli, folder, "train", 150, codes)
    assert codes[0]


@pytest.mark.slow
def test_is_refused_or_finetunes(cli, folder):
    codes = Counter()
    train_by_each(cli, folder, "finetune", 60, codes)
    assert codes[0] and codes[2]
