"""What the tests share: a text, a small configuration, and a way to run the commands as a user does."""

import csv
import json
import os
import random
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.in_process import cli_runner

ROOT = Path(__file__).resolve().parents[1]

jax.config.update("jax_num_cpu_devices", 2)  # as a machine of two cores has, on any
jax.config.update("jax_enable_compilation_cache", False)  # here; commands have the cache of their own home

# A model that compiles in about a second and learns the text's letters within a hundred steps.
SMALL = (
    "--model.n-layer=1 --model.n-head=2 --model.n-embd=16 --model.block-size=16 --batch-size=8 --lr=0.01 "
    "--eval-every=20 --eval-batches=2 --checkpoint-every=10 --sample-tokens=20"
).split()


def pytest_collection_modifyitems(config, items):
    """With JAXGPT_TEST_SHARE=K/N selects the K-th of N shares of the tests, by name: how CI divides the slow ones."""
    if share := os.environ.get("JAXGPT_TEST_SHARE"):
        k, n = map(int, share.split("/"))
        chosen = [item for item in items if zlib.crc32(item.nodeid.encode()) % n == k]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


def make_text() -> str:
    """Six thousand words of our own, with an accent and a character beyond the basic plane."""
    draw = random.Random(0)
    words = [draw.choice(["la", "ti", "mo", "né", "ru", "s", "ha"]) * draw.randint(1, 2) for _ in range(6000)]
    return " ".join(words) + " \U0001f600.\n"


@pytest.fixture(scope="session")
def text() -> str:
    return make_text()


@pytest.fixture(scope="session")
def text_file(text, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def gpt2():
    """GPT-2's tokenizer, where its vocabulary is at hand or can be downloaded."""
    from jaxgpt.data.files import NotAvailable
    from jaxgpt.data.tokenizer import Gpt2Tokenizer, gpt2_folder

    try:
        return Gpt2Tokenizer(gpt2_folder(None, print))
    except NotAvailable as e:
        pytest.skip(f"GPT-2's vocabulary: {e}")


@pytest.fixture(scope="session")
def user_env(tmp_path_factory) -> dict[str, str]:
    """The environment of a user with an empty home."""
    home = tmp_path_factory.mktemp("home")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX", "XLA", "HF_", "XDG", "TF_"))}
    return {**env, "HOME": str(home)}


@pytest.fixture(scope="session")
def cli(user_env):
    """Runs `jaxgpt COMMAND ...` in this process, as a user with an empty home; returns what `command` returns.

    What a command sets for its whole process is put back. Whatever needs a process of its own (signals, kill, limits,
    another number of devices, a closed standard output) takes `command` or `start`.
    """
    return cli_runner(user_env)


@pytest.fixture(scope="session")
def command(user_env):
    """Runs a script of scripts/ and returns the finished process, its output as text."""

    def run(script: str, *args: object, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess:
        words = [word if isinstance(word, bytes) else str(word) for word in args]
        line = [sys.executable, str(ROOT / "scripts" / script), *words]
        return subprocess.run(
            line, cwd=cwd or ROOT, env={**user_env, **env}, capture_output=True, text=True, timeout=300
        )

    return run


@pytest.fixture(scope="session")
def start(user_env):
    """Starts a script of scripts/ and returns the process, its output in one stream of text."""

    def begin(script: str, *args: object, stdin: int | None = None) -> subprocess.Popen:
        line = [sys.executable, str(ROOT / "scripts" / script), *map(str, args)]
        env = {**os.environ, **user_env}
        streams = dict(stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return subprocess.Popen(line, env=env, text=True, **streams)

    return begin


@pytest.fixture(scope="session")
def trained(command, text_file, tmp_path_factory) -> Path:
    """The folder of a small finished run, trained by a real process."""
    out = tmp_path_factory.mktemp("runs") / "trained"
    done = command("train.py", "--dataset", f"file:{text_file}", "--steps=60", "--out-dir", out, *SMALL)
    assert done.returncode == 0, done.stderr
    return out


CLASSES = {"north": "la la ti", "south": "mo ru mo", "east": "ha ha la"}  # words that tell the class of a text


def write_labeled(path, n=120, label=lambda at, name: name, seed=0):
    """Writes a CSV file of n texts in the words of `text`; `label` gives a row's label from its number and class."""
    draw = random.Random(seed)
    with path.open("w", newline="", encoding="utf-8") as f:
        rows = csv.writer(f)
        rows.writerow(["id", "text", "label"])
        for at in range(n):
            name = draw.choice(list(CLASSES))
            words = CLASSES[name].split() * draw.randint(1, 3)
            rows.writerow([at, " ".join(words), label(at, name)])
    return path


def read_state(run: Path, step: int) -> dict:
    """A checkpoint's arrays as plain numpy, read without the project's own code."""
    import jax
    import orbax.checkpoint as ocp

    path = run.absolute() / "checkpoints" / str(step) / "default"
    with jax.enable_x64(True), ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(path, restore_args=as_numpy)  # whatever devices wrote it


def recorded(out: Path) -> tuple[list, dict, dict]:
    """All records of a run, but for times."""
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for m in metrics:
        del m["tokens_per_s"], m["elapsed_s"]
    summary = json.loads((out / "summary.json").read_text())
    numbers = {k: summary[k] for k in ("params", "steps", "val_loss", "val_ppl", "val_tokens")}
    names = ["steps.csv", "sample.txt", "diagnostics.jsonl", "samples.jsonl", "attention.gif"]
    files = [out / name for name in names] + sorted((out / "attention").glob("*"))
    return metrics, numbers, {file.name: file.read_bytes() for file in files if file.exists()}


def assert_same(out: Path, whole: Path, steps: int) -> None:
    """Asserts that two runs of that many steps have the same records and state, bit for bit."""
    assert recorded(out) == recorded(whole)
    ours, theirs = read_state(out, steps), read_state(whole, steps)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)
