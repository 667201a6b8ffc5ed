"""The four diffs of CONTRIBUTING.md, applied to a copy of the repository, do what their sections say."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from documentation import ROOT, Block, blocks

MOST_LINES = 20
COPIED = ("jaxgpt", "torch_ref", "parity_tests")
VERSES = "The wheel goes round, the loss goes down.\n" * 60
# What a reader would do with the four additions; runs in the copy, with a data folder as its argument.
USE = """
import sys
from pathlib import Path
import jax
from jaxgpt.cli.args import config_of, parse_train_flags
from jaxgpt.data.corpora import load_corpus
from parity_tests.checks import optimizer
from jaxgpt.parity.suite import run_check
from parity_tests.suite import SUITE, prepare_process

assert load_corpus("verses", Path(sys.argv[1]), print).text.startswith("The wheel")
config = config_of(parse_train_flags(["--preset", "deepgpt", "--optimizer", "nesterov", "--momentum", "0.9"], "", ""))
assert (config.model.n_layer, config.steps, config.optimizer) == (12, 2000, "nesterov")
prepare_process(1)
name = "SGD, Nesterov"
rows = list(optimizer.compare_optimizer(optimizer.case_of(name, optimizer.configurations()[name]), (1, 2)))
rows += run_check("embedding", SUITE.checks["embedding"]).rows
assert len(rows) == 3 and all(row.status == "passed" for row in rows), rows
"""


def diffs() -> list[Block]:
    return [block for block in blocks("CONTRIBUTING.md") if block.language == "diff"]


def apply(diff: str, root: Path) -> None:
    """Applies a diff without line numbers: what a hunk takes out and its context stand in the file, once."""
    for part in re.split(r"^--- ", diff, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition("\n")
        text = (root / name).read_text(encoding="utf-8")
        for hunk in body.split("@@\n"):
            lines = hunk.splitlines()
            before = "".join(f"{line[1:]}\n" for line in lines if line[:1] != "+")
            after = "".join(f"{line[1:]}\n" for line in lines if line[:1] != "-")
            assert text.count(before) == 1, f"{name} has changed; CONTRIBUTING.md shows\n{before}"
            text = text.replace(before, after)
        (root / name).write_text(text, encoding="utf-8")


def test_there_are_four_additions_each_under_twenty_lines():
    added = [sum(line.startswith("+") for line in diff.text.splitlines()) for diff in diffs()]
    assert len(added) == 4 and max(added) < MOST_LINES


@pytest.mark.slow
def test_the_additions_work(tmp_path, user_env):
    for name in COPIED:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for diff in diffs():
        apply(diff.text, tmp_path)
    data = tmp_path / "data" / "verses"
    data.mkdir(parents=True)
    (data / "input.txt").write_text(VERSES)
    assert hashlib.sha256(VERSES.encode()).hexdigest() in (tmp_path / "jaxgpt/data/corpora.py").read_text()
    env = {**os.environ, **user_env, "PYTHONPATH": str(tmp_path)}
    line = [sys.executable, "-c", USE, str(data.parent)]
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
