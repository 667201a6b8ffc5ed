"""`jaxgpt generate`: prompts, seeds, several samples, stop strings, prompts from standard input."""

import json
import re
import signal
import subprocess

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


@pytest.mark.slow
def test_several_prompts_as_json(cli, trained, text, tmp_path):
    """Prompts of different lengths in one batch: each text is what its prompt gives alone."""
    prompts = [text[:2], text[10:21], text[30:33]]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    flags = [trained, "--temperature=0", "--max-new-tokens=5", "--stop=zz"]
    together = cli("generate", *flags, "--prompts-file", file, "--json")
    assert together.returncode == 0, together.stderr
    found = [json.loads(line) for line in together.stdout.splitlines()]
    assert [one["prompt"] for one in found] == prompts
    for one in found:
        assert (one["tokens"], one["finish_reason"], one["seed"]) == (5, "length", 1337)
    alone = cli("generate", *flags, "--prompt", prompts[1])
    assert alone.stdout == f"{prompts[1]}{found[1]['text']}\n"
    several = cli("generate", *flags, "--prompt", prompts[0], "--prompt", prompts[1])
    assert several.stdout == "".join(
        f"--- prompt {i} ---\n{one['prompt']}{one['text']}\n" for i, one in enumerate(found[:2], 1)
    )


def test_interactive_goes_on_after_a_bad_prompt(cli, trained, text):
    flags = [trained, "--interactive", "--max-new-tokens=5", "--temperature=0"]
    done = cli("generate", *flags, stdin=f"{text[:3]}\n\n\u4e16\n{text[:3]}\n")
    first, second = done.stdout.splitlines()
    assert done.returncode == 0 and first == second and first.startswith(text[:3]) and len(first) == 8
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["error", "error"]


@pytest.mark.slow
def test_a_process_stops_before_a_string_and_ends_with_its_input_or_ctrl_c(start, command, trained, text):
    """A stop string that the text is known to hold; then Ctrl-C while the process waits for a prompt."""
    whole = command("generate.py", trained, "--prompt", text[:3], "--max-new-tokens=40").stdout
    stop = whole[20:23]
    done = command("generate.py", trained, "--prompt", text[:3], "--max-new-tokens=40", "--stop", stop)
    assert done.returncode == 0 and done.stdout == text[:3] + whole[3 : whole.index(stop, 3)] + "\n"
    process = start("generate.py", trained, "--interactive", "--max-new-tokens=4", stdin=subprocess.PIPE)
    process.stdin.write(text[:3] + "\n")
    process.stdin.flush()
    assert process.stdout.readline().startswith(text[:3])
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and not rest.strip(), rest
