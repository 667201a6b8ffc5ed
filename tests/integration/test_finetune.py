"""`jaxgpt finetune` and `jaxgpt classify`, on texts whose words determine the class."""

import io
import json
import math
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, read_state, write_labeled
from conftest import SMALL as SMALL_MODEL

from jaxgpt.config import from_json

SMALL = "--batch-size=8 --lr=0.01 --max-tokens=16 --checkpoint-every=7".split()


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_labeled(tmp_path_factory.mktemp("labeled") / "texts.csv")


@pytest.fixture(scope="module")
def tuned(cli, trained, texts, tmp_path_factory):
    """The folder of a finished classifier's run."""
    out = tmp_path_factory.mktemp("runs") / "tuned"
    done = cli("finetune", trained, "--dataset", f"file:{texts}", "--pool=mean", "--out-dir", out, *SMALL)
    assert done.returncode == 0, done.stderr
    assert "24 of its texts" in done.stdout
    assert "accuracy" in done.stdout
    return out


@pytest.fixture(scope="module")
def summary(tuned):
    return json.loads((tuned / "summary.json").read_text())


def test_the_summary(summary):
    assert summary["labels"] == ["east", "north", "south"]
    assert summary["steps"] == 5 * 12  # 96 texts, batches of 8
    assert summary["val_accuracy"] > 0.9  # the words determine the class


def test_the_confusion_matrix(summary):
    confusion = np.array(summary["confusion"])
    assert confusion.sum() == 24
    assert summary["val_accuracy"] == pytest.approx(np.trace(confusion) / 24)
    for at, label in enumerate(summary["labels"]):
        figures = summary["per_class"][label]
        assert figures["support"] == confusion[at].sum()
        assert figures["recall"] == pytest.approx(confusion[at, at] / confusion[at].sum())
        assert figures["precision"] == pytest.approx(confusion[at, at] / confusion[:, at].sum())


def test_the_reports(tuned, summary):
    reports = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in reports] == [1, 2, 3, 4, 5]
    assert {"val_loss", "val_accuracy", "train_loss"} <= set(reports[0])
    assert reports[-1]["val_accuracy"] == summary["val_accuracy"]


def test_the_files_of_a_run(tuned):
    for name in ("confusion.png", "learning_curves.png"):
        assert (tuned / name).read_bytes()[:4] == b"\x89PNG"
    values = json.loads((tuned / "config.json").read_text())
    assert values["task"] == "classification"
    assert from_json(values).pool == "mean"


def test_new_texts_are_classified(cli, tuned):
    done = cli("classify", tuned, "mo ru mo mo ru mo", "la la ti", "--json")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["label"] for row in rows] == ["south", "north"]
    for row in rows:
        assert math.isclose(sum(row["probabilities"].values()), 1, rel_tol=1e-6)
        assert row["probability"] == max(row["probabilities"].values())


def test_texts_from_standard_input(cli, tuned):
    done = cli("classify", tuned, stdin="la la ti\nmo ru mo\n")
    assert [row.split()[0] for row in done.stdout.splitlines()] == ["north", "south"], done.stderr


def test_a_finished_run_and_another_configuration(cli, trained, texts, tuned):
    flags = [trained, "--dataset", f"file:{texts}", "--out-dir", tuned, *SMALL]
    done = cli("finetune", *flags, "--pool=mean")
    assert done.returncode == 0 and "finished already" in done.stdout
    done = cli("finetune", *flags, "--pool=last")
    assert done.returncode == 2 and "--pool mean there, last here" in done.stderr
    done = cli("finetune", *flags, "--pool=mean", "--epochs=6")
    assert done.returncode == 2 and "--epochs 5 there, 6 here" in done.stderr


@pytest.mark.slow
def test_killed_and_resumed(cli, trained, texts, tuned, tmp_path, user_env):
    out = tmp_path / "run"
    flags = [str(trained), "--dataset", f"file:{texts}", "--pool=mean", "--out-dir", str(out), *SMALL]
    line = [sys.executable, str(ROOT / "scripts/finetune.py"), *flags]
    process = subprocess.Popen(line, env=user_env, stdout=subprocess.DEVNULL)
    begun = time.monotonic()
    while not (out / "checkpoints/7").exists() and process.poll() is None and time.monotonic() - begun < 120:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = cli("finetune", *flags)
    assert done.returncode == 0, done.stderr
    one, other = (read_state(folder, 60) for folder in (tuned, out))
    for name, p in one["params"].items():
        np.testing.assert_array_equal(p, other["params"][name])


@pytest.mark.slow
@pytest.mark.parametrize("pool, dtype", [("last", "bfloat16"), ("last_token", "float32")])
def test_other_pools_few_samples_and_pmap(cli, trained, texts, tmp_path, pool, dtype):
    out = tmp_path / "run"
    flags = [f"--pool={pool}", "--train-samples=20", "--epochs=2", "--parallel=pmap", f"--dtype={dtype}", *SMALL]
    test = write_labeled(tmp_path / "test.csv", 30, seed=1)
    done = cli(
        "finetune", trained, "--dataset", f"file:{texts}", "--test-dataset", f"file:{test}", "--out-dir", out, *flags
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 2 * 3 and np.sum(summary["confusion"]) == 30


@pytest.mark.slow
def test_labels_that_matplotlib_or_int_would_interpret(cli, trained, tmp_path):
    names = {"north": "$_$", "south": "<$10 \\& more$", "east": "--5"}
    path = write_labeled(tmp_path / "x.csv", 60, label=lambda at, name: names[name])
    done = cli("finetune", trained, "--dataset", f"file:{path}", "--out-dir", tmp_path / "run", "--epochs=1", *SMALL)
    assert done.returncode == 0, done.stderr
    assert set(json.loads((tmp_path / "run/summary.json").read_text())["labels"]) == set(names.values())


@pytest.mark.slow
def test_other_weights_or_another_vocabulary_are_refused(cli, text_file, trained, texts, tuned, tmp_path):
    flags = ["--dataset", f"file:{texts}", "--pool=mean", *SMALL]
    other, vocabulary = tmp_path / "other", tmp_path / "vocabulary"
    assert cli("train", "--dataset", f"file:{text_file}", "--steps=2", "--out-dir", other, *SMALL_MODEL).returncode == 0
    done = cli("finetune", other, "--out-dir", tuned, *flags)
    assert done.returncode == 2 and f"other weights to start from than those of {other}" in done.stderr
    before = (tuned / "tokenizer.json").read_bytes()
    of_bytes = ["--dataset", f"file:{text_file}", "--steps=2", "--tokenizer=byte", *SMALL_MODEL]
    assert cli("train", *of_bytes, "--out-dir", vocabulary).returncode == 0
    assert cli("finetune", vocabulary, "--out-dir", tuned, *flags).returncode == 2
    assert (tuned / "tokenizer.json").read_bytes() == before
    done = cli("finetune", other, "--out-dir", other, "--overwrite", *flags)
    assert done.returncode == 2 and "which it is made from" in done.stderr and (other / "summary.json").exists()


@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--dataset", "imdb"], ["--dataset imdb", "choose of ag_news"]),
        (["--dataset", "file:nothing.csv"], ["--dataset file:nothing.csv", "check the path"]),
        (["--max-tokens", "17"], ["--max-tokens 17", "block of 16"]),
        (["--max-tokens", "0"], ["--max-tokens 0", "at least 1"]),
        (["--epochs", "0"], ["--epochs 0", "at least 1"]),
        (["--train-samples", "1000"], ["--train-samples 1000", "96 training texts"]),
        (["--pool", "max"], ["--pool", "last_token"]),
        (["--text-column", "body"], ["no column 'body'", "'id', 'text', 'label'"]),
        (["--label-column", "lable"], ["no column 'lable'", "did you mean label"]),
    ],
)
def test_bad_flags(cli, trained, texts, tmp_path, flags, parts):
    given = flags if "--dataset" in flags else ["--dataset", f"file:{texts}", *flags]
    done = cli(
        "finetune", trained, *given, *(SMALL if "--max-tokens" not in flags else SMALL[:2]), *flags, cwd=tmp_path
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert all(part in done.stderr for part in parts), done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "reader, run, hint",
    [
        ("evaluate", "tuned", "jaxgpt classify"),
        ("generate", "tuned", "jaxgpt classify"),
        ("finetune", "tuned", "jaxgpt classify"),
        ("classify", "trained", "jaxgpt finetune"),
    ],
)
def test_a_run_of_the_other_task_is_refused(cli, request, reader, run, hint):
    done = cli(reader, request.getfixturevalue(run), *(["la"] if reader == "classify" else []))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and hint in done.stderr, done.stderr


@pytest.mark.parametrize(
    "given, part", [([""], "TEXT number 1: empty"), (["la", " "], "TEXT number 2: empty"), (["la Q"], "'Q'")]
)
def test_texts_that_cannot_be_classified(cli, tuned, given, part):
    done = cli("classify", tuned, *given)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and part in done.stderr, done.stderr


def test_no_text_at_all(cli, tuned):
    done = cli("classify", tuned, stdin="")
    assert done.returncode == 2 and "no lines" in done.stderr


def test_standard_input_that_is_not_utf8(cli, tuned):
    done = cli("classify", tuned, stdin=io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    assert done.returncode == 2 and "not UTF-8 text (byte 3)" in done.stderr, done.stderr
