"""jaxgpt inspect on a trained run: what it prints, and the pictures it writes."""

import json
import shutil

import matplotlib.image


def lines(done):
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout.splitlines()


def picture(path):
    """The pixels of a picture that has more than one color."""
    pixels = matplotlib.image.imread(path)
    assert pixels.std() > 0.01 and pixels.shape[1] >= 400
    return pixels


def test_gradients(cli, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")  # the picture goes into it
    printed = lines(cli("inspect", run, "--gradients"))
    header, rows = printed[0].split(), printed[1:-3]
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
    assert "20 healthy, 0 vanishing, 0 exploding, 1 zero by design" in printed[-3] and "1e-08" in printed[-2]
    pixels = picture(run / "inspect" / "gradients.png")
    height, width, _ = pixels.shape
    blank = (pixels[height // 5 : height // 2, :, :3] == 1).all(axis=(0, 2))  # columns, beside the panels' rows
    gaps = "".join("x "[int(b)] for b in blank).split("x")
    assert max(map(len, gaps)) < 0.1 * width  # the panels fill the width


def test_gradients_after_a_rate_of_0(cli, trained, tmp_path):
    """At the end of a cosine schedule there is no update to show, and a line says so."""
    run = shutil.copytree(trained, tmp_path / "run")
    for name, changed in (("config.json", {"schedule": "cosine"}), ("data.json", {"format": 1})):
        (run / name).write_text(json.dumps(json.loads((run / name).read_text()) | changed))
    for path in run.rglob("manifest.json"):  # format 1 had none; with one, another configuration is refused
        path.unlink()
    printed = lines(cli("inspect", run, "--gradients"))
    assert "rate at step 60 is 0" in printed[-2]
    picture(run / "inspect" / "gradients.png")


def test_attention(cli, trained, text, tmp_path):
    out = tmp_path / "maps.png"
    printed = lines(cli("inspect", trained, "--attention", text[:12], "--out", out))
    assert printed == ["tokens: 12, layers: 1, heads of each: 2", f"picture: {out}"]
    picture(out)


def test_surprisal(cli, trained, text, tmp_path):
    sure, odd = text[:16], text[:7] + "\U0001f600" + text[8:16]  # the last character of the text, where none follows
    losses = []
    for words in (sure, odd):
        printed = lines(cli("inspect", trained, "--surprise", words, "--out", tmp_path / "s.png"))
        assert words.replace(" ", "\u2423") in printed[0]
        assert printed[2].startswith("tokens predicted: 15, loss ")
        losses.append(float(printed[2].split("loss ")[1].split(",")[0]))
        picture(tmp_path / "s.png")
    assert losses[1] > losses[0] + 0.3
    assert printed[3].split()[:3] == ["token", "8", "\U0001f600"]


def test_graph(cli, trained, tmp_path):
    """Both levels. Without Graphviz the .dot is written, and a line says so."""
    sizes = {}
    for level in ("block", "op"):
        printed = lines(cli("inspect", trained, "--graph", tmp_path / "g.svg", "--level", level, PATH=str(tmp_path)))
        assert "Graphviz is not installed" in printed[0] and printed[1] == f"graph: {tmp_path / 'g.dot'}"
        dot = (tmp_path / "g.dot").read_text()
        assert "attn.Wq" in dot and "->" in dot and dot.startswith("digraph")
        sizes[level] = dot.count("->")
        (tmp_path / "g.dot").unlink()
    assert 10 < sizes["block"] < sizes["op"] / 4
    assert not list(tmp_path.iterdir())
