"""Whatever a user gets wrong: exit 2, one line on stderr that names the flag and the remedy, nothing written."""

import shutil

import pytest
from conftest import SMALL

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
    (["--stepz", "5"], ["--stepz", "--steps"]),
    (["--preset", "minigtp"], ["--preset minigtp", "choose of tinygpt, minigpt", "did you mean minigpt"]),
    (["--preset"], ["--preset", "choose of"]),
    (["--optimizer", "lion"], ["--optimizer", "adamw"]),
    (["--lr", "0"], ["--lr 0.0", "positive"]),
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
    (tmp_path / "good.txt").write_text("all is good here. " * 500)
    return tmp_path


@pytest.mark.parametrize("flags, parts", TRAIN, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_train(command, folder, flags, parts):
    before = sorted(folder.rglob("*"))
    check(command("train.py", *flags, cwd=folder, HF_HUB_OFFLINE="1"), parts)
    assert sorted(folder.rglob("*")) == before


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
    check(command(script), ["PATH"])
    bare = tmp_path / "bare"
    shutil.copytree(trained, bare, ignore=shutil.ignore_patterns("checkpoints"))
    check(command(script, bare), [f"RUN {bare}", "no checkpoint", "train"])
    (bare / "checkpoints").mkdir()
    check(command(script, bare), [f"RUN {bare}", "no checkpoint", "train"])
    (bare / "config.json").write_text("{")
    check(command(script, bare), [f"RUN {bare}", "not readable"])


def test_a_damaged_checkpoint_is_told(command, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for path in (run / "checkpoints/60/default").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(b"damaged")
    done = command("evaluate.py", run)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]  # orbax's threads may print too
    assert "checkpoints/60" in line and "remove this folder" in line
