"""Fine-tune a trained run to classify texts: jaxgpt finetune RUN --dataset ag_news"""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxgpt.cli.args import BatchTokens, parse_flags
from jaxgpt.config import DeviceLayout, FaultPolicy, FinetuneConfig, ModelConfig
from jaxgpt.signals import warning_signals


@dataclass(frozen=True)
class FinetuneFlags(BatchTokens, FaultPolicy, DeviceLayout, FinetuneConfig):
    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")] = tyro.MISSING
    """A language model's run, or what else jaxgpt train --init-from takes: the classifier starts from its weights, and
    takes its model and tokenizer."""
    checkpoint: Literal["result", "last", "best"] = "result"
    """RUN's checkpoint. result: best if RUN stopped early, else last. best: the one with the lowest validation loss."""
    out_dir: Path | None = None
    """Folder of the new run (default: runs/<dataset>-finetune-<pool>-<time>). The same run there is resumed."""
    data_dir: Path | None = None
    """Folder to look for datasets in first."""
    overwrite: bool = False
    """Start again if --out-dir holds a run."""
    # Not flags: these follow from RUN and the epochs.
    model: tyro.conf.Suppress[ModelConfig] = dataclasses.field(default_factory=lambda: ModelConfig(block_size=10**6))
    steps: tyro.conf.Suppress[int] = 0


def main(args: list[str], started: float | None = None) -> int:
    """Runs the command; `started` is `time.perf_counter()` at its start."""
    started = time.perf_counter() if started is None else started
    flags = parse_flags(FinetuneFlags, args, __doc__, "jaxgpt finetune")
    with warning_signals():
        return _finetune(flags, started)


def _finetune(flags: FinetuneFlags, started: float) -> int:
    config = FinetuneConfig(**{f.name: getattr(flags, f.name) for f in dataclasses.fields(FinetuneConfig)})
    from jaxgpt.data.corpora import path_of
    from jaxgpt.data.labeled import load_labeled
    from jaxgpt.progress import ProgressDisplay

    display = ProgressDisplay()
    data = load_labeled(config, flags.data_dir, display.line)
    from jaxgpt.tasks.classification import finetune

    test = config.test_dataset and f"file:{path_of(config.test_dataset).resolve()}"
    config = dataclasses.replace(config, dataset=data.name, test_dataset=test)
    rest = (display, started, flags, flags.mesh)
    return finetune(flags.run, flags.checkpoint, config, data, flags.out_dir, flags.overwrite, *rest)
