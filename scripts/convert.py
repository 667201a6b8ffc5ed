"""Weights of PyTorch to a run, and a run to weights for PyTorch.

usage: convert.py import --weights FILE.safetensors --out RUN [--optimizer-state FILE] [flags of scripts/train.py]
       convert.py export RUN --out FILE.safetensors [--optimizer-state FILE] [--checkpoint result|last|best]

import makes a run that evaluate.py, generate.py and train.py (with the same flags and --out-dir RUN) take. It reads the
write-ups' names, and GPT-2's as Hugging Face and nanoGPT write them. export is its inverse, in the write-ups' names.
convert.py import --help, convert.py export --help: all flags.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxgpt.cli import config_of, parse_flags, parse_train_flags, run_command
from jaxgpt.config import TrainConfig
from jaxgpt.errors import UserError


@dataclass(frozen=True)
class ImportFlags(TrainConfig):
    weights: Path = tyro.MISSING
    """Weights, a safetensors file."""
    out: Path = tyro.MISSING
    """Folder of the run to make."""
    optimizer_state: Path | None = None
    """Optimiser state, a safetensors file: the run goes on from its step. Without it, from step 0."""
    data_dir: Path | None = None
    """Folder to look for datasets in first."""
    overwrite: bool = False
    """Replace the run that --out holds."""


@dataclass(frozen=True)
class ExportFlags:
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of a run."""
    out: Path
    """File for the weights (safetensors)."""
    optimizer_state: Path | None = None
    """File for the optimiser's state (safetensors)."""
    checkpoint: Literal["result", "last", "best"] = "result"
    """result: the last, or, of a run that stopped early, the best: the one with the lowest validation loss."""
    overwrite: bool = False
    """Replace files that exist."""


def main() -> None:
    action, args = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if action in ("-h", "--help"):
        print(__doc__.strip())
    elif action == "import":
        import_run(parse_train_flags(args, "Make a run of weights.", ImportFlags))
    elif action == "export":
        export_run(parse_flags(ExportFlags, args, "Write a run's weights for PyTorch."))
    else:
        raise UserError(f"convert.py {action}: give import or export first; --help shows both")


def import_run(flags: ImportFlags) -> None:
    from jaxgpt.datasets import load_corpus

    corpus = load_corpus(flags.dataset, flags.data_dir, print, flags.text_column)
    from jaxgpt import exchange

    config = dataclasses.replace(config_of(flags), dataset=corpus.name)
    exchange.import_run(
        config, corpus, flags.weights, flags.optimizer_state, flags.out, flags.overwrite, print, flags.data_dir
    )


def export_run(flags: ExportFlags) -> None:
    from jaxgpt.exchange import export_run

    step = export_run(flags.run, flags.checkpoint, flags.out, flags.optimizer_state, flags.overwrite)
    print(f"{flags.run} after {step} steps: {flags.out}")


if __name__ == "__main__":
    run_command(main)
