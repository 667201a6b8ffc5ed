"""A trained run, opened for evaluation and generation."""

import contextlib
import sys
from pathlib import Path

import numpy as np

from jaxgpt import batches, checkpoint, parallel, run_folder
from jaxgpt.datasets import NotAvailable, cache_folder, load_corpus, split_tokens
from jaxgpt.errors import UserError
from jaxgpt.parallel import Executor
from jaxgpt.run_folder import RunFolder
from jaxgpt.train_step import Program, TrainState

ATTEMPTS = 5


def open_trained(path: Path, which: str) -> tuple[RunFolder, Executor, TrainState]:
    """A run, its program on one device, and the state of its "last" or "best" checkpoint.

    Raises:
        UserError: no run there, or a run without a checkpoint.
    """
    run = run_folder.open_run(path)
    none_yet = UserError(f"RUN {path}: has no checkpoint yet; train it with scripts/train.py --out-dir {path}")
    if not run.checkpoints.is_dir():
        raise none_yet
    parallel.prepare(run.config, cache_folder() / "xla")
    program = Program(run.config, run.tokenizer.vocab_size, parallel.numerics(run.config))
    executor = Executor(program, parallel.one_device())
    for attempt in range(ATTEMPTS):
        with contextlib.closing(checkpoint.open_checkpoints(run.checkpoints, writes=False)) as checkpoints:
            step = checkpoint.pick_step(checkpoints, which)
            if step is None:
                raise none_yet
            remedy = f"try --checkpoint {'last' if which == 'best' else 'best'}"
            try:
                return run, executor, checkpoint.restore(checkpoints, executor.abstract_state(), step, remedy)
            except UserError:
                # A run that is still training may have replaced it by a later one.
                if attempt == ATTEMPTS - 1 or (run.checkpoints / str(step)).exists():
                    raise
    raise AssertionError


def split_of(run: RunFolder, split: str, data_dir: Path | None) -> np.ndarray:
    """The tokens of the "train" or "val" split of the run's own data, int32.

    Raises:
        UserError: the data cannot be had, or is not what the run was trained on.
    """
    try:
        corpus = load_corpus(run.config.dataset, data_dir or run.data_dir, lambda line: print(line, file=sys.stderr))
    except NotAvailable as e:
        raise UserError(f"RUN {run.path}: the text it was trained on cannot be had: {e}") from None
    if corpus.sha256 != run.data_sha256:
        raise UserError(
            f"RUN {run.path}: was trained on another text than {corpus.source} (sha256 {run.data_sha256[:12]}..., here "
            f"{corpus.sha256[:12]}...); bring that text back, or give its folder with --data-dir"
        )
    train_tokens, val_tokens = split_tokens(corpus, run.tokenizer, run.config.model.block_size)
    return train_tokens if split == "train" else val_tokens


def whole_split_loss(run: RunFolder, executor: Executor, state: TrainState, tokens: np.ndarray) -> tuple[float, int]:
    """The mean loss over all non-overlapping windows of a split of the run's data, and its number of tokens."""
    tokens_N = executor.put(batches.device_tokens(tokens, run.tokenizer.vocab_size))
    return executor.whole_split_loss(state.params, tokens_N)
