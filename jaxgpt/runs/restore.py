"""Restored runs: a run's folder, its objective compiled for this machine's devices, and the state of a checkpoint."""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxgpt import parallel
from jaxgpt.data.corpora import load_corpus, streaming_of_run
from jaxgpt.data.files import NotAvailable
from jaxgpt.data.token_cache import open_shards, split_tokens
from jaxgpt.errors import DamagedRun, UserError
from jaxgpt.objective import Objective
from jaxgpt.parallel import Executor
from jaxgpt.runs import run_dir
from jaxgpt.runs.checkpoint import ATTEMPTS, Checkpoints
from jaxgpt.runs.run_dir import RunDir
from jaxgpt.runtime import build_executor, build_objective
from jaxgpt.train_step import TrainState


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


def restore_any(path: Path, which: str) -> RestoredRun:
    """Restores a run of either task, like `restore_language_model`."""
    return _restored(run_dir.open_run(path), which)


def restore_objective(path: Path) -> tuple[RunDir, Objective]:
    """A run, of a language model or a classifier, and its objective. Raises `UserError` if there is no run."""
    run = run_dir.open_run(path)
    return run, build_objective(run.config, run.tokenizer, run.labels)


def _restored(run: RunDir, which: str) -> RestoredRun:
    checkpoints = Checkpoints(run, writes=False)
    if which == "result":
        which = "best" if checkpoints.stopped_early() else "last"
    executor = build_executor(run.config, run.tokenizer, run.labels, parallel.cores_or_one_device)
    if which == "best":
        for _ in range(ATTEMPTS):
            step = checkpoints.best_step()
            if step is None:
                break
            try:
                return RestoredRun(run, executor, checkpoints.restore(step, executor.abstract_state()))
            except DamagedRun as e:
                if checkpoints.path(step).exists():  # else the run, which still trains, has removed it for a better one
                    raise DamagedRun(f"{e}; try --checkpoint last") from None
    else:
        state = checkpoints.restore_last(executor.abstract_state, print_progress)
        if state is not None:
            return RestoredRun(run, executor, state)
    raise UserError(f"RUN {run.path}: has no checkpoint yet; train it to its first one")


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
    if not config.dataset:
        raise UserError(f"RUN {run.path}: holds a model that was imported without a text; give one with --dataset")
    try:
        folder = data_dir or run.data_dir
        streaming = streaming_of_run(config.dataset, config.streaming)
        corpus = load_corpus(config.dataset, folder, print_progress, config.text_column, streaming)
    except NotAvailable as e:
        raise UserError(f"RUN {run.path}: the text it was trained on cannot be had: {e}") from None
    if corpus.sha256 != run.data_sha256:
        raise UserError(
            f"RUN {run.path}: was trained on another text than {corpus.source} (sha256 {run.data_sha256[:12]}..., here "
            f"{corpus.sha256[:12]}...); bring that text back, or give its folder with --data-dir"
        )
    if corpus.shards:
        if split == "train":
            raise UserError(
                f"RUN {run.path}: {config.dataset} comes in shards, of which only a training reads those to train on; "
                "evaluate the val split"
            )
        return open_shards(corpus, run.tokenizer, config, print_progress)[1]
    train_N, val_N = split_tokens(corpus, run.tokenizer, config, print_progress)
    return train_N if split == "train" else val_N
