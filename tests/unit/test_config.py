"""Presets hold the documented values; bad values are refused with the flag and the remedy; JSON keeps all."""

import dataclasses
import json
import math

import pytest

from jaxgpt.config import (
    FinetuneConfig,
    ModelConfig,
    SamplingConfig,
    TrainConfig,
    differences,
    from_json,
    to_json,
)
from jaxgpt.errors import UserError
from jaxgpt.presets import BENCHMARKS, PRESETS

OTHERS = (True, 1e-5, 0.0)  # biases, LayerNorm's epsilon, dropout of attention weights


def test_tinygpt_is_as_documented():
    c = PRESETS["tinygpt"]
    assert dataclasses.astuple(c.model) == (4, 4, 64, 64, 0.0, False, "erf", "documented", *OTHERS)
    assert (c.batch_size, c.steps, c.lr, c.decay, c.decay_mask) == (32, 500, 3e-4, 0.01, "all")
    assert (c.beta1, c.beta2, c.eps, c.clip, c.schedule) == (0.9, 0.999, 1e-8, 1.0, "constant")
    assert (c.eval_every, c.eval_batches) == (50, 1)


def test_minigpt_is_as_documented():
    c = PRESETS["minigpt"]
    assert dataclasses.astuple(c.model) == (4, 4, 64, 128, 0.0, False, "erf", "documented", *OTHERS)
    assert (c.batch_size, c.steps, c.lr, c.decay, c.decay_mask) == (32, 5000, 3e-4, 0.01, "all")
    assert (c.beta1, c.beta2, c.eps, c.clip, c.schedule) == (0.9, 0.999, 1e-8, 0.0, "constant")
    assert (c.eval_every, c.eval_batches) == (500, 10)


def test_wikitext2_is_as_documented():
    c = PRESETS["wikitext2"]
    assert dataclasses.astuple(c.model) == (4, 8, 256, 128, 0.1, False, "erf", "documented", *OTHERS)
    assert (c.batch_size, c.steps, c.epochs, c.lr, c.decay, c.decay_mask) == (16, 2000, 20, 3e-4, 0.1, "matrices")
    assert (c.beta1, c.beta2, c.eps, c.clip) == (0.9, 0.95, 1e-8, 1.0)
    assert (c.schedule, c.warmup_steps, c.decay_steps, c.min_lr) == ("warmup-cosine", 200, 2000, 3e-5)
    assert (c.tokenizer, c.packing, c.min_chars, c.max_train_texts, c.max_val_texts) == ("gpt2", "chunks", 50, 500, 100)
    assert (c.eval_every, c.eval_batches) == (0, 0)  # after each epoch, the whole split
    assert (c.prompt, c.sample_tokens, c.sample_temperature, c.sample_top_k) == ("The history of", 50, 0.8, 40)


def test_nanogpts_are_as_published():
    """config/train_shakespeare_char.py over the defaults of train.py, and the README's command for a CPU."""
    c = PRESETS["nanogpt-char"]
    assert dataclasses.astuple(c.model) == (6, 6, 384, 256, 0.2, True, "erf", "gpt2", *OTHERS)
    assert (c.batch_size, c.steps, c.lr, c.decay, c.decay_mask) == (64, 5000, 1e-3, 0.1, "matrices")
    assert (c.beta1, c.beta2, c.eps, c.clip) == (0.9, 0.99, 1e-8, 1.0)
    assert (c.schedule, c.warmup_steps, c.cosine_end, c.min_lr) == ("warmup-cosine", 100, 5000, 1e-4)
    assert (c.dataset, c.tokenizer, c.packing, c.eval_every, c.eval_batches) == (
        "tinyshakespeare", "char", "windows", 250, 200
    )  # fmt: skip
    small = PRESETS["nanogpt-cpu"]
    assert dataclasses.astuple(small.model) == (4, 4, 128, 64, 0.0, True, "erf", "gpt2", *OTHERS)
    assert (small.batch_size, small.steps, small.cosine_end, small.eval_batches) == (12, 2000, 2000, 20)
    same = dict(preset=c.preset, model=c.model, batch_size=64, steps=5000, eval_batches=200)
    assert dataclasses.replace(small, **same) == c


def test_gpt2s_recipes_are_as_published():
    """llm.c's scripts/run_gpt2_124M.sh, _350M.sh, _774M.sh and _1558M.sh, over the defaults of its train_gpt2.cu."""
    tokens, rates = 524_288, {"gpt2": 6e-4, "gpt2-medium": 3e-4, "gpt2-large": 2.5e-4, "gpt2-xl": 6e-4}
    steps = {"gpt2": 18_865, "gpt2-medium": 60_000, "gpt2-large": 286_102, "gpt2-xl": 32_000}
    for name, lr in rates.items():
        c, is_largest = PRESETS[name], name == "gpt2-xl"
        assert (c.preset, c.tokens_per_step, c.steps) == (name, tokens * (1 + is_largest), steps[name])
        assert (c.lr, c.min_lr, c.warmup_steps, c.schedule) == (lr, 6e-5 * is_largest, 700, "warmup-cosine")
        assert (c.beta1, c.beta2, c.eps, c.clip, c.decay, c.decay_mask) == (0.9, 0.95, 1e-8, 1.0, 0.1, "matrices")
        assert (c.tokenizer, c.packing) == ("gpt2", "chunks")
        assert dataclasses.astuple(c.model)[3:] == (1024, 0.0, True, "tanh", "gpt2", *OTHERS)


def test_what_is_timed_is_what_is_trained():
    """Without dropout and at a constant rate, as each side of a benchmark has it."""
    for name, (timed, _) in BENCHMARKS.items():
        if name in PRESETS:
            model = dataclasses.replace(PRESETS[name].model, dropout=0.0)
            assert (timed.model, timed.batch_size, timed.schedule) == (model, PRESETS[name].batch_size, "constant")


@pytest.mark.parametrize(
    "build, flag, remedy",
    [
        (lambda: ModelConfig(n_embd=65), "--model.n-embd 65", "multiple of 4"),
        (lambda: ModelConfig(n_layer=0), "--model.n-layer 0", "at least 1"),
        (lambda: ModelConfig(block_size=-1), "--model.block-size -1", "at least 1"),
        (lambda: ModelConfig(dropout=1.0), "--model.dropout 1.0", "probability"),
        (lambda: TrainConfig(steps=0), "--steps 0", "at least 1"),
        (lambda: TrainConfig(steps=2**31), "--steps 2147483648", "at most 2147483647"),
        (lambda: TrainConfig(checkpoint_every=10**18), f"--checkpoint-every {10**18}", "at most 2147483647"),
        (lambda: ModelConfig(n_head=10**10), "--model.n-head 10000000000", "at most 2147483647"),
        (lambda: FinetuneConfig(epochs=2**31), "--epochs 2147483648", "at most 2147483647"),
        (lambda: SamplingConfig(top_k=2**31), "--top-k 2147483648", "at most 2147483647"),
        (lambda: TrainConfig(batch_size=-4), "--batch-size -4", "at least 1"),
        (lambda: TrainConfig(eval_every=0), "--eval-every 0", "at least 1; random windows"),
        (lambda: TrainConfig(epochs=2), "--epochs 2", "--packing chunks"),
        (lambda: TrainConfig(packing="documents"), "--packing documents", "--tokenizer gpt2"),
        (lambda: TrainConfig(tokenizer="gpt3"), "--tokenizer gpt3", "bpe:N"),
        (lambda: TrainConfig(tokenizer="bpe:12"), "--tokenizer bpe:12", "from 257"),
        (lambda: TrainConfig(tokenizer="bpe:²"), "--tokenizer bpe", "choose of"),
        (lambda: TrainConfig(min_chars=-1), "--min-chars -1", "at least 0"),
        (lambda: TrainConfig(lr=-1.0), "--lr -1.0", "positive"),
        (lambda: TrainConfig(lr=float("nan")), "--lr nan", "positive"),
        (lambda: TrainConfig(beta2=1.0), "--beta2 1.0", "not with, 1"),
        (lambda: TrainConfig(clip=-1.0), "--clip -1.0", "0 or a positive"),
        (lambda: TrainConfig(skip_spikes=0.5), "--skip-spikes 0.5", "0 or a number above 1"),
        (lambda: TrainConfig(skip_spikes=math.inf), "--skip-spikes inf", "0 or a number above 1"),
        (lambda: TrainConfig(weight_decay=-0.1), "--weight-decay -0.1", "0 or a positive"),
        (lambda: TrainConfig(warmup_steps=10), "--warmup-steps 10", "--schedule warmup-cosine"),
        (lambda: TrainConfig(min_lr=1e-5), "--min-lr 1e-05", "--schedule cosine"),
        (lambda: TrainConfig(momentum=0.9), "--momentum 0.9", "--optimizer sgd"),
        (lambda: TrainConfig(patience=-1), "--patience -1", "at least 0"),
        (lambda: TrainConfig(min_delta=0.1), "--min-delta 0.1", "--patience"),
        (lambda: TrainConfig(patience=1, min_delta=float("nan")), "--min-delta nan", "0 or a positive"),
        (lambda: TrainConfig(diagnose_every=-5), "--diagnose-every -5", "at least 0"),
        (lambda: TrainConfig(attention_every=-5), "--attention-every -5", "at least 0"),
        (lambda: TrainConfig(sample_every=-5), "--sample-every -5", "at least 0"),
        (lambda: TrainConfig(momentum=0.9, optimizer="adam"), "--momentum 0.9", "--optimizer sgd"),
        (lambda: TrainConfig(steps=10**8, schedule="cosine"), "--steps 100000000", "at most"),
        (lambda: TrainConfig(seed=-1), "--seed -1", "from 0"),
        (lambda: TrainConfig(prompt=""), "--prompt", "at least one character"),
        (lambda: TrainConfig(schedule="warmup-cosine", warmup_steps=5000), "--warmup-steps 5000", "lower it"),
        (lambda: TrainConfig(schedule="cosine", min_lr=1.0), "--min-lr 1.0", "lower it"),
        (lambda: SamplingConfig(temperature=-0.1), "--temperature -0.1", "positive"),
        (lambda: SamplingConfig(top_p=0.0), "--top-p 0.0", "above 0"),
        (lambda: SamplingConfig(top_k=-1), "--top-k -1", "at least 0"),
        (lambda: SamplingConfig(max_new_tokens=0), "--max-new-tokens 0", "at least 1"),
        (lambda: SamplingConfig(samples=0), "--samples 0", "at least 1"),
        (lambda: SamplingConfig(samples=1001), "--samples 1001", "at most 1000"),
        (lambda: SamplingConfig(samples=2, seed=2**31 - 1), "--samples 2", "or --seed"),
    ],
)
def test_bad_values_name_flag_and_remedy(build, flag, remedy):
    with pytest.raises(UserError) as e:
        build()
    assert flag in str(e.value) and remedy in str(e.value)


def test_weight_decay_defaults_to_that_of_torch():
    assert [TrainConfig(optimizer=name).decay for name in ("adamw", "adam", "sgd")] == [0.01, 0.0, 0.0]
    assert TrainConfig(optimizer="sgd", weight_decay=0.5).decay == 0.5


def test_json_round_trip_and_differences():
    config = dataclasses.replace(PRESETS["tinygpt"], lr=1e-3, model=ModelConfig(n_layer=2))
    back = from_json(json.loads(json.dumps(to_json(config))))
    assert back == config and differences(back, config) == []
    assert differences(config, dataclasses.replace(config, seed=1, model=ModelConfig(n_layer=3))) == [
        ("seed", 1337, 1),
        ("model.n_layer", 2, 3),
    ]


def test_json_of_an_earlier_version_takes_the_defaults_of_what_came_later():
    values = {k: v for k, v in to_json(TrainConfig()).items() if k not in ("packing", "epochs", "sample_top_k")}
    assert from_json(values) == TrainConfig()


def test_json_of_another_version_is_refused():
    with pytest.raises(UserError, match="colour"):
        from_json({**to_json(TrainConfig()), "colour": "red"})
