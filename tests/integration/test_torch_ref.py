"""`python -m torch_ref.train` and `torch_ref.finetune`, alone and in exchange with the commands of jaxgpt."""

import csv
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

torch = pytest.importorskip("torch")

from torch_ref import command as reference_command  # noqa: E402
from torch_ref import finetune, train  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--model.n-layer=1 --model.n-head=2 --model.n-embd=16 --model.block-size=16 --batch-size=8 --lr=0.01 "
    "--eval-every=20 --eval-batches=2 --sample-tokens=20 --dtype=float64"
).split()


@pytest.fixture(scope="module")
def plain_text_file(tmp_path_factory) -> Path:
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(draw.choice(["la", "ti", "mo", "ru", "ha"]) for _ in range(4000)))
    return path


@pytest.fixture
def reference(monkeypatch, capfd):
    """Runs a command of the reference in this process; returns what a finished process would.

    On one thread: these models are too small for more.
    """
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(module, *args: object) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, args)])
        capfd.readouterr()
        code = reference_command.exit_code(module.main)
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(args, code, out, err)

    yield run
    torch.set_num_threads(n_threads)


def test_the_reference_imports_no_jax():
    code = "import sys, torch_ref.train, torch_ref.finetune; assert not {'jax', 'flax', 'optax'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_it_runs_as_a_module(plain_text_file):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX", "XLA"))}
    line = [sys.executable, "-m", "torch_ref.train", "--dataset", f"file:{plain_text_file}", "--lr=0"]
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "--lr" in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.slow
def test_a_reference_run_becomes_a_run_and_goes_on(reference, cli, command, plain_text_file, tmp_path):
    """PyTorch trains, its files are imported; evaluation agrees, training goes on, the export starts PyTorch again."""
    weights, state = tmp_path / "w.safetensors", tmp_path / "o.safetensors"
    files = ("--out", weights, "--optimizer-state-out", state)
    done = reference(train, "--dataset", f"file:{plain_text_file}", "--steps=40", *SMALL, *files)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("step 00  train ") and "loss " in lines[3]
    reported = float(lines[3].split("loss ")[1].split()[0])
    flags = ("--dataset", f"file:{plain_text_file}", "--steps=60", *SMALL)
    given = ("--weights", weights, "--optimizer-state", state)
    done = cli("convert", "import", *given, "--out", tmp_path / "run", *flags)
    assert done.returncode == 0, done.stderr
    figures = json.loads(cli("evaluate", tmp_path / "run", "--json").stdout)
    assert figures["loss"] == pytest.approx(reported, abs=5.1e-5)  # four decimals are printed
    assert figures["tokens"] % 16 == 0
    done = command("parity.py", "--run", tmp_path / "run")
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout + done.stderr
    done = cli("train", "--out-dir", tmp_path / "run", *flags)
    assert done.returncode == 0 and "resuming after 40 of 60" in done.stdout, done.stderr

    exported = (tmp_path / "w2.safetensors", tmp_path / "o2.safetensors")
    done = cli("convert", "export", tmp_path / "run", "--out", exported[0], "--optimizer-state", exported[1])
    assert done.returncode == 0, done.stderr
    start = ("--weights", exported[0], "--optimizer-state", exported[1])
    line = ("--dataset", f"file:{plain_text_file}", "--steps=70", *SMALL, *start, *files)
    done = reference(train, *line)
    assert done.returncode == 2 and "--overwrite" in done.stderr, done.stderr
    done = reference(train, *line, "--overwrite")
    assert done.returncode == 0 and "step 69" in done.stdout and "step 59" not in done.stdout, done.stderr
    assert load_file(state)["step"] == 70 and not np.array_equal(
        *(load_file(w)["ln_f.bias"] for w in (weights, exported[0]))
    )


def test_a_run_in_two_parts_is_the_whole_run(reference, plain_text_file, tmp_path):
    """Bit for bit, through the files of weights and optimiser state."""
    line = ("--dataset", f"file:{plain_text_file}", *SMALL)
    paths = [tmp_path / name for name in ("whole", "first", "second")]
    for path, *flags in (
        (paths[0], "--steps=20"),
        (paths[1], "--steps=12"),
        (paths[2], "--steps=20", "--weights", paths[1], "--optimizer-state", f"{paths[1]}.state"),
    ):
        done = reference(train, *line, *flags, "--out", path, "--optimizer-state-out", f"{path}.state")
        assert done.returncode == 0, done.stderr
    for suffix in ("", ".state"):
        assert Path(f"{paths[0]}{suffix}").read_bytes() == Path(f"{paths[2]}{suffix}").read_bytes()


@pytest.mark.parametrize(
    "args, part",
    [
        (["--parallel=pmap"], "--parallel"),
        (["--optimizer-state=x"], "--weights"),
        (["--weights=nothing"], "--weights nothing"),
        (["--out=no/where"], "--out no/where"),
        (["--out=/dev/null", "--overwrite"], "--out /dev/null"),
        (["--out=w.safetensors", "--optimizer-state-out=w.safetensors"], "the same file"),
        (["--prompt=Zebra"], "--prompt"),
        (["--lr=0"], "--lr"),
        (["--lr"], "--lr"),
        (["--preset=gpt5"], "--preset"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--tokenizer=bpe:300"], "--tokenizer bpe:300"),
        (["--min-chars=5"], "--min-chars 5"),
        (["--dataset=file:nothing.txt"], "--dataset file:nothing.txt: no such file"),
        (["--dataset=pydoc"], "--dataset pydoc"),
        (["--data-dir=no/where"], "--data-dir no/where"),
        (["--model.block-size=4000"], "--model.block-size"),
        (["--packing=chunks", "--batch-size=5000"], "--batch-size 5000"),
    ],
)
def test_the_reference_refuses(reference, plain_text_file, args, part):
    done = reference(train, "--dataset", f"file:{plain_text_file}", "--steps=1", *SMALL, *args)
    assert done.returncode == 2 and part in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_what_does_not_fit_the_model_is_refused(reference, plain_text_file, tmp_path):
    line = ("--dataset", f"file:{plain_text_file}", "--steps=1", *SMALL)
    weights, state = tmp_path / "w.safetensors", tmp_path / "o.safetensors"
    assert reference(train, *line, "--out", weights, "--optimizer-state-out", state).returncode == 0
    text = tmp_path / "text.safetensors"
    text.write_text("no tensors")
    for flags, part in (
        (("--weights", weights, "--model.n-embd=32"), "not float64 [32"),
        (("--weights", weights, "--model.n-layer=2"), "blocks.1."),
        (("--weights", text), f"--weights {text}: cannot be read as safetensors"),
        (("--weights", weights, "--optimizer-state", state, "--optimizer=sgd"), f"--optimizer-state {state}"),
    ):
        done = reference(train, *line, *flags)
        assert done.returncode == 2 and part in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_diverged_run_ends_with_code_3(reference, plain_text_file):
    flags = ("--optimizer=sgd", "--lr=1e30", "--dtype=float32", "--steps=20", "--eval-every=100")
    done = reference(train, "--dataset", f"file:{plain_text_file}", *SMALL, *flags)
    assert done.returncode == 3 and "try a lower --lr" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_the_reference_stops_early(reference, plain_text_file, tmp_path):
    """At the report that its losses say, and ends with the best weights."""
    flags = (
        "--dataset",
        f"file:{plain_text_file}",
        *SMALL,
        "--steps=200",
        "--lr=0.3",
        "--eval-every=5",
        "--patience=2",
    )
    done = reference(train, *flags, "--out", tmp_path / "w.safetensors")
    assert done.returncode == 0, done.stderr
    *reports, told, whole = [line for line in done.stdout.splitlines() if "val" in line or "stopped" in line]
    losses = [float(line.split("val ")[1]) for line in reports]
    n = len(losses)
    assert n < 41 and min(losses[:-2]) <= min(losses[-2:]) and losses[-3] == min(losses[:-2])
    assert told.startswith(f"stopped early after {5 * (n - 1) + 1} steps")
    assert abs(float(told.rsplit(" ", 1)[1]) - losses[-3]) <= 5.1e-4  # one has three decimals, one four
    assert (tmp_path / "w.safetensors").exists()
    done = reference(train, *flags, "--optimizer-state-out", tmp_path / "o.safetensors")
    assert done.returncode == 2 and "--optimizer-state-out" in done.stderr


def test_documents_end_after_their_epochs(reference, tmp_path):
    """wikitext-2 from a data folder: lines are documents, the report is by epoch, --epochs limits the steps."""
    folder, draw = tmp_path / "wikitext-2", random.Random(0)
    folder.mkdir()
    for split in ("train", "valid"):
        lines = [" ".join(draw.choice(["one", "two", "six"]) for _ in range(draw.randint(1, 30))) for _ in range(80)]
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    flags = ("--preset=wikitext2", "--dataset=wikitext-2", "--data-dir", tmp_path, "--tokenizer=byte", "--epochs=2")
    sizes = ("--model.n-layer=1", "--model.n-embd=16", "--model.block-size=16", "--batch-size=64", "--warmup-steps=2")
    done = reference(train, *flags, *sizes, "--sample-tokens=3")
    assert done.returncode == 0, done.stderr
    reports = [line.split() for line in done.stdout.splitlines() if line.startswith("epoch")]
    assert [report[1] for report in reports] == ["1", "2"]
    assert int(reports[1][3]) == 2 * int(reports[0][3]) + 1  # steps are counted from 0


@pytest.fixture(scope="module")
def labeled_file(tmp_path_factory) -> Path:
    """Texts whose class is in their words."""
    path, draw = tmp_path_factory.mktemp("rows") / "rows.csv", random.Random(0)
    with path.open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["text", "label"])
        for i in range(100):
            words = [draw.choice(["rain", "sun"]) for _ in range(5)] if i % 2 else ["goal", "team"] * 2
            writer.writerow([" ".join(words), ("sport", "weather")[i % 2]])
    return path


def gpt2_is_at_hand() -> bool:
    from torch_ref.datasets import UserError, gpt2_folder

    try:
        return bool(gpt2_folder(None))
    except UserError:
        return False


@pytest.mark.skipif(not gpt2_is_at_hand(), reason="GPT-2's vocabulary is in no data folder")
def test_fine_tuning_learns_the_classes(reference, labeled_file, tmp_path):
    sizes = ("--model.n-layer=1", "--model.n-head=2", "--model.n-embd=8", "--model.block-size=16")
    text, weights = tmp_path / "text.txt", tmp_path / "w.safetensors"
    text.write_text("the sun and the rain " * 50)
    given = (*sizes, "--dataset", f"file:{text}", "--tokenizer=gpt2", "--steps=1", "--eval-batches=1")
    done = reference(train, *given, "--batch-size=2", "--sample-tokens=1", "--out", weights)
    assert done.returncode == 0, done.stderr
    flags = (*sizes, "--weights", weights, "--dataset", f"file:{labeled_file}", "--max-tokens=8", "--lr=0.03")
    done = reference(finetune, *flags, "--epochs=3", "--batch-size=16", "--pool=mean")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "20 of its texts are held out" in lines[0]
    assert [line.split()[1] for line in lines[1:]] == ["1", "2", "3"]
    assert float(lines[-1].split()[-1]) == 1.0  # accuracy


@pytest.mark.parametrize(
    "args, part",
    [
        (["--weights=nothing", "--dtype=float64"], "--dtype"),
        (["--dataset=imdb"], "--dataset imdb"),
        (["--dataset=file:nothing.csv"], "--dataset file:nothing.csv: no such file"),
        (["--label-column=kind"], "no column 'kind'"),
        (["--train-samples=81"], "--train-samples 81"),
        (["--max-tokens=500"], "--max-tokens 500"),
    ],
)
def test_fine_tuning_refuses(reference, labeled_file, args, part):
    done = reference(finetune, "--weights=nothing", "--dataset", f"file:{labeled_file}", *args)
    assert done.returncode == 2 and part in done.stderr and done.stderr.count("\n") == 1, done.stderr
