"""Continue a prompt with a trained run: python scripts/generate.py RUN --prompt "ROMEO:" """

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxgpt.cli import parse_flags, run_command
from jaxgpt.config import SamplingConfig
from jaxgpt.errors import UserError

AT_ONCE = 32  # samples, whose keys and values must fit the memory together


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
    import numpy as np

    from jaxgpt.generate import generate, generate_batch
    from jaxgpt.parallel import on_one_device
    from jaxgpt.tokenizer import decode
    from jaxgpt.trained import open_trained

    run, executor, state = open_trained(flags.run, flags.checkpoint)
    trained = (executor.program.exact_model, on_one_device(state.params), run.config.model)
    try:
        prompt = run.tokenizer.encode(flags.prompt)
    except UserError as e:
        raise UserError(f"--prompt: {e}") from None
    if flags.samples == 1:
        print(flags.prompt, end="", flush=True)
        for text in run.tokenizer.decode_stream(generate(*trained, prompt, flags)):
            print(text, end="", flush=True)
        print()
        return
    for first in range(0, flags.samples, AT_ONCE):
        part = replace(flags, seed=flags.seed + first, samples=min(AT_ONCE, flags.samples - first))
        token_TB = np.stack(list(generate_batch(*trained, np.tile(prompt, (part.samples, 1)), part)))
        for seed, ids in enumerate(token_TB.T.tolist(), part.seed):
            print(f"--- seed {seed} ---\n{flags.prompt}{decode(run.tokenizer, ids)}", flush=True)


if __name__ == "__main__":
    run_command(main)
