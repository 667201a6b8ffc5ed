"""Import a model of PyTorch as a run, and export a run's model to PyTorch.

usage: jaxgpt convert import PATH --out RUN [--dataset NAME] [flags of jaxgpt train]
       jaxgpt convert export RUN --to safetensors|huggingface|nanogpt --out PATH [--checkpoint result|last|best]

import reads Hugging Face's GPT-2 (a folder, or a repository's name), nanoGPT's ckpt.pt, llm.c's .bin and safetensors
files, and makes a run for jaxgpt evaluate, generate, finetune and train --init-from. With --dataset and the state of
an optimizer, jaxgpt train goes on with the run. jaxgpt convert import --help and export --help list all flags.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxgpt.cli.args import config_of, given_flags, parse_flags, parse_train_flags, train_command
from jaxgpt.config import TrainConfig
from jaxgpt.errors import UserError


@dataclass(frozen=True)
class ImportFlags(TrainConfig):
    path: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="PATH")] = None
    """A folder or repository of Hugging Face's GPT-2, nanoGPT's ckpt.pt, llm.c's .bin, or a safetensors file."""
    out: Path = tyro.MISSING
    """Folder of the run to make."""
    dataset: str = ""
    """As of jaxgpt train, the text that the run trains on. Without it the run holds the model alone."""
    weights: Path | None = None
    """In place of PATH: weights alone, a safetensors file, of the model that the flags describe."""
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
    """File to write; with --to huggingface a folder."""
    to: Literal["safetensors", "huggingface", "nanogpt"] = "safetensors"
    """safetensors: weights under the tutorials' names. huggingface: a folder for AutoTokenizer and AutoModelForCausalLM
    (of a classifier AutoModelForSequenceClassification). nanogpt: ckpt.pt, with the optimizer's state."""
    optimizer_state: Path | None = None
    """File for the optimizer state (safetensors)."""
    checkpoint: Literal["result", "last", "best"] = "result"
    """result: best if the run stopped early, else last. best: the one with the lowest validation loss."""
    overwrite: bool = False
    """Replace what exists."""


def main(args: list[str]) -> None:
    action, args = (args[:1] or [""])[0], args[1:]
    if action in ("-h", "--help"):
        print((__doc__ or "").strip())
    elif action == "import":
        import_run(parse_train_flags(args, "Make a run from weights.", "jaxgpt convert import", ImportFlags), args)
    elif action == "export":
        export_run(parse_flags(ExportFlags, args, "Write a run's model for PyTorch.", "jaxgpt convert export"))
    else:
        given = f"jaxgpt convert {action}".strip()
        raise UserError(f"{given}: give import or export first; --help shows both")


def import_run(flags: ImportFlags, args: list[str]) -> None:
    if flags.path is not None and flags.weights is not None:
        raise UserError(f"PATH {flags.path}: --weights {flags.weights} is given in its place; leave one of both out")
    if flags.path is None and flags.weights is None:
        raise UserError("PATH: nothing to import; give a path, or --weights FILE in its place")
    from jaxgpt.data.corpora import load_corpus

    corpus = None
    if flags.dataset:
        corpus = load_corpus(flags.dataset, flags.data_dir, print, flags.text_column, flags.streaming)
    from jaxgpt.interop import import_export

    sources = {"PATH": flags.path, "--weights": flags.weights, "--optimizer-state": flags.optimizer_state}
    import_export.require_new_run(flags.out, flags.overwrite, sources)
    from jaxgpt.interop.pretrained import TOLD, load_pretrained, load_weights

    config = dataclasses.replace(config_of(flags), dataset=corpus.name if corpus else "")
    if flags.weights is not None:
        named = f"--weights {flags.weights}"
        pretrained = load_weights(flags.weights, "--weights", config.model)
    else:
        assert flags.path is not None
        named = f"PATH {flags.path}"
        given = given_flags(args)
        told: dict[str, Any] = {name: getattr(flags.model, name) for name in TOLD if f"model.{name}" in given}
        pretrained = load_pretrained(flags.path, "PATH", data_dir=flags.data_dir, say=print, told=told)
        config = import_export.imported_config(config, flags.path, pretrained, given)
    if flags.optimizer_state is not None:
        pretrained = import_export.with_optimizer_state(pretrained, flags.optimizer_state, "--optimizer-state")
        named = f"--optimizer-state {flags.optimizer_state}"
    rest = (flags.out, flags.overwrite, print, flags.data_dir)
    config, done = import_export.import_run(config, corpus, pretrained, named, *rest)
    if corpus and flags.path and done == config.steps:
        print(f"it has done all of its {done} updates; to go on with its training, import it with more --steps")
    elif corpus and flags.path:
        print(f"to go on with its training: {train_command(config, flags.out, flags.data_dir)}")


def export_run(flags: ExportFlags) -> None:
    from jaxgpt.interop import import_export

    if flags.optimizer_state is not None and flags.to != "safetensors":
        remedy = "nanogpt has it in its one file" if flags.to == "nanogpt" else "huggingface has no place for it"
        raise UserError(f"--optimizer-state {flags.optimizer_state}: --to {remedy}; leave it out")
    where = (flags.run, flags.checkpoint, flags.out)
    if flags.to == "huggingface":
        step = import_export.export_huggingface(*where, flags.overwrite)
    elif flags.to == "nanogpt":
        step = import_export.export_nanogpt(*where, flags.overwrite, print)
    else:
        step = import_export.export_safetensors(*where, flags.optimizer_state, flags.overwrite)
    print(f"{flags.run} after {step} steps: {flags.out}")
