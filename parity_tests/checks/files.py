"""Weights and optimiser state across frameworks, through files: bitwise, and in a training that changes frameworks."""

import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import safetensors.torch

from jaxgpt.interop import torch_names
from jaxgpt.parity.harness import Row, worst_tensor
from jaxgpt.parity.jax_side import precision_of
from jaxgpt.train_step import TrainState
from parity_tests.cases import SIZES, Case, FlaxTraining, TorchTraining, small
from parity_tests.checks.optimizer import without_epsilon
from parity_tests.checks.trajectories import cases as trajectory_cases
from parity_tests.checks.trajectories import torch_trajectory
from parity_tests.tolerances import row
from torch_ref.train_step import load_optimizer_tensors, optimizer_tensors

BEFORE = 40  # steps in the framework that begins; the other goes on to a hundred


def check_conversion(quick: bool) -> Iterator[Row]:
    """Weights, both moments and the count: torch to Flax to torch, and the other way round, bit by bit."""
    cases = [
        small("AdamW"),
        small("AdamW, tied head", model=dataclasses.replace(SIZES, tied_head=True)),
        small("SGD, momentum", optimizer="sgd", lr=0.1, momentum=0.9),
    ]
    for case in cases[:1] if quick else cases:
        for precision in ("float64", "float32") if case is cases[0] and not quick else ("float64",):
            with precision_of(precision):
                flax, torch = FlaxTraining(case, precision), TorchTraining(case, precision, without_epsilon)
                torch.run(3)
                flax.run(3)
                params, opt_state = jax.device_get((flax.state.params, flax.state.opt_state))

                weights = torch.params()
                back = torch_names.to_torch(torch_names.from_torch(weights, params))
                state = {
                    n: t.numpy() for n, t in optimizer_tensors(torch.model, torch.optimizer, case.config, 3).items()
                }
                there = torch_names.optimizer_from_torch(state, opt_state)
                state_back = torch_names.optimizer_to_torch(there)
                n_wrong = _differing(back, weights) + _differing(state_back, state)
                # What the names mean: the moments themselves, after the same three steps, agree with PyTorch's. Not a
                # key bias': its gradient is rounding alone.
                moments = {n: a for n, a in state.items() if n != "step" and not n.endswith("Wk.bias")}
                meaning, where = worst_tensor(
                    torch_names.optimizer_to_torch(opt_state), moments, precision, floor=1e-14
                )

                again = torch_names.from_torch(torch_names.to_torch(params), params)
                opt_again = torch_names.optimizer_from_torch(torch_names.optimizer_to_torch(opt_state), opt_state)
                pairs = zip(jax.tree.leaves((again, opt_again)), jax.tree.leaves((params, opt_state)), strict=True)
                n_wrong += sum(not _same_bits(a, b) for a, b in pairs)
            yield row("conversion, tensors that differ", precision, case.name, n_wrong)
            yield row("converted moments", precision, case.name, meaning, note=where)


def _differing(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> int:
    return len(set(a) ^ set(b)) + sum(not _same_bits(a[name], b[name]) for name in set(a) & set(b))


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def check_resume_across(quick: bool) -> Iterator[Row]:
    """40 steps in one framework, files, 60 in the other, against 100 in PyTorch."""
    more = [] if quick else [small("SGD, momentum", optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=0.01)]
    for case in [*trajectory_cases(quick=True), *(dataclasses.replace(c, weights="documented") for c in more)]:
        truth = torch_trajectory(case, "float64")
        with precision_of("float64"), tempfile.TemporaryDirectory() as folder:
            flax = FlaxTraining(case, "float64")
            for name, resume in (("Flax, then torch", _flax_then_torch), ("torch, then Flax", _torch_then_flax)):
                losses, params = resume(case, flax, Path(folder))
                label = f"{case.name}: {name}"
                error = np.abs(np.array(losses) / np.array(truth.losses[BEFORE:]) - 1).max()
                yield row("resume across, every loss", "float64", label, float(error))
                error, where = worst_tensor(params, truth.params[100], "float64")
                yield row("resume across, every parameter", "float64", label, error, note=where)


def _flax_then_torch(case: Case, flax: FlaxTraining, folder: Path) -> tuple[list[float], dict[str, np.ndarray]]:
    flax.run(BEFORE)
    weights = {name: np.ascontiguousarray(p) for name, p in flax.params().items()}
    safetensors.numpy.save_file(weights, folder / "weights")
    tensors = torch_names.optimizer_to_torch(jax.device_get(flax.state.opt_state))
    safetensors.numpy.save_file({n: np.ascontiguousarray(a) for n, a in tensors.items()}, folder / "optimizer")
    torch = TorchTraining(case, "float64", without_epsilon)
    torch.model.load_state_dict(safetensors.torch.load_file(folder / "weights"))
    tensors = safetensors.torch.load_file(folder / "optimizer")
    torch.step = load_optimizer_tensors(torch.model, torch.optimizer, case.config, tensors)
    return torch.run(100 - BEFORE), torch.params()


def _torch_then_flax(case: Case, flax: FlaxTraining, folder: Path) -> tuple[list[float], dict[str, np.ndarray]]:
    """Everything that `flax` holds is replaced by what the files hold; its compiled program serves again."""
    torch = TorchTraining(case, "float64", without_epsilon)
    torch.run(BEFORE)
    safetensors.torch.save_file(dict(torch.model.state_dict()), folder / "weights")
    tensors = optimizer_tensors(torch.model, torch.optimizer, case.config, torch.step)
    safetensors.torch.save_file(tensors, folder / "optimizer")
    like = flax.executor.abstract_state()
    params = torch_names.from_torch(safetensors.numpy.load_file(folder / "weights"), like.params)
    tensors = safetensors.numpy.load_file(folder / "optimizer")
    opt_state = torch_names.optimizer_from_torch(tensors, like.opt_state)
    flax.state = flax.executor.put(TrainState(jnp.asarray(tensors["step"], jnp.int32), params, opt_state))
    return flax.run(100 - BEFORE), flax.params()
