"""jaxgpt inspect: flags, runs and texts that it refuses."""

import shutil
import sys

import pytest
from conftest import ROOT


@pytest.mark.parametrize(
    "flags, parts",
    [
        ([], ["RUN", "nothing to inspect", "--gradients"]),
        (["--gradients", "--surprise", "la"], ["--gradients and --surprise"]),
        (["--attention", ""], ["--attention ''", "at least 1"]),
        (["--surprise", "l"], ["--surprise 'l'", "at least 2"]),
        (["--attention", "la ti mo la ti mo"], ["--attention", "17 tokens", "block is 16", "shorten"]),
        (["--surprise", "lax"], ["--surprise", "'x'", "not in the vocabulary"]),
        (["--attention", "la", "--out", "/tmp"], ["--out /tmp", ".png"]),
        (["--attention", "la", "--out", "maps.jpg"], ["--out maps.jpg", ".png"]),
        (["--attention", "la", "--out", "no/such/maps.png"], ["--out no/such/maps.png", "no such folder"]),
        (["--attention", "la", "--data-dir", "x"], ["--data-dir", "--gradients"]),
        (["--gradients", "--checkpoint", "first"], ["--checkpoint"]),
        (["--gradients", "--level", "op"], ["--level", "--graph"]),
        (["--graph", "g.dot", "--out", "g.png"], ["--out", "--graph"]),
        (["--graph", "g.dot", "--checkpoint", "best"], ["--checkpoint"]),
        (["--graph", "g.pdf"], ["--graph g.pdf", ".svg"]),
        (["--graph", "no/such/g.svg"], ["--graph no/such/g.svg", "no such folder"]),
    ],
)
def test_bad_input(cli, trained, tmp_path, flags, parts):
    before = sorted(trained.rglob("*"))
    done = cli("inspect", trained, *flags, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout, done.stderr
    assert all(part in done.stderr for part in parts), done.stderr
    assert sorted(trained.rglob("*")) == before and not list(tmp_path.iterdir())


def test_no_run_and_a_folder_that_cannot_be_written(cli, trained, tmp_path):
    done = cli("inspect", tmp_path, "--gradients")
    assert done.returncode == 2 and "no run here" in done.stderr
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "inspect").write_text("in the way")
    done = cli("inspect", run, "--attention", "la")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--out" in done.stderr


def test_no_script_has_the_name_of_a_standard_library_module():
    """A script's own folder comes first among the places that modules are imported from."""
    names = {path.stem for path in (ROOT / "scripts").glob("*.py")}
    assert names and not names & sys.stdlib_module_names
