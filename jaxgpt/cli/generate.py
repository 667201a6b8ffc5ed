"""Continue a prompt with a trained run: jaxgpt generate RUN --prompt "ROMEO:" """

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxgpt.cli.args import parse_flags
from jaxgpt.config import SamplingConfig
from jaxgpt.errors import UserError

BATCH_SIZE = 32  # samples generated together; their keys and values are in memory at the same time


@dataclass(frozen=True)
class GenerateFlags(SamplingConfig):
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")] = tyro.MISSING
    """Folder of a run."""
    prompt: str = "ROMEO:"
    """Text to continue."""
    checkpoint: Literal["result", "last", "best"] = "result"
    """result: best if the run stopped early, else last. best: the one with the lowest validation loss."""


def main(args: list[str]) -> None:
    flags = parse_flags(GenerateFlags, args, __doc__, "jaxgpt generate")
    if not flags.prompt:
        raise UserError("--prompt '': empty; give at least one character to continue")
    import numpy as np

    from jaxgpt.data.tokenizer import decode
    from jaxgpt.model.sampling import generate, generate_batch
    from jaxgpt.parallel import on_one_device
    from jaxgpt.runs.restore import restore_language_model

    run, executor, state = restore_language_model(flags.run, flags.checkpoint)
    trained = (executor.objective.exact_model, on_one_device(state.params), run.config.model)
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
    for first in range(0, flags.samples, BATCH_SIZE):
        part = replace(flags, seed=flags.seed + first, samples=min(BATCH_SIZE, flags.samples - first))
        token_TB = np.stack(list(generate_batch(*trained, np.tile(prompt, (part.samples, 1)), part)))
        for seed, ids in enumerate(token_TB.T.tolist(), part.seed):
            print(f"--- seed {seed} ---\n{flags.prompt}{decode(run.tokenizer, ids)}", flush=True)
