"""The head over classes: logits, loss, gradients, updates and accuracy on the same weights and texts."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
import torch
from torch.nn import functional as F

from jaxgpt import parallel
from jaxgpt.config import FinetuneConfig
from jaxgpt.data.labeled import eval_batches
from jaxgpt.data.loader import ExampleLoader
from jaxgpt.data.sampler import PADDING, ExampleSampler
from jaxgpt.interop.torch_names import from_torch, to_torch
from jaxgpt.model.gpt import Numerics
from jaxgpt.objective import ClassificationObjective
from jaxgpt.parity.harness import Row, max_abs, own_errors, worst_tensor
from jaxgpt.parity.jax_side import precision_of
from jaxgpt.tasks.classification import scores
from jaxgpt.train_step import SINGLE_DEVICE, TrainState, train_step
from parity_tests.cases import SIZES, VOCAB, masks_of
from parity_tests.checks.trajectories import STEPS
from parity_tests.tolerances import error_row, ratio_row, row
from torch_ref import finetune as reference
from torch_ref.train_step import make_optimizer

N_TEXTS, N_CLASSES, BATCH, T = 40, 5, 6, 13  # the block is 17: texts are shorter
POOLS = ("last", "last_token", "mean")
FLOOR = 1e-10


def config_of(pool: str, **values: Any) -> FinetuneConfig:
    return FinetuneConfig(pool=pool, max_tokens=T, batch_size=BATCH, steps=STEPS, model=SIZES, **values)


def texts() -> tuple[np.ndarray, np.ndarray]:
    """Token ids [N, T] of texts of every length from 1 to T, PADDING after them, and their classes."""
    draw = np.random.default_rng(0)
    idx_NT = draw.integers(0, VOCAB, (N_TEXTS, T)).astype(np.int32)
    idx_NT[np.arange(T) >= (np.arange(N_TEXTS) % T + 1)[:, None]] = PADDING
    return idx_NT, draw.integers(0, N_CLASSES, N_TEXTS).astype(np.int32)


def torch_side(config: FinetuneConfig, dtype: str) -> reference.Classifier:
    """The reference with weights as after training: matrices eight times as large, norms away from 1 and 0."""
    torch.manual_seed(0)
    model = reference.Classifier(config.model, VOCAB, N_CLASSES, config.pool)
    draw = np.random.default_rng(0)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.from_numpy(draw.standard_normal(tuple(p.shape), np.float32))
            p.copy_(p * 8 if p.ndim == 2 else p + 0.1 * noise)
    return model.to(getattr(torch, dtype))


def torch_batch(idx_BT: np.ndarray, label_B: np.ndarray) -> reference.Batch:
    """The same texts as lists, padded by the reference's own code; rows that are PADDING left out."""
    there = label_B != PADDING
    lists = [row[row != PADDING].tolist() for row in idx_BT[there]]
    return *reference.pad(lists, T, VOCAB - 1), torch.from_numpy(label_B[there]).long()


def objective_of(config: FinetuneConfig, dtype: str) -> ClassificationObjective:
    numerics = Numerics(np.dtype(dtype), np.dtype(dtype))
    return ClassificationObjective(config, VOCAB, numerics, n_classes=N_CLASSES, pad_token=VOCAB - 1)


def flax_params(objective: ClassificationObjective, model: reference.Classifier) -> dict[str, np.ndarray]:
    like = objective.param_shapes
    dtype = objective.numerics.param_dtype
    return from_torch({name: p.detach().numpy().astype(dtype) for name, p in model.named_parameters()}, like)


def check_classification(quick: bool) -> Iterator[Row]:
    for pool in POOLS[1:2] if quick else POOLS:
        yield from compare_batch(pool, ("float64",) if quick else ("float64", "float32"))
        yield from compare_accuracy(pool)
    yield from compare_training("last_token")


def compare_batch(pool: str, precisions: tuple[str, ...]) -> Iterator[Row]:
    """Logits, mean loss and gradients of a batch that is not full."""
    config, case = config_of(pool), f"--pool {pool}"
    idx_BT, label_B = (a[:BATCH].copy() for a in texts())
    label_B[-1] = PADDING
    found = {}
    for precision in ("float64", "float32"):
        model = torch_side(config, precision)
        *inputs, labels = torch_batch(idx_BT, label_B)
        logits = model(*inputs)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        grads = {name: p.grad.numpy() for name, p in model.named_parameters()}
        found[precision] = logits.detach().numpy(), loss.item(), grads
    truth_logits, truth_loss, truth_grads = found["float64"]
    compared = {name: g for name, g in truth_grads.items() if not name.endswith("Wk.bias")}
    for precision in precisions:
        with precision_of(precision):
            objective = objective_of(config, precision)
            params = flax_params(objective, torch_side(config, "float32"))
            compute = jax.jit(lambda p, of=objective: of.logits(of.model(p), idx_BT))
            logits = np.asarray(compute(params))[: BATCH - 1]
            loss, grads = jax.jit(partial(_loss_and_grads, objective, (idx_BT, label_B)))(params)
            loss, grads = float(loss), to_torch(grads)
        if precision == "float64":
            yield error_row("classification logits", precision, case, partial(max_abs, logits, truth_logits))
        else:
            errors = partial(own_errors, logits, found[precision][0], truth_logits)
            yield ratio_row("classification logits", precision, case, errors)
        yield row("classification loss", precision, case, abs(loss / truth_loss - 1))
        error, where = worst_tensor(grads, compared, precision, FLOOR)
        yield row("classification gradients", precision, case, error, note=where)


def _loss_and_grads(objective: ClassificationObjective, batch: tuple[np.ndarray, np.ndarray], params: Any) -> Any:
    state = TrainState(jax.numpy.int32(0), params, objective.optimizer.init(params))
    _, result = train_step(objective, state, batch, SINGLE_DEVICE)
    return result.loss, result.grads


def compare_accuracy(pool: str) -> Iterator[Row]:
    """Loss and accuracy over all texts, whose last batch is ragged, through the trainer's evaluation."""
    config = config_of(pool)
    idx_NT, label_N = texts()
    with torch.no_grad():
        loss, accuracy = reference.test(torch_side(config, "float64"), torch_batch(idx_NT, label_N), 7)
    with precision_of("float64"):
        objective = objective_of(config, "float64")
        executor = parallel.Executor(objective, jax.devices()[:1])
        params = flax_params(objective, torch_side(config, "float32"))
        sums = executor.evaluate(params, eval_batches(idx_NT, label_N, BATCH)).sum(0)
    confusion_KK = sums[2:].reshape(N_CLASSES, N_CLASSES)
    n_wrong = abs(scores(confusion_KK).accuracy - accuracy) * N_TEXTS
    n_wrong += np.abs(confusion_KK.sum(1) - np.bincount(label_N, minlength=N_CLASSES)).sum()
    yield row("classification, predictions that differ", "float64", f"--pool {pool}", float(round(n_wrong, 6)))
    yield row("classification loss", "float64", f"--pool {pool}, all texts", abs(sums[0] / sums[1] / loss - 1))


def compare_training(pool: str) -> Iterator[Row]:
    """A hundred updates with dropout, through the trainer's compiled step; an epoch's last batch is smaller."""
    config = config_of(pool)
    config = dataclasses.replace(config, model=dataclasses.replace(SIZES, dropout=0.1))
    idx_NT, label_N = texts()
    order = ExampleSampler(config.seed, N_TEXTS, BATCH)
    kept = []  # rows of each step that are there

    def batches() -> Iterator[reference.Batch]:
        for step in range(STEPS):
            row_B = order.rows(step)
            kept.append(row_B != PADDING)
            yield torch_batch(idx_NT[row_B], np.where(row_B == PADDING, PADDING, label_N[row_B]))

    def keep_of(step: int) -> list[torch.Tensor]:
        masks = masks_of(config, step, T)
        return [torch.from_numpy(mask[kept[step]]) for mask in masks]

    model = torch_side(config, "float64")
    losses = list(reference.train(model, make_optimizer(model, config), config, batches(), keep_of))
    truth = {name: p.detach().numpy() for name, p in model.named_parameters()}
    with precision_of("float64"):
        objective = objective_of(config, "float64")
        executor = parallel.Executor(objective, jax.devices()[:1])
        params = flax_params(objective, torch_side(config, "float32"))
        state = executor.put(TrainState(np.int32(0), params, objective.optimizer.init(params)))
        loader = ExampleLoader(idx_NT, label_N, ExampleSampler(config.seed, N_TEXTS, BATCH), executor.put)
        state, metrics = executor.train_steps(state, loader.take(0, STEPS), STEPS)
        ours = to_torch(state.params)
    errors = np.abs(metrics[:, 0] / np.array(losses) - 1)
    note = f"step {int(errors.argmax())}"
    yield row("classification, every loss", "float64", f"--pool {pool}", float(errors.max()), note=note)
    error, where = worst_tensor(ours, truth, "float64")
    yield row("classification, every parameter", "float64", f"--pool {pool}", error, note=where)
