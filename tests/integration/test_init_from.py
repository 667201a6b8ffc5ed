"""`jaxgpt train --init-from`: a training that starts from given weights."""

import csv
import json
import shutil

import numpy as np
import pytest
from conftest import SMALL, assert_same, read_state

RECIPE = [flag for flag in SMALL if not flag.startswith("--model.")]


def train(cli, text_file, out, source, *more, steps=30):
    line = ["--dataset", f"file:{text_file}", "--steps", steps, "--out-dir", out, "--init-from", source, *RECIPE]
    return cli("train", *line, *more)


@pytest.fixture(scope="module")
def tuned(cli, trained, text_file, tmp_path_factory):
    """A run that began from the weights of `trained`."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    done = train(cli, text_file, out, trained)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
def test_it_starts_from_the_weights_and_records_them(tuned, trained, cli, text_file, tmp_path):
    """At so small a learning rate no weight moves: the run ends with those that it began from."""
    out = tmp_path / "still"
    done = train(cli, text_file, out, trained, "--lr=1e-30", "--weight-decay=0", steps=3)
    assert done.returncode == 0, done.stderr
    began, ended = read_state(trained, 60), read_state(out, 3)
    for name, p in began["params"].items():
        np.testing.assert_array_equal(p, ended["params"][name])

    config, theirs = (json.loads((run / "config.json").read_text()) for run in (tuned, trained))
    assert config["model"] == theirs["model"] and config["tokenizer"] == theirs["tokenizer"]
    base = json.loads((tuned / "data.json").read_text())["base"]
    assert base["run"] == str(trained) and base["step"] == 60 and len(base["sha256"]) == 64
    first_loss = float(next(csv.DictReader((tuned / "steps.csv").open()))["train_loss"])
    assert first_loss < 1.5 < np.log(len(json.loads((trained / "tokenizer.json").read_text())["chars"]))


@pytest.mark.slow
def test_it_goes_on_without_the_weights_that_it_began_from(cli, trained, tuned, text_file, tmp_path):
    source, out = tmp_path / "source", tmp_path / "run"
    shutil.copytree(trained, source)
    assert train(cli, text_file, out, source).returncode == 0
    first, *later = sorted(out.glob("checkpoints/*"), key=lambda path: int(path.name))
    assert later, "it is to go on from a checkpoint before the last"
    for path in later:  # as if it had been stopped after the first
        shutil.rmtree(path)
    (out / "manifest.json").unlink()
    shutil.rmtree(source)
    done = train(cli, text_file, out, source)
    assert done.returncode == 0, done.stderr
    assert_same(tuned, out, 30)


@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--model.n-embd=32"], ["--model.n-embd 32", "has 16", "leave it out"]),
        (["--model.no-bias"], ["--model.bias False", "has True"]),
        (["--model.block-size=64"], ["--model.block-size 64", "has 16"]),
        (["--tokenizer=byte"], ["--tokenizer byte", "has char"]),
        (["--dataset=pydoc"], ["is not in the vocabulary"]),
    ],
)
def test_flags_that_do_not_fit_the_weights(cli, trained, text_file, tmp_path, flags, parts):
    done = train(cli, text_file, tmp_path / "run", trained, *flags)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert all(part in done.stderr for part in parts), done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_fewer_positions_and_dropout_of_its_own(cli, trained, text_file, tmp_path):
    done = train(cli, text_file, tmp_path / "run", trained, "--model.block-size=8", "--model.dropout=0.2", steps=2)
    assert done.returncode == 0, done.stderr
    model = json.loads((tmp_path / "run" / "config.json").read_text())["model"]
    assert (model["block_size"], model["dropout"], model["n_embd"]) == (8, 0.2, 16)
    assert read_state(tmp_path / "run", 2)["params"]["pos_emb.embedding"].shape == (8, 16)


@pytest.mark.slow
def test_other_weights_are_another_run(cli, trained, tuned, text_file, tmp_path):
    """A run that has begun from some weights does not go on as one that begins from others."""
    other, out = tmp_path / "other", tmp_path / "run"
    shutil.copytree(tuned, out)
    assert train(cli, text_file, other, trained, "--seed=1", steps=2).returncode == 0
    done = train(cli, text_file, out, other)
    assert done.returncode == 2 and "other weights to start from" in done.stderr
