"""Continue a prompt with a trained run: python scripts/generate.py RUN --prompt "ROMEO:" """

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxgpt.cli import parse_flags, run_command
from jaxgpt.config import SamplingConfig
from jaxgpt.errors import UserError


@dataclass(frozen=True)
class GenerateFlags(SamplingConfig):
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")] = tyro.MISSING
    """Folder of a run."""
    prompt: str = "ROMEO:"
    """Text to continue."""
    checkpoint: Literal["result", "last", "best"] = "result"
    """result: the last, or, of a run that stopped early, the best: the one with the lowest validation loss."""


def main() -> None:
    flags = parse_flags(GenerateFlags, sys.argv[1:], __doc__)
    if not flags.prompt:
        raise UserError("--prompt '': empty; give at least one character to continue")
    from jaxgpt.generate import generate
    from jaxgpt.trained import open_trained

    run, executor, state = open_trained(flags.run, flags.checkpoint)
    try:
        prompt = run.tokenizer.encode(flags.prompt)
    except UserError as e:
        raise UserError(f"--prompt: {e}") from None
    print(flags.prompt, end="", flush=True)
    ids = generate(executor.program.exact_model, state.params, run.config.model, prompt, flags)
    for text in run.tokenizer.decode_stream(ids):
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    run_command(main)
