"""The documented loops as configurations: the defaults of all flags, by `--preset`; and what is timed."""

import dataclasses
import difflib
from typing import Any

from jaxgpt.config import ModelConfig, TrainConfig
from jaxgpt.errors import UserError


def _gpt2_like(n_layer: int, n_head: int, n_embd: int, block_size: int, **others: Any) -> ModelConfig:
    return ModelConfig(n_layer, n_head, n_embd, block_size, tied_head=True, init="gpt2", **others)


# nanoGPT's optimiser: AdamW with decayed matrices and a clip.
_NANOGPT: dict[str, Any] = dict(lr=1e-3, beta2=0.99, weight_decay=0.1, decay_mask="matrices", clip=1.0)
_NANOGPT_RATE: dict[str, Any] = dict(schedule="warmup-cosine", warmup_steps=100, min_lr=1e-4)

_GPT2 = _gpt2_like(12, 12, 768, 1024, gelu="tanh")


def _reproduction(preset: Any, model: ModelConfig, **others: Any) -> TrainConfig:
    """A training of GPT-2's shape from nothing, as llm.c's scripts/run_gpt2_*.sh do it: 524,288 tokens an update.

    With accelerators of less memory than the batch takes at once, `--grad-accum` divides it.
    """
    return TrainConfig(
        preset=preset,
        **{
            "dataset": "hf:HuggingFaceFW/fineweb:sample-100BT",
            "tokenizer": "gpt2",
            "packing": "chunks",
            "batch_size": 512,
            "schedule": "warmup-cosine",
            "warmup_steps": 700,
            **_NANOGPT,
            "beta2": 0.95,
            "eval_every": 250,
            "eval_batches": 4,
            "checkpoint_every": 1000,
            "prompt": "The history of",
            **others,
        },
        model=model,
    )


PRESETS = {
    # Section 1 of docs/loops.md: the toy loop, one validation batch every 50 steps, clipped.
    "tinygpt": TrainConfig(
        preset="tinygpt",
        steps=500,
        clip=1.0,
        eval_every=50,
        eval_batches=1,
        checkpoint_every=100,
        model=ModelConfig(n_layer=4, n_head=4, n_embd=64, block_size=64),
    ),
    # Section 2: no clipping, constant rate.
    "minigpt": TrainConfig(preset="minigpt"),
    # Section 3: the modern recipe.
    "wikitext2": TrainConfig(
        preset="wikitext2",
        dataset="wikitext-2",
        tokenizer="gpt2",
        min_chars=50,
        max_train_texts=500,
        max_val_texts=100,
        packing="chunks",
        batch_size=16,
        steps=2000,
        epochs=20,
        eval_every=0,
        eval_batches=0,
        beta2=0.95,
        weight_decay=0.1,
        decay_mask="matrices",
        clip=1.0,
        schedule="warmup-cosine",
        warmup_steps=200,
        decay_steps=2000,
        min_lr=3e-5,
        prompt="The history of",
        sample_tokens=50,
        sample_temperature=0.8,
        sample_top_k=40,
        model=ModelConfig(n_layer=4, n_head=8, n_embd=256, block_size=128, dropout=0.1),
    ),
    # Section 4: nanoGPT's character model, as in its config/train_shakespeare_char.py.
    "nanogpt-char": TrainConfig(
        preset="nanogpt-char",
        steps=5000,
        batch_size=64,
        eval_every=250,
        eval_batches=200,
        model=_gpt2_like(6, 6, 384, 256, dropout=0.2),
        **_NANOGPT,
        **_NANOGPT_RATE,
    ),
    # The same for a CPU, by the command in its README.
    "nanogpt-cpu": TrainConfig(
        preset="nanogpt-cpu",
        steps=2000,
        batch_size=12,
        eval_every=250,
        eval_batches=20,
        model=_gpt2_like(4, 4, 128, 64),
        **_NANOGPT,
        **_NANOGPT_RATE,
    ),
    # GPT-2's four shapes: 124, 355, 774 and 1,558 million parameters. For accelerators.
    "gpt2": _reproduction("gpt2", _GPT2, dataset="hf:HuggingFaceFW/fineweb:sample-10BT", steps=18_865, lr=6e-4),
    "gpt2-medium": _reproduction("gpt2-medium", _gpt2_like(24, 16, 1024, 1024, gelu="tanh"), steps=60_000, lr=3e-4),
    "gpt2-large": _reproduction("gpt2-large", _gpt2_like(36, 20, 1280, 1024, gelu="tanh"), steps=286_102, lr=2.5e-4),
    "gpt2-xl": _reproduction(
        "gpt2-xl",
        _gpt2_like(48, 25, 1600, 1024, gelu="tanh"),
        dataset="hf:HuggingFaceFW/fineweb-edu:sample-100BT",
        batch_size=1024,
        steps=32_000,
        lr=6e-4,
        min_lr=6e-5,
    ),
}


def configure(preset: str = "minigpt", **flags: Any) -> TrainConfig:
    """A configuration: a preset with other values for some of its fields.

    Args:
        preset: a name of `PRESETS`.
        flags: fields of `TrainConfig` or of its `model`, as `steps=100, n_layer=2`.

    Raises:
        UserError: there is no such preset or field, or a value is out of its range.
    """
    if preset not in PRESETS:
        raise UserError(f"--preset {preset}: unknown preset; choose of {', '.join(PRESETS)}")
    config = PRESETS[preset]
    of_model = {f.name for f in dataclasses.fields(ModelConfig)}
    known = of_model | {f.name for f in dataclasses.fields(TrainConfig)}
    for name in flags:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise UserError(f"{name}: no such field" + (f"; did you mean {near[0]}?" if near else "; see --help"))
    shape = {name: value for name, value in flags.items() if name in of_model}
    rest = {name: value for name, value in flags.items() if name not in of_model}
    try:
        if shape:
            rest["model"] = dataclasses.replace(rest.get("model", config.model), **shape)
        return dataclasses.replace(config, **rest)
    except TypeError as e:
        raise UserError(f"configure: a value has another type than its field ({e}); see TrainConfig") from None


def _timed(batch_size: int, model: ModelConfig) -> TrainConfig:
    """With nanoGPT's optimiser at a constant rate; without dropout, so that losses can be compared."""
    return TrainConfig(batch_size=batch_size, model=dataclasses.replace(model, dropout=0.0), **_NANOGPT)


def _timed_preset(name: str) -> TrainConfig:
    return _timed(PRESETS[name].batch_size, PRESETS[name].model)


# What scripts/bench.py times, on random tokens: configuration and vocabulary. The last is GPT-2's smallest.
BENCHMARKS: dict[str, tuple[TrainConfig, int]] = {
    "tinygpt": (PRESETS["tinygpt"], 65),
    "minigpt": (PRESETS["minigpt"], 65),
    "wikitext2": (_timed_preset("wikitext2"), 50257),
    "nanogpt-cpu": (_timed_preset("nanogpt-cpu"), 65),
    "nanogpt-char": (_timed_preset("nanogpt-char"), 65),
    "gpt2-124m": (_timed(32, _GPT2), 50257),
}
