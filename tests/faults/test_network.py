"""Without a network, every command works on local data, and none tries to connect.

The commands run in an empty network namespace where the system allows one (`unshare`), and in every Python process each
attempt to connect or to look up a name is recorded (`no_network/sitecustomize.py`).
"""

import functools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT, SMALL, write_labeled

RECORDER = Path(__file__).parent / "no_network"
# What a user may type, in this order: the first line makes the run that the others read.
FINETUNE = ["finetune", "run", "--dataset=file:labeled.csv", "--max-tokens=8", "--epochs=1", "--out-dir=classifier"]
COMMANDS = {
    "generate": ["generate", "run", "--prompt=la", "--max-new-tokens=5"],
    "evaluate": ["evaluate", "run"],
    "gradients": ["inspect", "run", "--gradients"],
    "attention": ["inspect", "run", "--attention=la ti mo"],
    "surprisal": ["inspect", "run", "--surprise=la ti mo"],
    "graph": ["inspect", "run", "--graph=graph.dot"],
    "export": ["convert", "export", "run", "--out=weights.safetensors"],
    "finetune": FINETUNE,
    "classify": ["classify", "classifier", "la ti mo"],
    "resume": ["train", "--dataset=file:words.txt", "--out-dir=run", *SMALL, "--steps=2"],
    "byte pairs": ["train", "--dataset=file:words.txt", "--tokenizer=bpe:300", "--out-dir=bpe", *SMALL, "--steps=2"],
    "compare": ["compare", "--dataset=file:words.txt", "--lr=0.1,0.2", "--out-dir=both", *SMALL[:5], "--steps=2"],
    "parity": ["parity", "--quick"],
    "bench": ["bench", "--preset=tinygpt", "--rounds=1", "--turn-seconds=0.05", "--batch-size=2"],
}


class Finished(NamedTuple):
    returncode: int
    stdout: str
    stderr: str
    connections: str  # the attempts, a line each


@functools.cache
def namespace() -> list[str]:
    """The words before a command that give it an empty network namespace; none where the system does not allow it."""
    for words in (["unshare", "-n"], ["unshare", "-rn"]):
        if shutil.which("unshare") and subprocess.run([*words, "true"], capture_output=True).returncode == 0:
            return words
    return []


@pytest.fixture(scope="module")
def offline(user_env, tmp_path_factory):
    """Runs words in a folder, without a network."""
    folder = tmp_path_factory.mktemp("offline")

    def run(*words: str) -> Finished:
        record = folder / "connections"
        record.write_text("")
        paths = f"{RECORDER}:{ROOT}"
        env = {**user_env, "PYTHONPATH": paths, "JAXGPT_TEST_CONNECTIONS": str(record)}
        done = subprocess.run(
            [*namespace(), sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=500
        )
        return Finished(done.returncode, done.stdout, done.stderr, record.read_text())

    run.folder = folder
    return run


@pytest.fixture(scope="module")
def train(offline, text_file) -> Finished:
    """A run in the folder, trained without a network."""
    shutil.copy(text_file, offline.folder / "words.txt")
    write_labeled(offline.folder / "labeled.csv", 40)
    return offline("-m", "jaxgpt", "train", "--dataset=file:words.txt", "--out-dir=run", *SMALL, "--steps=2")


@pytest.mark.parametrize(
    "attempt",
    [
        "socket.create_connection(('127.0.0.1', 9))",
        "socket.socket(type=socket.SOCK_DGRAM).sendto(b'', ('127.0.0.1', 9))",
        "socket.getaddrinfo('localhost', 80)",
        "urllib.request.urlopen('http://localhost/')",
    ],
)
def test_an_attempt_is_recorded_and_fails(offline, attempt):
    done = offline("-c", f"import socket, urllib.request; {attempt}")
    assert done.returncode == 1 and "there is no network" in done.stderr
    assert done.connections.startswith("socket.") and done.connections.count("\n") == 1


@pytest.mark.slow
def test_train(train):
    assert train.returncode == 0, train.stderr
    assert train.connections == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_command(offline, train, name):
    words = COMMANDS[name]
    if name == "classify" and not (offline.folder / "classifier").exists():
        assert offline("-m", "jaxgpt", *FINETUNE).returncode == 0
    done = offline("-m", "jaxgpt", *words)
    assert done.returncode == 0, done.stderr
    assert done.connections == ""


@pytest.mark.slow
def test_data_that_cannot_be_had_is_told_at_once(offline, train):
    """The probe of a download is the one attempt that is made, and only for data that is not on the machine."""
    done = offline("-m", "jaxgpt", "train", "--dataset=hf:nobody/nothing", "--data-dir=.", *SMALL)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: --dataset hf:nobody/nothing") and "no network" in done.stderr
    assert done.connections
