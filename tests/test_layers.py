"""Imports go one way, and what must not be imported is not."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Each file may import those before it.
ORDER = """errors versions checks config presets tensor_files data_files texts datasets labelled tokenizer
tokens batches attention elementwise model loss optimizer train_step classifier program_cache parallel loader
checkpoint diagnostics run_folder generate trained convert exchange report dot graph diagrams console cli inspection
summary trainer language_model finetune variants comparison""".split()


def imported(path):
    """The jaxgpt modules that a file imports, and the top-level packages."""
    modules, packages = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            packages.add(name.split(".")[0])
            if name.startswith("jaxgpt."):
                modules.add(name.split(".")[1])
    return modules & set(ORDER), packages


def test_every_module_has_its_place():
    assert sorted(p.stem for p in (ROOT / "jaxgpt").glob("*.py") if p.stem != "__init__") == sorted(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_one_way(name):
    modules, packages = imported(ROOT / "jaxgpt" / f"{name}.py")
    assert modules <= set(ORDER[: ORDER.index(name)])
    assert "torch" not in packages
    assert "flax" not in packages or name == "model"
    assert "orbax" not in packages or name == "checkpoint"


@pytest.mark.parametrize("path", sorted((ROOT / "torch_ref").glob("*.py")), ids=lambda p: p.name)
def test_the_reference_imports_no_jax(path):
    modules, packages = imported(path)
    assert not packages & {"jax", "flax", "optax"} and modules <= {
        "checks",
        "config",
        "errors",
        "labelled",
        "presets",
        "cli",
        "data_files",
        "datasets",
        "tensor_files",
        "tokenizer",
        "tokens",
    }


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda p: p.name)
def test_help_needs_no_jax(script):
    """So it answers at once."""
    code = f"import runpy, sys; sys.argv = ['x', '--help']\ntry: runpy.run_path({str(script)!r}, run_name='__main__')\n"
    code += "except SystemExit as e: assert not e.code\nassert not {'jax', 'torch'} & set(sys.modules), 'slow'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


def test_files_can_be_read_in_a_sitting():
    for path in [*ROOT.glob("[!.]*/**/*.py")]:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path
