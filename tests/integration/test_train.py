"""`jaxgpt train` on a small text: the files of a run, resuming, and the folders that it refuses."""

import json
import math
import shutil

import pytest
from conftest import SMALL, read_state

SUMMARY_KEYS = "params steps val_loss val_ppl tokens_per_s first_step_s wall_s device versions data_sha256".split()


def train(cli, text_file, out, *flags, **kwargs):
    return cli("train", "--dataset", f"file:{text_file}", "--out-dir", out, *SMALL, *flags, **kwargs)


def records(trained):
    return [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]


def test_the_files_of_a_run(trained):
    assert {p.name for p in trained.iterdir()} - {".lock"} == {
        *("config.json", "tokenizer.json", "data.json", "metrics.jsonl", "steps.csv", "summary.json"),
        *("sample.txt", "learning_curves.png", "checkpoints", "manifest.json"),
    }
    assert (trained / "learning_curves.png").read_bytes()[:4] == b"\x89PNG"


def test_the_summary(trained, text):
    summary = json.loads((trained / "summary.json").read_text())
    assert set(SUMMARY_KEYS) <= set(summary)
    assert summary["steps"] == 60
    assert summary["val_ppl"] == pytest.approx(math.exp(summary["val_loss"]))
    n_chars = len(set(text))
    assert summary["params"] == n_chars * 16 * 2 + 16 * 16 + 4 * (16 * 17) + 2 * 64 * 16 + 64 + 16 + 6 * 16
    assert summary["val_loss"] < 0.8 * math.log(n_chars)  # the model has learned


def test_the_reports(trained):
    metrics = records(trained)
    assert [m["step"] for m in metrics] == [0, 20, 40, 59]
    for m in metrics:
        assert {"step", "train_loss", "val_loss", "val_ppl", "lr", "grad_norm", "tokens_per_s"} <= set(m)
        assert all(math.isfinite(v) for v in m.values())


def test_the_steps(trained):
    steps = (trained / "steps.csv").read_text().splitlines()
    assert steps[0] == "step,train_loss,grad_norm,lr"
    assert [int(row.split(",")[0]) for row in steps[1:]] == list(range(60))
    assert float(steps[21].split(",")[1]) == records(trained)[1]["train_loss"]


def test_the_sample(trained, text):
    sample = (trained / "sample.txt").read_text()
    assert len(sample) == 1 + 20 + 1  # one character as the prompt: "ROMEO:" is not in the text
    assert set(sample) <= set(text)


def test_the_configuration_names_its_task(trained):
    assert json.loads((trained / "config.json").read_text())["task"] == "language_modeling"


def test_the_last_few_checkpoints_and_the_best_are_kept(trained):
    steps = sorted(int(p.name) for p in (trained / "checkpoints").iterdir())
    assert steps[-3:] == [41, 51, 60] and len(steps) <= 4
    assert not [p for p in trained.rglob("*") if p.suffix in (".pkl", ".pickle", ".pt")]


def test_a_finished_run_says_so_and_stays(cli, trained, text_file):
    before = {p: p.read_bytes() for p in trained.iterdir() if p.is_file()}
    done = train(cli, text_file, trained, "--steps=60")
    assert done.returncode == 0 and "finished already" in done.stdout
    assert {p: p.read_bytes() for p in trained.iterdir() if p.is_file()} == before


def test_another_configuration_is_refused_naming_the_fields(cli, trained, text_file):
    done = train(cli, text_file, trained, "--steps=61", "--model.n-head=4")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--steps 60 there, 61 here" in done.stderr and "--model.n-head 2 there, 4 here" in done.stderr
    assert "--overwrite" in done.stderr and "--lr" not in done.stderr


def test_another_text_is_refused(cli, trained, text_file):
    text = text_file.read_text(encoding="utf-8")
    try:
        text_file.write_text(text.replace("ti", "to"), encoding="utf-8")
        done = train(cli, text_file, trained, "--steps=60")
    finally:
        text_file.write_text(text, encoding="utf-8")
    assert done.returncode == 2 and "another text" in done.stderr


@pytest.mark.slow
def test_overwrite_starts_again(cli, trained, text_file, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    done = train(cli, text_file, out, "--steps=7", "--seed=5", "--overwrite")
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "summary.json").read_text())["steps"] == 7
    assert sorted(int(p.name) for p in (out / "checkpoints").iterdir()) == [1, 7]
    assert len((out / "steps.csv").read_text().splitlines()) == 8


def test_a_folder_of_other_files_is_left_alone(cli, text_file, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    done = train(cli, text_file, tmp_path, "--steps=5", "--overwrite")
    assert done.returncode == 2 and "holds files that are no run" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("file", ["attention/notes.txt", "inspect/mine.png", "checkpoints/weights.bin", "attention"])
def test_folders_that_a_run_has_too_are_left_alone(cli, text_file, tmp_path, file):
    path = tmp_path / "run" / file
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    for more in ([], ["--overwrite"]):
        done = train(cli, text_file, tmp_path / "run", "--steps=5", *more)
        assert done.returncode == 2 and "holds files that are no run" in done.stderr
    assert path.read_text() == "precious"


@pytest.mark.slow
def test_loss_not_finite_stops_and_keeps_the_last_good_state(cli, text_file, tmp_path):
    out = tmp_path / "run"
    # The rate climbs until the loss overflows: some steps are good, and one is not.
    flags = ["--optimizer=sgd", "--lr=1e38", "--schedule=warmup-cosine", "--warmup-steps=59", "--steps=60"]
    done = train(cli, text_file, out, *flags)
    assert done.returncode == 3, done.stderr
    assert done.stderr.count("\n") == 1 and "error: step " in done.stderr and "Traceback" not in done.stderr
    kept = sorted(int(p.name) for p in (out / "checkpoints").iterdir())
    assert f"the state after {kept[-1]} steps is kept" in done.stderr
    state = read_state(out, kept[-1])
    assert all(math.isfinite(float(abs(p).max())) for p in state["params"].values())
    assert not (out / "summary.json").exists()


@pytest.mark.slow
def test_from_another_folder_with_the_default_out_dir(cli, text_file, tmp_path):
    done = cli("train", "--dataset", f"file:{text_file}", "--steps=2", *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("words-minigpt-20") and (run / "summary.json").exists()


@pytest.mark.slow
def test_bytes_and_sgd_and_pmap_train_too(cli, text_file, tmp_path):
    out = tmp_path / "run"
    flags = [
        "--tokenizer=byte",
        "--optimizer=sgd",
        "--momentum=0.9",
        "--parallel=pmap",
        "--schedule=cosine",
        "--clip=1",
    ]
    done = train(cli, text_file, out, "--steps=30", "--model.dropout=0.1", *flags)
    assert done.returncode == 0, done.stderr
    assert "vocabulary 256" in done.stdout
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["val_loss"] < metrics[0]["val_loss"] and metrics[-1]["lr"] < 1e-4 < metrics[0]["lr"] == 0.01


@pytest.mark.slow
@pytest.mark.parametrize("dtype, stored", [("float64", "float64"), ("bfloat16", "float32")])
def test_other_dtypes(cli, text_file, tmp_path, dtype, stored):
    out = tmp_path / "run"
    assert train(cli, text_file, out, "--steps=3", f"--dtype={dtype}").returncode == 0
    assert json.loads((out / "summary.json").read_text())["dtype"] == dtype
    assert {str(p.dtype) for p in read_state(out, 3)["params"].values()} == {stored}


@pytest.mark.slow
def test_a_sharded_state_trains_the_same(cli, text_file, trained, tmp_path):
    done = train(cli, text_file, tmp_path / "run", "--steps", "60", "--mesh", "fsdp=2", "--grad-accum", "2")
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(
        (tmp_path / "run/steps.csv").read_text().splitlines()[1:],
        (trained / "steps.csv").read_text().splitlines()[1:],
        strict=True,
    ):
        # float32: the order of sums, which 60 steps of Adam amplify.
        assert [*map(float, ours.split(","))] == pytest.approx([*map(float, theirs.split(","))], rel=1e-3)
    assert "on 2 x CPU (data=1,fsdp=2) in float32" in done.stdout
    assert "mesh" not in json.loads((tmp_path / "run/config.json").read_text())


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--mesh", "data=3"], "--mesh data=3: is not a mesh of the 2 devices that there are"),
        (["--mesh", "fsdp=2", "--parallel", "pmap"], "--mesh fsdp=2: --parallel pmap has no axis fsdp"),
        (["--grad-accum", "3"], "--grad-accum 3: does not divide --batch-size 8"),
        (
            ["--mesh", "data=2", "--grad-accum", "8"],
            "--grad-accum 8: does not divide the 4 rows that each of the 2 devices of this machine has",
        ),
        (["--batch-tokens", "100"], "--batch-tokens 100: no multiple of --model.block-size 16; give one, as 96"),
        (["--batch-tokens", "64"], "--batch-tokens 64: --batch-size 8 is another; give one of both"),
    ],
)
def test_devices_that_cannot_share_a_step(cli, text_file, tmp_path, flags, message):
    done = train(cli, text_file, tmp_path / "run", *flags)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert message in done.stderr and not (tmp_path / "run").exists()
