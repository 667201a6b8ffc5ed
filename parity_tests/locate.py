"""Where the two sides part: operation by operation, layer by layer, gradient by gradient, step by step, in float64.

The walk stops at the first tensor whose error is above its gate, in the order in which a step computes them.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxgpt.convert import optimizer_to_torch
from jaxgpt.model import GPT
from jaxgpt.train_step import ALONE
from parity_tests import sides
from parity_tests.harness import Row, worst_tensor
from parity_tests.rungs import ops
from parity_tests.rungs.optimizer import without_epsilon
from parity_tests.sides import SIZES, Case, FlaxTraining, TorchTraining, precision_of, small
from parity_tests.tolerances import TOLERANCES
from torch_ref.train_step import optimizer_tensors

STEPS = 30
FLOOR = 1e-12  # below it a tensor is near zero on purpose: a key bias' gradient


@dataclass(frozen=True)
class Departure:
    """The first tensor that departs, or None for none, and how many were compared."""

    where: str | None
    error: float
    gate: float
    compared: int


def walk(say: Callable[[str], None]) -> Departure:
    """Compares everything between a batch and its updates, in order, and stops at the first departure."""
    compared = 0
    for stage, tensors in (
        ("op", _ops()),
        ("layer", _layers()),
        ("gradient", _gradients()),
        ("step", _steps()),
    ):
        before, last = compared, "the beginning"
        try:
            for name, error, gate in tensors:
                compared += 1
                if not error <= gate:
                    say(f"{stage}: {name} departs")
                    return Departure(f"{stage} {name}", error, gate, compared)
                last = name
        except Exception as e:  # a fault may raise: where it does is the answer
            reason = (str(e).splitlines() or [""])[0][:120]
            return Departure(f"{stage}, after {last}: {type(e).__name__}: {reason}", float("inf"), 0.0, compared)
        say(f"{stage}: {compared - before} tensors agree")
    return Departure(None, 0.0, 0.0, compared)


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


Compared = Iterator[tuple[str, float, float]]  # name, error, gate


def _gate(rung: str) -> float:
    return TOLERANCES[rung, "float64"].gate


def _ops() -> Compared:
    for op in ops.ops():
        for row in ops.compare_op(op, ("float64",)):
            yield f"{op.name}: {row.rung.removeprefix('op ')}{_of(row)}", row.value, row.gate


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
        yield name, worst_tensor(same_shape, {name: tensor}, "float64")[0], _gate("gradients")


def torch_activations(case: Case) -> dict[str, np.ndarray]:
    """By module name: its output; as "into <module>" the input of those that follow something without a module."""
    model = sides.torch_model(case, "float64")
    found: dict[str, np.ndarray] = {}

    def keep(name: str, value: torch.Tensor) -> None:
        found.setdefault(name, value.detach().numpy())

    for name, module in model.named_modules():
        if name in _watched(case):
            if _has_input(name):
                module.register_forward_pre_hook(lambda _m, args, name=name: keep(f"into {name}", args[0]))
            module.register_forward_hook(lambda _m, _args, out, name=name: keep(name, out))
    found["logits"] = model(sides.torch_batch(case, 0)[0], sides.torch_masks(case, 0)).detach().numpy()
    found["logits"] = found.pop("logits")  # computed last
    return found


def _watched(case: Case) -> list[str]:
    parts = ("", ".ln1", ".attn.Wq", ".attn.Wk", ".attn.Wv", ".attn.Wo", ".attn", ".ln2", ".ff.0", ".ff.2", ".ff")
    blocks = [f"blocks.{i}{part}" for i in range(case.config.model.n_layer) for part in parts]
    return ["token_emb", "pos_emb", *blocks, "ln_f"]


def _has_input(name: str) -> bool:
    """Whether what comes in is itself worth a look: the embedding sum, attention, GELU."""
    return name == "blocks.0" or name.endswith(("attn.Wo", "ff.2"))


def flax_activations(case: Case) -> dict[str, np.ndarray]:
    """Ours under the same names, computed eagerly with every module's call watched."""
    program = sides.program_of(case, "float64")
    params = {name: jnp.asarray(p) for name, p in sides.flax_params(case, program).items()}
    bound = program.model(params)
    names = {id(_module(bound, name)): name for name in _watched(case)}
    found: dict[str, np.ndarray] = {}

    def watched(call: Callable) -> Callable:
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
            stack.enter_context(patch.object(kind, "__call__", watched(kind.__call__)))
        keys = program.dropout_keys(jnp.int32(0), ALONE)
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
    truth = sides.torch_results(case, "float64")
    with precision_of("float64"):
        ours = sides.flax_results(case, "float64")
    yield "loss", abs(ours.loss / truth.loss - 1), _gate("loss")
    for name in reversed(truth.grads):
        if not name.endswith("Wk.bias"):
            yield name, worst_tensor(ours.grads, {name: truth.grads[name]}, "float64", FLOOR)[0], _gate("gradients")


def _steps() -> Compared:
    """After every update: its loss, the moments, the weights."""
    case = walk_case()
    theirs = TorchTraining(case, "float64", without_epsilon)
    with precision_of("float64"):
        ours = FlaxTraining(case, "float64")
        for step in range(STEPS):
            ours_loss, torch_loss = ours.run(1)[0], theirs.run(1)[0]
            yield f"{step}: loss", abs(ours_loss / torch_loss - 1), _gate("trajectory, every loss")
            state = optimizer_to_torch(jax.device_get(ours.state.opt_state))
            true_state = optimizer_tensors(theirs.model, theirs.optimizer, case.config, step + 1)
            params = ours.params()
            for name, tensor in {**true_state, **dict(theirs.model.named_parameters())}.items():
                if name == "step" or name.endswith("Wk.bias"):
                    continue
                side = state if name in state else params
                gate = _gate("trajectory, every parameter")
                yield f"{step}: {name}", worst_tensor(side, {name: tensor.detach().numpy()}, "float64", 1e-14)[0], gate
