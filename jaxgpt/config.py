"""The configuration: frozen dataclasses whose every field is a flag of `jaxgpt train` or `jaxgpt finetune`.

A field's docstring is its help text. Values are checked at construction; the errors name the flag, the value and the
remedy. Nothing here imports jax or torch: `--help` is instant, and `torch_ref` uses the same classes.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from jaxgpt.errors import UserError, flag, require, require_at_least, require_at_most, require_int32, require_seed


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
    bias: bool = True
    """Linear and LayerNorm add a bias; without, as in nanoGPT, neither does. (The head over tokens never does.)"""
    layer_norm_eps: float = 1e-5
    """Epsilon of LayerNorm, added to the variance."""
    attention_dropout: float = 0.0
    """Probability of zeroing an attention weight. No flash attention then: it never stores the weights."""

    def __post_init__(self):
        require_int32(self, prefix="model.")
        require_at_least(1, self, "n_layer", "n_head", "n_embd", "block_size", prefix="model.")
        require_at_most(10**3, self, "n_layer", prefix="model.")
        require_at_most(10**5, self, "n_embd", prefix="model.")
        require_at_most(10**6, self, "block_size", prefix="model.")
        require(
            self.n_embd % self.n_head == 0,
            "model.n_embd",
            self.n_embd,
            f"not divisible by --model.n-head {self.n_head}; choose a multiple of {self.n_head}",
        )
        for name in ("dropout", "attention_dropout"):
            value = getattr(self, name)
            require(0 <= value < 1, f"model.{name}", value, "give a probability from 0 up to, not with, 1")
        eps = self.layer_norm_eps
        require(0 < eps < 1, "model.layer_norm_eps", eps, "give a number above 0 and below 1")

    @property
    def has_dropout(self) -> bool:
        """Whether training draws dropout masks."""
        return self.dropout > 0 or self.attention_dropout > 0

    def flop_per_token(self, n_counted: int) -> dict[str, int]:
        """Floating-point operations of a token, forward and backward, in the two usual counts.

        "F12": 6 N + 12 L T C, nanoGPT's count (PaLM, appendix B); "F6": 6 N + 6 L T C, with attention's causal half.

        Args:
            n_counted: N, the parameters without the tables that are only looked up.
        """
        attention = self.n_layer * self.block_size * self.n_embd
        return {"F12": 6 * n_counted + 12 * attention, "F6": 6 * n_counted + 6 * attention}


@dataclass(frozen=True)
class OptimizerConfig:
    """The update rule and its schedule. The defaults are PyTorch's AdamW at the tutorials' learning rate."""

    steps: int = 5000
    """Updates; with --epochs at most so many."""

    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """Update rule; each is defined as in torch.optim."""
    lr: float = 3e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """adamw, adam: decay of the first moment."""
    beta2: float = 0.999
    """adamw, adam: decay of the second moment."""
    eps: float = 1e-8
    """adamw, adam: added outside the square root."""
    momentum: float = 0.0
    """sgd: momentum (0 = none)."""
    weight_decay: float | None = None
    """adamw: decoupled, times the rate. adam, sgd: added to the gradient. Default: torch.optim's, 0.01 and 0."""
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
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """When a loss or gradient norm is not finite: stop, or skip that update. Five updates skipped in a row stop."""
    skip_spikes: float = 0.0
    """Skip an update whose gradient norm exceeds so many times the running mean of the norms before (0 = none)."""

    def check_optimizer(self) -> None:
        """Raises `UserError` for a value out of its range."""
        for name in ("lr", "eps"):
            value = getattr(self, name)
            require(0 < value < math.inf, name, value, "give a positive number")
        for name in ("beta1", "beta2", "momentum"):
            value = getattr(self, name)
            require(0 <= value < 1, name, value, "give a number from 0 up to, not with, 1")
        for name in ("weight_decay", "clip", "min_lr"):
            value = getattr(self, name)
            require(value is None or 0 <= value < math.inf, name, value, "give 0 or a positive number")
        require_at_least(0, self, "warmup_steps", "decay_steps")
        factor = self.skip_spikes
        require(factor == 0 or 1 < factor < math.inf, "skip_spikes", factor, "give 0 or a number above 1")
        # A value that would be ignored is a mistake that nobody would notice.
        for name, needed, ignored in (
            ("warmup_steps", "--schedule warmup-cosine", self.schedule != "warmup-cosine"),
            ("decay_steps", "--schedule cosine or warmup-cosine", self.schedule == "constant"),
            ("min_lr", "--schedule cosine or warmup-cosine", self.schedule == "constant"),
            ("momentum", "--optimizer sgd", self.optimizer != "sgd"),
        ):
            value = getattr(self, name)
            require(
                not (value and ignored), name, value, f"has an effect only with {needed}; add that, or leave it out"
            )

    def check_schedule(self) -> None:
        """Raises `UserError` for a schedule that does not fit into `steps` updates."""
        if self.schedule == "warmup-cosine":
            require(
                self.warmup_steps < self.cosine_end,
                "warmup_steps",
                self.warmup_steps,
                f"not before the end of the cosine at step {self.cosine_end}; lower it, or raise --decay-steps",
            )
        if self.schedule != "constant":
            require(self.min_lr <= self.lr, "min_lr", self.min_lr, f"above --lr {self.lr}; lower it")
            # The rates are a table that goes into the compiled program.
            require(self.steps <= 10**7, "steps", self.steps, "with a schedule, give at most 10000000")

    @property
    def skips_updates(self) -> bool:
        """Whether an update may be skipped."""
        return self.on_nonfinite == "skip" or self.skip_spikes > 0

    @property
    def cosine_end(self) -> int:
        """The step at which the cosine reaches `min_lr`."""
        return self.decay_steps or self.steps

    @property
    def decay(self) -> float:
        """The weight decay in force."""
        if self.weight_decay is None:
            return 0.01 if self.optimizer == "adamw" else 0.0
        return self.weight_decay


@dataclass(frozen=True)
class RunConfig:
    """What every training has, of a language model or of a classifier."""

    batch_size: int = 32
    """Windows, or texts, per update (B), over all devices."""
    checkpoint_every: int = 250
    """Steps between checkpoints."""
    keep_checkpoints: int = 3
    """How many of the latest checkpoints to keep; the one with the best validation loss stays besides."""
    seed: int = 1337
    """Determines initial weights, batches, dropout masks and the sample."""
    patience: int = 0
    """Stop after so many reports in a row whose validation loss was no better (0 = never). The best checkpoint is then
    the run's result."""
    min_delta: float = 0.0
    """patience: minimum improvement of the validation loss on the best before, in nats."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Of the forward pass; master weights stay float32 (float64 in float64). auto: float32 on CPU, else bfloat16."""
    parallel: Literal["jit", "pmap"] = "jit"
    """How one step spreads over all local devices: a sharded batch in one program, or jax.pmap."""
    grad_accum: int = 1
    """Microbatches of an update: a device computes its rows in so many parts, and adds up their gradients."""
    remat: Literal["none", "block", "dots"] = "none"
    """What the backward pass recomputes (jax.checkpoint). block: each block from its input, for the least memory. dots:
    all but the blocks' matrix products."""
    model: ModelConfig = field(default_factory=ModelConfig)

    @property
    def within_documents(self) -> bool:
        """Whether attention and loss stop at the ends of packed texts."""
        return False

    @property
    def n_time(self) -> int:
        """Tokens of a row of a batch."""
        return self.model.block_size

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.n_time

    def check_run(self) -> None:
        """Raises `UserError` for a value out of its range."""
        require_at_least(1, self, "batch_size", "checkpoint_every", "keep_checkpoints", "grad_accum")
        remedy = f"does not divide --batch-size {self.batch_size}; choose a divisor of it"
        require(self.batch_size % self.grad_accum == 0, "grad_accum", self.grad_accum, remedy)
        require_at_least(0, self, "patience")
        require_at_most(10**6, self, "batch_size")
        require(0 <= self.min_delta < math.inf, "min_delta", self.min_delta, "give 0 or a positive number")
        remedy = "has an effect only with --patience; add that, or leave it out"
        require(not self.min_delta or self.patience > 0, "min_delta", self.min_delta, remedy)
        require_seed(self.seed)


@dataclass(frozen=True)
class DataConfig:
    """What text is trained on, and in what pieces."""

    dataset: str = "tinyshakespeare"
    """tinyshakespeare, pydoc, wikitext-2, wikitext-103, hf:NAME[:CONFIG], bin:DIR (tokens of nanoGPT, llm.c or
    modded-nanogpt), or file:PATH (UTF-8 text; .csv, .jsonl, .parquet: rows; .gz, .zst); of a list a,b the first that is
    there."""
    streaming: Literal["auto", "always", "never"] = "auto"
    """Of hf:NAME, whether training begins while files are downloaded and tokenized. auto: above 1 GiB of files."""
    text_column: str | None = None
    """Of rows, the column that holds the texts (default: text)."""
    token_dtype: Literal["auto", "uint16", "uint32"] = "auto"
    """Of nanoGPT's bin:DIR, the type of its tokens. auto: recognised by the content, refused in doubt."""
    tokenizer: str = "char"
    """char: the text's distinct characters, sorted. byte: UTF-8 bytes. gpt2: GPT-2's byte pairs (50,257). bpe:N: byte
    pairs trained on the corpus, N entries."""
    min_chars: int = 0
    """Of many texts only those of more characters, white space at the ends not counted."""
    max_train_texts: int = 0
    """Train on the first so many texts (0 = all)."""
    max_val_texts: int = 0
    """Validate on the first so many texts (0 = all)."""
    max_val_tokens: int = 0
    """Validate on the first so many tokens (0 = all): of a large corpus all take long."""
    packing: Literal["windows", "chunks", "documents"] = "windows"
    """windows: uniform random windows, with replacement. chunks: consecutive chunks of a block, shuffled anew each
    epoch. documents: such chunks, in which attention and loss stop at the end of each text."""

    @property
    def within_documents(self) -> bool:
        """Whether attention and loss stop at the ends of packed texts."""
        return self.packing == "documents"

    def check_data(self) -> None:
        """Raises `UserError` for a value out of its range."""
        require_at_least(0, self, "min_chars", "max_train_texts", "max_val_texts", "max_val_tokens")
        entries = self.tokenizer.removeprefix("bpe:")
        known = self.tokenizer in ("char", "byte", "gpt2") or (
            self.tokenizer.startswith("bpe:") and entries.isdecimal() and entries.isascii() and len(entries) < 8
        )
        require(known, "tokenizer", self.tokenizer, "choose of char, byte, gpt2, bpe:N")
        if self.tokenizer.startswith("bpe:"):
            require(257 <= int(entries) <= 10**6, "tokenizer", self.tokenizer, "give bpe:N with N from 257 to 1000000")
        if self.packing == "documents":
            ends = self.tokenizer == "gpt2" or self.tokenizer.startswith("bpe:")
            remedy = f"--tokenizer {self.tokenizer} has no end of text; give --tokenizer gpt2 or bpe:N"
            require(ends, "packing", self.packing, remedy)


@dataclass(frozen=True)
class LoopConfig(DataConfig, RunConfig):
    """What is trained on, for how many epochs, and what is reported."""

    preset: Literal[
        "tinygpt",
        "minigpt",
        "wikitext2",
        "nanogpt-char",
        "nanogpt-cpu",
        "gpt2",
        "gpt2-medium",
        "gpt2-large",
        "gpt2-xl",
    ] = "minigpt"
    """The documented loop whose values are the defaults of all other flags."""
    epochs: int = 0
    """Passes over all chunks (0 = no limit but --steps)."""
    eval_every: int = 500
    """Steps between reports with validation loss (0 = after each epoch); the last step reports too."""
    eval_batches: int = 10
    """Random validation batches per report (0 = the whole split in order)."""
    diagnose_every: int = 0
    """Steps between records of every tensor's gradient, in diagnostics.jsonl (0 = none)."""
    attention_every: int = 0
    """Steps between attention maps of the first validation tokens, in attention/ and attention.gif (0 = none)."""
    sample_every: int = 0
    """Steps between samples, printed and kept in samples.jsonl (0 = only the one at the end)."""
    prompt: str | None = None
    """What the samples continue (default: "ROMEO:" where the vocabulary has it)."""
    sample_tokens: int = 200
    """Tokens of a sample."""
    sample_temperature: float = 1.0
    """Temperature of a sample."""
    sample_top_k: int = 0
    """Of a sample: only the k most likely tokens (0 = all)."""

    def check_loop(self) -> None:
        """Raises `UserError` for a value out of its range."""
        self.check_run()
        self.check_data()
        require_at_least(1, self, "sample_tokens")
        require_at_least(0, self, "epochs", "eval_every", "eval_batches", "sample_top_k")
        require_at_least(0, self, "diagnose_every", "attention_every", "sample_every")
        require_at_most(10**6, self, "sample_tokens")
        require_at_most(10**4, self, "eval_batches")
        require(self.prompt != "", "prompt", "''", "empty; give at least one character to continue")
        temperature = self.sample_temperature
        require(0 <= temperature < math.inf, "sample_temperature", temperature, "give 0 or a positive number")
        if self.packing == "windows":
            remedy = "random windows have no epochs; add --packing chunks"
            require(not self.epochs, "epochs", self.epochs, remedy)
            require(self.eval_every > 0, "eval_every", self.eval_every, f"give at least 1; {remedy}")


@dataclass(frozen=True)
class TrainConfig(OptimizerConfig, LoopConfig):
    """All that determines a run's numbers; saved as its `config.json`."""

    def __post_init__(self):
        require_int32(self)
        require_at_least(1, self, "steps")
        self.check_loop()
        if self.max_val_tokens:
            remedy = f"less than a window of {self.model.block_size + 1}; raise it, or leave it out"
            require(self.max_val_tokens > self.model.block_size, "max_val_tokens", self.max_val_tokens, remedy)
        self.check_optimizer()
        self.check_schedule()


@dataclass(frozen=True)
class FinetuneConfig(OptimizerConfig, RunConfig):
    """All that determines the numbers of a classifier's run, but the weights it starts from; its `config.json`."""

    dataset: str = "ag_news"
    """ag_news, hf:NAME[:CONFIG], or file:PATH (.csv, .jsonl, .parquet)."""
    test_dataset: str | None = None
    """The texts to test on: file:PATH (default: the data's own test split, else a fifth of it, always the same)."""
    text_column: str | None = None
    """Of rows, the column that holds the texts, or several, a,b, that are joined (default: text)."""
    label_column: str | None = None
    """Of rows, the column that holds the classes (default: label)."""
    train_samples: int = 0
    """Train on so many texts, drawn by the seed (0 = all)."""
    pool: Literal["last", "last_token", "mean"] = "last"
    """What the head reads of the final-norm hidden states. last: the last position, which for a short text is padding,
    as documented. last_token: the last real token's. mean: the real tokens' mean."""
    max_tokens: int = 64
    """Texts are cut after so many tokens, and padded to them on the right (T)."""
    epochs: int = 5
    """Passes over all training texts."""
    lr: float = 1e-4
    """Peak learning rate."""
    steps: int = 0
    """Updates: the total, derived from the epochs."""

    eval_every: ClassVar[int] = 0  # after each epoch

    @property
    def n_time(self) -> int:
        return self.max_tokens

    def __post_init__(self):
        require_int32(self)
        self.check_run()
        self.check_optimizer()
        require_at_least(1, self, "max_tokens", "epochs")
        require_at_least(0, self, "train_samples")
        remedy = f"more than the model's block of {self.model.block_size}; lower it"
        require(self.max_tokens <= self.model.block_size, "max_tokens", self.max_tokens, remedy)
        if self.steps:
            self.check_schedule()


@dataclass(frozen=True)
class FaultPolicy:
    """What a training does about warning signals and failed saves. No part of a run's numbers, nor of config.json."""

    on_warning_signal: Literal["stop", "continue"] = "stop"
    """After SIGUSR1 or SIGUSR2 (SLURM: --signal=USR1@120) and a checkpoint: stop with exit code 0, or go on."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """When a checkpoint cannot be written: stop, or go on and try the next one. The first and the last must succeed."""


@dataclass(frozen=True)
class DeviceLayout:
    """How devices share a training. No part of a run's numbers, nor of config.json: a run may go on with another."""

    mesh: str = ""
    """The devices as a mesh, data=N,fsdp=M: all divide the batch; along fsdp, parameters, gradients and optimizer state
    are sharded, too. An axis left out takes the rest (default: data alone)."""


@dataclass(frozen=True)
class ProcessLayout:
    """How several processes train together. No part of a run's numbers, nor of config.json."""

    distributed: bool = False
    """Train together with other processes: one on each host of a TPU pod or GPU cluster. JAX finds them on SLURM,
    Kubernetes, MPI and TPU pods; elsewhere the next three flags name them. All need the same --out-dir."""
    coordinator: str = ""
    """Where process 0 listens, HOST:PORT."""
    num_processes: int = 0
    """How many processes train together."""
    process_id: int = -1
    """Which of them this is, from 0 on."""
    join_timeout: int = 300
    """Seconds to wait for all processes to join."""
    heartbeat_timeout: int = 100
    """Seconds after which a process that does not answer counts as dead; then the others end, too."""

    def check_processes(self) -> None:
        """Raises `UserError` for flags that do not belong together, or a value out of its range."""
        require_at_least(1, self, "join_timeout")
        require_at_least(10, self, "heartbeat_timeout")
        require_at_most(86400, self, "join_timeout", "heartbeat_timeout")
        require_at_least(0, self, "num_processes")
        examples = {"coordinator": "HOST:PORT", "num_processes": "N", "process_id": "I"}
        by_hand = {name: getattr(self, name) for name in examples}
        given = [name for name, value in by_hand.items() if value != getattr(ProcessLayout, name)]
        if not given:
            return
        require(self.distributed, given[0], by_hand[given[0]], "names other processes; add --distributed")
        for name, example in examples.items():
            require(name in given, given[0], by_hand[given[0]], f"says not all; add {flag(name)} {example}")
        host, _, port = self.coordinator.rpartition(":")
        readable = host and re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 2**16
        require(bool(readable), "coordinator", self.coordinator, "cannot be read; give HOST:PORT, as 10.0.0.1:1234")
        in_range = 0 <= self.process_id < self.num_processes
        require(in_range, "process_id", self.process_id, f"give a number from 0 to {self.num_processes - 1}")


MESH_AXES = ("data", "fsdp")


def mesh_shape(mesh: str, n_devices: int) -> tuple[int, int]:
    """The sizes of the axes data and fsdp, from the flag --mesh.

    Args:
        mesh: "data=4,fsdp=2", or one of both, and the other takes the rest; "" is data alone.

    Raises:
        UserError: it cannot be read, or is not a mesh of `n_devices`.
    """
    sizes: dict[str, int] = {}
    for part in mesh.split(",") if mesh else [f"data={n_devices}"]:
        name, _, size = part.partition("=")
        if name not in MESH_AXES or name in sizes or not re.fullmatch("[1-9][0-9]{0,5}", size):
            raise UserError(f"--mesh {mesh}: {part!r} cannot be read; give it as data=4,fsdp=2")
        sizes[name] = int(size)
    rest = n_devices // math.prod(sizes.values())
    shape = sizes.get("data", rest), sizes.get("fsdp", rest)
    if math.prod(shape) != n_devices:
        example = f"data={n_devices // 2},fsdp=2" if n_devices % 2 == 0 else f"data={n_devices}"
        raise UserError(
            f"--mesh {mesh}: is not a mesh of the {n_devices} devices that there are; give one of so many, as {example}"
        )
    return shape


def mesh_text(shape: Mapping[str, int]) -> str:
    """A mesh by the sizes of its axes, as `mesh_shape` reads it: "data=4,fsdp=2"."""
    return ",".join(f"{name}={size}" for name, size in shape.items())


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
    min_p: float = 0.0
    """Only tokens with at least this share of the most likely one's probability (0 = all)."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens that the text holds, and multiplies the negative ones (1 = off)."""
    stop: tuple[str, ...] = ()
    """A text ends before the first of these that it would hold."""
    ignore_end_of_text: bool = False
    """Go on past the tokenizer's end-of-text token, which else ends a text."""
    seed: int = 1337
    """The same seed gives the same text."""
    samples: int = 1
    """Continuations of each prompt; the seed of each is one more than of the one before."""

    def __post_init__(self):
        require_int32(self)
        require_at_least(1, self, "max_new_tokens", "samples")
        require_at_most(1000, self, "samples")
        require_at_least(0, self, "top_k")
        require(0 <= self.temperature < math.inf, "temperature", self.temperature, "give 0 or a positive number")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "give a number above 0 and at most 1")
        require(0 <= self.min_p <= 1, "min_p", self.min_p, "give a number from 0 to 1")
        penalty = self.repetition_penalty
        require(0 < penalty < math.inf, "repetition_penalty", penalty, "give a number above 0; 1 is off")
        require("" not in self.stop, "stop", "''", "holds no character; give at least one, or leave it out")
        require_seed(self.seed)
        last = self.seed + self.samples - 1
        require(last < 2**31, "samples", self.samples, f"its last seed would be {last}; lower it, or --seed")


_CLASS_OF_TASK = {"language_modeling": TrainConfig, "classification": FinetuneConfig}


def to_json(config: TrainConfig | FinetuneConfig) -> dict[str, Any]:
    """The configuration as plain values, nested as the classes are, with the name of its "task"."""
    task = next(name for name, kind in _CLASS_OF_TASK.items() if isinstance(config, kind))
    return {"task": task, **dataclasses.asdict(config)}


def from_json(values: dict[str, Any]) -> TrainConfig | FinetuneConfig:
    """The inverse of `to_json`.

    Raises:
        UserError: an unknown task or field, a value of another type than its field's, or one out of its range.
    """
    import msgspec  # here: nothing else needs it

    values = dict(values)
    # Runs begun before config.json named the task: only a classifier has a "pool".
    task = values.pop("task", "classification" if "pool" in values else "language_modeling")
    if not isinstance(task, str) or task not in _CLASS_OF_TASK:
        raise UserError(f"config.json was written by another version: its task is {task}")
    kind = _CLASS_OF_TASK[task]
    # A missing field was added after the file was written; its default is what the program did then.
    model = values.get("model")
    if not isinstance(model, dict):
        raise UserError("config.json is damaged (it has no model)")
    unknown = [name for name in values if name not in {f.name for f in dataclasses.fields(kind)}]
    unknown += [name for name in model if name not in {f.name for f in dataclasses.fields(ModelConfig)}]
    if unknown:
        raise UserError(f"config.json was written by another version: it has the fields {', '.join(unknown)}")
    try:
        return msgspec.convert(values, kind)  # checks the types; each class checks its ranges
    except msgspec.ValidationError as e:
        raise UserError(f"config.json is damaged ({e})") from None


def differences(a: Any, b: Any) -> list[tuple[str, Any, Any]]:
    """The fields in which two configurations differ: (dotted name, value in a, value in b)."""
    flat_a, flat_b = _flatten(dataclasses.asdict(a)), _flatten(dataclasses.asdict(b))
    names = [*flat_a, *(name for name in flat_b if name not in flat_a)]
    return [(name, flat_a.get(name), flat_b.get(name)) for name in names if flat_a.get(name) != flat_b.get(name)]


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
