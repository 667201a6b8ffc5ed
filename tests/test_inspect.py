"""Looking into a run through the real command: what it prints, the pictures it leaves, and what it refuses."""

import json
import shutil
import subprocess
import sys

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
from conftest import ROOT, SMALL

from jaxgpt import diagnostics
from jaxgpt.diagnostics import Flow


def lines(done):
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout.splitlines()


def picture(path):
    """Its pixels: something was drawn, and not one colour."""
    pixels = matplotlib.image.imread(path)
    assert pixels.std() > 0.01 and pixels.shape[1] >= 400
    return pixels


def test_gradients(command, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")  # the picture goes into it
    told = lines(command("inspect.py", run, "--gradients"))
    header, rows = told[0].split(), told[1:-3]
    assert header[:2] == ["tensor", "shape"]
    table = {row.split()[0]: row.split()[1:] for row in rows}
    assert len(table) == len(rows) == 2 + 16 + 3
    assert list(table)[:3] == ["token_emb.embedding", "pos_emb.embedding", "blocks.0.ln1.scale"]
    assert list(table)[-1] == "lm_head.kernel"
    for name, (shape, *figures, verdict) in table.items():
        assert all(int(n) > 0 for n in shape.split("x"))
        if name == "blocks.0.attn.Wk.bias":
            assert verdict == "design" and float(figures[0]) < 1e-7
        else:
            assert verdict == "healthy" and 1e-8 < float(figures[0]) < 1 and 0 < float(figures[2]) < 1
    assert "20 healthy, 0 vanishing, 0 exploding, 1 zero by design" in told[-3] and "1e-08" in told[-2]
    pixels = picture(run / "inspect" / "gradients.png")
    height, width, _ = pixels.shape
    blank = (pixels[height // 5 : height // 2, :, :3] == 1).all(axis=(0, 2))  # columns, beside the panels' rows
    gaps = "".join("x "[int(b)] for b in blank).split("x")
    assert max(map(len, gaps)) < 0.1 * width  # the panels fill the width


def test_verdicts():
    def verdict(name, mean_abs):
        return Flow(name, (3,), mean_abs, mean_abs, 1e-3).verdict

    assert verdict("lm_head.kernel", 1e-4) == "healthy"
    assert verdict("lm_head.kernel", 0.9e-8) == verdict("lm_head.kernel", 0.0) == "vanishing"
    for broken in (1.1, float("inf"), float("nan")):
        assert verdict("lm_head.kernel", broken) == verdict("blocks.0.attn.Wk.bias", broken) == "exploding"
    flows = [Flow("ln_f.bias", (3,), float("nan"), float("nan"), float("inf"))]
    record = json.loads(json.dumps(diagnostics.record(7, flows), allow_nan=False))
    assert record["exploding"] == ["ln_f.bias"] and record["tensors"]["ln_f.bias"]["mean_abs"] is None


def test_gradients_after_a_rate_of_0(command, text_file, tmp_path):
    """The end of a cosine: no update is left to show, and that is said."""
    line = ("--dataset", f"file:{text_file}", *SMALL, "--steps=2", "--schedule=cosine", "--out-dir", tmp_path / "run")
    assert command("train.py", *line).returncode == 0
    told = lines(command("inspect.py", tmp_path / "run", "--gradients"))
    assert "rate at step 2 is 0" in told[-2]
    picture(tmp_path / "run" / "inspect" / "gradients.png")


def test_gradients_that_have_no_place_on_the_axis(tmp_path, recwarn):
    from jaxgpt import diagrams

    flows = [
        Flow(f"blocks.{i}.ln1.bias", (3,), value, value, value) for i, value in enumerate((0.0, float("nan"), 1e-3))
    ]
    drawn = {}
    for name, chosen in {"all": flows, "none": flows[:2], "one": flows[2:]}.items():
        diagrams.gradient_flow(tmp_path / "g.png", name, chosen)
        drawn[name] = picture(tmp_path / "g.png")
    blue, red = (np.array(matplotlib.colors.to_rgb(c)) for c in ("tab:blue", "tab:red"))
    for colour in (blue, red):  # the vanishing and the exploding one are to be seen
        seen = {name: (np.abs(p[..., :3] - colour).max(-1) < 0.02).sum() for name, p in drawn.items()}
        assert seen["all"] > 20 and seen["none"] > 20 and seen["one"] == 0
    assert not recwarn.list and not list(tmp_path.glob("*.partial"))


def test_attention(command, trained, text, tmp_path):
    out = tmp_path / "maps.png"
    told = lines(command("inspect.py", trained, "--attention", text[:12], "--out", out))
    assert told == ["tokens: 12, layers: 1, heads of each: 2", f"picture: {out}"]
    picture(out)


def test_surprise(command, trained, text, tmp_path):
    sure, odd = text[:16], text[:7] + "\U0001f600" + text[8:16]  # the last character of the text, where none follows
    losses = []
    for words in (sure, odd):
        told = lines(command("inspect.py", trained, "--surprise", words, "--out", tmp_path / "s.png"))
        assert words.replace(" ", "\u2423") in told[0]
        assert told[2].startswith("tokens foretold: 15, loss ")
        losses.append(float(told[2].split("loss ")[1].split(",")[0]))
        picture(tmp_path / "s.png")
    assert losses[1] > losses[0] + 0.3
    assert told[3].split()[:3] == ["token", "8", "\U0001f600"]


def test_graph(command, trained, tmp_path):
    """Without Graphviz its text is written, and that is said; block by block and every operation."""
    sizes = {}
    for level in ("block", "op"):
        told = lines(
            command("inspect.py", trained, "--graph", tmp_path / "g.svg", "--level", level, PATH=str(tmp_path))
        )
        assert "Graphviz is not installed" in told[0] and told[1] == f"graph: {tmp_path / 'g.dot'}"
        dot = (tmp_path / "g.dot").read_text()
        assert "attn.Wq" in dot and "->" in dot and dot.startswith("digraph")
        sizes[level] = dot.count("->")
        (tmp_path / "g.dot").unlink()
    assert 10 < sizes["block"] < sizes["op"] / 4
    assert not list(tmp_path.iterdir())


def test_surprise_is_the_loss(trained, text):
    """Over a text, the mean of -log of what it prints is the loss of the model."""
    from jaxgpt.trained import open_trained

    run, executor, state = open_trained(trained, "result")
    ids_T = run.tokenizer.encode(text[:16])
    found = diagnostics.surprise(executor.program, state.params, ids_T)
    total, count = executor.program.loss_sum(state.params, ids_T[None, :-1], ids_T[None, 1:], None)
    assert -np.log(found.probability_T).mean() == pytest.approx(float(total / count), rel=1e-5)
    assert (np.diff(found.likeliest_probability_TK, axis=1) <= 0).all()
    maps = diagnostics.attention_maps(executor.program, state.params, ids_T)
    assert maps.shape == (1, 2, 16, 16)
    np.testing.assert_allclose(maps.sum(-1), 1, rtol=1e-5)
    assert not np.triu(maps, 1).any()


@pytest.mark.parametrize(
    "flags, parts",
    [
        ([], ["RUN", "nothing to look at", "--gradients"]),
        (["--gradients", "--surprise", "la"], ["--gradients and --surprise"]),
        (["--attention", ""], ["--attention ''", "at least 1"]),
        (["--surprise", "l"], ["--surprise 'l'", "at least 2"]),
        (["--attention", "la ti mo la ti mo"], ["--attention", "17 tokens", "block is 16", "shorten"]),
        (["--surprise", "lax"], ["--surprise", "'x'", "not in the vocabulary"]),
        (["--attention", "la", "--out", "/tmp"], ["--out /tmp", ".png"]),
        (["--attention", "la", "--out", "maps.jpg"], ["--out maps.jpg", ".png"]),
        (["--attention", "la", "--out", "no/such/maps.png"], ["--out no/such/maps.png", "does not exist"]),
        (["--attention", "la", "--data-dir", "x"], ["--data-dir", "--gradients"]),
        (["--gradients", "--checkpoint", "first"], ["--checkpoint"]),
        (["--gradients", "--level", "op"], ["--level", "--graph"]),
        (["--graph", "g.dot", "--out", "g.png"], ["--out", "--graph"]),
        (["--graph", "g.dot", "--checkpoint", "best"], ["--checkpoint"]),
        (["--graph", "g.pdf"], ["--graph g.pdf", ".svg"]),
        (["--graph", "no/such/g.svg"], ["--graph no/such/g.svg", "no such folder"]),
    ],
)
def test_bad_input(command, trained, tmp_path, flags, parts):
    before = sorted(trained.rglob("*"))
    done = command("inspect.py", trained, *flags, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout, done.stderr
    assert all(part in done.stderr for part in parts), done.stderr
    assert sorted(trained.rglob("*")) == before and not list(tmp_path.iterdir())


def test_no_run_and_a_folder_that_cannot_be_written(command, trained, tmp_path):
    done = command("inspect.py", tmp_path, "--gradients")
    assert done.returncode == 2 and "no run here" in done.stderr
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "inspect").write_text("in the way")
    done = command("inspect.py", run, "--attention", "la")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--out" in done.stderr


def test_the_standard_librarys_inspect_is_the_one_that_is_imported():
    """Commands have their own folder first among the places that modules come from, and a file `inspect.py` in it."""
    code = "import sys; sys.path.insert(0, {!r}); import inspect; print(inspect.getsource(inspect.getsource)[:3])"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code.format(str(ROOT / "scripts"))], capture_output=True, text=True
    )
    assert done.stdout == "def\n", done.stderr
