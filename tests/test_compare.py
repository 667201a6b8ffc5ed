"""scripts/compare.py: what a comparison leaves, how it is stopped and resumed, what diverges, what is refused."""

import json
import signal
import time

import pytest
from conftest import SMALL, read_state

from jaxgpt import comparison, variants
from jaxgpt.config import TrainConfig


def line_of(text_file, out, *flags):
    small = [word for word in SMALL if not any(word.startswith(f.split("=")[0] + "=") for f in flags)]
    return ["--dataset", f"file:{text_file}", "--out-dir", str(out), *small, *flags]


def recorded(out):
    found = json.loads((out / "comparison.json").read_text())
    return found, {row["label"]: row for row in found["variants"]}


@pytest.mark.slow
def test_two_optimizers(command, text_file, tmp_path):
    out, alone = tmp_path / "both", tmp_path / "alone"
    done = command("compare.py", *line_of(text_file, out, "--optimizer=sgd,adamw", "--steps=20"))
    assert done.returncode == 0, done.stderr
    assert command("train.py", *line_of(text_file, alone, "--optimizer=sgd", "--steps=20")).returncode == 0
    for name in ("steps.csv", "config.json", "data.json", "sample.txt"):
        assert (out / "optimizer=sgd" / name).read_bytes() == (alone / name).read_bytes(), name
    sgd, adamw = (json.loads((out / f"optimizer={name}" / "config.json").read_text()) for name in ("sgd", "adamw"))
    assert adamw == {**sgd, "optimizer": "adamw"}

    found, rows = recorded(out)
    assert found["fields"] == ["optimizer"] and found["ranked_by"] == "val_loss"
    assert list(rows) == ["optimizer=adamw", "optimizer=sgd"]  # the best first: sgd at this rate learns slowly
    row, summary = rows["optimizer=sgd"], json.loads((alone / "summary.json").read_text())
    reports = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
    assert row["values"] == {"optimizer": "sgd"} and row["status"] == "finished" and row["steps"] == 20
    assert [row[name] for name in ("val_loss", "val_ppl", "params")] == [
        summary[name] for name in ("val_loss", "val_ppl", "params")
    ]
    assert row["best_val_loss"] == min(r["val_loss"] for r in reports)
    assert [r["val_loss"] for r in reports if r["step"] == row["best_val_step"]] == [row["best_val_loss"]]
    assert row["tokens_per_s"] > 0 and row["wall_s"] > 0

    told = (out / "comparison.md").read_text()
    assert told in done.stdout and str(out) in done.stdout.splitlines()[-1]
    head, _, first, second = told.splitlines()
    assert head.startswith("| optimizer | val loss |") and len({len(text) for text in told.splitlines()}) == 1
    assert first.startswith("| adamw ") and second.startswith("| sgd ") and f"{row['val_loss']:.4f}" in second
    assert (out / "comparison.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_stopped_and_resumed(start, command, text_file, tmp_path):
    """And a run in float64 leaves nothing of that to the next."""
    out = tmp_path / "compared"
    line = line_of(text_file, out, "--dtype=float64,float32", "--steps=200")
    process = start("compare.py", *line)
    steps = out / "dtype=float32" / "steps.csv"
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline and not (steps.exists() and steps.stat().st_size):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "Traceback" not in output and "all saved" in output
    assert f"after 1 of 2 runs; the same command with --out-dir {out} goes on" in output.splitlines()[-1]
    assert {label: row["status"] for label, row in recorded(out)[1].items()} == {
        "dtype=float64": "finished",
        "dtype=float32": "unfinished",
    }
    first = (out / "dtype=float64" / "summary.json").read_bytes()

    done = command("compare.py", *line)
    assert done.returncode == 0, done.stderr
    assert "dtype=float64: finished already" in done.stdout and "resuming after " in done.stdout
    assert (out / "dtype=float64" / "summary.json").read_bytes() == first
    rows = recorded(out)[1]
    assert all(row["status"] == "finished" and row["steps"] == 200 for row in rows.values())
    assert {str(p.dtype) for p in read_state(out / "dtype=float32", 200)["params"].values()} == {"float32"}
    assert abs(rows["dtype=float64"]["val_loss"] - rows["dtype=float32"]["val_loss"]) < 1e-3


@pytest.mark.slow
def test_a_run_that_diverges_stops_no_other(command, text_file, tmp_path):
    done = command("compare.py", *line_of(text_file, tmp_path / "c", "--lr=1e30,0.01", "--steps=5"))
    assert done.returncode == 0 and done.stderr == "", done.stderr
    rows = recorded(tmp_path / "c")[1]
    assert list(rows) == ["lr=0.01", "lr=1e30"] and rows["lr=0.01"]["status"] == "finished"
    bad = rows["lr=1e30"]
    assert bad["status"] == "diverged" and "val_loss" not in bad
    assert bad["steps"] - bad["diverged_at_step"] in (0, 1) and bad["steps"] < 5  # in that step, or validated after it
    told = (tmp_path / "c" / "comparison.md").read_text()
    assert f"diverged at step {bad['diverged_at_step']} " in told.splitlines()[-1]
    assert (tmp_path / "c" / "comparison.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_run_that_fails_stops_no_other_but_the_first_does(command, text_file, tmp_path):
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = command("compare.py", *line_of(text_file, tmp_path / "a", "--batch-size=6,8", "--steps=2"), **devices)
    assert done.returncode == 2 and done.stderr.startswith("error: --batch-size 6: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "a").exists()
    done = command("compare.py", *line_of(text_file, tmp_path / "b", "--batch-size=8,6", "--steps=2"), **devices)
    assert done.returncode == 2 and done.stderr.startswith("error: batch-size=6: --batch-size 6: ")
    assert done.stderr.count("\n") == 1
    rows = recorded(tmp_path / "b")[1]
    assert rows["batch-size=8"]["status"] == "finished" and rows["batch-size=6"]["status"] == "failed"
    assert "4 devices" in rows["batch-size=6"]["error"] and "failed |" in (tmp_path / "b/comparison.md").read_text()


@pytest.mark.parametrize(
    "flags, part",
    [
        (["--lr=1e-3,0"], "lr=0: --lr 0.0: give a positive number"),
        (["--lr=0,1e-3"], "--lr 0.0: give a positive number"),
        (["--lr", "1e-3,many"], "--lr"),
        (["--lr", "1e-3,"], "--lr 1e-3,: a value is missing"),
        (["--lr", "1e-3,0.001"], "--lr 1e-3,0.001: lr=1e-3 and lr=0.001 are the same"),
        (["--lr=1,2", "--lr=3,4"], "--lr: given twice"),
        (["--lr=1e-3"], "scripts/train.py"),
        (["--dataset=pydoc,tinyshakespeare"], "--dataset, --text-column, --prompt are never"),
        (["--lrs=1e-3,1e-4"], "--lrs"),
        (["--loader=device,host", "--seed=1,2"], "--loader"),
        (["--seed=" + ",".join(map(str, range(13))), "--steps=1,2,3,4,5"], "65 combinations; give lists that make at"),
        (["--optimizer=sgd,adamw", "--momentum=0.9"], "optimizer=adamw: --momentum 0.9"),
        (["--model.tied-head=yes,no"], "--model.tied-head yes: to compare, give true,false"),
        (["--preset=tinygpt,wikitext2"], "give all the same --dataset"),
        (["--preset=minigtp,tinygpt"], "did you mean minigpt?"),
        (["--seed=1,2", "--dataset=file:nothing.txt"], "--dataset file:nothing.txt"),
        (["--seed=1,2", "--out-dir", "held"], "--out-dir held: holds files that are no comparison"),
    ],
)
def test_refuses(command, tmp_path, flags, part):
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "thesis.tex").write_text("precious")
    done = command("compare.py", *flags, cwd=tmp_path)
    assert done.returncode == 2 and part in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert {path.name for path in tmp_path.rglob("*")} == {"held", "thesis.tex"}


def test_combinations_of_any_fields():
    line = "--preset tinygpt,minigpt --model.n_layer=1,2 --model.tied-head false,true --weight-decay None,0.5 --clip 2"
    found = variants.parse([*line.split(), "--prompt", "To be, or not"], "")
    assert len(found) == 16 and len({variant.label for variant in found}) == 16
    last = found[-1]
    assert last.label == "preset=minigpt,model.n-layer=2,model.tied-head=true,weight-decay=0.5"
    values = {"preset": "minigpt", "model.n_layer": 2, "model.tied_head": True, "weight_decay": 0.5}
    assert last.values == values and last.config.clip == 2 and last.config.prompt == "To be, or not"
    assert {(v.config.steps, v.config.model.block_size) for v in found} == {(500, 64), (5000, 128)}
    assert found[0].config.weight_decay is None and not found[0].config.model.tied_head
    assert isinstance(last.config, TrainConfig)


def test_tokenizers_are_ranked_by_bits_per_byte():
    """A loss per token is lower where tokens are shorter."""
    found = variants.parse(["--tokenizer=byte,bpe:300"], "")
    assert comparison.ranked_by(found) == "val_bits_per_byte"
    rows = [{"label": v.label, "status": "finished", "val_loss": 2.0, "val_bits_per_byte": 2.5} for v in found]
    head, _, first, second = comparison.table(rows, found).splitlines()
    assert head.startswith("| tokenizer | bits per byte | val loss") and "| byte      |        2.5000 |" in first
    assert second.startswith("| bpe:300 ")
    assert comparison.ranked_by(variants.parse(["--tokenizer=byte", "--seed=1,2"], "")) == "val_loss"
