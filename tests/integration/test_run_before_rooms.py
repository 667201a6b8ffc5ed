"""A run begun by the program before its modules moved into rooms goes on as if nothing had happened.

`tests/data/run_before_rooms` holds what that program left after 21 of 40 updates (a byte-level model in float64 with
dropout, a clip and a warm-up), the digests of its checkpoint's arrays, and steps.csv of the same run to its end.
"""

import csv
import hashlib
import json
import random
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import read_state

OLD = Path(__file__).resolve().parents[1] / "data" / "run_before_rooms"
DONE, STEPS = 21, 40


@pytest.fixture
def run(tmp_path) -> Path:
    """The old run in a folder of its own, beside the text that it was trained on."""
    draw = random.Random(7)
    words = [draw.choice(["la", "ti", "mo", "ru", "ha"]) * draw.randint(1, 2) for _ in range(1500)]
    (tmp_path / "words.txt").write_text(" ".join(words) + "\n", encoding="utf-8")
    shutil.copytree(OLD / "run", tmp_path / "run")
    for name in ("config.json", "data.json"):  # they hold the absolute path of the text
        path = tmp_path / "run" / name
        path.write_text(path.read_text().replace("words.txt", str(tmp_path / "words.txt")))
    return tmp_path / "run"


def read_steps(path: Path) -> np.ndarray:
    with path.open(newline="") as f:
        return np.array([[float(value) for value in row] for row in list(csv.reader(f))[1:]])


def test_its_checkpoint_is_read_bit_for_bit(run):
    digests = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(read_state(run, DONE))[0]:
        value = np.asarray(leaf)
        form = f"{value.dtype} {value.shape} ".encode()
        digests[jax.tree_util.keystr(path)] = hashlib.sha256(form + np.ascontiguousarray(value).tobytes()).hexdigest()
    assert digests == json.loads((OLD / "digests.json").read_text()) and len(digests) > 50


@pytest.mark.slow
def test_it_resumes_as_the_same_run(cli, run):
    """The steps before the checkpoint stay as they are; those after it are the old program's.

    On the machine that made the run they are equal to the last bit. Others round otherwise: 19 updates in float64, each
    rounded by 1e-16 and amplified by Adam, stay within 1e-10, as the parity suite's trajectories do.
    """
    flags = (
        "--tokenizer byte --dtype float64 --steps 40 --model.n-layer 1 --model.n-head 2 --model.n-embd 8 "
        "--model.block-size 8 --model.dropout 0.1 --batch-size 4 --lr 0.01 --clip 0.5 --schedule warmup-cosine "
        "--warmup-steps 5 --eval-every 20 --eval-batches 2 --checkpoint-every 10 --keep-checkpoints 9 --sample-tokens 5"
    )
    done = cli("train", "--dataset", f"file:{run.parent / 'words.txt'}", *flags.split(), "--out-dir", run)
    assert done.returncode == 0, done.stderr
    assert f"resuming after {DONE} of {STEPS} steps" in done.stdout
    steps, expected = read_steps(run / "steps.csv"), read_steps(OLD / "steps.csv")
    np.testing.assert_array_equal(steps[:DONE], expected[:DONE])
    np.testing.assert_allclose(steps, expected, rtol=1e-10, atol=1e-10)
    assert (run / "summary.json").exists() and (run / "checkpoints" / "40").is_dir()
