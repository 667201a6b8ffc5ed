"""Compile the training step for accelerators that are not here: jaxgpt plan --preset gpt2 --target v5e:4x4

Prints memory, kernels, dtypes, communication and an estimate of the time; nothing is executed.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from jaxgpt import strict_json
from jaxgpt.analysis.targets import CHIPS, compile_without_accelerators, parse_target
from jaxgpt.cli.args import BatchTokens, config_of, parse_train_flags
from jaxgpt.config import DeviceLayout, TrainConfig, mesh_shape
from jaxgpt.data.files import atomic_write
from jaxgpt.errors import UserError, require, require_writable

SHAKESPEARE_VOCABULARY = 65  # distinct characters of tinyshakespeare
VOCABULARIES = {"gpt2": 50257, "byte": 256, "char": SHAKESPEARE_VOCABULARY}


@dataclass(frozen=True)
class PlanFlags(BatchTokens, DeviceLayout, TrainConfig):
    """The flags of `jaxgpt plan`: those of a training, the target, and what is told of it."""

    target: str = ""
    """Accelerators: a TPU slice, v4, v5e, v5p, v6e or tpu7x with its topology (v5e:4x4, v5p:2x2x1), or GPUs of one
    host, A100, H100, H200 or B200 with their number (H100:8). v5e:1 and H100 are one chip."""
    vocab_size: int = 0
    """Tokens of the vocabulary (0: of the tokenizer; of --tokenizer char, tinyshakespeare's 65)."""
    tokens: float = 1e9
    """Tokens that the estimate of the hours is for."""
    json: Path | None = None
    """Also write the plan to this file."""

    def __post_init__(self):
        super().__post_init__()
        require(0 <= self.vocab_size <= 10**7, "vocab_size", self.vocab_size, "give a number from 0 to 10000000")
        require(0 < self.tokens < math.inf, "tokens", self.tokens, "give a number above 0")
        require(self.parallel == "jit", "parallel", self.parallel, "a plan is of --parallel jit; leave it out")
        remedy = "accelerators train in bfloat16 or float32; choose one of them"
        require(self.dtype != "float64", "dtype", self.dtype, remedy)
        if self.json:
            require(self.json.suffix == ".json", "json", self.json, "give the name of a file that ends in .json")
            require_writable("--json", self.json)


def main(args: list[str]) -> None:
    """Runs the command. Raises `UserError` for flags that cannot be used, and a topology that the compiler refuses."""
    flags = parse_train_flags(args, __doc__, "jaxgpt plan", PlanFlags)
    if not flags.target:
        raise UserError(f"--target: missing; give one of {', '.join(CHIPS)}, as v5e:4x4 or H100:8")
    target = parse_target(flags.target)
    mesh_shape(flags.mesh, target.n_devices)  # refuses another
    compile_without_accelerators()
    from jaxgpt.analysis import plan  # jax begins here

    n_vocab = flags.vocab_size or vocab_size(flags.tokenizer)
    found = plan.make_plan(config_of(flags), n_vocab, target, flags.tokens, flags.mesh)
    print(plan.text(found, target))
    if flags.json:
        atomic_write(flags.json, (strict_json.dumps(found, indent=1) + "\n").encode())


def vocab_size(tokenizer: str) -> int:
    """The number of tokens of a `--tokenizer`, without a corpus: of characters, that of tinyshakespeare."""
    return VOCABULARIES.get(tokenizer) or int(tokenizer.removeprefix("bpe:"))
