"""Classify new texts by a fine-tuned run: jaxgpt classify RUN "text" ...

Without texts on the command line, each line of standard input is a text.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxgpt import strict_json
from jaxgpt.cli.args import parse_flags
from jaxgpt.errors import UserError


@dataclass(frozen=True)
class ClassifyFlags:
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of a run that jaxgpt finetune has made."""
    texts: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="TEXT")] = ()
    """Texts to classify."""
    checkpoint: Literal["result", "last", "best"] = "result"
    """result: best if the run stopped early, else last. best: the one with the lowest loss on the test texts."""
    json: bool = False
    """Print a line {"text", "label", "probability", "probabilities"} for each text and nothing else."""


def main(args: list[str]) -> None:
    flags = parse_flags(ClassifyFlags, args, __doc__, "jaxgpt classify")
    texts = list(flags.texts)
    if not texts:
        if sys.stdin is None or sys.stdin.isatty():
            raise UserError("TEXT: none given; give texts to classify, or lines on standard input")
        try:
            texts = [line.rstrip("\r\n") for line in sys.stdin]
        except UnicodeDecodeError as e:
            raise UserError(
                f"standard input: not UTF-8 text (byte {e.start}); convert it with iconv -t UTF-8"
            ) from None
        if not texts:
            raise UserError("standard input: no lines; give a text a line, or texts on the command line")
    if empty := [at for at, text in enumerate(texts, 1) if not text.strip()]:
        raise UserError(f"TEXT number {empty[0]}: empty; give at least one character")
    from jaxgpt.runs.restore import restore_classifier
    from jaxgpt.tasks.classification import classify

    run, executor, state = restore_classifier(flags.run, flags.checkpoint)
    for text, probability_K in zip(texts, classify(run, executor, state, texts), strict=True):
        best = int(probability_K.argmax())
        if flags.json:
            probabilities = dict(zip(run.labels, map(float, probability_K), strict=True))
            found = {"text": text, "label": run.labels[best], "probability": float(probability_K[best])}
            print(strict_json.dumps(found | {"probabilities": probabilities}))
        else:
            print(f"{run.labels[best]}  {probability_K[best]:.4f}  {text}", flush=True)
