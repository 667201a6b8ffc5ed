"""`jaxgpt convert`: runs to weights and back, and files that do not fit."""

import json

import numpy as np
import pytest
from conftest import SMALL, read_state
from safetensors.numpy import load_file, save_file


@pytest.fixture(scope="module")
def exported(cli, trained, tmp_path_factory):
    """The trained run's weights and optimiser state as files."""
    folder = tmp_path_factory.mktemp("exported")
    done = cli(
        "convert",
        "export",
        trained,
        "--out",
        folder / "w.safetensors",
        "--optimizer-state",
        folder / "o.safetensors",
    )
    assert done.returncode == 0, done.stderr
    assert "after 60 steps" in done.stdout
    return folder


def imports(cli, text_file, out, *flags, small=SMALL):
    return cli("convert", "import", "--dataset", f"file:{text_file}", "--out", out, *small, *flags)


def test_names_and_layouts_are_torchs(exported, trained):
    weights, state = load_file(exported / "w.safetensors"), load_file(exported / "o.safetensors")
    checkpoint = read_state(trained, 60)
    kernel = checkpoint["params"]["blocks.0.mlp.fc.kernel"]
    np.testing.assert_array_equal(weights["blocks.0.ff.0.weight"], kernel.T)
    assert weights["blocks.0.ff.0.weight"].shape == (64, 16)
    assert set(state) == {"step"} | {f"{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name in weights}
    assert state["step"] == 60 and all(p.dtype == np.float32 for p in weights.values())


def test_export_and_import_are_bitwise_inverse(cli, exported, trained, text_file, tmp_path):
    done = imports(cli, text_file, tmp_path / "run", "--weights", exported / "w.safetensors", "--steps=60")
    assert done.returncode == 0, done.stderr
    figures = [json.loads(cli("evaluate", run, "--json").stdout) for run in (trained, tmp_path / "run")]
    assert figures[0] == figures[1]
    assert cli("generate", tmp_path / "run", "--prompt", "la", "--max-new-tokens=5").returncode == 0
    done = cli("convert", "export", tmp_path / "run", "--out", tmp_path / "w.safetensors")
    assert done.returncode == 0 and "after 0 steps" in done.stdout
    assert (tmp_path / "w.safetensors").read_bytes() == (exported / "w.safetensors").read_bytes()


@pytest.mark.slow
def test_training_continues_bit_for_bit(cli, exported, text_file, tmp_path):
    """60 steps, export, import, and 20 more steps equal 80 steps in one run."""
    files = ("--weights", exported / "w.safetensors", "--optimizer-state", exported / "o.safetensors")
    assert imports(cli, text_file, tmp_path / "across", *files, "--steps=80").returncode == 0
    for run in ("across", "whole"):
        done = cli("train", "--dataset", f"file:{text_file}", "--steps=80", "--out-dir", tmp_path / run, *SMALL)
        assert done.returncode == 0, done.stderr
        assert ("resuming after 60 of 80" in done.stdout) == (run == "across")
    across, whole = (read_state(tmp_path / run, 80) for run in ("across", "whole"))
    for name, p in whole["params"].items():
        np.testing.assert_array_equal(across["params"][name], p)


BAD = [
    (["--weights", "none"], ["--weights none", "no such file"]),
    (["--weights", "text"], ["--weights text", "safetensors", "save_file"]),
    (["--weights", "w", "--model.n-layer=2"], ["--weights w", "missing blocks.1", "and 12 more"]),
    (["--weights", "w", "--model.n-embd=32"], ["blocks", "shape", "--preset and --model flags"]),
    (["--weights", "w", "--model.tied-head"], ["left over lm_head.weight", "leave out --model.tied-head"]),
    (["--weights", "w", "--tokenizer=byte"], ["a vocabulary of 16", "--tokenizer"]),
    (["--weights", "int"], ["ln_f.bias", "int32", "floating-point"]),
    (["--weights", "twice"], ["wte.weight", "another name"]),
    (["--weights", "."], ["--weights .", "regular file"]),
    (["--weights", "run/w", "--out", "run"], ["--weights run/w", "lies in --out run"]),
    (["--weights", "short"], ["--weights short", "missing ln_f.bias"]),
    (["--weights", "more"], ["--weights more", "left over extra.weight"]),
    (["--weights", "nan"], ["--weights nan", "ln_f.bias", "not finite"]),
    (["--weights", "wide"], ["--weights wide", "float64", "--dtype float64"]),
    (["--weights", "w", "--optimizer-state", "w"], ["--optimizer-state w", "missing"]),
    (["--weights", "w", "--optimizer-state", "o", "--optimizer=sgd"], ["--optimizer-state o", "left over"]),
    (
        ["--weights", "w", "--optimizer-state", "o", "--steps=10"],
        ["--steps 10", "60 updates done", "--optimizer-state o"],
    ),
    (["--weights", "w", "--out", "taken"], ["--out taken", "--overwrite"]),
    (["--weights", "w", "--out", "o"], ["--out o", "writable"]),
    (["--weights", "w", "--out", "w"], ["--out w", "move the file"]),
    ([], ["--weights"]),
]


@pytest.mark.parametrize("flags, parts", BAD, ids=lambda x: "-".join(map(str, x))[:50])
def test_files_that_do_not_fit_are_refused(cli, exported, text_file, tmp_path, flags, parts):
    weights = load_file(exported / "w.safetensors")
    save_file(weights, tmp_path / "w")
    save_file(load_file(exported / "o.safetensors"), tmp_path / "o")
    (tmp_path / "text").write_text("not weights")
    save_file({n: p for n, p in weights.items() if n != "ln_f.bias"}, tmp_path / "short")
    save_file({**weights, "extra.weight": np.ones(3, np.float32)}, tmp_path / "more")
    save_file({**weights, "ln_f.bias": weights["ln_f.bias"] * np.nan}, tmp_path / "nan")
    save_file({**weights, "ln_f.bias": weights["ln_f.bias"].astype(np.int32)}, tmp_path / "int")
    save_file({**weights, "wte.weight": weights["token_emb.weight"]}, tmp_path / "twice")
    save_file({n: p.astype(np.float64) for n, p in weights.items()}, tmp_path / "wide")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text("{}")
    args = ["import", "--dataset", f"file:{text_file}", "--steps=60", "--out", "run", *SMALL, *flags]
    before = sorted(p.name for p in tmp_path.iterdir())
    done = cli("convert", *args, cwd=tmp_path)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_export_refuses(cli, trained, tmp_path):
    (tmp_path / "there").touch()
    for args, part in (
        (["export", trained, "--out", "there"], "exists already"),
        (["export", trained, "--out", "no/where"], "no such folder"),
        (["export", trained, "--out", "a", "--optimizer-state", tmp_path / "a"], "same file"),
        (["export", trained, "--out", trained / "config.json", "--overwrite"], "lies in the run"),
        (["export", trained, "--out", "a" * 300], "cannot be written"),
        (["export", "nothing", "--out", "a"], "no run here"),
        (["export"], "RUN"),
        ([], "give import or export"),
    ):
        done = cli("convert", *args, cwd=tmp_path)
        assert done.returncode == 2 and part in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["there"]
