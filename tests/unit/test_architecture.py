"""The architecture holds: imports go downward, and what must not be imported is not."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxgpt.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]


def test_the_import_contracts_hold(monkeypatch):
    """The contracts are in pyproject.toml, [tool.importlinter]; `lint-imports` prints what breaks one."""
    importlinter = pytest.importorskip("importlinter.cli", reason="import-linter is in the lint extra")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    assert importlinter.lint_imports(no_cache=True) == 0


def test_help_needs_neither_jax_nor_torch():
    """So every command's help answers at once; one process for all."""
    code = """
import sys
from jaxgpt.cli.main import COMMANDS, run
for args in (["--help"], *([name, "--help"] for name in COMMANDS)):
    assert run(args) == 0, args
    assert not {"jax", "torch", "matplotlib"} & set(sys.modules), args
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage") >= len(COMMANDS)


def test_json_is_written_by_one_module():
    """`json.dumps` writes NaN and Infinity, which are not JSON."""
    writes = re.compile(r"(?<!strict_)\bjson\.dumps?\(")
    files = sorted((ROOT / "jaxgpt").rglob("*.py"))
    assert [path.name for path in files if writes.search(path.read_text(encoding="utf-8"))] == ["strict_json.py"]


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.name)
def test_scripts_are_thin(script):
    """A script names its command and holds nothing else: what runs is tested in the package."""
    text = script.read_text(encoding="utf-8")
    assert f'script("{script.stem}")' in text and script.stem in COMMANDS
    assert len(text.splitlines()) < 10
