"""The classification of a run folder from its files."""

import os
import shutil

import pytest

from jaxgpt.runs import manifest
from jaxgpt.runs.status import run_status


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def states(path):
    status = run_status(path)
    return status.state, status.problem


def test_a_folder_without_a_run_is_new(tmp_path, run):
    assert states(tmp_path / "missing") == ("new", "")
    (tmp_path / "empty").mkdir()
    assert states(tmp_path / "empty") == ("new", "")
    begun = tmp_path / "begun"  # a start that was interrupted before config.json
    begun.mkdir()
    for name in ("tokenizer.json", "data.json"):
        shutil.copy(run / name, begun)
    (begun / "config.json.partial").write_text("{")
    (begun / ".lock").touch()
    assert states(begun) == ("new", "")


def test_files_that_no_run_writes_are_foreign(run):
    (run / "checkpoints" / "notes.txt").touch()
    assert states(run) == ("foreign", "checkpoints/notes.txt")
    (run / "checkpoints" / "notes.txt").unlink()
    (run / "thesis.tex").touch()
    assert states(run) == ("foreign", "thesis.tex")


def test_a_run_that_ended_is_finished(run):
    assert states(run) == ("finished", "")


@pytest.mark.parametrize("name", ["summary.json", "sample.txt", "learning_curves.png", "steps.csv", "metrics.jsonl"])
def test_a_finished_run_whose_files_changed_is_resumable(run, name):
    content = (run / name).read_bytes()
    (run / name).write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    assert states(run) == ("resumable", f"{name} is not as it was written")
    (run / name).unlink()
    assert states(run) == ("resumable", f"{name} is missing")


def test_a_run_without_its_manifest_is_resumable(run):
    (run / manifest.NAME).write_text("{}")
    state, problem = states(run)
    assert state == "resumable" and problem.startswith("manifest.json is damaged")
    (run / manifest.NAME).unlink()
    assert states(run) == ("resumable", "")


def test_a_missing_checkpoint_is_named(run):
    shutil.rmtree(run / "checkpoints" / "60")
    assert states(run) == ("resumable", "checkpoints/60 is missing")


def test_a_run_without_config_json_is_damaged(run):
    (run / "config.json").unlink()
    state, problem = states(run)
    assert state == "damaged" and problem.startswith("config.json is missing beside") and "checkpoints/" in problem


def test_a_run_without_its_checkpoints_is_damaged(run):
    shutil.rmtree(run / "checkpoints")
    assert states(run)[0] == "damaged" and "recorded" in states(run)[1]


@pytest.mark.parametrize("name", ["config.json", "data.json"])
@pytest.mark.parametrize(
    "content", ["", "null", "[]", "[" * 10**5, "{}", '{"model": 1}', '{"model": {"n_layer": 2.5}}']
)
def test_damaged_json_makes_a_run_damaged(run, name, content):
    (run / name).write_text(content)
    assert states(run)[0] == "damaged" and name in states(run)[1]


def test_an_edited_configuration_makes_a_run_damaged(run):
    """Valid in itself, and another than the weights were trained with."""
    path = run / "config.json"
    path.write_text(path.read_text().replace('"n_head": 2', '"n_head": 4'))
    assert states(run)[0] == "damaged" and "config.json is not the one" in states(run)[1]


@pytest.mark.parametrize("name", ["config.json", "steps.csv", ".lock", "checkpoints"])
def test_links_and_pipes_make_a_run_damaged(run, name, tmp_path):
    moved = tmp_path / "moved"
    os.rename(run / name, moved)
    (run / name).symlink_to(moved)
    assert states(run)[0] == "damaged" and name in states(run)[1]
    (run / name).unlink()
    os.mkfifo(run / name)
    assert states(run)[0] == "damaged" and name in states(run)[1]


def test_a_run_from_before_manifests_is_known_by_its_summary(run):
    (run / manifest.NAME).unlink()
    data = run / "data.json"
    data.write_text(data.read_text().replace('"format": 2', '"format": 1'))
    assert states(run) == ("finished", "")
    (run / "summary.json").write_text("{")
    assert states(run)[0] == "resumable"
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints")  # killed before the first one was complete, perhaps
    assert states(run) == ("resumable", "")


@pytest.mark.parametrize("name", ["checkpoints/61.partial", "attention/00000005.npy", "checkpoints/60"])
def test_pipes_inside_the_folders_make_a_run_damaged(run, name):
    (run / name).parent.mkdir(exist_ok=True)
    if (run / name).is_dir():
        shutil.rmtree(run / name)
    os.mkfifo(run / name)
    assert states(run)[0] == "damaged" and name in states(run)[1]


def test_a_file_in_place_of_the_checkpoints_is_foreign(run):
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").touch()
    assert states(run) == ("foreign", "checkpoints")
