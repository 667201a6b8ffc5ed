"""Damage to a run's files is told, or mended, by every command that reads them; never a wrong figure in silence."""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import SMALL, assert_same, recorded

STEPS = 60


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def unfinished(run) -> Path:
    """The same as a kill just before its end leaves it."""
    for name in ("summary.json", "sample.txt", "learning_curves.png", "manifest.json"):
        (run / name).unlink()
    return run


@pytest.fixture
def train(cli, text_file):
    return lambda out, *more: cli(
        "train", "--dataset", f"file:{text_file}", f"--steps={STEPS}", "--out-dir", out, *SMALL, *more
    )


@pytest.fixture(scope="module")
def loss(cli, trained) -> float:
    """The loss of the undamaged run."""
    return json.loads(cli("evaluate", trained, "--json").stdout)["loss"]


def flip(path: Path, at: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    path.write_bytes(content)


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_a_flipped_bit_in_a_checkpoint_is_named_and_the_one_before_it_taken(cli, run, loss, train, trained):
    damaged = largest(run / "checkpoints" / "60")
    flip(damaged)
    done = cli("evaluate", run, "--json")
    assert done.returncode == 0 and done.stderr.count("\n") == 1
    assert "checkpoints/60 is damaged" in done.stderr and damaged.name in done.stderr
    assert "taking the checkpoint after 51 steps" in done.stderr
    assert json.loads(done.stdout)["loss"] != loss
    (run / "summary.json").unlink()  # else it is finished: nothing reads the checkpoint
    done = train(run)
    assert done.returncode == 0, done.stderr
    assert "checkpoints/60 is damaged" in done.stdout and "resuming after 51 of 60 steps" in done.stdout
    assert_same(run, trained, STEPS)


def test_without_a_sound_checkpoint_nothing_goes_on(cli, unfinished, train):
    before = {}
    for step in (41, 51, 60):
        flip(largest(unfinished / "checkpoints" / str(step)))
        before[step] = read_bytes(unfinished / "checkpoints" / str(step))
    for done in (cli("evaluate", unfinished), train(unfinished), cli("evaluate", unfinished, "--checkpoint=best")):
        assert done.returncode == 4 and done.stderr.count("\n") == 1 and "is damaged" in done.stderr, done.stderr
    assert all(read_bytes(unfinished / "checkpoints" / str(step)) == files for step, files in before.items())


def read_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("lost", ["config.json", pytest.param("checkpoints", marks=pytest.mark.slow)])
def test_the_same_command_never_starts_again_over_parts_of_a_run(run, lost, train):
    shutil.rmtree(run / lost) if lost == "checkpoints" else (run / lost).unlink()
    before = read_bytes(run)
    done = train(run)
    assert done.returncode == 4 and lost.rstrip("s") in done.stderr and "--overwrite" in done.stderr, done.stderr
    assert read_bytes(run) == before


@pytest.mark.slow
def test_overwrite_starts_again_over_parts_of_a_run(run, train, trained):
    (run / "config.json").unlink()
    done = train(run, "--overwrite")
    assert done.returncode == 0 and recorded(run) == recorded(trained)


def test_a_damaged_summary_is_made_anew(run, train, trained):
    (run / "summary.json").write_text('{"steps": 60')
    done = train(run)
    assert done.returncode == 0 and "summary.json has 12 bytes" in done.stdout
    assert_same(run, trained, STEPS)
    assert "finished already" in train(run).stdout


@pytest.mark.slow
def test_the_result_of_an_early_stop_is_known_without_the_summary(cli, text_file, tmp_path):
    out = tmp_path / "run"
    line = ["train", "--dataset", f"file:{text_file}", "--steps=400", "--out-dir", out, *SMALL]
    done = cli(*line, "--lr=3", "--patience=2", "--eval-every=5")
    assert done.returncode == 0 and "stopped early" in done.stdout, done.stderr
    expected = cli("evaluate", out, "--json").stdout
    last = cli("evaluate", out, "--json", "--checkpoint=last").stdout
    assert json.loads(expected)["loss"] < json.loads(last)["loss"]
    (out / "summary.json").unlink()
    assert cli("evaluate", out, "--json").stdout == expected
    done = cli(*line, "--lr=3", "--patience=2", "--eval-every=5")
    assert done.returncode == 0 and "stopped early" in done.stdout
    assert "stopped_early" in json.loads((out / "summary.json").read_text())
    best = json.loads((out / "summary.json").read_text())["stopped_early"]["best_step"]
    shutil.rmtree(out / "checkpoints" / str(best))
    done = cli("evaluate", out)
    assert done.returncode == 4 and f"checkpoints/{best} is missing" in done.stderr


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("config.json", '"n_head": 2', '"n_head": 4'),
        ("config.json", '"gelu": "erf"', '"gelu": "tanh"'),
        ("config.json", '"lr": 0.01', '"lr": "0.01"'),
        ("config.json", '"seed": 1337', '"seed": 1.5'),
        ("config.json", '"n_layer": 1', '"n_layer": -1'),
        ("tokenizer.json", "a", "b"),
        ("data.json", '"sha256": "', '"sha256": "0'),
    ],
)
def test_an_edited_file_is_told(cli, run, name, old, new):
    path = run / name
    text = path.read_text()
    assert old in text
    path.write_text(text[::-1].replace(old[::-1], new[::-1], 1)[::-1])  # the last one
    done = cli("evaluate", run)
    assert done.returncode in (2, 4) and name.partition(".")[0] in done.stderr or "--model" in done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == ""


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "data.json"])
@pytest.mark.parametrize("content", ["null", "[]", "[" * 10**5, '{"kind": 5}', '{"kind": ["char"], "chars": null}'])
def test_json_of_other_types_is_told(cli, run, name, content):
    (run / name).write_text(content)
    done = cli("evaluate", run)
    assert done.returncode in (2, 4) and done.stderr.count("\n") == 1 and f"RUN {run}: {name}" in done.stderr


@pytest.mark.parametrize(
    "name, damage",
    [
        ("steps.csv", "first line"),
        ("metrics.jsonl", "first line"),
        pytest.param("steps.csv", "late line", marks=pytest.mark.slow),
        pytest.param("metrics.jsonl", "late line", marks=pytest.mark.slow),
        pytest.param("steps.csv", "doubled", marks=pytest.mark.slow),
        pytest.param("metrics.jsonl", "doubled", marks=pytest.mark.slow),
    ],
)
def test_lost_and_doubled_records_are_mended_or_told(unfinished, train, trained, name, damage):
    path = unfinished / name
    lines = path.read_text().splitlines(keepends=True)
    at = {"first line": 1, "late line": -1, "doubled": -1}[damage]
    lines[at:] = [lines[at], *lines[at:]] if damage == "doubled" else lines[at:][1:]
    path.write_text("".join(lines))
    done = train(unfinished)
    if damage == "first line":
        assert done.returncode == 4 and name in done.stderr and done.stderr.count("\n") == 1, done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert_same(unfinished, trained, STEPS)


def test_a_renamed_checkpoint_is_not_taken_for_that_step(cli, run, loss):
    os.rename(run / "checkpoints" / "60", run / "checkpoints" / "400")
    done = cli("evaluate", run, "--json")
    assert "is damaged: it holds the state after 60 steps" in done.stderr or "60 is missing" in done.stderr
    assert json.loads(done.stdout)["loss"] != loss


@pytest.mark.parametrize(
    "name", [".lock", "config.json", "summary.json.partial", "tokenizer.json.partial", "steps.csv"]
)
def test_no_link_in_a_run_folder_is_followed(unfinished, train, name, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (unfinished / name).unlink(missing_ok=True)
    (unfinished / name).symlink_to(precious)
    done = train(unfinished)
    assert precious.read_text() == "precious"
    assert done.returncode in (0, 2, 4) and "Traceback" not in done.stderr
    assert done.returncode == 0 or name in done.stderr


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "data.json", "config.json", "summary.json", ".lock", "manifest.json"]
)
@pytest.mark.parametrize("kind", ["pipe", "endless"])
def test_pipes_and_devices_are_refused_at_once(cli, run, train, name, kind):
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name) if kind == "pipe" else (run / name).symlink_to("/dev/zero")
    done = train(run)
    assert done.returncode in (2, 4) and name in done.stderr and done.stderr.count("\n") == 1, done.stderr
    if name in ("tokenizer.json", "data.json", "config.json"):
        done = cli("evaluate", run)
        assert done.returncode in (2, 4) and name in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_an_older_checkpoint_without_its_manifest_is_named_and_removed(unfinished, train, trained):
    flip(unfinished / "checkpoints" / "41" / "manifest.json")
    done = train(unfinished)
    assert done.returncode == 0 and "checkpoints/41 is damaged: manifest.json" in done.stdout, done.stdout
    assert not (unfinished / "checkpoints" / "41").exists()
    assert recorded(unfinished) == recorded(trained)
