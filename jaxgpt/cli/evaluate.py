"""Compute the loss and perplexity of a run over a whole split of its data: jaxgpt evaluate RUN"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxgpt import strict_json
from jaxgpt.cli.args import parse_flags


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
    import jaxgpt
    from jaxgpt.api import load_run
    from jaxgpt.runs.restore import print_progress

    model = load_run(flags.run, flags.checkpoint)
    whole = jaxgpt.evaluate(model, flags.split, flags.stride, flags.data_dir, print_progress)
    ppl, bpb = whole.perplexity, whole.bits_per_byte
    if flags.json:
        print(strict_json.dumps({"loss": whole.loss, "ppl": ppl, "tokens": whole.tokens, "bits_per_byte": bpb}))
    else:
        stride = f" at stride {flags.stride}" if flags.stride else ""
        print(
            f"{flags.run} after {model.step} steps, whole {flags.split} split ({whole.tokens:,} tokens{stride}): "
            f"loss {whole.loss:.4f}  perplexity {ppl:.3f}  bits per byte {bpb:.4f}"
        )
