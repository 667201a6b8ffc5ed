"""Runs to and from files of weights (safetensors) that PyTorch reads and writes."""

import contextlib
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from jaxgpt import checkpoint, convert, parallel, run_folder, tensor_files
from jaxgpt.config import TrainConfig
from jaxgpt.data_files import cache_folder
from jaxgpt.datasets import Corpus
from jaxgpt.errors import UserError
from jaxgpt.tokens import prepare
from jaxgpt.train_step import Program, TrainState
from jaxgpt.trained import open_trained


def import_run(
    config: TrainConfig,
    corpus: Corpus,
    weights: Path,
    optimizer_state: Path | None,
    out: Path,
    overwrite: bool,
    say: Callable[[str], None],
    data_dir: Path | None = None,
) -> None:
    """Makes a run folder whose only checkpoint holds the files' weights and optimiser state.

    Without optimiser state the run starts at step 0 with fresh moments; with it, after the updates that it counts.

    Raises:
        UserError: a file cannot be read or does not fit the model, before anything is written; or the folder is taken.
    """
    if (out / "config.json").exists() and not overwrite:
        raise UserError(f"--out {out}: holds a run already; choose another folder, or --overwrite to replace it")
    for flag, path in (("--weights", weights), ("--optimizer-state", optimizer_state)):
        if path and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(out)):
            raise UserError(f"{flag} {path}: lies in --out {out}, which is made anew; move the file out of there")
    config, data = prepare(config, corpus, data_dir, say)  # refuses a text that is too short
    tokenizer = data.tokenizer
    parallel.prepare(config, cache_folder() / "xla")
    numerics = parallel.numerics(config)
    config = dataclasses.replace(config, dtype=np.dtype(numerics.compute_dtype).name)
    executor = parallel.Executor(
        Program(config, tokenizer.vocab_size, numerics, tokenizer.end_of_text), parallel.one_device()
    )
    state = _read_state(executor, weights, optimizer_state)
    done = int(state.step)
    if done > config.steps:
        raise UserError(
            f"--optimizer-state {optimizer_state}: {done} updates done, more than --steps {config.steps}; "
            "raise --steps, or give another file"
        )
    with _flag_named("--out"):
        run = run_folder.create(out, config, tokenizer, corpus, overwrite, complete=False)
    try:
        with contextlib.closing(checkpoint.open_checkpoints(run.checkpoints, config.keep_checkpoints)) as checkpoints:
            checkpoint.save(checkpoints, executor.put(state), None)
            checkpoint.wait(checkpoints)
        run.complete()  # from here on the folder is a run; stopped before, it is none
    except BaseException:
        run.discard()
        raise
    n_params = sum(p.size for p in state.params.values())
    say(f"{n_params:,} parameters from {weights}, {done} of {config.steps} updates done: {out}")


def _read_state(executor: parallel.Executor, weights: Path, optimizer_state: Path | None) -> TrainState:
    """The files' state on the host. Raises `UserError` that names the file."""
    like = executor.abstract_state()
    tensors = tensor_files.read(weights, "--weights")
    with _file_named(f"--weights {weights}"):
        params = convert.from_torch(convert.writeup_names(tensors), like.params)
    if optimizer_state is None:
        step, opt_state = 0, executor.program.optimizer.init(jax.tree.map(jax.numpy.asarray, params))
    else:
        tensors = tensor_files.read(optimizer_state, "--optimizer-state")
        with _file_named(f"--optimizer-state {optimizer_state}"):
            opt_state = convert.optimizer_from_torch(tensors, like.opt_state)
            step = int(np.asarray(tensors["step"]).item())
    return TrainState(np.asarray(step, np.int32), params, opt_state)


def export_run(path: Path, which: str, out: Path, optimizer_state: Path | None, overwrite: bool) -> int:
    """Writes a checkpoint's weights, and its optimiser state if asked for. Returns its number of updates.

    Raises:
        UserError: no run or checkpoint there, or a file cannot be written, or exists.
    """
    tensor_files.require_new({"--out": out, "--optimizer-state": optimizer_state}, overwrite, keep_out_of=path)
    _, _, state = open_trained(path, which)
    params, opt_state = jax.device_get((state.params, state.opt_state))
    files = [("--out", out, convert.to_torch(params))]
    if optimizer_state:
        files.append(("--optimizer-state", optimizer_state, convert.optimizer_to_torch(opt_state)))
    tensor_files.write(files)
    return int(state.step)


@contextlib.contextmanager
def _file_named(flag_and_path: str):
    """Puts the flag and the file before what is wrong with it."""
    try:
        yield
    except UserError as e:
        raise UserError(f"{flag_and_path}: {e}") from None


@contextlib.contextmanager
def _flag_named(flag: str):
    """The run folder speaks of --out-dir, as in scripts/train.py; here the flag has another name."""
    try:
        yield
    except UserError as e:
        raise UserError(str(e).replace("--out-dir", flag)) from None
