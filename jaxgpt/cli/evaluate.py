"""Compute a run's loss and perplexity over a whole split of its data, or a benchmark: jaxgpt evaluate RUN"""

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
    split: Literal["val", "train", "test"] = "val"
    """Split of the data to read, in windows of a block. test: with --dataset."""
    dataset: str | None = None
    """Another dataset than the run's, as jaxgpt train takes it, encoded with the run's tokenizer."""
    benchmark: Literal["wikitext-2", "wikitext-103", "lambada", "hellaswag"] | None = None
    """wikitext-2 and -103: perplexity of the test split, by strides. lambada: accuracy and perplexity of last words
    (OpenAI's variant). hellaswag: accuracy on the validation split."""
    file: Path | None = None
    """With --benchmark, its data: a text for WikiText, JSON Lines for the others. Default: that of a data folder or the
    Hugging Face hub."""
    checkpoint: Literal["result", "last", "best"] = "result"
    """result: best if the run stopped early, else last. best: the one with the lowest validation loss."""
    data_dir: Path | None = None
    """Folder to look for datasets in first."""
    stride: int | None = None
    """Distance in tokens between the starts of windows. A window counts the tokens that no window before it has
    counted, each with a context of at least a block minus the stride. Default: a block; a last, shorter window is left
    out. With --benchmark wikitext-2 or -103: 512, or half a block if that is less."""
    json: bool = False
    """Print {"loss", "ppl", "tokens", "bits_per_byte"}, or the benchmark's figures, and nothing else."""


def main(args: list[str]) -> None:
    flags = parse_flags(EvaluateFlags, args, __doc__, "jaxgpt evaluate")
    _check(flags)
    import jaxgpt
    from jaxgpt.api import load_local
    from jaxgpt.runs.restore import print_progress

    model = load_local(flags.run, flags.checkpoint, print_progress)
    if flags.benchmark:
        from jaxgpt.tasks.evaluation import evaluate_benchmark

        data_dir = flags.data_dir or (model.run.data_dir if model.run else None)
        figures = evaluate_benchmark(
            model.text_model, flags.benchmark, flags.stride, flags.file, data_dir, print_progress
        )
        if flags.json:
            print(strict_json.dumps({"benchmark": flags.benchmark, **figures}))
        else:
            told = "  ".join(f"{name.replace('_', ' ')} {_figure(value)}" for name, value in figures.items())
            print(f"{flags.run} after {model.step} steps, {flags.benchmark}: {told}")
        return
    whole = jaxgpt.evaluate(model, flags.split, flags.stride, flags.data_dir, print_progress, flags.dataset)
    ppl, bpb = whole.perplexity, whole.bits_per_byte
    if flags.json:
        print(strict_json.dumps({"loss": whole.loss, "ppl": ppl, "tokens": whole.tokens, "bits_per_byte": bpb}))
    else:
        stride = f" at stride {flags.stride}" if flags.stride else ""
        dataset = f" of {flags.dataset}" if flags.dataset else ""
        print(
            f"{flags.run} after {model.step} steps, whole {flags.split} split{dataset} ({whole.tokens:,} "
            f"tokens{stride}): loss {whole.loss:.4f}  perplexity {ppl:.3f}  bits per byte {bpb:.4f}"
        )


def _check(flags: EvaluateFlags) -> None:
    """Raises `UserError` for flags that exclude each other."""
    if flags.benchmark:
        if flags.dataset is not None:
            raise UserError("--benchmark and --dataset: a benchmark has its own data; give one of them")
        if flags.split != "val":
            raise UserError(f"--split {flags.split}: a benchmark has its own split; leave it out")
    elif flags.file is not None:
        raise UserError(f"--file {flags.file}: is a benchmark's data; give --benchmark, or --dataset file:PATH")
    elif flags.split == "test" and flags.dataset is None:
        raise UserError("--split test: a run's own data has val and train; name the dataset with --dataset")


def _figure(value: float | int) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
