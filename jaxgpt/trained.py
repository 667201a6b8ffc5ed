"""A trained run, opened for evaluation and generation."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgpt import batches, checkpoint, parallel, run_folder
from jaxgpt.batches import Scored
from jaxgpt.classifier import ClassifierProgram, encode, in_batches, padding
from jaxgpt.data_files import NotAvailable, cache_folder
from jaxgpt.datasets import load_corpus
from jaxgpt.errors import UserError
from jaxgpt.loss import mean_of_batches
from jaxgpt.parallel import Executor
from jaxgpt.run_folder import RunFolder
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.tokens import split_tokens
from jaxgpt.train_step import Program, TrainState

ATTEMPTS = 5
PROGRESS_SECONDS = 20.0


def open_trained(path: Path, which: str) -> tuple[RunFolder, Executor, TrainState]:
    """A language model's run, its program, on a CPU over the cores that trained it, and the state of a checkpoint.

    Args:
        which: "last", "best", or "result": the last, or the best if it stopped early.

    Raises:
        UserError: no run there, or a run without a checkpoint, or a classifier's.
    """
    run, program = program_of(path)
    if run.labels:
        raise UserError(f"RUN {path}: classifies texts; give it to scripts/classify.py, or a language model's run here")
    return _restored(run, program, which)


def open_classifier(path: Path, which: str) -> tuple[RunFolder, Executor, TrainState]:
    """The same of a classifier's run. Raises `UserError` for a language model's."""
    run, program = program_of(path)
    if not run.labels:
        raise UserError(f"RUN {path}: is a language model's; make a classifier of it with scripts/finetune.py RUN")
    return _restored(run, program, which)


def program_of(path: Path) -> tuple[RunFolder, Program]:
    """A run and its program, of a language model or a classifier. Raises `UserError` if there is no run."""
    run = run_folder.open_run(path)
    parallel.prepare(run.config, cache_folder() / "xla")
    tokenizer, numerics = run.tokenizer, parallel.numerics(run.config)
    if not run.labels:
        return run, Program(run.config, tokenizer.vocab_size, numerics, tokenizer.end_of_text)
    classes = dict(n_classes=len(run.labels), padding=padding(tokenizer))
    return run, ClassifierProgram(run.config, tokenizer.vocab_size, numerics, **classes)


def classify(run: RunFolder, executor: Executor, state: TrainState, texts: list[str]) -> np.ndarray:
    """The probability of each class for each text, [N, classes]. Raises `UserError` for what the vocabulary has not."""
    program, batch_size = executor.program, run.config.batch_size
    for number, text in enumerate(texts, 1):
        try:
            run.tokenizer.encode(text)
        except UserError as e:
            raise UserError(f"TEXT number {number}: {e}") from None
    idx_NT = encode(texts, run.tokenizer, run.config.max_tokens)

    @jax.jit
    def probabilities(params: Any, idx_BT: Any) -> Any:
        return jax.nn.softmax(program.logits(program.exact_model(params), idx_BT))

    labels = np.zeros(len(texts), np.int32)
    params = parallel.on_one_device(state.params)
    found = [probabilities(params, idx_BT) for idx_BT, _ in in_batches(idx_NT, labels, batch_size)]
    return np.concatenate([np.asarray(p_BK) for p_BK in found])[: len(texts)]


def _restored(run: RunFolder, program: Program, which: str) -> tuple[RunFolder, Executor, TrainState]:
    which = run.result if which == "result" else which
    none_yet = UserError(f"RUN {run.path}: has no checkpoint yet; train it to its first one")
    if not run.checkpoints.is_dir():
        raise none_yet
    executor = Executor(program, parallel.cores_or_one_device(program))
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


def say(line: str) -> None:
    """Progress, beside a command's result."""
    print(line, file=sys.stderr, flush=True)


def split_of(run: RunFolder, split: str, data_dir: Path | None) -> np.ndarray:
    """The tokens of the "train" or "val" split of the run's own data.

    Raises:
        UserError: the data cannot be had, or is not what the run was trained on.
    """
    config = run.config
    try:
        corpus = load_corpus(config.dataset, data_dir or run.data_dir, say, config.text_column)
    except NotAvailable as e:
        raise UserError(f"RUN {run.path}: the text it was trained on cannot be had: {e}") from None
    if corpus.sha256 != run.data_sha256:
        raise UserError(
            f"RUN {run.path}: was trained on another text than {corpus.source} (sha256 {run.data_sha256[:12]}..., here "
            f"{corpus.sha256[:12]}...); bring that text back, or give its folder with --data-dir"
        )
    train_N, val_N = split_tokens(corpus, run.tokenizer, config, say)
    return train_N if split == "train" else val_N


class SplitLoss(NamedTuple):
    """The result over a split: the mean loss in nats per token, how many tokens, the bytes they stand for, and the
    documented mean of the batches' mean losses."""

    loss: float
    tokens: int
    n_bytes: int
    batch_mean: float

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits over the bytes of UTF-8, by which tokenizers compare. NaN where there are none."""
        return self.loss * self.tokens / math.log(2) / self.n_bytes if self.n_bytes else math.nan


def whole_split_loss(
    executor: Executor,
    params: Any,
    tokens_N: np.ndarray,
    tokenizer: Tokenizer,
    stride: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> SplitLoss:
    """The loss over a split's targets, cut as `batches.whole_split` says; `say` is told how far it is."""
    program = executor.program
    config, n_bytes, told = program.config, 0, time.monotonic()

    def scored() -> Iterator[Scored]:
        nonlocal n_bytes, told
        done = 0
        for batch in batches.whole_split(tokens_N, config.batch_size, config.model.block_size, stride):
            counts_BT = batch.counts_BT
            if config.within_documents:
                counts_BT = counts_BT & (batch.window_BT[:, :-1] != program.end_of_text)
            n_bytes += int(tokenizer.n_bytes_V[batch.window_BT[:, 1:][counts_BT]].sum())
            done += int(counts_BT.sum())
            if time.monotonic() - told > PROGRESS_SECONDS:
                told = time.monotonic()
                say(f"evaluated {done:,} of {len(tokens_N):,} tokens")
            yield batch

    sums_J2 = executor.evaluate(params, scored())
    loss, count = sums_J2.sum(0)
    return SplitLoss(float(loss / count), int(count), n_bytes, mean_of_batches(sums_J2))
