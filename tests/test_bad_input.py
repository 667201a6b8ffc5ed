"""Whatever a user gets wrong: exit 2, one line on stderr that names the flag and the remedy, nothing written."""

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
    (["--dataset", "file:pipe"], ["--dataset file:pipe", "regular file"]),
    (["--dataset", "file:good.txt", "--out-dir", b"ru\xffn"], ["--out-dir", "UTF-8"]),
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
def test_train(command, folder, flags, parts):
    before = sorted(folder.rglob("*"))
    check(command("train.py", *flags, cwd=folder, HF_HUB_OFFLINE="1"), parts)
    assert sorted(folder.rglob("*")) == before


def test_colours_of_a_terminal_are_left_out(folder, user_env):
    """Through a pseudo-terminal, where tyro colours its messages."""
    ours, theirs = pty.openpty()
    line = [sys.executable, str(ROOT / "scripts/train.py"), "--stepz", "3"]
    assert subprocess.run(line, env={**user_env, "COLUMNS": "200"}, stdout=theirs, stderr=theirs).returncode == 2
    told = os.read(ours, 100_000).decode()
    assert told.startswith("error: Unrecognized options: --stepz") and told.count("\n") == 1 and "\x1b" not in told


def test_memory_that_does_not_suffice_is_told_and_nothing_stays(user_env, folder):
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
def test_devices_that_are_no_number(command, folder, given):
    done = command("train.py", "--dataset", "file:good.txt", cwd=folder, JAX_NUM_CPU_DEVICES=given)
    check(done, [f"JAX_NUM_CPU_DEVICES={given}", "from 1"])


def test_train_on_devices_that_do_not_divide_the_batch(command, folder):
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
def test_generate(command, trained, flags, parts):
    check(command("generate.py", trained, *flags), parts)


@pytest.mark.parametrize("script", ["generate.py", "evaluate.py"])
def test_folders_that_are_no_runs(command, trained, tmp_path, script):
    check(command(script, tmp_path / "nothing"), ["RUN", "no run here"])
    check(command(script), ["RUN"])
    bare = tmp_path / "bare"
    shutil.copytree(trained, bare, ignore=shutil.ignore_patterns("checkpoints"))
    check(command(script, bare), [f"RUN {bare}", "no checkpoint", "train"])
    (bare / "checkpoints").mkdir()
    check(command(script, bare), [f"RUN {bare}", "no checkpoint", "train"])
    for name, damage in (
        ("tokenizer.json", b'{"kind": "char", "chars": "ba"}'),
        ("config.json", b"{"),
        ("config.json", b"\xff"),
    ):
        (bare / name).write_bytes(damage)
        check(command(script, bare), [f"RUN {bare}", "not readable"])


@pytest.mark.parametrize("what", ["default/d/*", "default/_METADATA", "metrics/metrics"])
def test_a_damaged_checkpoint_is_told(command, trained, tmp_path, what):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    damaged = list((run / "checkpoints/60").glob(what))
    assert damaged
    for path in damaged:
        path.write_bytes(b"")
    done = command("evaluate.py", run)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "checkpoints" in line and ("try --checkpoint" in line or "remove the folder" in line)


def test_a_full_disk_is_told_and_the_run_goes_on_later(trained, text_file, tmp_path, user_env):
    """The limit on a file's size plays the full disk: the first state does not fit."""
    out = tmp_path / "run"
    line = [sys.executable, ROOT / "scripts/train.py", "--dataset", f"file:{text_file}", "--out-dir", out, *SMALL]
    line = [str(word) for word in [*line, "--steps=60"]]

    limited = ["bash", "-c", 'ulimit -f 3; exec "$@"', "bash", *line]
    done = subprocess.run(limited, env=user_env, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "the checkpoint could not be written" in done.stderr and "File too large" in done.stderr, done.stderr
    assert subprocess.run(line, env=user_env, capture_output=True).returncode == 0
    for name in ("metrics.jsonl", "summary.json"):
        theirs = (trained / name).read_text().replace("\n", " ").split('"val_loss": ')[1:]
        ours = (out / name).read_text().replace("\n", " ").split('"val_loss": ')[1:]
        assert [text.split(",")[0] for text in ours] == [text.split(",")[0] for text in theirs]
