"""What a run shows of its model: the gradient report, attention maps, token probabilities, early stopping."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from jaxgpt import trainer
from jaxgpt.analysis import comparison, diagnostics
from jaxgpt.config import ModelConfig
from jaxgpt.interop.torch_names import to_torch
from jaxgpt.parity.harness import Row, max_abs
from jaxgpt.parity.jax_side import precision_of
from parity_tests.cases import (
    SIZES,
    Case,
    FlaxTraining,
    TorchTraining,
    flax_params,
    objective_of,
    preset_case,
    small,
    torch_batch,
    torch_masks,
    torch_model,
)
from parity_tests.checks.optimizer import without_epsilon
from parity_tests.tolerances import error_row, row
from torch_ref.model import attention_maps, mean_loss
from torch_ref.train import EarlyStopping
from torch_ref.train_step import gradient_report

STEP = 2  # of the report: after so many updates: the moments are not those of the start


def cases(quick: bool) -> list[Case]:
    """A small case with dropout, clip, schedule and masked decay; and the documented model at its start."""
    model: ModelConfig = dataclasses.replace(SIZES, dropout=0.1)
    recipe = dict(clip=0.5, schedule="cosine", steps=9, weight_decay=0.1, decay_mask="matrices")
    first = small("dropout, clip, cosine", model=model, **recipe)
    return [first] if quick else [first, dataclasses.replace(preset_case("minigpt"), weights="documented")]


def check_gradient_report(quick: bool) -> Iterator[Row]:
    """The documented report of every tensor, as training records it, and the update's share of the weights."""
    for case in cases(quick):
        theirs = TorchTraining(case, "float64", clip=without_epsilon)
        theirs.run(STEP)
        before = theirs.params()
        theirs.run(1)  # leaves the gradient of its batch, cut: the report is of the gradient before the clip
        share = {name: _norm(p - before[name]) / _norm(before[name]) for name, p in theirs.params().items()}
        report = _report(case, before)
        with precision_of("float64"):
            ours = FlaxTraining(case, "float64")
            ours.run(STEP)
            flow = ours.executor.compiled(partial(diagnostics.gradient_flow, ours.executor.objective))
            found = {
                f.name: f for f in diagnostics.flows(flow(ours.state, ours.loader.take(STEP, 1)), ours.state.params)
            }
        names = dict(zip(to_torch(ours.state.params), ours.state.params, strict=True))
        for i, (figure, field) in enumerate((("mean |g|", "mean_abs"), ("standard deviation", "std"))):
            errors = {}
            for name, values in report.items():
                # A key bias' true gradient is 0: it is held against the size of the query's bias, as in `gradients`.
                size = report[name.replace("Wk.bias", "Wq.bias")][i]
                errors[name] = abs(getattr(found[names[name]], field) - values[i]) / size
            yield _worst(f"gradient report, {figure}", case, errors)
        # Adam makes whole steps of the noise that is a key bias' gradient.
        errors = {
            name: abs(found[names[name]].update_ratio / share[name] - 1)
            for name in share
            if not name.endswith("Wk.bias")
        }
        yield _worst("gradient report, update over weight", case, errors)


def _report(case: Case, weights: dict[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    """torch's report of step STEP's batch at the weights."""
    model = torch_model(case, "float64")
    model.load_state_dict({name: torch.tensor(p) for name, p in weights.items()})
    mean_loss(model, *torch_batch(case, STEP), torch_masks(case, STEP)).backward()
    return gradient_report(model)


def _norm(a: np.ndarray) -> float:
    return float(np.linalg.norm(a))


def _worst(check: str, case: Case, errors: dict[str, float]) -> Row:
    values = np.array(list(errors.values()))
    where = int(np.argmax(np.where(np.isnan(values), np.inf, values)))  # a NaN is the worst
    return row(check, "float64", case.label, float(values[where]), note=list(errors)[where])


def check_maps(quick: bool) -> Iterator[Row]:
    """The attention maps of every layer and head, and the probability of each token, of one text."""
    for case in [small("small")] if quick else [small("small"), preset_case("minigpt")]:
        idx_T = case.batch(0)[0][0]
        model = torch_model(case, "float64")
        idx_1T = torch.from_numpy(idx_T).long()[None]
        truth = attention_maps(model, idx_1T)[0].numpy()
        with torch.no_grad():
            probability_TV = model(idx_1T)[0].softmax(-1).numpy()
        with precision_of("float64"):
            objective = objective_of(case, "float64")
            params: Any = flax_params(case, objective)
            maps = diagnostics.attention_maps(objective, params, idx_T)
            found = diagnostics.token_probabilities(objective, params, idx_T)
        yield error_row("attention maps", "float64", case.label, partial(max_abs, maps, truth))
        expected = probability_TV[np.arange(len(idx_T) - 1), idx_T[1:]]
        yield error_row("token probabilities", "float64", case.label, partial(max_abs, found.probability_T, expected))
        likeliest = np.argsort(-probability_TV[:-1], axis=-1)[:, : diagnostics.LIKELIEST]
        yield row(
            "likeliest tokens that differ",
            "float64",
            case.label,
            float((found.likeliest_TK != likeliest).sum()),
        )


def check_early_stopping(quick: bool) -> Iterator[Row]:
    """After which report each side stops, for random losses, and which report is the best."""
    draw = np.random.default_rng(0)
    for patience, min_delta in ((1, 0.0), (3, 0.0), (3, 0.05), (5, 0.01)):
        different = 0
        stops = set()
        for _ in range(20 if quick else 200):
            losses = (4 + np.cumsum(draw.choice([-0.1, -0.05, -0.01, 0, 0.01, 0.1], 60))).tolist()
            stopping = EarlyStopping(patience, min_delta)
            theirs = next((i for i, loss in enumerate(losses) if stopping.step(loss)), None)
            waited = [trainer.reports_without_gain(losses[: i + 1], min_delta) for i in range(len(losses))]
            ours = next((i for i, n in enumerate(waited) if n >= patience), None)
            different += ours != theirs
            stops.add(ours)
        assert len(stops) > 3, "all losses stop at the same reports"
        case = f"patience {patience}, min_delta {min_delta:g}"
        yield row("early stopping, stops that differ", "float64", case, float(different))
    losses = draw.normal(4, 0.1, (20 if quick else 200, 60))
    theirs = torch.from_numpy(losses).argmin(1).tolist()
    found = [comparison.best_report([{"step": i, "val_loss": v} for i, v in enumerate(row)]) for row in losses.tolist()]
    different = sum(report["step"] != i for report, i in zip(found, theirs, strict=True))
    yield row("comparison, best steps that differ", "float64", "random losses", float(different))
