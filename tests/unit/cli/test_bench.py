"""The flags of `jaxgpt bench`."""

import pytest

import jaxgpt
from jaxgpt.cli.bench import parse_flags


@pytest.mark.parametrize(
    "args, part",
    [
        (["--preset", "gpt9"], "--preset gpt9"),
        (["--sides", "eager"], "--sides eager"),
        (["--sides", "ours,tensorflow"], "--sides ours,tensorflow"),
        (["--rounds", "0"], "--rounds"),
        (["--rounds", "many"], "--rounds"),
        (["--rounds", "\u0663"], "--rounds: invalid integer value"),
        (["--batch-size", "1_0"], "--batch-size: invalid integer value"),
        (["--turn-seconds", " 1"], "--turn-seconds: invalid number value"),
        (["--json", "no/where.json"], "--json no/where.json"),
        (["--picture", "no/where.png"], "--picture no/where.png"),
        (["--torch-python", "no/python"], "--torch-python no/python"),
        (["--sides", "ours,eager", "--torch-python", "/bin/false"], "--sides ours,eager"),
        (["--torch-python", "/etc/passwd"], "--torch-python /etc/passwd"),
        (["--turn-seconds", "nan"], "--turn-seconds"),
        (["--batch-size", "0"], "--batch-size"),
        (["--json", "."], "--json ."),
        (["--docs", "--batch-size", "2"], "--docs"),
        (["--loop", "0"], "--loop 0"),
        (["--loop", "10", "--growth"], "--growth: has no meaning with --loop"),
        (["--loop", "10", "--rounds", "3"], "--rounds: has no meaning with --loop"),
        (["--loop", "10", "--preset", "gpt2-124m"], "--preset gpt2-124m: only timed"),
        (["--tune-cpu", "--growth"], "--growth: has no meaning with --tune-cpu"),
        (["--tune-cpu", "--loop", "10"], "--loop: has no meaning with --tune-cpu"),
        (["--tune-cpu", "--docs"], "--docs: has no meaning with --tune-cpu"),
        (["--tune-cpu", "--batch-size", "3"], "--batch-size 3: does not divide"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_refuses(cli, args, part):
    done = cli("bench", *args)
    assert done.returncode == 2 and part in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_defaults_depend_on_what_is_measured():
    plain, tuning = parse_flags([]), parse_flags(["--tune-cpu"])
    assert (plain.preset, plain.rounds) == (["minigpt"], 12)
    assert (tuning.preset, tuning.rounds) == (["minigpt", "nanogpt-cpu"], 6)


def test_help_is_in_the_words_of_the_entry_point(cli):
    done = cli("bench", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: jaxgpt bench") and "--tune-cpu" in done.stdout


def test_tune_cpu_needs_a_cpu_of_several_devices(cli, monkeypatch):
    import jax

    device = jax.local_devices()[0]
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    done = cli("bench", "--tune-cpu")
    assert done.returncode == 2 and "one CPU device" in done.stderr


def test_outside_a_checkout_it_says_what_is_missing(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(jaxgpt, "__file__", str(tmp_path / "site-packages" / "jaxgpt" / "__init__.py"))
    done = cli("bench")
    assert done.returncode == 2 and done.stderr.startswith("error: benchmarks/ is not installed with jaxgpt")
