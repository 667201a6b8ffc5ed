"""`jaxgpt generate`: prompts, seeds, and several samples."""

import re

import pytest


def test_the_command_writes_the_sample_of_training(cli, trained, text):
    sample = (trained / "sample.txt").read_text()
    done = cli("generate", trained, "--prompt", sample[0], "--max-new-tokens=20")
    assert done.returncode == 0, done.stderr
    assert done.stdout == sample


def test_the_command_past_the_block_and_options(cli, trained, text):
    args = ["--prompt", text[:40], "--max-new-tokens=50", "--temperature=0.7", "--top-k=5", "--top-p=0.9", "--seed=3"]
    done = cli("generate", trained, *args, "--checkpoint=best")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(text[:40]) and len(done.stdout) == 40 + 50 + 1
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_command_writes_several_samples(cli, trained, text, temperature):
    """More than are computed at once; each is what the command gives for its seed alone."""
    args = [trained, "--prompt", text[:3], "--max-new-tokens=20", f"--temperature={temperature}"]
    done = cli("generate", *args, "--seed=5", "--samples=34")
    assert done.returncode == 0, done.stderr
    parts = re.split(r"^--- seed (\d+) ---\n", done.stdout, flags=re.MULTILINE)
    assert parts[0] == "" and parts[1::2] == [str(seed) for seed in range(5, 5 + 34)]
    texts = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert len(set(texts.values())) == (1 if temperature == 0 else 34)
    for seed in ("5", "38"):
        assert cli("generate", *args, f"--seed={seed}").stdout == texts[seed]
