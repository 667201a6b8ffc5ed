"""Fine-tune a trained run to classify texts: python scripts/finetune.py RUN --dataset ag_news"""

import time

STARTED = time.perf_counter()

import dataclasses  # noqa: E402  (the clock of "time to the first step" starts before the imports)
import sys  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Annotated, Literal  # noqa: E402

import tyro  # noqa: E402

from jaxgpt.cli import parse_flags, run_command  # noqa: E402
from jaxgpt.config import FinetuneConfig, ModelConfig  # noqa: E402


@dataclass(frozen=True)
class FinetuneFlags(FinetuneConfig):
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")] = tyro.MISSING
    """Folder of a language model's run; its model and tokenizer are taken over."""
    checkpoint: Literal["result", "last", "best"] = "result"
    """Of RUN, result: the last, or, of a run that stopped early, the best: the one with the lowest validation
    loss."""
    out_dir: Path | None = None
    """Folder of the new run (default: runs/<dataset>-finetune-<pool>-<time>). The same run there is resumed."""
    data_dir: Path | None = None
    """Folder to look for datasets in first."""
    overwrite: bool = False
    """Start again if --out-dir holds a run."""
    # What follows from RUN and the epochs is no flag.
    model: tyro.conf.Suppress[ModelConfig] = dataclasses.field(default_factory=lambda: ModelConfig(block_size=10**6))
    steps: tyro.conf.Suppress[int] = 0


def main() -> int:
    flags = parse_flags(FinetuneFlags, sys.argv[1:], __doc__)
    config = FinetuneConfig(**{f.name: getattr(flags, f.name) for f in dataclasses.fields(FinetuneConfig)})
    from jaxgpt.console import Display
    from jaxgpt.datasets import path_of
    from jaxgpt.labelled import load_labelled

    display = Display()
    data = load_labelled(config, flags.data_dir, display.line)
    from jaxgpt.finetune import finetune

    test = config.test_dataset and f"file:{path_of(config.test_dataset).resolve()}"
    config = dataclasses.replace(config, dataset=data.name, test_dataset=test)
    return finetune(flags.run, flags.checkpoint, config, data, flags.out_dir, flags.overwrite, display, STARTED)


if __name__ == "__main__":
    run_command(main)
