"""Classification: fine-tuning a trained language model to classify texts, and classifying new texts."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgpt import parallel
from jaxgpt.analysis.callbacks import PlotLearningCurves
from jaxgpt.config import FaultPolicy, FinetuneConfig
from jaxgpt.data.labeled import Example, LabeledTexts, choose, encode, eval_batches
from jaxgpt.data.loader import ExampleLoader
from jaxgpt.data.sampler import ExampleSampler
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.interop.pretrained import load_pretrained
from jaxgpt.objective import ClassificationObjective
from jaxgpt.parallel import Executor
from jaxgpt.progress import ProgressDisplay
from jaxgpt.runs import run_dir
from jaxgpt.runs.run_dir import RunDir
from jaxgpt.runtime import build_executor
from jaxgpt.tasks.initial_weights import InitialWeights
from jaxgpt.train_step import TrainState
from jaxgpt.trainer import Task, run_training


def finetune(
    base: str,
    which: str,
    config: FinetuneConfig,
    data: LabeledTexts,
    out_dir: Path | None,
    overwrite: bool,
    display: ProgressDisplay,
    started: float,
    policy: FaultPolicy = FaultPolicy(),  # noqa: B008  (frozen)
    mesh: str = "",
) -> int:
    """Trains a classifier from the weights of a run to the end, or resumes the one in `out_dir`.

    Args:
        base: the language model, as `interop.pretrained.load_pretrained` takes it.
        which: which of its checkpoints: "last", "best" or "result".
        data: the texts with their labels.
        out_dir, overwrite, display, started, policy, mesh: as in `language_modeling.train`.

    Returns:
        The command's exit code, as `run_training` gives it.

    Raises:
        UserError: before anything is written; or as `run_training` does, which raises the other errors too.
    """
    if out_dir and (os.path.realpath(base) + "/").startswith(os.path.realpath(out_dir) + "/"):
        raise UserError(f"--out-dir {out_dir}: holds RUN {base}, which it is made from; choose another folder")
    pretrained = load_pretrained(base, "RUN", which, say=display.line)
    tokenizer = pretrained.tokenizer
    if tokenizer is None:
        raise UserError(f"RUN {base}: names no tokenizer; make a run of it with jaxgpt convert import {base}")
    weights = InitialWeights(pretrained, pretrained.model)
    train = choose(data.train, config.train_samples, config.seed)
    config = dataclasses.replace(
        config, model=pretrained.model, steps=config.epochs * math.ceil(len(train) / config.batch_size)
    )
    executor = build_executor(config, tokenizer, data.labels, trains=True, mesh=mesh)
    config, objective = executor.config, executor.objective
    splits = {
        name: _encoded(examples, tokenizer, config, name) for name, examples in (("train", train), ("test", data.test))
    }
    folder = out_dir or run_dir.default_run_dir(config.dataset, f"finetune-{config.pool}")
    begun = run_dir.create(folder, config, tokenizer, data, overwrite, labels=data.labels, base=weights.record)
    with contextlib.closing(begun) as run:
        headline = (
            f"{data.name} ({len(train):,} texts to train on and {len(data.test):,} to test on, "
            f"{len(data.labels)} classes) "
            f"from {base} after {pretrained.step} steps, on {executor.describe_devices()} in {config.dtype}"
        )

        def first_state() -> TrainState:
            state = executor.init_state()
            dtype = objective.numerics.param_dtype
            body = {name: p.astype(dtype) for name, p in weights.params.items() if name in state.params}
            assert set(state.params) - set(body) == {"classifier.kernel", "classifier.bias"}
            params = state.params | executor.put(body)
            return TrainState(state.step, params, executor.put(objective.optimizer.init(params)))

        def make_task() -> ClassificationTask:
            return ClassificationTask(run, executor, splits)

        return run_training(run, executor, headline, make_task, first_state, [display], display.line, started, policy)


def _encoded(
    examples: Sequence[Example], tokenizer: Tokenizer, config: FinetuneConfig, split: str
) -> tuple[np.ndarray, np.ndarray]:
    try:
        idx_NT = encode([text for text, _ in examples], tokenizer, config.max_tokens)
    except UserError as e:
        raise UserError(f"--dataset {config.dataset}: a {split} text: {e}; or start from another RUN") from None
    return idx_NT, np.array([label for _, label in examples], np.int32)


class Scores(NamedTuple):
    """Figures of merit from a confusion matrix [class, predicted]."""

    accuracy: float
    precision: list[float]  # of each class; NaN where none was predicted so
    recall: list[float]
    f1: list[float]
    support: list[int]


def scores(confusion_KK: np.ndarray) -> Scores:
    """Accuracy, and of each class precision, recall, their harmonic mean and the number of its texts."""
    hits_K, predicted_K, true_K = np.diag(confusion_KK), confusion_KK.sum(0), confusion_KK.sum(1)
    with np.errstate(invalid="ignore"):
        precision_K, recall_K, f1_K = hits_K / predicted_K, hits_K / true_K, 2 * hits_K / (predicted_K + true_K)
    accuracy = float(hits_K.sum() / confusion_KK.sum())
    return Scores(accuracy, precision_K.tolist(), recall_K.tolist(), f1_K.tolist(), true_K.astype(int).tolist())


class ClassificationTask(Task):
    """The `trainer.Task` of predicting the classes of texts."""

    def __init__(self, run: RunDir, executor: parallel.Executor, data: dict[str, tuple[np.ndarray, np.ndarray]]):
        config = run.config
        self.run, self.executor, self.test = run, executor, data["test"]
        self.title = f"{config.dataset.rsplit('/')[-1]}, --pool {config.pool}"
        example_sampler = ExampleSampler(config.seed, len(data["train"][0]), config.batch_size)
        self.steps_per_epoch = example_sampler.steps_per_epoch
        self.loader = ExampleLoader(*data["train"], example_sampler, executor.put)
        self.callbacks = [PlotLearningCurves(run, self.title)]

    def validate(self, params: Any, step: int, n_batches: int | None = None) -> dict[str, float]:
        """Loss and accuracy on the test texts."""
        loss, confusion_KK = self._test(params, n_batches)
        return {"val_loss": loss, "val_accuracy": scores(confusion_KK).accuracy}

    def line(self, report: dict[str, Any], n_steps: int) -> str:
        step = str(report["step"]).zfill(len(str(n_steps)))
        return (
            f"epoch {report['epoch']:<4.3g} step {step}  train loss {report['train_loss']:.3f}  test loss "
            f"{report['val_loss']:.4f}  accuracy {report['val_accuracy']:.4f}  {report['tokens_per_s']:,.0f} tokens/s"
        )

    def finish(self, params: Any) -> tuple[dict[str, Any], str]:
        """Accuracy, the confusion matrix, and each class's precision and recall."""
        from jaxgpt.analysis.plots import confusion_matrix

        loss, confusion_KK = self._test(params, None)
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

    def _test(self, params: Any, n_batches: int | None) -> tuple[float, np.ndarray]:
        batch_size, n_classes = self.run.config.batch_size, len(self.run.labels)
        idx_NT, label_N = (a if n_batches is None else a[: n_batches * batch_size] for a in self.test)
        sums = self.executor.evaluate(params, eval_batches(idx_NT, label_N, batch_size)).sum(0)
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


def classify(run: RunDir, executor: Executor, state: TrainState, texts: list[str]) -> np.ndarray:
    """The probability of each class for each text, [N, classes].

    Raises:
        UserError: a text has characters outside the vocabulary.
    """
    objective, batch_size = executor.objective, run.config.batch_size
    assert isinstance(objective, ClassificationObjective)
    for number, text in enumerate(texts, 1):
        try:
            run.tokenizer.encode(text)
        except UserError as e:
            raise UserError(f"TEXT number {number}: {e}") from None
    idx_NT = encode(texts, run.tokenizer, run.config.max_tokens)

    @jax.jit
    def probabilities(params: Any, idx_BT: Any) -> Any:
        return jax.nn.softmax(objective.logits(objective.exact_model(params), idx_BT))

    labels = np.zeros(len(texts), np.int32)
    params = parallel.on_one_device(state.params)
    found = [probabilities(params, idx_BT) for idx_BT, _ in eval_batches(idx_NT, labels, batch_size)]
    return np.concatenate([np.asarray(p_BK) for p_BK in found])[: len(texts)]
