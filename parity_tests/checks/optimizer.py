"""The update rule on injected gradients, the clip, the decay mask, and the schedules.

The gradients are drawn once, in float32, and given to both frameworks, so nothing of the model is in these rows.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxgpt import optimizer as ours
from jaxgpt.config import ModelConfig, TrainConfig
from jaxgpt.interop.torch_names import from_torch, optimizer_from_torch, optimizer_to_torch, to_torch
from jaxgpt.parity.harness import Row, checked, rms, worst_tensor
from jaxgpt.parity.jax_side import precision_of
from jaxgpt.presets import PRESETS
from parity_tests.cases import VOCABULARIES, Case, flax_params, objective_of, torch_model
from parity_tests.tolerances import row
from torch_ref import train_step as reference

TINY = ModelConfig(n_layer=1, n_head=1, n_embd=3, block_size=5)  # every kind of parameter, few of each
TIMES = (1, 2, 1000)
CORE = ("b2 0.999, decay matrices", "clip 1", "warm-up and cosine", "SGD, momentum")


def configurations() -> dict[str, TrainConfig]:
    """AdamW with the combinations of second moment and decay; clip, schedule, Adam and SGD."""
    base = TrainConfig(model=TINY, steps=TIMES[-1])
    found = {
        f"b2 {beta2}, decay {mask}": dataclasses.replace(base, beta2=beta2, decay_mask=mask, weight_decay=0.1)
        for beta2, mask in itertools.product((0.95, 0.999), ("all", "matrices"))
    }
    found["documented decay 0.01"] = base
    found["clip 1"] = dataclasses.replace(base, clip=1.0)
    found["warm-up and cosine"] = dataclasses.replace(
        base, schedule="warmup-cosine", warmup_steps=200, decay_steps=900, min_lr=3e-5
    )
    found["Adam, decay in the gradient"] = dataclasses.replace(base, optimizer="adam", weight_decay=0.01)
    found["Adam"] = dataclasses.replace(base, optimizer="adam")
    found["SGD, momentum"] = dataclasses.replace(base, optimizer="sgd", momentum=0.9, weight_decay=0.01)
    found["SGD"] = dataclasses.replace(base, optimizer="sgd")
    return found


def case_of(name: str, config: TrainConfig) -> Case:
    return Case(name, config, vocab_size=7)


@cache
def gradients(case: Case, scale: float = 1.0) -> list[dict[str, np.ndarray]]:
    """The gradients of each step, float32 by torch name; their sizes differ from step to step."""
    draw = np.random.default_rng(3)
    sets = []
    for _ in range(TIMES[-1]):
        size = scale * 10 ** draw.uniform(-2, 0.5)
        sets.append({n: (size * draw.standard_normal(p.shape)).astype(np.float32) for n, p in case.start.items()})
    return sets


def without_epsilon(parameters: Any, limit: float) -> None:
    """The clip by its formula: g * min(1, limit / norm). `clip_grad_norm_` divides by norm + 1e-6."""
    parameters = list(parameters)
    norm = torch.sqrt(sum((p.grad**2).sum() for p in parameters))
    for p in parameters:
        p.grad *= torch.clamp(limit / norm, max=1.0)


def torch_updates(
    case: Case, precision: str, grads: list[dict[str, np.ndarray]], n_steps: int, clip: Any = without_epsilon
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The weights and the optimiser's state after n steps, by torch name."""
    model = torch_model(case, precision)
    optimizer = reference.make_optimizer(model, case.config)
    for step in range(n_steps):
        torch_update(model, optimizer, case, reference.learning_rate(case.config, step), grads[step], clip)
    state = reference.optimizer_tensors(model, optimizer, case.config, n_steps)
    return _numpy(dict(model.named_parameters())), _numpy(state)


def torch_update(model: Any, optimizer: Any, case: Case, lr: float, grads: dict[str, np.ndarray], clip: Any) -> None:
    for name, p in model.named_parameters():
        p.grad = torch.tensor(grads[name], dtype=p.dtype)
    for group in optimizer.param_groups:
        group["lr"] = lr
    if case.config.clip:
        clip(model.parameters(), case.config.clip)
    optimizer.step()


def flax_updates(
    case: Case, precision: str, grads: list[dict[str, np.ndarray]], n_steps: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The same through the trainer's optax chain, all steps in one program as in training."""
    objective = objective_of(case, precision)
    params = flax_params(case, objective)
    stacked = {name: np.stack([g[name] for g in grads[:n_steps]]).astype(precision) for name in grads[0]}
    stacked = {name: stacked[torch] for name, torch in zip(params, to_torch(params), strict=True)}

    @jax.jit
    def run(params: Any, stacked: Any) -> Any:
        def body(carry: Any, g: Any) -> Any:
            params, opt_state = carry
            g = {name: a.T if name.endswith("kernel") else a for name, a in g.items()}
            updates, opt_state = objective.optimizer.update(g, opt_state, params)
            return (jax.tree.map(jnp.add, params, updates), opt_state), None

        return jax.lax.scan(body, (params, objective.optimizer.init(params)), stacked)[0]

    params, opt_state = run(params, stacked)
    return to_torch(params), optimizer_to_torch(opt_state)


@cache
def _torch_updates(case: Case, precision: str, n_steps: int) -> Any:
    return torch_updates(case, precision, gradients(case), n_steps)


def check_optimizer(quick: bool) -> Iterator[Row]:
    """Weights and moments after 1, 2 and 1000 injected gradients."""
    for name, config in configurations().items():
        if name in CORE or not quick:
            yield from compare_optimizer(case_of(name, config), TIMES[1:2] if quick else TIMES)


def compare_optimizer(case: Case, times: tuple[int, ...] = TIMES, low_precision: bool = True) -> Iterator[Row]:
    adamw = case.config.optimizer == "adamw"
    for n_steps in times:
        truth, true_state = _torch_updates(case, "float64", n_steps)
        with precision_of("float64"):
            params, state = flax_updates(case, "float64", gradients(case), n_steps)
        # Weights and moments start at and near 0, where a relative error means what it says.
        true_state = {f"state {name}": a for name, a in true_state.items() if name != "step"}
        state = {f"state {name}": a for name, a in state.items()}
        error, where = worst_tensor({**params, **state}, {**truth, **true_state}, "float64", floor=1e-12)
        # PyTorch rounds 1 - lr * decay once and multiplies by it every step: its error grows with the steps.
        check = "optimizer, after 1000 decays" if adamw and n_steps == 1000 else "optimizer"
        yield row(check, "float64", f"{case.name}, t = {n_steps}", error, note=where)
        if check != "optimizer":
            exact = extended_adamw(case, n_steps)
            errors = [worst_tensor(side, exact, "float64", floor=1e-12)[0] for side in (params, truth)]
            yield row("optimizer, 80-bit formula", "float64", f"{case.name}, t = {n_steps}", *errors)
    if low_precision and adamw and not case.config.clip and case.config.schedule == "constant":
        for n_steps in times:
            yield from _one_float32_update(case, gradients(case), n_steps)


@cache
def extended_adamw(case: Case, n_steps: int) -> dict[str, np.ndarray]:
    """The weights after n steps by AdamW's formula in the machine's extended precision (80 bits on x86)."""
    config, wide = case.config, np.longdouble
    b1, b2 = wide(config.beta1), wide(config.beta2)
    p = {name: a.astype(wide) for name, a in case.start.items()}
    m, v = ({name: np.zeros_like(a) for name, a in p.items()} for _ in range(2))
    for t, step_grads in enumerate(gradients(case)[:n_steps], start=1):
        lr = wide(reference.learning_rate(config, t - 1))
        grads = {name: g.astype(wide) for name, g in step_grads.items()}
        norm = np.sqrt(sum((g * g).sum() for g in grads.values()))
        scale = min(wide(1), wide(config.clip) / norm) if config.clip else wide(1)
        for name, g in grads.items():
            decays = config.decay_mask == "all" or (g.ndim >= 2 and "ln" not in name)
            m[name] = b1 * m[name] + (1 - b1) * g * scale
            v[name] = b2 * v[name] + (1 - b2) * (g * scale) ** 2
            update = (m[name] / (1 - b1**t)) / (np.sqrt(v[name] / (1 - b2**t)) + wide(config.eps))
            p[name] = p[name] - lr * (update + (wide(config.decay) * p[name] if decays else 0))
    return {name: a.astype(np.float64) for name, a in p.items()}


def _one_float32_update(case: Case, grads: list[dict[str, np.ndarray]], n_steps: int) -> Iterator[Row]:
    """The n-th update alone, from the same float32 state and weights of 0, so that the new weights are the update."""
    zeros = from_zero(case)
    state = _torch_updates(case, "float32", n_steps - 1)[1]
    lr = reference.learning_rate(case.config, n_steps - 1)
    results = {}
    for precision in ("float64", "float32"):
        model = torch_model(zeros, precision)
        optimizer = reference.make_optimizer(model, case.config)
        if n_steps > 1:
            tensors = {
                n: torch.tensor(a).to(torch.int64 if n == "step" else getattr(torch, precision))
                for n, a in state.items()
            }
            reference.load_optimizer_tensors(model, optimizer, case.config, tensors)
        torch_update(model, optimizer, case, lr, grads[n_steps - 1], None)
        results[precision] = _numpy(dict(model.named_parameters()))
    with precision_of("float32"):
        objective = objective_of(zeros, "float32")
        params = flax_params(zeros, objective)
        opt_state = objective.optimizer.init(params)
        if n_steps > 1:
            opt_state = optimizer_from_torch(state, opt_state)
        g = from_torch(grads[n_steps - 1], params)
        updates, _ = jax.jit(objective.optimizer.update)(g, opt_state, params)
    ours_f32 = to_torch(updates)
    flat = [
        np.concatenate([r[n].ravel() for n in ours_f32]) for r in (ours_f32, results["float32"], results["float64"])
    ]
    # Of the update's typical size: single elements where the first moment cancels have lost digits on either side.
    ulp = np.finfo(np.float32).eps * 2 ** np.floor(np.log2(rms(flat[2])))
    checked(flat[0], flat[1], floor=1e-17)
    error, torch_error = (float(np.abs(f.astype(np.float64) - flat[2]).max() / ulp) for f in flat[:2])
    yield row("optimizer, ulp of the update", "float32", f"{case.name}, update {n_steps}", error, torch_error)


def check_tiny_gradients(quick: bool) -> Iterator[Row]:
    """Gradients of 1e-15: their squares are far below float32's least normal number, the updates are not 0."""
    case = case_of(
        "gradients of 1e-15", dataclasses.replace(configurations()["documented decay 0.01"], weight_decay=0.0)
    )
    yield from _one_float32_update(
        case, [{n: g * np.float32(1e-15) for n, g in s.items()} for s in gradients(case)[:1]], 1
    )


def check_clip(quick: bool) -> Iterator[Row]:
    """The clip alone (SGD at rate 1 makes the clipped gradient the update): below, at, and above the limit."""
    config = dataclasses.replace(configurations()["SGD"], lr=1.0)
    case = case_of("clip", config)
    g = gradients(case)[0]
    norm = math.sqrt(sum(float((a.astype(np.float64) ** 2).sum()) for a in g.values()))
    for name, limit in (
        ("off", 0.0),
        ("below", 2 * norm),
        ("at", norm),
        ("above", 0.2 * norm),
        ("far above", 1e-3 * norm),
    ):
        case = case_of(f"norm {name} the limit" if limit else "off", dataclasses.replace(config, clip=limit))
        case = from_zero(case)
        for precision in ("float64", "float32"):
            with precision_of(precision):
                update, _ = flax_updates(case, precision, [g], 1)
            truth, _ = torch_updates(case, "float64", [g], 1)
            error, where = worst_tensor(update, truth, precision, floor=1e-9)
            yield row("clip", precision, case.name, error, note=where)
            if precision == "float64":
                truth, _ = torch_updates(case, precision, [g], 1, torch.nn.utils.clip_grad_norm_)
                error, where = worst_tensor(update, truth, precision, floor=1e-9)
                yield row("clip, clip_grad_norm_ x norm", precision, case.name, error * norm, note=where)


def from_zero(case: Case) -> Case:
    """The same case with all weights 0, so that the weights after an update are the update, to all its digits."""
    return dataclasses.replace(case, weights="zero")


def check_decay_mask(quick: bool) -> Iterator[Row]:
    """Which tensors decay: ours by name against torch's groups, for the documented model, its head tied and not."""
    cases = [Case("wikitext2", PRESETS["wikitext2"], VOCABULARIES["wikitext2"])]
    for tied, mask in itertools.product((False, True), ("all", "matrices")):
        model = dataclasses.replace(PRESETS["minigpt"].model, tied_head=tied)
        config = dataclasses.replace(PRESETS["minigpt"], model=model, decay_mask=mask, weight_decay=0.1)
        cases.append(Case(f"decay {mask}{', tied head' if tied else ''}", config, 65))
    for case in cases[1:] if quick else cases:
        config, mask = case.config, case.config.decay_mask
        model = torch_model(case, "float32")
        names = {id(p): name for name, p in model.named_parameters()}
        groups = reference.make_optimizer(model, config).param_groups
        theirs = {names[id(p)]: bool(group["weight_decay"]) for group in groups for p in group["params"]}
        params = flax_params(case, objective_of(case, "float32"))
        our_mask = dict(zip(to_torch(params), ours.decay_mask(params, mask).values(), strict=True))
        assert len(theirs) == len(our_mask) and set(theirs.values()) == ({True} if mask == "all" else {True, False})
        differing = [name for name in theirs if theirs[name] != our_mask.get(name)]
        yield row("decay mask", "float32", case.name, len(differing), note=", ".join(differing[:3]))


def schedules() -> dict[str, TrainConfig]:
    base = TrainConfig(steps=2000)
    modern = dataclasses.replace(base, schedule="warmup-cosine", warmup_steps=200, min_lr=3e-5)
    return {
        "constant": base,
        "cosine to 0": dataclasses.replace(base, schedule="cosine"),
        "cosine that ends before": dataclasses.replace(base, schedule="cosine", decay_steps=1500, min_lr=1e-5),
        "warm-up and cosine": modern,
        "warm-up, cosine that ends before": dataclasses.replace(modern, decay_steps=1700),
        "warm-up of 1": dataclasses.replace(modern, warmup_steps=1),
        "wikitext2": PRESETS["wikitext2"],
    }


def check_schedules(quick: bool) -> Iterator[Row]:
    """The rate of every update, 0 to one past the last: as defined, and as the optimiser applies it."""
    for name, config in schedules().items():
        steps = range(config.steps + 2)
        truth = np.array([reference.learning_rate(config, step) for step in steps])
        rates = np.array([ours.learning_rate(config, step) for step in steps])
        yield row("schedule", "float64", name, _ulps(rates, truth))
        for precision in ("float64", "float32"):
            with precision_of(precision):
                yield row(
                    "schedule, as applied", precision, name, _ulps(_applied(config, precision), truth.astype(precision))
                )
        if config.schedule != "constant":
            recursion = _torch_schedulers(config, config.cosine_end + 2)
            yield row(
                "schedule, torch's schedulers",
                "float64",
                name,
                float(np.abs(rates[: len(recursion)] - recursion)[:-1].max() / config.lr),
            )


def _ulps(rates: np.ndarray, truth: np.ndarray) -> float:
    """The largest difference in units of the last place; a rate of 0 must be 0."""
    assert rates.dtype == truth.dtype and rates.shape == truth.shape
    wide = truth.astype(np.float64)
    ulp = np.finfo(truth.dtype).eps * 2.0 ** np.floor(np.log2(np.where(wide == 0, 1, wide)))
    difference = np.abs(rates - wide)
    return math.inf if (difference[wide == 0] != 0).any() else float((difference / ulp).max())


def _applied(config: TrainConfig, precision: str) -> np.ndarray:
    """The rates that the trainer's optax chain uses: what SGD makes of a gradient of -1."""
    optimizer = ours.make_optimizer(dataclasses.replace(config, optimizer="sgd"))
    p = {"w": jnp.zeros((), precision)}

    @jax.jit
    def run() -> Any:
        def body(state: Any, _: Any) -> Any:
            updates, state = optimizer.update({"w": -jnp.ones((), precision)}, state, p)
            return state, updates["w"]

        return jax.lax.scan(body, optimizer.init(p), length=config.steps + 2)[1]

    return np.asarray(run())


def _torch_schedulers(config: TrainConfig, n_steps: int) -> np.ndarray:
    """The rates of torch.optim.lr_scheduler, stepped after every update."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.lr)
    warmup, schedulers = config.warmup_steps, torch.optim.lr_scheduler
    cosine = schedulers.CosineAnnealingLR(optimizer, config.cosine_end - warmup, config.min_lr)
    scheduler: Any = cosine
    if warmup:
        rise = schedulers.LambdaLR(optimizer, lambda step: step / warmup)
        scheduler = schedulers.SequentialLR(optimizer, [rise, cosine], [warmup])
    rates = []
    for _ in range(n_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return np.array(rates)


def _numpy(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: t.detach().numpy().copy() for name, t in tensors.items()}
