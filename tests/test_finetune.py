"""Fine-tuning and classifying through the commands, on texts whose class is told by their words."""

import csv
import json
import math
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from jaxgpt.classifier import ABSENT, EpochOrder, encode, in_batches, scores
from jaxgpt.config import FinetuneConfig, ModelConfig, from_json, to_json
from jaxgpt.errors import UserError
from jaxgpt.labelled import choose, load_labelled, set_apart
from jaxgpt.tokenizer import ByteTokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared/data"
CLASSES = {"north": "la la ti", "south": "mo ru mo", "east": "ha ha la"}
SMALL = "--batch-size=8 --lr=0.01 --max-tokens=16 --checkpoint-every=7".split()


def write(path, n=120, label=lambda at, name: name, seed=0):
    draw = random.Random(seed)
    with path.open("w", newline="", encoding="utf-8") as f:
        rows = csv.writer(f)
        rows.writerow(["id", "text", "label"])
        for at in range(n):
            name = draw.choice(list(CLASSES))
            words = CLASSES[name].split() * draw.randint(1, 3)
            rows.writerow([at, " ".join(words), label(at, name)])
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write(tmp_path_factory.mktemp("labelled") / "texts.csv")


@pytest.fixture(scope="module")
def tuned(command, trained, texts, tmp_path_factory):
    """The folder of a finished classifier's run."""
    out = tmp_path_factory.mktemp("runs") / "tuned"
    done = command("finetune.py", trained, "--dataset", f"file:{texts}", "--pool=mean", "--out-dir", out, *SMALL)
    assert done.returncode == 0, done.stderr
    assert "24 of its texts are set apart" in done.stdout and "accuracy" in done.stdout
    return out


def test_what_a_run_leaves(tuned):
    summary = json.loads((tuned / "summary.json").read_text())
    assert summary["labels"] == ["east", "north", "south"] and summary["steps"] == 5 * 12  # 96 texts, batches of 8
    confusion = np.array(summary["confusion"])
    assert confusion.sum() == 24 and summary["val_accuracy"] == pytest.approx(np.trace(confusion) / 24)
    assert summary["val_accuracy"] > 0.9  # the words tell the class
    for at, label in enumerate(summary["labels"]):
        figures = summary["per_class"][label]
        assert figures["support"] == confusion[at].sum()
        assert figures["recall"] == pytest.approx(confusion[at, at] / confusion[at].sum())
        assert figures["precision"] == pytest.approx(confusion[at, at] / confusion[:, at].sum())
    reports = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in reports] == [1, 2, 3, 4, 5] and {"val_loss", "val_accuracy", "train_loss"} <= set(
        reports[0]
    )
    assert reports[-1]["val_accuracy"] == summary["val_accuracy"]
    for name in ("confusion.png", "learning_curves.png"):
        assert (tuned / name).read_bytes()[:4] == b"\x89PNG"
    assert from_json(json.loads((tuned / "config.json").read_text())).pool == "mean"


def test_new_texts_are_classified(command, tuned):
    done = command("classify.py", tuned, "mo ru mo mo ru mo", "la la ti", "--json")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["label"] for row in rows] == ["south", "north"]
    for row in rows:
        assert math.isclose(sum(row["probabilities"].values()), 1, rel_tol=1e-6)
        assert row["probability"] == max(row["probabilities"].values())
    line = [sys.executable, str(ROOT / "scripts/classify.py"), str(tuned)]
    piped = subprocess.run(line, input="la la ti\nmo ru mo\n", capture_output=True, text=True)
    assert [row.split()[0] for row in piped.stdout.splitlines()] == ["north", "south"], piped.stderr


def test_the_same_command_says_finished_and_another_is_refused(command, trained, texts, tuned):
    flags = [trained, "--dataset", f"file:{texts}", "--out-dir", tuned, *SMALL]
    done = command("finetune.py", *flags, "--pool=mean")
    assert done.returncode == 0 and "finished already" in done.stdout
    done = command("finetune.py", *flags, "--pool=last")
    assert done.returncode == 2 and "--pool mean there, last here" in done.stderr
    done = command("finetune.py", *flags, "--pool=mean", "--epochs=6")
    assert done.returncode == 2 and "--epochs 5 there, 6 here" in done.stderr


def test_killed_and_resumed_it_ends_with_the_same_weights(command, trained, texts, tuned, tmp_path, user_env):
    from conftest import read_state

    out = tmp_path / "run"
    flags = ["finetune.py", str(trained), "--dataset", f"file:{texts}", "--pool=mean", "--out-dir", str(out), *SMALL]
    line = [sys.executable, str(ROOT / "scripts" / flags[0]), *flags[1:]]
    process = subprocess.Popen(line, env=user_env, stdout=subprocess.DEVNULL)
    begun = time.monotonic()
    while not (out / "checkpoints/7").exists() and process.poll() is None and time.monotonic() - begun < 120:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert command(*flags).returncode == 0
    one, other = (read_state(folder, 60) for folder in (tuned, out))
    for name, p in one["params"].items():
        np.testing.assert_array_equal(p, other["params"][name])


@pytest.mark.parametrize("pool, dtype", [("last", "bfloat16"), ("last_token", "float32")])
def test_other_pools_few_samples_and_pmap(command, trained, texts, tmp_path, pool, dtype):
    out = tmp_path / "run"
    flags = [f"--pool={pool}", "--train-samples=20", "--epochs=2", "--parallel=pmap", f"--dtype={dtype}", *SMALL]
    test = write(tmp_path / "test.csv", 30, seed=1)
    done = command(
        "finetune.py", trained, "--dataset", f"file:{texts}", "--test-dataset", f"file:{test}", "--out-dir", out, *flags
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 2 * 3 and np.sum(summary["confusion"]) == 30


# ------------------------------------------------------------------------------------------------------------ bad input


def labelled(path, **values):
    model = ModelConfig(block_size=64)
    return load_labelled(FinetuneConfig(dataset=f"file:{path}", model=model, **values), None, lambda line: None)


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
        labelled(path)


def test_a_test_label_outside_the_classes_is_named(texts, tmp_path):
    test = write(tmp_path / "test.csv", 5, label=lambda at, name: "up" if at == 3 else name)
    with pytest.raises(UserError, match="--test-dataset .*row 4 has the label 'up', outside the classes east, north"):
        labelled(texts, test_dataset=f"file:{test}")


def test_a_class_named_by_a_number_means_that(tmp_path):
    """Counted in the released rows, named in one's own."""
    (tmp_path / "ag_news").mkdir()
    (tmp_path / "ag_news/classes.txt").write_text("2\n1\n")
    (tmp_path / "ag_news/test.csv").write_text('"1","a","b"\n"2","c","d"\n' * 5)
    own = write(tmp_path / "own.csv", 4, label=lambda at, name: 1 + at % 2)
    config = FinetuneConfig(model=ModelConfig(), test_dataset=f"file:{own}")
    data = load_labelled(config, tmp_path, print)
    assert [label for _, label in data.train] == [0, 1] * 5 and [label for _, label in data.test] == [1, 0, 1, 0]


def test_labels_that_are_equal_as_numbers_only_are_classes_of_their_own(tmp_path):
    (tmp_path / "x.csv").write_text("text,label\n" + "a,1\nb,01\nc, 1\nd,0\n" * 5)
    assert labelled(tmp_path / "x.csv").labels == ("0", "01", "1")
    rows = [("a", True), ("b", 1), ("c", "1"), ("d", False)] * 5
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": a, "label": b}) + "\n" for a, b in rows))
    data = labelled(tmp_path / "x.jsonl")
    assert data.labels == ("1", "False", "True")
    assert {text: data.labels[label] for text, label in data.train} == {"a": "True", "b": "1", "c": "1", "d": "False"}


def test_labels_that_matplotlib_and_int_would_stumble_over(command, trained, tmp_path):
    names = {"north": "$_$", "south": "<$10 \\& more$", "east": "--5"}
    path = write(tmp_path / "x.csv", 60, label=lambda at, name: names[name])
    done = command(
        "finetune.py", trained, "--dataset", f"file:{path}", "--out-dir", tmp_path / "run", "--epochs=1", *SMALL
    )
    assert done.returncode == 0, done.stderr
    assert set(json.loads((tmp_path / "run/summary.json").read_text())["labels"]) == set(names.values())


def test_other_weights_or_another_vocabulary_are_refused(command, text_file, trained, texts, tuned, tmp_path):
    from conftest import SMALL as LM

    flags = ["--dataset", f"file:{texts}", "--pool=mean", *SMALL]
    other, vocabulary = tmp_path / "other", tmp_path / "vocabulary"
    assert command("train.py", "--dataset", f"file:{text_file}", "--steps=2", "--out-dir", other, *LM).returncode == 0
    done = command("finetune.py", other, "--out-dir", tuned, *flags)
    assert done.returncode == 2 and f"other weights to start from than those of {other}" in done.stderr
    before = (tuned / "tokenizer.json").read_bytes()
    bytes_too = ["--dataset", f"file:{text_file}", "--steps=2", "--tokenizer=byte", "--out-dir", vocabulary, *LM]
    assert command("train.py", *bytes_too).returncode == 0
    assert command("finetune.py", vocabulary, "--out-dir", tuned, *flags).returncode == 2
    assert (tuned / "tokenizer.json").read_bytes() == before
    done = command("finetune.py", other, "--out-dir", other, "--overwrite", *flags)
    assert done.returncode == 2 and "which it is made from" in done.stderr and (other / "summary.json").exists()


def test_released_labels_outside_the_classes_are_named(tmp_path):
    (tmp_path / "ag_news").mkdir()
    (tmp_path / "ag_news/classes.txt").write_text("World\nSports\n")
    (tmp_path / "ag_news/test.csv").write_text('"1","a","b"\n"3","c","d"\n')
    with pytest.raises(UserError, match="row 2 has the label '3', outside the classes World, Sports"):
        load_labelled(FinetuneConfig(model=ModelConfig()), tmp_path, print)


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
def test_bad_flags(command, trained, texts, tmp_path, flags, parts):
    given = flags if "--dataset" in flags else ["--dataset", f"file:{texts}", *flags]
    done = command(
        "finetune.py", trained, *given, *(SMALL if "--max-tokens" not in flags else SMALL[:2]), *flags, cwd=tmp_path
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert all(part in done.stderr for part in parts), done.stderr
    assert not list(tmp_path.iterdir())


def test_runs_of_the_other_kind_are_refused(command, trained, tuned):
    for script, run, hint in (
        ("evaluate.py", tuned, "classify.py"),
        ("generate.py", tuned, "classify.py"),
        ("finetune.py", tuned, "classify.py"),
        ("classify.py", trained, "finetune.py"),
    ):
        done = command(script, run, *(["la"] if script == "classify.py" else []))
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and hint in done.stderr, (script, done.stderr)


def test_texts_that_cannot_be_classified(command, tuned):
    line = [sys.executable, str(ROOT / "scripts/classify.py"), str(tuned)]
    nothing = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert nothing.returncode == 2 and "no lines" in nothing.stderr
    for texts, part in (([""], "TEXT number 1: empty"), (["la", " "], "TEXT number 2: empty"), (["la Q"], "'Q'")):
        done = command("classify.py", tuned, *texts)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and part in done.stderr, done.stderr


# ----------------------------------------------------------------------------------------------------------- the pieces


def test_what_is_set_apart_does_not_change():
    examples = [(str(at), 0) for at in range(20)]
    train, test = set_apart(examples)
    assert sorted(train + test, key=lambda e: int(e[0])) == examples and len(test) == 4
    assert [text for text, _ in test] == PINNED_TEST
    drawn = choose(examples, 5, seed=0)
    assert len(set(drawn)) == 5 and drawn == choose(examples, 5, seed=0) != choose(examples, 5, seed=1)
    assert choose(examples, 0, seed=0) == examples


PINNED_TEST = ["4", "6", "14", "17"]


@pytest.mark.skipif(not (SHARED / "ag_news").is_dir(), reason="needs AG News")
def test_ag_news_has_its_classes_in_every_part():
    data = load_labelled(FinetuneConfig(model=ModelConfig()), SHARED, lambda line: None)
    assert data.labels == ("World", "Sports", "Business", "Sci/Tech")
    if len(data.train) == 6080:  # only test.csv is at hand
        assert np.bincount([label for _, label in data.test]).min() > 300 and len(data.test) == 1520
        assert not {text for text, _ in data.test} <= {text for text, _ in data.train}


def test_every_epoch_takes_every_text_once():
    order = EpochOrder(0, 20, 8)
    assert order.steps_per_epoch == 3
    epochs = [np.concatenate([order.rows(3 * e + k) for k in range(3)]) for e in range(2)]
    for row in epochs:
        assert sorted(row[row != ABSENT]) == list(range(20)) and (row[20:] == ABSENT).all()
    assert epochs[0].tolist() != epochs[1].tolist()
    np.testing.assert_array_equal(EpochOrder(0, 20, 8).rows(4), order.rows(4))


def test_texts_are_cut_and_padded():
    idx_NT = encode(["abc", "abcdef"], ByteTokenizer(), 4)
    assert idx_NT.tolist() == [[97, 98, 99, ABSENT], [97, 98, 99, 100]]
    (first, last) = in_batches(idx_NT[[0, 1, 0]], np.array([1, 0, 1]), 2)
    assert last[1].tolist() == [1, ABSENT] and last[0].shape == (2, 4) and first[1].tolist() == [1, 0]


def test_scores_of_a_confusion():
    result = scores(np.array([[8, 2, 0], [1, 4, 0], [0, 0, 0]]))
    assert result.accuracy == pytest.approx(12 / 15) and result.support == [10, 5, 0]
    assert result.precision[:2] == pytest.approx([8 / 9, 4 / 6]) and result.recall[:2] == pytest.approx([0.8, 0.8])
    assert result.f1[0] == pytest.approx(16 / 19) and math.isnan(result.precision[2]) and math.isnan(result.recall[2])


def test_configuration_as_documented_and_as_json():
    c = FinetuneConfig(model=ModelConfig())
    assert (c.lr, c.decay, c.batch_size, c.epochs, c.max_tokens, c.pool) == (1e-4, 0.01, 32, 5, 64, "last")
    assert (c.beta1, c.beta2, c.clip, c.schedule, c.decay_mask) == (0.9, 0.999, 0.0, "constant", "all")
    assert from_json(json.loads(json.dumps(to_json(c)))) == c
