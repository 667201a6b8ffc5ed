"""Import of PyTorch weights (safetensors) as a run, and export of a run's weights."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from jaxgpt import parallel
from jaxgpt.config import TrainConfig
from jaxgpt.data.corpora import Corpus
from jaxgpt.data.tokenizer import sample_prompt
from jaxgpt.errors import UserError
from jaxgpt.interop import safetensors, torch_names
from jaxgpt.runs import run_dir
from jaxgpt.runs.checkpoint import Checkpoints
from jaxgpt.runs.restore import restore_language_model
from jaxgpt.runtime import build_language_modeling
from jaxgpt.train_step import TrainState


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
    """Makes a run folder whose only checkpoint holds the weights and optimizer state of files.

    Args:
        corpus: the text that the run will train on; it gives the vocabulary.
        weights, optimizer_state: safetensors files. Without optimizer state the run starts at step 0 with zero
            moments; with it, at the step that the file counts.
        out: the folder of the run.
        say: takes lines about the progress.
        data_dir: a folder to look for GPT-2's vocabulary in first.

    Raises:
        UserError: `out` holds a run or other files; or a file cannot be read or does not fit the model. Nothing has
            been written then.
    """
    if os.path.exists(out / "config.json") and not overwrite:
        raise UserError(f"--out {out}: holds a run already; choose another folder, or --overwrite to replace it")
    for flag, path in (("--weights", weights), ("--optimizer-state", optimizer_state)):
        if path and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(out)):
            raise UserError(f"{flag} {path}: lies in --out {out}, which is replaced; move the file out of there")
    data, executor = build_language_modeling(config, corpus, data_dir, say, devices=parallel.one_device, trains=False)
    config, tokenizer = executor.config, data.tokenizer
    sample_prompt(config.prompt, tokenizer, corpus)  # a run whose prompt cannot be encoded could not be trained
    state = _read_state(executor, weights, optimizer_state)
    done = int(state.step)
    if done > config.steps:
        raise UserError(
            f"--optimizer-state {optimizer_state}: {done} updates done, more than --steps {config.steps}; "
            "raise --steps, or give another file"
        )
    with _out_dir_flag_replaced("--out"):
        begun = run_dir.create(out, config, tokenizer, corpus, overwrite, complete=False)
    with contextlib.closing(begun) as run:
        try:
            with contextlib.closing(Checkpoints(run, config.keep_checkpoints)) as checkpoints:
                checkpoints.save(executor.put(state))
                checkpoints.wait()
            run.complete()  # only now is the folder a run: an interrupted import leaves none
        except BaseException:
            run.discard()
            raise
    n_params = sum(p.size for p in state.params.values())
    say(f"{n_params:,} parameters from {weights}, {done} of {config.steps} updates done: {out}")


def _read_state(executor: parallel.Executor, weights: Path, optimizer_state: Path | None) -> TrainState:
    """The state in the files, as numpy arrays. Raises a `UserError` that names the file."""
    like = executor.abstract_state()
    tensors = safetensors.read(weights, "--weights")
    with _errors_prefixed(f"--weights {weights}"):
        params = torch_names.from_torch(torch_names.tutorial_names(tensors), like.params)
    if optimizer_state is None:
        step, opt_state = 0, executor.objective.optimizer.init(jax.tree.map(jax.numpy.asarray, params))
    else:
        tensors = safetensors.read(optimizer_state, "--optimizer-state")
        with _errors_prefixed(f"--optimizer-state {optimizer_state}"):
            opt_state = torch_names.optimizer_from_torch(tensors, like.opt_state)
            step = int(np.asarray(tensors["step"]).item())
    return TrainState(jax.numpy.int32(step), params, opt_state)


def export_run(path: Path, which: str, out: Path, optimizer_state: Path | None, overwrite: bool) -> int:
    """Writes the weights of a checkpoint to a safetensors file.

    Args:
        which: "last", "best", or "result": the best if the run stopped early, else the last.
        out: the file for the weights.
        optimizer_state: the file for the optimizer state, if it is to be written.

    Returns:
        The checkpoint's number of updates.

    Raises:
        UserError: there is no run or checkpoint, or a file exists or cannot be written.
    """
    safetensors.require_new({"--out": out, "--optimizer-state": optimizer_state}, overwrite, keep_out_of=path)
    _, _, state = restore_language_model(path, which)
    params, opt_state = jax.device_get((state.params, state.opt_state))
    files = [("--out", out, torch_names.to_torch(params))]
    if optimizer_state:
        files.append(("--optimizer-state", optimizer_state, torch_names.optimizer_to_torch(opt_state)))
    safetensors.write(files)
    return int(state.step)


@contextlib.contextmanager
def _errors_prefixed(flag_and_path: str) -> Iterator[None]:
    """Puts the flag and the file before the message of a `UserError`."""
    try:
        yield
    except UserError as e:
        raise UserError(f"{flag_and_path}: {e}") from None


@contextlib.contextmanager
def _out_dir_flag_replaced(flag: str) -> Iterator[None]:
    """Names `flag` in the messages of `run_dir`, which name --out-dir, the flag of `jaxgpt train`."""
    try:
        yield
    except UserError as e:
        raise UserError(str(e).replace("--out-dir", flag)) from None
