"""The flags of `jaxgpt plan`, its output and its JSON."""

import json

import pytest

from jaxgpt.analysis.targets import Target
from jaxgpt.cli.plan import vocab_size

TINY = "--model.n-layer=1 --model.n-head=2 --model.n-embd=16 --model.block-size=16 --batch-size=8".split()
KEYS = {
    *("target", "devices", "fits", "bytes_per_device", "flash_attention", "float32_products", "collectives"),
    *("donated", "flop_per_device", "estimated"),
}


@pytest.mark.parametrize(
    "args, part",
    [
        ([], "--target: missing; give one of v4"),
        (["--target", "v5"], "--target v5: unknown chip"),
        (["--target", "v5e:2x2", "--batch-size", "6"], "--batch-size 6: not divisible by the 4 devices"),
        (["--target", "v5e:2x2", "--mesh", "data=3"], "--mesh data=3: is not a mesh of the 4 devices"),
        (["--target", "v5e:2x2", "--mesh", "data=2,fsdp=4"], "--mesh data=2,fsdp=4: is not a mesh of the 4 devices"),
        (["--target", "v5e:2x2", "--mesh", "2,2"], "--mesh 2,2: '2' cannot be read"),
        (["--target", "H100", "--json", "plan.txt"], "--json plan.txt"),
        (["--target", "H100", "--json", "no/where.json"], "--json no/where.json"),
        (["--target", "H100", "--parallel", "pmap"], "--parallel pmap"),
        (["--target", "H100", "--dtype", "float64"], "--dtype float64"),
        (["--target", "H100", "--tokens", "0"], "--tokens 0"),
        (["--target", "H100", "--tokens", "inf"], "--tokens inf"),
        (["--target", "H100", "--vocab-size", "-1"], "--vocab-size -1"),
    ],
)
def test_refuses(cli, args, part):
    done = cli("plan", *args)
    assert done.returncode == 2 and part in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_prints_and_writes_a_plan(cli, monkeypatch, tmp_path):
    monkeypatch.setattr(Target, "compiler_is_installed", False)
    path = tmp_path / "plan.json"
    done = cli("plan", "--preset", "tinygpt", *TINY, "--target", "A100:4", "--mesh", "data=4", "--json", path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("tinygpt on A100:4: 4 devices of 85.9 GB, batch 8 (jax ")
    assert "flash attention: 1 forward and 1 backward in 1 layers\n" in done.stdout
    found = json.loads(path.read_text())
    assert KEYS <= set(found) and (found["target"], found["devices"], found["batch_size"]) == ("A100:4", 4, 8)


@pytest.mark.parametrize("tokenizer, n", [("gpt2", 50257), ("byte", 256), ("char", 65), ("bpe:300", 300)])
def test_the_vocabulary_of_a_tokenizer(tokenizer, n):
    assert vocab_size(tokenizer) == n
