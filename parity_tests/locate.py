"""The tensors of this GPT in order of computation, for `engine.locate`: the first that departs is where to look.

Operation by operation, layer by layer, gradient by gradient, update by update, in float64.
"""

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxgpt.interop.torch_names import optimizer_to_torch
from jaxgpt.model.gpt import GPT
from jaxgpt.parity.harness import Row, worst_tensor
from jaxgpt.parity.jax_side import precision_of
from jaxgpt.parity.locate import Compared
from parity_tests.cases import (
    SIZES,
    Case,
    FlaxTraining,
    TorchTraining,
    flax_params,
    flax_results,
    objective_of,
    small,
    torch_batch,
    torch_masks,
    torch_model,
    torch_results,
)
from parity_tests.checks import ops
from parity_tests.checks.optimizer import without_epsilon
from parity_tests.tolerances import TOLERANCES
from torch_ref.train_step import optimizer_tensors

STEPS = 30
FLOOR = 1e-12  # below it a tensor is near zero on purpose: a key bias' gradient


def stages() -> list[tuple[str, Compared]]:
    """Everything between a batch and its updates, in order of computation; nothing is computed yet."""
    return [("op", _ops()), ("layer", _layers()), ("gradient", _gradients()), ("step", _steps())]


def walk_case() -> Case:
    """Everything at once: dropout, clip, masked decay, warm-up and cosine, at sizes that all differ."""
    return small(
        "walk",
        model=dataclasses.replace(SIZES, dropout=0.1),
        steps=STEPS,
        schedule="warmup-cosine",
        warmup_steps=5,
        min_lr=3e-5,
        beta2=0.95,
        weight_decay=0.1,
        decay_mask="matrices",
        clip=0.5,
    )


def _tolerance(check: str) -> float:
    return TOLERANCES[check, "float64"].value


def _ops() -> Compared:
    for op in ops.ops():
        for row in ops.compare_op(op, ("float64",)):
            yield f"{op.name}: {row.check.removeprefix('op ')}{_of(row)}", row.value, row.tolerance


def _of(row: Row) -> str:
    return f" ({row.note})" if row.note else ""


def _layers() -> Compared:
    """Every module's output, and what flows between them, in the reference's order."""
    case = walk_case()
    theirs = torch_activations(case)
    with precision_of("float64"):
        ours = flax_activations(case)
    for name, tensor in theirs.items():
        if name not in ours:
            yield f"{name}: never computed", float("inf"), 0.0
            continue
        same_shape = {name: ours[name].reshape(tensor.shape) if ours[name].size == tensor.size else ours[name]}
        yield name, worst_tensor(same_shape, {name: tensor}, "float64")[0], _tolerance("gradients")


def torch_activations(case: Case) -> dict[str, np.ndarray]:
    """By module name: its output; as "into <module>" the input of those that follow something without a module."""
    model = torch_model(case, "float64")
    found: dict[str, np.ndarray] = {}

    def keep(name: str, value: torch.Tensor) -> None:
        found.setdefault(name, value.detach().numpy())

    for name, module in model.named_modules():
        if name in _compared(case):
            if _has_input(name):
                module.register_forward_pre_hook(lambda _m, args, name=name: keep(f"into {name}", args[0]))
            module.register_forward_hook(lambda _m, _args, out, name=name: keep(name, out))
    found["logits"] = model(torch_batch(case, 0)[0], torch_masks(case, 0)).detach().numpy()
    found["logits"] = found.pop("logits")  # computed last
    return found


def _compared(case: Case) -> list[str]:
    parts = ("", ".ln1", ".attn.Wq", ".attn.Wk", ".attn.Wv", ".attn.Wo", ".attn", ".ln2", ".ff.0", ".ff.2", ".ff")
    blocks = [f"blocks.{i}{part}" for i in range(case.config.model.n_layer) for part in parts]
    return ["token_emb", "pos_emb", *blocks, "ln_f"]


def _has_input(name: str) -> bool:
    """Whether the module's input is compared too: the embedding sum, the heads' outputs, GELU."""
    return name == "blocks.0" or name.endswith(("attn.Wo", "ff.2"))


def flax_activations(case: Case) -> dict[str, np.ndarray]:
    """Ours under the same names, computed eagerly, every module's call recorded."""
    objective = objective_of(case, "float64")
    params = {name: jnp.asarray(p) for name, p in flax_params(case, objective).items()}
    bound = objective.model(params)
    names = {id(_module(bound, name)): name for name in _compared(case)}
    found: dict[str, np.ndarray] = {}

    def recording(call: Callable) -> Callable:
        def wrapper(self: Any, x: Any, *rest: Any) -> Any:
            name = names.get(id(self))
            if name and _has_input(name):
                found.setdefault(f"into {name}", np.asarray(x))
            out = call(self, x, *rest)
            if name:
                found.setdefault(name, np.asarray(out[0] if isinstance(out, tuple) else out))
            return out

        return wrapper

    with ExitStack() as stack:
        for kind in {type(_module(bound, name)) for name in names.values()}:
            stack.enter_context(patch.object(kind, "__call__", recording(kind.__call__)))
        keys = objective.dropout_keys(jnp.int32(0))
        found["logits"] = np.asarray(bound(jnp.asarray(case.batch(0)[0]), keys))
    return found


def _module(bound: GPT, name: str) -> Any:
    """The module of a torch name."""
    module: Any = bound
    for part in name.replace("ff.0", "mlp.fc").replace("ff.2", "mlp.proj").replace(".ff", ".mlp").split("."):
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    return module


def _gradients() -> Compared:
    """The loss, then every parameter's gradient from the head back to the embeddings."""
    case = walk_case()
    truth = torch_results(case, "float64")
    with precision_of("float64"):
        ours = flax_results(case, "float64")
    yield "loss", abs(ours.loss / truth.loss - 1), _tolerance("loss")
    for name in reversed(truth.grads):
        if not name.endswith("Wk.bias"):
            yield (
                name,
                worst_tensor(ours.grads, {name: truth.grads[name]}, "float64", FLOOR)[0],
                _tolerance("gradients"),
            )


def _steps() -> Compared:
    """After every update: its loss, the moments, the weights."""
    case = walk_case()
    theirs = TorchTraining(case, "float64", without_epsilon)
    with precision_of("float64"):
        ours = FlaxTraining(case, "float64")
        for step in range(STEPS):
            ours_loss, torch_loss = ours.run(1)[0], theirs.run(1)[0]
            yield f"{step}: loss", abs(ours_loss / torch_loss - 1), _tolerance("trajectory, every loss")
            state = optimizer_to_torch(jax.device_get(ours.state.opt_state))
            true_state = optimizer_tensors(theirs.model, theirs.optimizer, case.config, step + 1)
            params = ours.params()
            for name, tensor in {**true_state, **dict(theirs.model.named_parameters())}.items():
                if name == "step" or name.endswith("Wk.bias"):
                    continue
                side = state if name in state else params
                error, _ = worst_tensor(side, {name: tensor.detach().numpy()}, "float64", 1e-14)
                yield f"{step}: {name}", error, _tolerance("trajectory, every parameter")
