"""The WikiText-2 recipe through the commands, on little text: epochs, packing, loaders, strides, byte pairs."""

import json
import math
import random
import shutil
import time

import pytest
from conftest import read_state

from jaxgpt.data import files

RECIPE = (
    "--preset=wikitext2 --model.n-layer=1 --model.n-head=2 --model.n-embd=16 --model.block-size=16 --batch-size=8 "
    "--tokenizer=bpe:300 --max-train-texts=90 --epochs=3 --lr=0.01 --warmup-steps=5 --decay-steps=40 --min-lr=0.001 "
    "--checkpoint-every=10 --sample-tokens=9"
).split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data folder with a wikitext-2 of our own words."""
    draw, folder = random.Random(0), tmp_path_factory.mktemp("data")
    (folder / "wikitext-2").mkdir()
    for name, n in (("train", 400), ("valid", 100)):
        lines = [" ".join(draw.choices(["north", "south", "wind", "of", "the", "sun"], k=20)) + " \n" for _ in range(n)]
        lines[::3] = [" = Heading = \n"] * len(lines[::3])  # too short
        (folder / "wikitext-2" / f"{name}.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def run(cli, data, tmp_path_factory):
    """The folder of a finished run, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "run"
    done = cli("train", *RECIPE, "--data-dir", data, "--out-dir", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def reports_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_epochs_and_their_reports(run):
    out, printed = run
    config, summary = (json.loads((out / name).read_text()) for name in ("config.json", "summary.json"))
    reports = reports_of(out)
    per_epoch = config["steps"] // 3
    assert summary["steps"] == config["steps"] == 3 * per_epoch < 2000  # derived from the epochs
    assert [r["step"] for r in reports] == [per_epoch - 1, 2 * per_epoch - 1, 3 * per_epoch - 1]
    assert [r["epoch"] for r in reports] == [1, 2, 3]
    for r in reports:
        assert r["val_ppl"] == pytest.approx(math.exp(r["val_loss"])) and r["val_loss"] != r["val_loss_token_mean"]
        assert (
            f"step {r['step']}  lr {r['lr']:.2e}  val_loss {r['val_loss']:.4f}  val_ppl {r['val_ppl']:.1f}" in printed
        )
    assert reports[-1]["val_loss_token_mean"] == pytest.approx(summary["val_loss"], rel=1e-12)
    assert summary["val_loss"] < 0.7 * math.log(300)  # it learned
    rates = [float(row.split(",")[3]) for row in (out / "steps.csv").read_text().splitlines()[1:]]
    assert rates[0] == 0 and max(rates) == rates[5] == pytest.approx(0.01) and rates[1] == pytest.approx(0.002)
    assert (out / "sample.txt").read_text().startswith("The history of")
    assert json.loads((out / "tokenizer.json").read_text())["kind"] == "bpe"


@pytest.mark.slow
def test_the_host_loader_trains_the_same_and_a_stopped_run_goes_on(command, cli, run, data, tmp_path):
    """Stopped within an epoch by --steps; begun from the device, ended from the host."""
    out, _ = run
    steps = json.loads((out / "config.json").read_text())["steps"]
    done = command("train.py", *RECIPE, "--data-dir", data, "--out-dir", tmp_path / "run", "--loader=host")
    assert done.returncode == 0, done.stderr
    one, other = (read_state(folder, steps) for folder in (out, tmp_path / "run"))
    assert all((p == other["params"][name]).all() for name, p in one["params"].items())
    assert [r["val_loss"] for r in reports_of(out)] == [r["val_loss"] for r in reports_of(tmp_path / "run")]
    # The last checkpoint is taken away: the run goes on from the one before it, from the other loader.
    (tmp_path / "run/summary.json").unlink()
    shutil.rmtree(tmp_path / "run/checkpoints" / str(steps))
    done = cli("train", *RECIPE, "--data-dir", data, "--out-dir", tmp_path / "run")
    assert done.returncode == 0 and "resuming after" in done.stdout, done.stderr
    again = read_state(tmp_path / "run", steps)
    assert all((p == again["params"][name]).all() for name, p in one["params"].items())


@pytest.mark.slow
def test_strides_and_bits_per_byte(cli, run, data):
    out, _ = run
    figures = {}
    for stride in (None, 16, 5):
        flags = ["--stride", stride] if stride else []
        done = cli("evaluate", out, "--json", "--data-dir", data, *flags)
        assert done.returncode == 0, done.stderr
        figures[stride] = json.loads(done.stdout)
    n_tokens = figures[16]["tokens"] + 1
    assert figures[None]["tokens"] == (n_tokens - 1) // 16 * 16 and figures[5]["tokens"] == n_tokens - 1
    assert figures[None]["loss"] == json.loads((out / "summary.json").read_text())["val_loss"]
    # Every token but the first, and the ends of texts, which stand for no bytes.
    texts = [line for line in (data / "wikitext-2/valid.txt").read_text().splitlines(True) if len(line.strip()) > 50]
    n_bytes = len("".join(texts))
    total = figures[5]["loss"] * figures[5]["tokens"] / math.log(2)
    assert figures[5]["bits_per_byte"] == pytest.approx(total / n_bytes, rel=0.01)  # less the first token's bytes
    for stride in ("0", "17"):
        done = cli("evaluate", out, "--stride", stride)
        assert done.returncode == 2 and f"--stride {stride}" in done.stderr and "block of 16" in done.stderr


@pytest.mark.slow
def test_packed_documents_train(cli, data, tmp_path):
    done = cli("train", *RECIPE, "--packing=documents", "--data-dir", data, "--out-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    reports = reports_of(tmp_path / "run")
    assert reports[-1]["val_loss"] < reports[0]["val_loss"]
    whole = json.loads(cli("evaluate", tmp_path / "run", "--json", "--data-dir", data).stdout)
    assert whole["loss"] == json.loads((tmp_path / "run/summary.json").read_text())["val_loss"]


def test_without_the_vocabulary_and_a_network_refused_within_seconds(cli, data, tmp_path, monkeypatch):
    """In a folder that has no ../shared, from a checkout that has none either."""
    monkeypatch.setattr(files, "CHECKOUT", tmp_path)
    begun = time.monotonic()
    flags = ["--preset", "wikitext2", "--data-dir", data]
    done = cli("train", *flags, cwd=tmp_path, HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert time.monotonic() - begun < 15
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: --tokenizer gpt2: not on this machine and no network")
    assert "bpe:N" in done.stderr and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["hf:some/thing", "wikitext-103"])
def test_a_hub_without_a_network_is_reported_within_seconds(cli, tmp_path, name):
    begun = time.monotonic()
    done = cli("train", "--dataset", name, cwd=tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert time.monotonic() - begun < 15
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"error: --dataset {name}: cannot be had from http://127.0.0.1:9: no network (")


def test_a_vocabulary_that_is_not_the_checkpoints(cli, run, data, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(run[0], out)
    (out / "tokenizer.json").write_text('{"kind": "byte"}')
    done = cli("evaluate", out, "--data-dir", data)
    assert done.returncode == 4 and done.stderr.count("\n") == 1, done.stderr
    assert "tokenizer.json is not the one that the checkpoint" in done.stderr
