"""Training on a streamed dataset by real processes: downloads from a stand-in hub, kills at any moment, bad input."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SMALL, assert_same
from unit.data.samples import write_hub_folder

from tests.hub import COMMIT, NAME, serve

STEPS = 300
FLAGS = [*SMALL, "--tokenizer=byte", "--packing=chunks", "--streaming=always", f"--steps={STEPS}"]
CARD = """---
configs:
- config_name: default
  data_files: [{split: train, path: data/*}]
- config_name: sample
  data_files: [{split: train, path: sample/10BT/*}]
---
"""


@pytest.fixture
def hub(tmp_path):
    """A hub whose dataset has four files of 240 kB of text, in the configuration "sample"."""
    write_hub_folder(tmp_path / "hub/sample/10BT", 4, n_rows=4000, row_group_size=500)
    write_hub_folder(tmp_path / "hub/data", 1)
    (tmp_path / "hub/README.md").write_text(CARD)
    with serve(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def train(command, hub, tmp_path):
    """Runs a training on the hub's dataset, with a cache of the test's own."""

    def run(out, *flags, dataset=f"hf:{NAME}:sample", **env):
        own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
        return command("train.py", "--dataset", dataset, *FLAGS, "--out-dir", out, *flags, **{**own, **env})

    return run


def assert_refused(done, *parts, prefix="error: --dataset hf:"):
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(prefix) and all(part in done.stderr for part in parts), done.stderr


@pytest.mark.slow
def test_a_hub_dataset_trains_while_it_is_downloaded(train, command, hub, tmp_path):
    """Through cut and changed downloads; and the finished run's data is found again without a network."""
    hub.n_cut, hub.n_changed = 1, 1
    done = train(tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "streaming hf:someone/corpus:sample@" in done.stdout and "4 Parquet files" in done.stdout
    data = json.loads((tmp_path / "run/data.json").read_text())
    assert data["dataset"] == data["source"] == f"hf:{NAME}:sample@{COMMIT}"
    assert hub.downloads().count("train-00000-of-00004.parquet") >= 3  # cut, changed, right
    left = [path.name for path in (tmp_path / "cache/jaxgpt/shards").rglob("*.parquet")]
    assert len(left) <= 3, left
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    done = train(tmp_path / "run", **env)
    assert done.returncode == 0 and "finished already" in done.stdout, done.stderr
    done = command("evaluate.py", tmp_path / "run", "--json", XDG_CACHE_HOME=str(tmp_path / "cache"), **env)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert done.returncode == 0 and json.loads(done.stdout)["loss"] == summary["val_loss"], done.stderr
    assert_refused(train(tmp_path / "other", "--loader=device"), prefix="error: --loader device: hf:")


@pytest.mark.slow
def test_a_run_that_is_killed_anywhere_goes_on_exactly(train, hub, user_env, tmp_path):
    """Kills at random moments, downloads among them, of the run and of workers, and shards that are gone."""
    assert train(tmp_path / "whole").returncode == 0
    draw, cache = random.Random(0), tmp_path / "other cache"
    hub.delay = 0.7
    env = {**user_env, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "XDG_CACHE_HOME": str(cache)}
    line = [sys.executable, str(ROOT / "scripts/train.py"), "--dataset", f"hf:{NAME}:sample", *FLAGS]
    for number in range(8):
        process = subprocess.Popen([*line, "--out-dir", tmp_path / "run"], env=env, stdout=subprocess.DEVNULL)
        time.sleep(draw.uniform(1, 7))
        children = children_of(process.pid)
        if number % 4 == 3 and children:  # a worker, and the run a moment later
            os.kill(draw.choice(children), signal.SIGKILL)
            time.sleep(draw.uniform(0, 2))
        process.kill()
        process.wait()
        for path in draw.sample(found := sorted(cache.rglob("*.bin")), len(found) // 3):
            path.unlink()
        assert end_soon(children), "workers outlive the run"
    done = train(tmp_path / "run", XDG_CACHE_HOME=str(cache))
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "run", tmp_path / "whole", STEPS)


def children_of(pid: int) -> list[int]:
    path = f"/proc/{pid}/task/{pid}/children"
    return [int(child) for child in open(path).read().split()] if os.path.exists(path) else []


def end_soon(pids: list[int]) -> bool:
    """Whether processes end within ten seconds."""
    deadline = time.monotonic() + 10
    while alive := [pid for pid in pids if os.path.exists(f"/proc/{pid}")]:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return not alive


@pytest.mark.slow
def test_what_the_hub_does_not_have_is_told_in_one_line(train, hub, tmp_path):
    out = tmp_path / "run"
    assert_refused(train(out, dataset="hf:someone/other"), "cannot be had from", "check the name")
    assert_refused(train(out, dataset=f"hf:{NAME}:other"), "cannot be had from", "other")
    assert_refused(train(out, HF_ENDPOINT="http://127.0.0.1:9"), "no network")
    assert_refused(train(out, "--text-column=body"), "no column 'body'; it has 'text'")
    hub.n_changed = 2
    assert_refused(train(out), "000.parquet is another file than the list of the corpus has".replace("000", "00004"))
    hub.gone.add("sample/10BT/train-00000-of-00004.parquet")
    assert_refused(train(out), "train-00000-of-00004.parquet cannot be had", "it is no longer there")
    assert not out.exists()
    hub.gone = {f"sample/10BT/train-0000{number}-of-00004.parquet" for number in (1, 2, 3)}
    assert_refused(train(out), "it is no longer there")  # in the midst of the training
    hub.gone = set()
    done = train(out)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number, to_all", [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_a_stop_signal_ends_the_run_and_its_workers(hub, start, tmp_path, monkeypatch, number, to_all):
    """To the run alone, or to all of its processes, as a scheduler sends it."""
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    process = start(
        "train.py", "--dataset", f"hf:{NAME}:sample", *FLAGS, "--steps=100000", "--out-dir", tmp_path / "run"
    )
    for line in process.stdout:
        if line.startswith("step"):
            break
    children = children_of(process.pid)
    for pid in [*(children if to_all else []), process.pid]:
        os.kill(pid, number)
    rest = process.stdout.read()
    assert process.wait(30) == 128 + number and "all saved" in rest, rest
    assert children and end_soon(children)
