"""A user's mistakes: exit code 2, one line on stderr that names the flag and the remedy, and nothing written."""

import os
import pty
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, SMALL

TRAIN = [
    (["--dataset", "shakespeare"], ["--dataset 'shakespeare'", "choose of tinyshakespeare"]),
    (["--dataset", "file:nothing.txt"], ["--dataset file:nothing.txt", "check the path"]),
    (["--dataset", "file:empty.txt"], ["--dataset file:empty.txt", "empty"]),
    (["--dataset", "file:latin1.txt"], ["--dataset file:latin1.txt", "UTF-8"]),
    (["--dataset", "file:."], ["--dataset file:.", "readable"]),
    (["--dataset", "file:short.txt"], ["--dataset file:", "too short", "--model.block-size"]),
    (["--dataset", ""], ["--dataset", "choose of"]),
    (["--data-dir", "nowhere"], ["--data-dir nowhere", "create it"]),
    (["--model.n-embd", "65"], ["--model.n-embd 65", "--model.n-head 4", "choose a multiple"]),
    (["--model.n-layer", "-1"], ["--model.n-layer -1", "at least 1"]),
    (["--batch-size", "0"], ["--batch-size 0", "at least 1"]),
    (["--steps", "-5"], ["--steps -5", "at least 1"]),
    (["--steps", "many"], ["--steps", "many"]),
    (["--batch-size", "3000000000"], ["--batch-size 3000000000", "at most"]),
    (["--model.n-embd", "1000000000000"], ["--model.n-embd 1000000000000", "at most"]),
    (
        ["--dataset", "file:good.txt", "--model.n-embd", "99998", "--model.n-head", "2", "--model.n-layer", "1000"],
        ["--model.n-embd 99998", "at least", "parameters 480 TB", "optimizer state 960 TB", "--model.n-layer 1000"],
    ),
    (["--dataset", "file:pipe"], ["--dataset file:pipe", "regular file"]),
    (["--dataset", "file:good.txt", "--out-dir", os.fsdecode(b"ru\xffn")], ["--out-dir", "UTF-8"]),
    (["--stepz", "5"], ["--stepz", "--steps"]),
    (["--preset", "minigtp"], ["--preset minigtp", "choose of tinygpt, minigpt", "did you mean minigpt"]),
    (["--preset"], ["--preset", "choose of"]),
    (["--optimizer", "lion"], ["--optimizer", "adamw"]),
    (["--lr", "0"], ["--lr 0.0", "positive"]),
    (["--warmup-steps", "5"], ["--warmup-steps 5", "--schedule warmup-cosine"]),
    (["--dataset", "file:~nobody-here/x"], ["--dataset file:~nobody-here/x", "check the path"]),
    (["--dataset", "file:" + "x" * 300], ["--dataset file:x", "give a readable text file"]),
    (["--dataset", "pydoc", "--data-dir", "nowhere"], ["--data-dir nowhere", "create it"]),
    (["--dataset", "file:good.txt", "--prompt", ""], ["--prompt", "at least one character"]),
    (["--dataset", "file:good.txt", "--prompt", "Zebra"], ["--prompt", "'Z'", "training text"]),
    (["--dataset", "file:good.txt", "--out-dir", "good.txt/run"], ["--out-dir good.txt/run", "writable"]),
    (["--dataset", "file:good.txt", "--out-dir", "/proc/run"], ["--out-dir /proc/run", "writable"]),
    (["--dataset", "file:good.txt", "--out-dir", "good.txt"], ["--out-dir good.txt", "writable"]),
]


def check(done, parts):
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr, done.stderr


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin1.txt").write_bytes(b"Gr\xfc\xdfe" * 1000)
    (tmp_path / "short.txt").write_text("too short to fill a window")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "good.txt").write_text("all is good here. " * 500)
    return tmp_path


@pytest.mark.parametrize("flags, parts", TRAIN, ids=lambda x: " ".join(map(str, x)) if isinstance(x, list) else "")
def test_train(cli, folder, flags, parts):
    before = sorted(folder.rglob("*"))
    check(cli("train", *flags, cwd=folder), parts)
    assert sorted(folder.rglob("*")) == before


def test_a_message_on_a_terminal_has_no_colours(folder, user_env):
    """Through a pseudo-terminal, where tyro colours its messages."""
    ours, theirs = pty.openpty()
    line = [sys.executable, str(ROOT / "scripts/train.py"), "--stepz", "3"]
    assert subprocess.run(line, env={**user_env, "COLUMNS": "200"}, stdout=theirs, stderr=theirs).returncode == 2
    output = os.read(ours, 100_000).decode()
    assert output.startswith("error: Unrecognized options: --stepz")
    assert output.count("\n") == 1
    assert "\x1b" not in output


@pytest.mark.slow
def test_exhausted_memory_names_the_flags_and_leaves_no_run(user_env, folder):
    flags = ["--dataset", "file:good.txt", "--out-dir", "run", "--batch-size", "1000000", "--model.block-size", "500"]
    limited = (  # 4 GiB: where there is more, a batch of a million rows is only slow
        "import os, resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32)); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    line = [sys.executable, "-c", limited, str(ROOT / "scripts/train.py"), *flags]
    env = {**user_env, "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    check(done, ["--batch-size 1000000", "out of memory"])
    assert {p.name for p in (folder / "run").iterdir()} <= {".lock"}


@pytest.mark.parametrize("given", ["abc", "0", "-2", ""])
def test_a_number_of_devices_that_is_none(cli, folder, given):
    done = cli("train", "--dataset", "file:good.txt", cwd=folder, JAX_NUM_CPU_DEVICES=given)
    check(done, [f"JAX_NUM_CPU_DEVICES={given}", "from 1"])


@pytest.mark.slow
def test_devices_that_do_not_divide_the_batch(command, folder):
    flags = ["--dataset", "file:good.txt", "--out-dir", "run", *SMALL, "--batch-size", "6"]
    done = command("train.py", *flags, cwd=folder, XLA_FLAGS="--xla_force_host_platform_device_count=4")
    check(done, ["--batch-size 6", "4 devices", "multiple of 4"])
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--prompt", ""], ["--prompt", "at least one character"]),
        (["--prompt", "la Q"], ["--prompt", "'Q'", "position 3"]),
        (["--prompt", "la", "--temperature", "-1"], ["--temperature -1.0", "positive"]),
        (["--prompt", "la", "--top-p", "1.5"], ["--top-p 1.5", "at most 1"]),
        (["--prompt", "la", "--top-k", "-2"], ["--top-k -2", "at least 0"]),
        (["--prompt", "la", "--max-new-tokens", "0"], ["--max-new-tokens 0", "at least 1"]),
    ],
)
def test_generate(cli, trained, flags, parts):
    check(cli("generate", trained, *flags), parts)


@pytest.fixture(params=["generate", "evaluate"])
def reader(request, cli):
    """A command that reads a run, as a function of the run's folder."""
    return lambda *run: cli(request.param, *run)


def test_a_folder_without_a_run(reader, tmp_path):
    check(reader(tmp_path / "nothing"), ["RUN", "no run here"])


def test_no_folder(reader):
    check(reader(), ["RUN"])


@pytest.fixture
def bare(trained, tmp_path):
    """The trained run as it was before its first checkpoint."""
    path = tmp_path / "bare"
    shutil.copytree(trained, path, ignore=shutil.ignore_patterns("checkpoints", "manifest.json"))
    return path


def test_a_run_without_a_checkpoint(reader, bare):
    check(reader(bare), [f"RUN {bare}", "no checkpoint", "train"])
    (bare / "checkpoints").mkdir()
    check(reader(bare), [f"RUN {bare}", "no checkpoint", "train"])


@pytest.mark.parametrize(
    "name, damage, reason",
    [
        ("tokenizer.json", b'{"kind": "char", "chars": "ba"}', "no vocabulary of sorted characters"),
        ("config.json", b"{", "config.json is damaged"),
        ("config.json", b"\xff", "config.json is damaged"),
    ],
)
def test_a_damaged_run(reader, bare, name, damage, reason):
    (bare / name).write_bytes(damage)
    check(reader(bare), [f"RUN {bare}", reason])


@pytest.mark.slow
def test_a_full_disk_ends_the_run_which_resumes_later(cli, trained, text_file, tmp_path, user_env):
    """A limit on the size of files stands in for the full disk: the first state does not fit."""
    flags = ["--dataset", f"file:{text_file}", "--out-dir", tmp_path / "run", *SMALL, "--steps=60"]
    line = [str(word) for word in (sys.executable, ROOT / "scripts/train.py", *flags)]
    limited = ["bash", "-c", 'ulimit -f 3; exec "$@"', "bash", *line]
    done = subprocess.run(limited, env=user_env, capture_output=True, text=True)
    check(done, ["the checkpoint could not be written", "File too large"])
    assert cli("train", *flags).returncode == 0
    for name in ("metrics.jsonl", "summary.json"):
        theirs = (trained / name).read_text().replace("\n", " ").split('"val_loss": ')[1:]
        ours = (tmp_path / "run" / name).read_text().replace("\n", " ").split('"val_loss": ')[1:]
        assert [text.split(",")[0] for text in ours] == [text.split(",")[0] for text in theirs]
