"""The configuration: frozen dataclasses whose every field is a flag of `scripts/train.py`, and the documented presets.

A field's docstring is its help text. Values are checked at construction; the errors name the flag, the value and the
remedy. Nothing here imports jax or torch: `--help` is instant, and `torch_ref` uses the same classes.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxgpt.errors import UserError


def flag(name: str) -> str:
    """The command-line flag of a field: `model.n_layer` -> `--model.n-layer`."""
    return "--" + name.replace("_", "-")


def _require(ok: bool, name: str, value: Any, remedy: str) -> None:
    if not ok:
        raise UserError(f"{flag(name)} {value}: {remedy}")


def _require_at_least(minimum: int, config: Any, *names: str, prefix: str = "") -> None:
    for name in names:
        value = getattr(config, name)
        _require(value >= minimum, prefix + name, value, f"give a whole number of at least {minimum}")


def _require_at_most(maximum: int, config: Any, *names: str, prefix: str = "") -> None:
    """For sizes beyond any machine, which would end without memory and without a word."""
    for name in names:
        value = getattr(config, name)
        _require(value <= maximum, prefix + name, value, f"give at most {maximum}")


def _require_seed(seed: int) -> None:
    _require(0 <= seed < 2**31, "seed", seed, "give a whole number from 0 to 2147483647")


@dataclass(frozen=True)
class ModelConfig:
    """The GPT's shape. The vocabulary's size is not here: it comes from the run's tokenizer."""

    n_layer: int = 4
    """Transformer blocks."""
    n_head: int = 4
    """Attention heads per block; must divide n_embd."""
    n_embd: int = 64
    """Width of the residual stream (C)."""
    block_size: int = 128
    """Context length in tokens (T)."""
    dropout: float = 0.0
    """Probability of zeroing an element after the embedding sum and after each residual branch."""
    tied_head: bool = False
    """The head's matrix is the token embedding's, as in GPT-2."""
    gelu: Literal["erf", "tanh"] = "erf"
    """erf: exact, as documented. tanh: the approximation of GPT-2."""
    init: Literal["documented", "gpt2"] = "documented"
    """documented: N(0, 0.02), biases as in PyTorch. gpt2: biases 0, residual projections over sqrt(2 n_layer)."""

    def __post_init__(self):
        _require_at_least(1, self, "n_layer", "n_head", "n_embd", "block_size", prefix="model.")
        _require_at_most(10**3, self, "n_layer", prefix="model.")
        _require_at_most(10**5, self, "n_embd", prefix="model.")
        _require_at_most(10**6, self, "block_size", prefix="model.")
        _require(
            self.n_embd % self.n_head == 0,
            "model.n_embd",
            self.n_embd,
            f"not divisible by --model.n-head {self.n_head}; choose a multiple of {self.n_head}",
        )
        _require(0 <= self.dropout < 1, "model.dropout", self.dropout, "give a probability from 0 up to, not with, 1")


@dataclass(frozen=True)
class OptimizerConfig:
    """The update rule. The defaults are PyTorch's AdamW at the write-ups' learning rate."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Update rule; each is defined as in torch.optim."""
    lr: float = 3e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """adamw: decay of the first moment."""
    beta2: float = 0.999
    """adamw: decay of the second moment."""
    eps: float = 1e-8
    """adamw: added outside the square root."""
    momentum: float = 0.0
    """sgd: momentum (0 = none)."""
    weight_decay: float | None = None
    """adamw: decoupled, times the rate. sgd: added to the gradient. Default: torch.optim's, 0.01 and 0."""
    decay_mask: Literal["all", "matrices"] = "all"
    """Which parameters decay: all, or only those of two and more dimensions that are no norm's."""
    clip: float = 0.0
    """Limit of the gradients' global norm (0 = no clipping)."""
    schedule: Literal["constant", "cosine", "warmup-cosine"] = "constant"
    """Learning rate over the steps."""
    warmup_steps: int = 0
    """warmup-cosine: steps over which the rate rises linearly from 0."""
    decay_steps: int = 0
    """Step at which the cosine reaches min_lr (0 = at --steps)."""
    min_lr: float = 0.0
    """Rate at and after the end of the cosine."""

    def check_optimizer(self) -> None:
        """Raises `UserError` for a value out of its range."""
        for name in ("lr", "eps"):
            value = getattr(self, name)
            _require(0 < value < math.inf, name, value, "give a positive number")
        for name in ("beta1", "beta2", "momentum"):
            value = getattr(self, name)
            _require(0 <= value < 1, name, value, "give a number from 0 up to, not with, 1")
        for name in ("weight_decay", "clip", "min_lr"):
            value = getattr(self, name)
            _require(value is None or 0 <= value < math.inf, name, value, "give 0 or a positive number")
        _require_at_least(0, self, "warmup_steps", "decay_steps")
        # A value that would be ignored is a mistake that nobody would notice.
        for name, needed, ignored in (
            ("warmup_steps", "--schedule warmup-cosine", self.schedule != "warmup-cosine"),
            ("decay_steps", "--schedule cosine or warmup-cosine", self.schedule == "constant"),
            ("min_lr", "--schedule cosine or warmup-cosine", self.schedule == "constant"),
            ("momentum", "--optimizer sgd", self.optimizer != "sgd"),
        ):
            value = getattr(self, name)
            _require(
                not (value and ignored), name, value, f"has an effect only with {needed}; add that, or leave it out"
            )

    @property
    def decay(self) -> float:
        """The weight decay in force."""
        if self.weight_decay is None:
            return 0.01 if self.optimizer == "adamw" else 0.0
        return self.weight_decay


@dataclass(frozen=True)
class LoopConfig:
    """What is trained on, how long, and what is reported."""

    preset: Literal["tinygpt", "minigpt"] = "minigpt"
    """The documented loop whose values are the defaults of all other flags."""
    dataset: str = "tinyshakespeare"
    """tinyshakespeare, pydoc, or file:PATH (UTF-8 text); of a list a,b the first that can be had."""
    tokenizer: Literal["char", "byte"] = "char"
    """char: the text's distinct characters, sorted. byte: UTF-8 bytes."""
    steps: int = 5000
    """Updates."""
    batch_size: int = 32
    """Windows per update (B), over all devices."""
    eval_every: int = 500
    """Steps between reports with validation loss; the last step reports too."""
    eval_batches: int = 10
    """Random validation batches per report."""
    checkpoint_every: int = 250
    """Steps between checkpoints."""
    keep_checkpoints: int = 3
    """How many of the latest checkpoints to keep; the one with the best validation loss stays besides."""
    prompt: str | None = None
    """What the sample at the end continues (default: "ROMEO:" where the vocabulary has it)."""
    sample_tokens: int = 200
    """Tokens of the sample at the end."""
    seed: int = 1337
    """Determines initial weights, batches, dropout masks and the sample."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Of the forward pass; master weights stay float32 (float64 in float64). auto: float32 on CPU, else bfloat16."""
    parallel: Literal["jit", "pmap"] = "jit"
    """How one step spreads over all local devices: a sharded batch in one program, or jax.pmap."""
    model: ModelConfig = field(default_factory=ModelConfig)

    def check_loop(self) -> None:
        """Raises `UserError` for a value out of its range."""
        _require_at_least(
            1, self, "steps", "batch_size", "eval_every", "eval_batches", "checkpoint_every", "keep_checkpoints"
        )
        _require_at_least(1, self, "sample_tokens")
        _require_at_most(10**6, self, "batch_size", "sample_tokens")
        _require_at_most(10**4, self, "eval_batches")
        _require(self.prompt != "", "prompt", "''", "empty; give at least one character to continue")
        _require_seed(self.seed)


@dataclass(frozen=True)
class TrainConfig(OptimizerConfig, LoopConfig):
    """All that determines a run's numbers; saved as its `config.json`."""

    def __post_init__(self):
        self.check_loop()
        self.check_optimizer()
        if self.schedule == "warmup-cosine":
            _require(
                self.warmup_steps < self.cosine_end,
                "warmup_steps",
                self.warmup_steps,
                f"not before the end of the cosine at step {self.cosine_end}; lower it, or raise --decay-steps",
            )
        if self.schedule != "constant":
            _require(self.min_lr <= self.lr, "min_lr", self.min_lr, f"above --lr {self.lr}; lower it")
            # The rates are a table that goes into the compiled program.
            _require(self.steps <= 10**7, "steps", self.steps, "with a schedule, give at most 10000000")

    @property
    def cosine_end(self) -> int:
        """The step at which the cosine reaches `min_lr`."""
        return self.decay_steps or self.steps


@dataclass(frozen=True)
class SamplingConfig:
    """How text is continued."""

    max_new_tokens: int = 200
    """Tokens to add to the prompt."""
    temperature: float = 1.0
    """Divides the logits; 0 (anything below 1e-6) takes the most likely token."""
    top_k: int = 0
    """Only the k most likely tokens (0 = all)."""
    top_p: float = 1.0
    """Only the most likely tokens that together reach this probability (1 = all)."""
    seed: int = 1337
    """The same seed gives the same text."""

    def __post_init__(self):
        _require_at_least(1, self, "max_new_tokens")
        _require_at_least(0, self, "top_k")
        _require(0 <= self.temperature < math.inf, "temperature", self.temperature, "give 0 or a positive number")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "give a number above 0 and at most 1")
        _require_seed(self.seed)


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
}


def to_json(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain values, nested as the classes are."""
    return dataclasses.asdict(config)


def from_json(values: dict[str, Any]) -> TrainConfig:
    """The inverse of `to_json`. Raises `UserError` naming fields that are unknown or missing."""
    known = {f.name for f in dataclasses.fields(TrainConfig)}
    if unknown := sorted(set(values) ^ known):
        raise UserError(f"config.json was written by another version: it differs in the fields {', '.join(unknown)}")
    known = {f.name for f in dataclasses.fields(ModelConfig)}
    # Those that are missing came later; their defaults are the past.
    if unknown := sorted(set(values["model"]) - known):
        raise UserError(f"config.json was written by another version: it differs in the fields {', '.join(unknown)}")
    return TrainConfig(**{**values, "model": ModelConfig(**values["model"])})


def differences(a: TrainConfig, b: TrainConfig) -> list[tuple[str, Any, Any]]:
    """The fields in which two configurations differ: (dotted name, value in a, value in b)."""
    flat_a, flat_b = _flatten(to_json(a)), _flatten(to_json(b))
    return [(name, flat_a[name], flat_b[name]) for name in flat_a if flat_a[name] != flat_b[name]]


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
