"""Loss and perplexity of a run over a whole split of its data: python scripts/evaluate.py RUN"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxgpt.cli import parse_flags, run_command


@dataclass(frozen=True)
class EvaluateFlags:
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of a run."""
    split: Literal["val", "train"] = "val"
    """Which part of the data; all of its non-overlapping windows of a block are read."""
    checkpoint: Literal["last", "best"] = "last"
    """The last checkpoint, or the one with the lowest validation loss."""
    data_dir: Path | None = None
    """Folder to look for datasets in first."""
    json: bool = False
    """Print {"loss", "ppl", "tokens"} and nothing else."""


def main() -> None:
    flags = parse_flags(EvaluateFlags, sys.argv[1:], __doc__)
    from jaxgpt.loss import perplexity
    from jaxgpt.trained import open_trained, split_of, whole_split_loss

    run, executor, state = open_trained(flags.run, flags.checkpoint)
    loss, tokens = whole_split_loss(run, executor, state, split_of(run, flags.split, flags.data_dir))
    if flags.json:
        print(json.dumps({"loss": loss, "ppl": perplexity(loss), "tokens": tokens}))
    else:
        print(
            f"{flags.run} after {int(state.step)} steps, whole {flags.split} split ({tokens:,} tokens): "
            f"loss {loss:.4f}  perplexity {perplexity(loss):.3f}"
        )


if __name__ == "__main__":
    run_command(main)
