"""Restored runs: a run's folder, its objective compiled for this machine's devices, and the state of a checkpoint."""

import contextlib
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxgpt import parallel
from jaxgpt.data.corpora import load_corpus
from jaxgpt.data.files import NotAvailable
from jaxgpt.data.token_cache import split_tokens
from jaxgpt.errors import UserError
from jaxgpt.objective import Objective
from jaxgpt.parallel import Executor
from jaxgpt.runs import checkpoint, run_dir
from jaxgpt.runs.run_dir import RunDir
from jaxgpt.runtime import build_executor, build_objective
from jaxgpt.train_step import TrainState

ATTEMPTS = 5


class RestoredRun(NamedTuple):
    """A run with the state of one of its checkpoints (on a CPU, on as many devices as trained it)."""

    run: RunDir
    executor: Executor
    state: TrainState


def restore_language_model(path: Path, which: str) -> RestoredRun:
    """Restores a language model's run.

    Args:
        which: "last", "best", or "result": the best if the run stopped early, else the last.

    Raises:
        UserError: there is no run at `path`, it has no checkpoint, or it is a classifier's.
    """
    run = run_dir.open_run(path)
    if run.labels:
        raise UserError(f"RUN {path}: classifies texts; give it to jaxgpt classify, or a language model's run here")
    return _restored(run, which)


def restore_classifier(path: Path, which: str) -> RestoredRun:
    """Restores a classifier's run, like `restore_language_model`. Raises `UserError` for a language model's."""
    run = run_dir.open_run(path)
    if not run.labels:
        raise UserError(f"RUN {path}: is a language model's; make a classifier of it with jaxgpt finetune RUN")
    return _restored(run, which)


def restore_objective(path: Path) -> tuple[RunDir, Objective]:
    """A run, of a language model or a classifier, and its objective. Raises `UserError` if there is no run."""
    run = run_dir.open_run(path)
    return run, build_objective(run.config, run.tokenizer, run.labels)


def _restored(run: RunDir, which: str) -> RestoredRun:
    which = run.result if which == "result" else which
    none_yet = UserError(f"RUN {run.path}: has no checkpoint yet; train it to its first one")
    if not run.checkpoints.is_dir():
        raise none_yet
    executor = build_executor(run.config, run.tokenizer, run.labels, parallel.cores_or_one_device)
    for attempt in range(ATTEMPTS):
        with contextlib.closing(checkpoint.open_checkpoints(run.checkpoints, writes=False)) as checkpoints:
            step = checkpoint.pick_step(checkpoints, which)
            if step is None:
                raise none_yet
            remedy = f"try --checkpoint {'last' if which == 'best' else 'best'}"
            try:
                state = checkpoint.restore(checkpoints, executor.abstract_state(), step, remedy)
                return RestoredRun(run, executor, state)
            except UserError:
                # A run that still trains may have deleted this checkpoint for a later one: take that.
                if attempt == ATTEMPTS - 1 or (run.checkpoints / str(step)).exists():
                    raise
    raise AssertionError


def print_progress(line: str) -> None:
    """Prints a line of progress to standard error; standard output is for a command's result."""
    print(line, file=sys.stderr, flush=True)


def split_of(run: RunDir, split: str, data_dir: Path | None) -> np.ndarray:
    """The tokens of the "train" or "val" split of the run's own data, [N] integers.

    Args:
        data_dir: a folder to look for datasets in first.

    Raises:
        UserError: the data cannot be had, or differs from the data that the run was trained on.
    """
    config = run.config
    try:
        corpus = load_corpus(config.dataset, data_dir or run.data_dir, print_progress, config.text_column)
    except NotAvailable as e:
        raise UserError(f"RUN {run.path}: the text it was trained on cannot be had: {e}") from None
    if corpus.sha256 != run.data_sha256:
        raise UserError(
            f"RUN {run.path}: was trained on another text than {corpus.source} (sha256 {run.data_sha256[:12]}..., here "
            f"{corpus.sha256[:12]}...); bring that text back, or give its folder with --data-dir"
        )
    train_N, val_N = split_tokens(corpus, run.tokenizer, config, print_progress)
    return train_N if split == "train" else val_N
