"""Fine-tuning a trained language model to classify texts: what `scripts/finetune.py` does."""

import dataclasses
import hashlib
import math
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgpt import parallel, run_folder
from jaxgpt.classifier import (
    ClassifierProgram,
    EpochOrder,
    RowLoader,
    Scores,
    encode,
    in_batches,
    padding,
    scores,
)
from jaxgpt.config import FinetuneConfig
from jaxgpt.console import Display
from jaxgpt.data_files import cache_folder
from jaxgpt.errors import UserError
from jaxgpt.labelled import Example, Labelled, choose
from jaxgpt.run_folder import RunFolder
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.train_step import TrainState
from jaxgpt.trained import open_trained
from jaxgpt.trainer import new_folder, run_training


def finetune(
    base: Path,
    which: str,
    config: FinetuneConfig,
    data: Labelled,
    out_dir: Path | None,
    overwrite: bool,
    display: Display,
    started: float,
) -> int:
    """Trains a classifier from a run's weights to the end, or goes on with the one in `out_dir`.

    Args:
        base: the folder of a language model's run, and `which` of its checkpoints.
        out_dir, overwrite, started: as in `language_model.train`.

    Returns:
        The command's exit code: 0, or 128 + the signal that stopped the run.

    Raises:
        UserError: before anything is written; or the disk is full or the memory exhausted while it trains.
        LossNotFinite: a loss or gradient norm is not finite; the checkpoints hold states from before it.
    """
    if out_dir and (os.path.realpath(base) + "/").startswith(os.path.realpath(out_dir) + "/"):
        raise UserError(f"--out-dir {out_dir}: holds RUN {base}, which it is made from; choose another folder")
    base_run, _, base_state = open_trained(base, which)
    base_params, base_step = jax.device_get(base_state.params), int(base_state.step)
    del base_state  # its optimiser's state would stay in memory
    given = {"run": os.path.abspath(base), "step": base_step, "sha256": digest(base_params)}
    tokenizer = base_run.tokenizer
    train = choose(data.train, config.train_samples, config.seed)
    config = dataclasses.replace(
        config, model=base_run.config.model, steps=config.epochs * math.ceil(len(train) / config.batch_size)
    )
    parallel.prepare(config, cache_folder() / "xla")
    numerics = parallel.numerics(config)
    config = dataclasses.replace(config, dtype=np.dtype(numerics.compute_dtype).name)
    program = ClassifierProgram(
        config, tokenizer.vocab_size, numerics, n_classes=len(data.labels), padding=padding(tokenizer)
    )
    executor = parallel.Executor(program)
    task_data = {
        name: _encoded(examples, tokenizer, config, name) for name, examples in (("train", train), ("test", data.test))
    }
    run = run_folder.create(
        out_dir or new_folder(config.dataset, f"finetune-{config.pool}"),
        config,
        tokenizer,
        data,
        overwrite,
        labels=data.labels,
        base=given,
    )
    if (run.path / "summary.json").exists():
        display.line(f"{run.path}: finished already; --overwrite starts again")
        return 0
    display.line(
        f"{data.name} ({len(train):,} texts to train on and {len(data.test):,} to test on, {len(data.labels)} classes) "
        f"from {base} after {base_step} steps, on {executor.describe_devices()} in {config.dtype}"
    )
    display.line(f"run folder: {run.path}")

    def first_state() -> TrainState:
        state = executor.init_state()
        dtype = numerics.param_dtype
        body = {name: p.astype(dtype) for name, p in base_params.items() if name in state.params}
        assert set(state.params) - set(body) == {"classifier.kernel", "classifier.bias"}
        params = state.params | executor.put(body)
        return TrainState(state.step, params, executor.put(program.optimizer.init(params)))

    return run_training(run, executor, lambda: Classification(run, executor, task_data), first_state, display, started)


def digest(params: dict[str, np.ndarray]) -> str:
    """Tells weights from any others."""
    found = hashlib.sha256()
    for name, p in sorted(params.items()):
        found.update(f"{name} {p.dtype} {p.shape} ".encode() + np.ascontiguousarray(p).tobytes())
    return found.hexdigest()


def _encoded(
    examples: list[Example], tokenizer: Tokenizer, config: FinetuneConfig, split: str
) -> tuple[np.ndarray, np.ndarray]:
    try:
        idx_NT = encode([text for text, _ in examples], tokenizer, config.max_tokens)
    except UserError as e:
        raise UserError(f"--dataset {config.dataset}: a {split} text: {e}; or start from another RUN") from None
    return idx_NT, np.array([label for _, label in examples], np.int32)


class Classification:
    """The task of `trainer.Task`: the classes of texts."""

    watches = ()

    def __init__(self, run: RunFolder, executor: parallel.Executor, data: dict[str, tuple[np.ndarray, np.ndarray]]):
        config = run.config
        self.run, self.executor, self.test = run, executor, data["test"]
        self.title = f"{config.dataset.rsplit('/')[-1]}, --pool {config.pool}"
        order = EpochOrder(config.seed, len(data["train"][0]), config.batch_size)
        self.steps_per_epoch = order.steps_per_epoch
        self.loader = RowLoader(*data["train"], order, executor.put)

    def validate(self, params: Any, step: int, n_batches: int | None = None) -> dict[str, float]:
        """Loss and accuracy on the test texts."""
        loss, confusion_KK = self._tested(params, n_batches)
        return {"val_loss": loss, "val_accuracy": scores(confusion_KK).accuracy}

    def line(self, report: dict[str, Any], n_steps: int) -> str:
        step = str(report["step"]).zfill(len(str(n_steps)))
        return (
            f"epoch {report['epoch']:<4.3g} step {step}  train loss {report['train_loss']:.3f}  test loss "
            f"{report['val_loss']:.4f}  accuracy {report['val_accuracy']:.4f}  {report['tokens_per_s']:,.0f} tokens/s"
        )

    def finish(self, params: Any) -> tuple[dict[str, Any], str]:
        """Accuracy, the confusion matrix, and each class's precision and recall."""
        from jaxgpt.report import confusion_matrix

        loss, confusion_KK = self._tested(params, None)
        result, labels = scores(confusion_KK), self.run.labels
        confusion_matrix(self.run.path / "confusion.png", self.title, confusion_KK, labels, result.accuracy)
        per_class = {
            label: {"precision": _number(p), "recall": _number(r), "f1": _number(f), "support": n}
            for label, p, r, f, n in zip(labels, *result[1:], strict=True)
        }
        figures = {
            "val_loss": loss,
            "val_accuracy": result.accuracy,
            "labels": list(labels),
            "confusion": confusion_KK.astype(int).tolist(),
            "per_class": per_class,
        }
        return figures, table(result, labels)

    def _tested(self, params: Any, n_batches: int | None) -> tuple[float, np.ndarray]:
        batch_size, n_classes = self.run.config.batch_size, len(self.run.labels)
        idx_NT, label_N = (a if n_batches is None else a[: n_batches * batch_size] for a in self.test)
        sums = self.executor.evaluate(params, in_batches(idx_NT, label_N, batch_size)).sum(0)
        return float(sums[0] / sums[1]), sums[2:].reshape(n_classes, n_classes)


def table(result: Scores, labels: tuple[str, ...]) -> str:
    """Precision and recall of each class, for a person."""
    width = max(map(len, (*labels, "class")))
    lines = [f"{'class':<{width}}  precision  recall      f1  texts"]
    for label, p, r, f, n in zip(labels, *result[1:], strict=True):
        lines.append(f"{label:<{width}}  {p:9.4f}  {r:6.4f}  {f:6.4f}  {n:5}")
    return "\n".join([*lines, f"accuracy {result.accuracy:.4f} on {sum(result.support):,} texts"])


def _number(value: float) -> float | None:
    """JSON knows no NaN."""
    return None if math.isnan(value) else value
