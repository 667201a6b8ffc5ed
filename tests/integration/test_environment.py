"""What surrounds a command: variables, limits, a full standard output. One line and exit code 2, nothing else."""

import subprocess
import sys

import pytest
from conftest import ROOT, SMALL, write_labeled


@pytest.fixture
def shell(user_env, tmp_path):
    """Runs a shell line in which `jaxgpt` is this checkout's; returns the exit code, and what stands on stderr."""

    def run(line, **env):
        script = f'jaxgpt() {{ "{sys.executable}" -m jaxgpt "$@"; }}\n{line}'
        env = {**user_env, "PYTHONPATH": str(ROOT), **env}
        shell = ["bash", "-c", script]
        done = subprocess.run(shell, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stderr

    return run


def check(done, *parts):
    code, err = done
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    for part in parts:
        assert part in err, err


FULL = "standard output: cannot be written (No space left on device)"


@pytest.mark.parametrize("args", ["--help", "train --help", "--version"])
def test_a_full_standard_output(shell, args):
    check(shell(f"jaxgpt {args} > /dev/full"), FULL)


def test_an_error_is_told_although_standard_output_is_full(shell):
    check(shell("jaxgpt evaluate nothing > /dev/full"), "RUN nothing: no run here")


@pytest.mark.slow
@pytest.mark.parametrize(
    "args", ["evaluate {}", "evaluate {} --json", "generate {} --prompt la", "inspect {} --surprise lala", "train"]
)
def test_a_result_that_cannot_be_printed(shell, trained, text_file, args):
    args = f"train --dataset file:{text_file} --out-dir run" if args == "train" else args.format(trained)
    check(shell(f"jaxgpt {args} > /dev/full"), FULL)


def test_a_closed_standard_output_or_error(shell):
    assert shell("jaxgpt --version >&-") == (0, "")
    assert shell("jaxgpt evaluate nothing 2>&-") == (2, "")
    assert shell("jaxgpt evaluate nothing 2> /dev/full") == (2, "")


@pytest.mark.slow
def test_a_reader_that_has_gone(shell, trained):
    assert shell(f"jaxgpt generate {trained} --prompt la --samples 3 | true; exit ${{PIPESTATUS[0]}}") == (141, "")


@pytest.mark.parametrize("kib", [200_000, 500_000, 1_000_000, 2_000_000])
def test_too_little_address_space(shell, kib):
    check(shell(f"ulimit -v {kib}; jaxgpt evaluate run"), f"ulimit -v {kib}", "at least 3145728")


def test_too_few_descriptors(shell):
    check(shell("ulimit -n 16; jaxgpt evaluate run"), "ulimit -n 16", "at least 64")


def test_help_needs_nothing(shell):
    assert shell("ulimit -n 16; ulimit -v 1000000; XLA_FLAGS=--nope jaxgpt train --help") == (0, "")


def test_a_working_directory_that_has_gone(shell):
    check(shell("mkdir gone; cd gone; rmdir ../gone; jaxgpt evaluate run"), "the working directory", "change to one")


@pytest.mark.parametrize("flags", ["--nope", "nope", " ", "--xla_force_host_platform_device_count=abc"])
def test_unknown_flags_of_xla(shell, flags):
    """XLA would end the process with a page of its flags."""
    check(shell("jaxgpt evaluate run", XLA_FLAGS=flags), f"XLA_FLAGS={flags.strip()}", "mend it, or unset it")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, value, part",
    [
        ("JAX_PLATFORMS", "nope", "not in the list of known backends"),
        ("JAX_PLATFORMS", "tpu", "JAX finds no such devices here"),
        ("JAX_ENABLE_X64", "maybe", "JAX does not start (invalid truth value 'maybe'"),
        ("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "x", "JAX does not start"),
        ("XLA_FLAGS", "--xla_force_host_platform_device_count=0", "JAX finds no such devices here"),
    ],
)
def test_variables_that_jax_refuses(shell, trained, name, value, part):
    check(shell(f"jaxgpt evaluate {trained}", **{name: value}), name, part)


@pytest.mark.slow
@pytest.mark.parametrize(
    "env",
    [{"HOME": "/proc"}, {"TMPDIR": "/nowhere"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}],
    ids=["read-only home", "no temporary folder", "ASCII"],
)
def test_a_poor_environment_is_enough(shell, text_file, env):
    flags = "--steps 2 --model.n-layer 1 --model.n-embd 16 --model.block-size 16 --eval-batches 1 --sample-tokens 5"
    assert shell(f"jaxgpt train --dataset file:{text_file} {flags} --out-dir run", **env) == (0, "")
    assert shell("unset HOME; jaxgpt evaluate run", **env) == (0, "")


@pytest.mark.slow
def test_commands_raise_no_warnings(shell, text_file, tmp_path):
    """With warnings as errors, and what the interpreter prints of one that it cannot raise."""
    write_labeled(tmp_path / "labeled.csv")
    data, small = f"--dataset file:{text_file}", " ".join([*SMALL, "--steps 2"])
    for line in (
        f"train {data} {small} --out-dir run --diagnose-every 1 --attention-every 1 --summary",
        f"train {data} {small} --out-dir pairs --tokenizer bpe:300 --dtype float64 --parallel pmap --packing chunks",
        "evaluate run --json",
        "generate run --prompt la --samples 2",
        "inspect run --gradients",
        "inspect run --surprise lala",
        "inspect run --graph graph.dot",
        "convert export run --out weights.safetensors --optimizer-state state.safetensors",
        f"convert import {data} {small} --weights weights.safetensors --out imported",
        "finetune run --dataset file:labeled.csv --epochs 1 --max-tokens 8 --out-dir classifier",
        "classify classifier la",
        f"compare {data} {small} --lr 1e-3,1e-4 --out-dir compared",
    ):
        assert shell(f"jaxgpt {line}", PYTHONWARNINGS="error") == (0, ""), line
