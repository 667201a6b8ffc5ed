"""Compute the loss and perplexity of a run over a whole split of its data: jaxgpt evaluate RUN"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxgpt import strict_json
from jaxgpt.cli.args import parse_flags
from jaxgpt.errors import UserError


@dataclass(frozen=True)
class EvaluateFlags:
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of a run."""
    split: Literal["val", "train"] = "val"
    """Split of the data to read, in windows of a block."""
    checkpoint: Literal["result", "last", "best"] = "result"
    """result: best if the run stopped early, else last. best: the one with the lowest validation loss."""
    data_dir: Path | None = None
    """Folder to look for datasets in first."""
    stride: int | None = None
    """Distance in tokens between the starts of windows. A window counts the tokens that no window before it has
    counted, each with a context of at least a block minus the stride. Default: a block; a last, shorter window is left
    out."""
    json: bool = False
    """Print {"loss", "ppl", "tokens", "bits_per_byte"} and nothing else."""


def main(args: list[str]) -> None:
    flags = parse_flags(EvaluateFlags, args, __doc__, "jaxgpt evaluate")
    from jaxgpt.model.loss import perplexity
    from jaxgpt.runs.restore import print_progress, restore_language_model, split_of
    from jaxgpt.tasks.language_modeling import whole_split_loss

    run, executor, state = restore_language_model(flags.run, flags.checkpoint)
    block_size = run.config.model.block_size
    if flags.stride is not None and not 1 <= flags.stride <= block_size:
        raise UserError(f"--stride {flags.stride}: give a whole number from 1 to the run's block of {block_size}")
    tokens_N = split_of(run, flags.split, flags.data_dir)
    whole = whole_split_loss(executor, state.params, tokens_N, run.tokenizer, flags.stride, print_progress)
    ppl, bpb = perplexity(whole.loss), whole.bits_per_byte
    if flags.json:
        print(strict_json.dumps({"loss": whole.loss, "ppl": ppl, "tokens": whole.tokens, "bits_per_byte": bpb}))
    else:
        stride = f" at stride {flags.stride}" if flags.stride else ""
        print(
            f"{flags.run} after {int(state.step)} steps, whole {flags.split} split ({whole.tokens:,} tokens{stride}): "
            f"loss {whole.loss:.4f}  perplexity {ppl:.3f}  bits per byte {bpb:.4f}"
        )
