"""Loss and perplexity of a run over a whole split of its data: python scripts/evaluate.py RUN"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxgpt.cli import parse_flags, run_command
from jaxgpt.errors import UserError


@dataclass(frozen=True)
class EvaluateFlags:
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of a run."""
    split: Literal["val", "train"] = "val"
    """Which part of the data; all of its non-overlapping windows of a block are read."""
    checkpoint: Literal["result", "last", "best"] = "result"
    """result: the last, or, of a run that stopped early, the best: the one with the lowest validation loss."""
    data_dir: Path | None = None
    """Folder to look for datasets in first."""
    stride: int | None = None
    """Windows begin so many tokens apart; each counts the tokens that none before it has, with at least a block minus
    the stride before them. Default: windows side by side, the ragged rest left out."""
    json: bool = False
    """Print {"loss", "ppl", "tokens", "bits_per_byte"} and nothing else."""


def main() -> None:
    flags = parse_flags(EvaluateFlags, sys.argv[1:], __doc__)
    from jaxgpt.loss import perplexity
    from jaxgpt.trained import open_trained, say, split_of, whole_split_loss

    run, executor, state = open_trained(flags.run, flags.checkpoint)
    block_size = run.config.model.block_size
    if flags.stride is not None and not 1 <= flags.stride <= block_size:
        raise UserError(f"--stride {flags.stride}: give a whole number from 1 to the run's block of {block_size}")
    tokens_N = split_of(run, flags.split, flags.data_dir)
    whole = whole_split_loss(executor, state.params, tokens_N, run.tokenizer, flags.stride, say)
    ppl, bpb = perplexity(whole.loss), whole.bits_per_byte
    if flags.json:
        print(json.dumps({"loss": whole.loss, "ppl": ppl, "tokens": whole.tokens, "bits_per_byte": bpb}))
    else:
        stride = f" at stride {flags.stride}" if flags.stride else ""
        print(
            f"{flags.run} after {int(state.step)} steps, whole {flags.split} split ({whole.tokens:,} tokens{stride}): "
            f"loss {whole.loss:.4f}  perplexity {ppl:.3f}  bits per byte {bpb:.4f}"
        )


if __name__ == "__main__":
    run_command(main)
