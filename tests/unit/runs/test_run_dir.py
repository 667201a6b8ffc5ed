"""The run folder: its lock, and the name of a new one."""

import signal
import subprocess
import sys

import msgspec
import pytest

from jaxgpt.config import TrainConfig
from jaxgpt.data.corpora import load_corpus
from jaxgpt.data.tokenizer import ByteTokenizer
from jaxgpt.errors import UserError
from jaxgpt.runs import run_dir
from jaxgpt.runs.files import json_text
from jaxgpt.runs.status import FORMAT, DataRecord

# Begins the run in a folder, says so, and waits.
HOLDER = """
import sys
from pathlib import Path
from jaxgpt.config import TrainConfig
from jaxgpt.data.corpora import load_corpus
from jaxgpt.data.tokenizer import ByteTokenizer
from jaxgpt.runs import run_dir

text, folder = map(Path, sys.argv[1:])
run = run_dir.create(folder, TrainConfig(), ByteTokenizer(), load_corpus(f"file:{text}", None, print), overwrite=False)
print("locked", flush=True)
sys.stdin.read()
"""


HUB = f"hf:a/b:c@{'0123456789' * 4}"


@pytest.fixture
def create(text_file, tmp_path):
    """Begins or resumes the run in one folder, as often as it is called."""
    corpus = load_corpus(f"file:{text_file}", None, print)
    return lambda: run_dir.create(tmp_path / "run", TrainConfig(), ByteTokenizer(), corpus, overwrite=False)


def test_a_folder_is_locked_until_it_is_closed(create):
    run = create()
    with pytest.raises(UserError, match="another process is training here"):
        create()
    run.close()
    create().close()


def test_a_forgotten_run_does_not_keep_the_lock(create):
    create()
    create().close()


def test_a_run_that_cannot_be_begun_does_not_keep_the_lock(create, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run_dir.files, "write_json", full)
        with pytest.raises(UserError, match="No space left on device"):
            create()
    create().close()


def test_another_process_holds_the_folder_until_it_is_killed(create, text_file, tmp_path):
    line = [sys.executable, "-c", HOLDER, text_file, tmp_path / "run"]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match="--out-dir .*another process is training here; wait for it"):
            create()
        holder.send_signal(signal.SIGKILL)
    create().close()


def test_a_new_folder_is_named_by_dataset_kind_and_time(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for dataset, name in (("tinyshakespeare", "tinyshakespeare"), ("file:/a/my words.txt", "my_words"), (HUB, "b_c")):
        path = run_dir.default_run_dir(dataset, "minigpt")
        assert path.parent.name == "runs"
        assert path.name.startswith(f"{name}-minigpt-20")


@pytest.mark.parametrize(
    "recorded, given, chosen",
    [
        ("b", "a, b", "b"),
        ("b", "a,c", "a,c"),
        (HUB, "hf:a/b:c", HUB),
        (HUB, "x,hf:a/b:c", HUB),
        (HUB, HUB, HUB),
        (HUB, "hf:a/b", "hf:a/b"),
        ("hf:/x@y", "hf:/x", "hf:/x"),
        (None, "a,b", "a,b"),
    ],
)
def test_a_run_goes_on_with_the_dataset_and_the_commit_that_it_began_with(tmp_path, recorded, given, chosen):
    if recorded:
        record = DataRecord(recorded, "0" * 64, "", (), None, FORMAT)
        (tmp_path / "data.json").write_text(json_text(msgspec.to_builtins(record)))
    assert run_dir.recorded_choice(tmp_path, given) == chosen
    assert run_dir.recorded_choice(None, given) == given


def test_a_new_folder_does_not_exist_yet(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    class Noon(run_dir.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, 2, 12)

    monkeypatch.setattr(run_dir, "datetime", Noon)
    names = []
    for _ in range(3):
        path = run_dir.default_run_dir("a", "b")
        path.mkdir(parents=True)
        names.append(path.name)
    assert names == ["a-b-20260102-120000", "a-b-20260102-120000-1", "a-b-20260102-120000-2"]
