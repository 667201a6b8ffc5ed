"""What the tests share: a text, a small configuration, and a way to run the commands as a user does."""

import os
import random
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parents[1]

jax.config.update("jax_num_cpu_devices", 2)  # as a machine of two cores has, on any
jax.config.update("jax_enable_compilation_cache", False)  # here; commands have the cache of their own home

# A model that compiles in about a second and learns the text's letters within a hundred steps.
SMALL = (
    "--model.n-layer=1 --model.n-head=2 --model.n-embd=16 --model.block-size=16 --batch-size=8 --lr=0.01 "
    "--eval-every=20 --eval-batches=2 --checkpoint-every=10 --sample-tokens=20"
).split()


@pytest.fixture(scope="session")
def text() -> str:
    """Six thousand words of our own, with an accent and a character beyond the basic plane."""
    draw = random.Random(0)
    words = [draw.choice(["la", "ti", "mo", "né", "ru", "s", "ha"]) * draw.randint(1, 2) for _ in range(6000)]
    return " ".join(words) + " \U0001f600.\n"


@pytest.fixture(scope="session")
def text_file(text, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def user_env(tmp_path_factory) -> dict[str, str]:
    """The environment of a user with an empty home."""
    home = tmp_path_factory.mktemp("home")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX", "XLA", "HF_", "XDG", "TF_"))}
    return {**env, "HOME": str(home)}


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

    def begin(script: str, *args: object) -> subprocess.Popen:
        line = [sys.executable, str(ROOT / "scripts" / script), *map(str, args)]
        env = {**os.environ, **user_env}
        return subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return begin


@pytest.fixture(scope="session")
def trained(command, text_file, tmp_path_factory) -> Path:
    """The folder of a small finished run."""
    out = tmp_path_factory.mktemp("runs") / "trained"
    done = command("train.py", "--dataset", f"file:{text_file}", "--steps=60", "--out-dir", out, *SMALL)
    assert done.returncode == 0, done.stderr
    return out


def read_state(run: Path, step: int) -> dict:
    """A checkpoint's arrays as plain numpy, read without the project's own code."""
    import jax
    import orbax.checkpoint as ocp

    with jax.enable_x64(True), ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(run.absolute() / "checkpoints" / str(step) / "default")
