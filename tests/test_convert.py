"""Runs to weights and back through the real commands, and the errors of files that do not fit."""

import json

import numpy as np
import pytest
from conftest import SMALL, read_state
from safetensors.numpy import load_file, save_file

from jaxgpt import convert
from jaxgpt.errors import UserError


@pytest.fixture(scope="module")
def exported(command, trained, tmp_path_factory):
    """The trained run's weights and optimiser state as files."""
    folder = tmp_path_factory.mktemp("exported")
    done = command(
        "convert.py",
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


def imports(command, text_file, out, *flags, small=SMALL):
    return command("convert.py", "import", "--dataset", f"file:{text_file}", "--out", out, *small, *flags)


def test_names_and_layout_are_torch_s(exported, trained):
    weights, state = load_file(exported / "w.safetensors"), load_file(exported / "o.safetensors")
    checkpoint = read_state(trained, 60)
    kernel = checkpoint["params"]["blocks.0.mlp.fc.kernel"]
    np.testing.assert_array_equal(weights["blocks.0.ff.0.weight"], kernel.T)
    assert weights["blocks.0.ff.0.weight"].shape == (64, 16)
    assert set(state) == {"step"} | {f"{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name in weights}
    assert state["step"] == 60 and all(p.dtype == np.float32 for p in weights.values())


def test_there_and_back_is_bitwise_and_evaluates_the_same(command, exported, trained, text_file, tmp_path):
    done = imports(command, text_file, tmp_path / "run", "--weights", exported / "w.safetensors", "--steps=60")
    assert done.returncode == 0, done.stderr
    figures = [json.loads(command("evaluate.py", run, "--json").stdout) for run in (trained, tmp_path / "run")]
    assert figures[0] == figures[1]
    assert command("generate.py", tmp_path / "run", "--prompt", "la", "--max-new-tokens=5").returncode == 0
    done = command("convert.py", "export", tmp_path / "run", "--out", tmp_path / "w.safetensors")
    assert done.returncode == 0 and "after 0 steps" in done.stdout
    assert (tmp_path / "w.safetensors").read_bytes() == (exported / "w.safetensors").read_bytes()


def test_training_goes_on_bit_for_bit(command, exported, text_file, tmp_path):
    """60 steps, files, 20 more: as 80 without a break."""
    files = ("--weights", exported / "w.safetensors", "--optimizer-state", exported / "o.safetensors")
    assert imports(command, text_file, tmp_path / "across", *files, "--steps=80").returncode == 0
    for run in ("across", "whole"):
        done = command("train.py", "--dataset", f"file:{text_file}", "--steps=80", "--out-dir", tmp_path / run, *SMALL)
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
def test_what_does_not_fit_is_told_in_one_line(command, exported, text_file, tmp_path, flags, parts):
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
    done = command("convert.py", *args, cwd=tmp_path)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_export_refuses(command, trained, tmp_path):
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
        done = command("convert.py", *args, cwd=tmp_path)
        assert done.returncode == 2 and part in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_an_import_that_is_interrupted_leaves_no_run(monkeypatch, exported, text_file, tmp_path):
    """Else training would go on from other weights than the file's, without a word."""
    from jaxgpt import checkpoint, exchange
    from jaxgpt.config import ModelConfig, TrainConfig
    from jaxgpt.datasets import load_corpus

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", interrupted)
    corpus = load_corpus(f"file:{text_file}", None, print)
    model = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16)
    config = TrainConfig(dataset=corpus.name, batch_size=8, model=model)
    with pytest.raises(KeyboardInterrupt):
        exchange.import_run(config, corpus, exported / "w.safetensors", None, tmp_path / "run", False, print)
    assert not (tmp_path / "run" / "config.json").exists() and not (tmp_path / "run" / "checkpoints").exists()


def gpt2_weights(conv1d: bool, prefix: str) -> dict[str, np.ndarray]:
    """One block's weights under GPT-2's names, C = 4; every number says where it was."""
    C, draw = 4, np.random.default_rng(0)

    def matrix(n_in: int, n_out: int) -> np.ndarray:
        p = draw.standard_normal((n_in, n_out)).astype(np.float32)
        return p if conv1d else np.ascontiguousarray(p.T)

    shapes = {"attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C), "mlp.c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C)}
    weights = {f"transformer.h.0.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
    weights |= {f"transformer.h.0.{name}.bias": np.arange(n_out) for name, (_, n_out) in shapes.items()}
    for name in ("h.0.ln_1", "h.0.ln_2", "ln_f"):
        weights |= {f"transformer.{name}.{part}": np.ones(C) for part in ("weight", "bias")}
    weights["transformer.wte.weight"] = weights["lm_head.weight"] = draw.standard_normal((7, C))
    weights["transformer.wpe.weight"] = draw.standard_normal((5, C))
    weights["transformer.h.0.attn.bias"] = np.ones((1, 1, 5, 5))  # the causal mask, a buffer
    return {prefix + name: p for name, p in weights.items()}


def test_gpt2_names():
    theirs = convert.writeup_names(gpt2_weights(True, ""))
    nanogpt = convert.writeup_names(gpt2_weights(False, "_orig_mod."))
    assert set(theirs) == set(nanogpt) and "lm_head.weight" not in theirs and len(theirs) == 2 + 16 + 2
    for name, p in theirs.items():
        np.testing.assert_array_equal(nanogpt[name], p)
    fused = gpt2_weights(True, "")["transformer.h.0.attn.c_attn.weight"]
    np.testing.assert_array_equal(theirs["blocks.0.attn.Wk.weight"], fused[:, 4:8].T)
    np.testing.assert_array_equal(theirs["blocks.0.attn.Wv.bias"], np.arange(8, 12))
    untied = gpt2_weights(True, "") | {"lm_head.weight": np.ones((7, 4))}
    assert "lm_head.weight" in convert.writeup_names(untied)


def test_the_step_must_be_one_whole_number():
    like = {"count": np.int32(0)}
    for step in (np.array([1, 2]), np.array(1.5), np.array(-1)):
        with pytest.raises((UserError, AssertionError)):
            convert.optimizer_from_torch({"step": step}, like)
