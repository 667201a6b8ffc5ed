"""Import weights from PyTorch as a run, and export the weights of a run to PyTorch.

usage: jaxgpt convert import --weights FILE.safetensors --out RUN [--optimizer-state FILE] [flags of jaxgpt train]
       jaxgpt convert export RUN --out FILE.safetensors [--optimizer-state FILE] [--checkpoint result|last|best]

import makes a run for jaxgpt evaluate, generate and train (with the same flags and --out-dir RUN). It reads the names
of the tutorials' models, and GPT-2's names as Hugging Face and nanoGPT write them. export writes the tutorials' names.
jaxgpt convert import --help and jaxgpt convert export --help list all flags.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxgpt.cli.args import config_of, parse_flags, parse_train_flags
from jaxgpt.config import TrainConfig
from jaxgpt.errors import UserError


@dataclass(frozen=True)
class ImportFlags(TrainConfig):
    weights: Path = tyro.MISSING
    """Weights, a safetensors file."""
    out: Path = tyro.MISSING
    """Folder of the run to make."""
    optimizer_state: Path | None = None
    """Optimizer state, a safetensors file: the run continues from its step. Without it, from step 0."""
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
    """File for the optimizer state (safetensors)."""
    checkpoint: Literal["result", "last", "best"] = "result"
    """result: best if the run stopped early, else last. best: the one with the lowest validation loss."""
    overwrite: bool = False
    """Replace files that exist."""


def main(args: list[str]) -> None:
    action, args = (args[:1] or [""])[0], args[1:]
    if action in ("-h", "--help"):
        print((__doc__ or "").strip())
    elif action == "import":
        import_run(parse_train_flags(args, "Make a run from weights.", "jaxgpt convert import", ImportFlags))
    elif action == "export":
        export_run(parse_flags(ExportFlags, args, "Write a run's weights for PyTorch.", "jaxgpt convert export"))
    else:
        given = f"jaxgpt convert {action}".strip()
        raise UserError(f"{given}: give import or export first; --help shows both")


def import_run(flags: ImportFlags) -> None:
    from jaxgpt.data.corpora import load_corpus

    corpus = load_corpus(flags.dataset, flags.data_dir, print, flags.text_column, flags.streaming)
    from jaxgpt.interop import import_export

    config = dataclasses.replace(config_of(flags), dataset=corpus.name)
    import_export.import_run(
        config, corpus, flags.weights, flags.optimizer_state, flags.out, flags.overwrite, print, flags.data_dir
    )


def export_run(flags: ExportFlags) -> None:
    from jaxgpt.interop.import_export import export_run

    step = export_run(flags.run, flags.checkpoint, flags.out, flags.optimizer_state, flags.overwrite)
    print(f"{flags.run} after {step} steps: {flags.out}")
