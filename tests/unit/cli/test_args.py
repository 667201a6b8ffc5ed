"""Parsing of command lines, and the messages of tyro."""

import dataclasses
import io
import shlex
import sys

import pytest

from jaxgpt.cli.args import TrainFlags, config_of, parse_flags, parse_train_flags, train_command
from jaxgpt.cli.finetune import FinetuneFlags
from jaxgpt.cli.plan import PlanFlags
from jaxgpt.config import FinetuneConfig, ModelConfig, TrainConfig
from jaxgpt.errors import UserError
from jaxgpt.presets import PRESETS


def parse(*args):
    return parse_train_flags(list(args), "Train.", "jaxgpt train")


def test_a_preset_gives_the_defaults():
    flags = parse("--preset", "tinygpt", "--lr", "0.5")
    assert flags.steps == PRESETS["tinygpt"].steps
    assert flags.lr == 0.5


def test_the_configuration_in_the_flags():
    config = config_of(TrainFlags(seed=3, overwrite=True))
    assert config == TrainConfig(seed=3)
    assert type(config) is TrainConfig


def test_a_batch_in_tokens():
    assert config_of(parse("--batch-tokens", "1024", "--model.block-size", "64")).batch_size == 16
    assert config_of(parse("--model.block-size", "64")).batch_size == TrainConfig().batch_size
    accumulated = parse("--batch-tokens", "12288", "--grad-accum", "3")  # 96 rows; the preset's 32 have no third
    assert accumulated.batch_size == config_of(accumulated).batch_size == 96


def test_a_batch_in_tokens_of_a_plan_and_of_texts():
    plan = parse_train_flags(["--preset", "gpt2", "--batch-tokens", "65536"], None, "jaxgpt plan", PlanFlags)
    assert plan.batch_size == 64

    def finetune(*args):
        return parse_flags(FinetuneFlags, ["RUN", *args], None, "jaxgpt finetune")

    assert finetune("--batch-tokens", "2048", "--max-tokens", "16").batch_size == 128
    assert finetune().batch_size == FinetuneConfig.batch_size
    with pytest.raises(UserError, match="^--batch-tokens 100: no multiple of --max-tokens 64; give one, as 128$"):
        finetune("--batch-tokens", "100")
    with pytest.raises(UserError, match="^--batch-tokens 128: --batch-size 4 is another; give one of both$"):
        finetune("--batch-tokens", "128", "--batch-size", "4")


@pytest.mark.parametrize(
    "args, message",
    [
        (["--stepz", "5"], "Unrecognized options: --stepz, 5 Perhaps you meant: --steps INT"),
        (["--steps"], "Missing value for argument '--steps'. Expected 1 values."),
        (["--steps", "many"], "Error parsing --steps: 'many': give a whole number, in at most 18 digits 0 to 9"),
        (
            ["--optimizer", "lion"],
            "invalid choice 'lion' for argument '--optimizer'. Expected one of ('adamw', 'adam',",
        ),
        (["surplus"], "Unrecognized options: surplus"),
    ],
)
def test_a_message_of_tyro_is_one_plain_line(args, message):
    with pytest.raises(UserError) as e:
        parse(*args)
    text = str(e.value)
    assert text.startswith(message)
    assert not set("│╭╮╰╯─\n\x1b") & set(text)
    assert "full helptext" not in text


# Python's int and float take these; the last of each are too long, and hexadecimal.
NO_INTEGERS = ["\u0663", "1_000", " 7", "7 ", "7\n", "\uff17", "", "1.0", "1" * 19]
NO_NUMBERS = ["\u0663", "1_0.5", " 1", "1 ", "\uff17", "", ".", "infinity", "0x1"]


@pytest.mark.parametrize(
    "option, text",
    [
        *((option, text) for option in ("--seed", "--model.n-layer") for text in NO_INTEGERS),
        *((option, text) for option in ("--lr", "--weight-decay", "--model.dropout") for text in NO_NUMBERS),
    ],
)
def test_numbers_are_ascii_digits(option, text):
    with pytest.raises(UserError, match=f"(?s)Error parsing {option}.*: give a .*number, in .*digits 0 to 9"):
        parse(f"{option}={text}")


def test_numbers_in_their_usual_forms():
    flags = parse("--seed=+7", "--lr=1e-3", "--weight-decay=.5", "--eps=1.", "--clip=2E+0", "--min-lr=0")
    assert (flags.seed, flags.lr, flags.weight_decay, flags.eps, flags.clip, flags.min_lr) == (7, 1e-3, 0.5, 1, 2, 0)
    with pytest.raises(UserError, match="--lr inf: give a positive number"):
        parse("--lr", "inf")


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_both_frames_of_tyro_are_removed(monkeypatch, encoding):
    """tyro draws its frame with the characters that standard output can encode."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with pytest.raises(UserError) as e:
        parse("surplus")
    assert str(e.value) == "Unrecognized options: surplus"


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match="--preset minigtp: unknown preset; .*; did you mean minigpt?"):
        parse("--preset", "minigtp")


def test_the_command_of_a_configuration_gives_it_again(tmp_path):
    """Also where a value is None or a switch is off, and the preset says otherwise."""
    recipe = dict(lr=1e-3, weight_decay=None, prompt=None, dtype="float64", dataset="file:/a b.txt", tokenizer="gpt2")
    model = ModelConfig(n_layer=2, n_head=3, n_embd=48, bias=False, tied_head=True, gelu="tanh", layer_norm_eps=1e-6)
    for preset in ("minigpt", "gpt2"):
        config = dataclasses.replace(PRESETS[preset], model=model, **recipe)
        program, command, *words = shlex.split(train_command(config, tmp_path))
        flags = parse_train_flags(words, None, "jaxgpt train")
        assert (program, command, config_of(flags), flags.out_dir) == ("jaxgpt", "train", config, tmp_path)
