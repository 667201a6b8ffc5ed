"""Cases: a configuration with weights, batches and masks, run in PyTorch and in JAX.

Axes: B batch, T time, C n_embd, V vocabulary. Weights travel under their torch names, in float32: a float64 model
starts from the same numbers. Batches are drawn by the trainer's own rule and cut here in numpy. The functions for this
are bound at import, so that a mutant changes the JAX side alone.
"""

import dataclasses
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import jax
import numpy as np
import torch

from jaxgpt import parallel
from jaxgpt.config import FinetuneConfig, ModelConfig, TrainConfig
from jaxgpt.data.loader import DeviceLoader
from jaxgpt.data.sampler import BatchSampler, documents, window_starts
from jaxgpt.interop.torch_names import from_torch, to_torch
from jaxgpt.model.gpt import Numerics, keep_mask
from jaxgpt.objective import LanguageModelingObjective
from jaxgpt.presets import PRESETS
from jaxgpt.rng import DROPOUT, TRAIN, stream_key
from jaxgpt.train_step import SINGLE_DEVICE, TrainState, train_step
from torch_ref.model import GPT, mean_loss
from torch_ref.train import train
from torch_ref.train_step import make_optimizer

VOCAB = 29
VOCABULARIES = {"tinygpt": 65, "minigpt": 65, "wikitext2": 50257}
N_TOKENS = 2003
# n_layer, n_head, head size, batch, block, n_embd and the vocabulary all differ, so no swapped axis goes unseen.
SIZES = ModelConfig(n_layer=2, n_head=5, n_embd=40, block_size=17)
BATCH = 6
TORCH_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.float32}


@dataclass(frozen=True)
class Case:
    """A configuration with its weights and tokens.

    weights: "documented", as at the start of training; "spread", as after it: matrices eight times as large (twice,
    at a width of 256), norms away from 1 and 0; or "zero". At the documented start attention is flat and its gradients
    are near zero.
    """

    name: str
    config: TrainConfig
    vocab_size: int = VOCAB
    weights: str = "spread"
    seed: int = 0
    fused_qkv: bool = False

    @property
    def label(self) -> str:
        return f"{self.name}, {self.weights} weights" if self.weights != "spread" else self.name

    @cached_property
    def tokens(self) -> np.ndarray:
        return np.random.default_rng(self.seed).integers(0, self.vocab_size, N_TOKENS).astype(np.uint16)

    @cached_property
    def start(self) -> dict[str, np.ndarray]:
        """The initial weights, drawn by torch, float32 by torch name."""
        torch.manual_seed(self.seed)
        model = GPT(self.config.model, self.vocab_size)
        weights = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
        if self.weights == "zero":
            return {name: np.zeros_like(p) for name, p in weights.items()}
        if self.weights == "spread":
            draw = np.random.default_rng(self.seed)
            scale = 8 * min(1, 64 / self.config.model.n_embd)  # wider models train to smaller weights
            for name, p in weights.items():
                weights[name] = p * scale if p.ndim == 2 else p + 0.1 * draw.standard_normal(p.shape, np.float32)
        return weights

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The inputs and targets that the trainer's step takes, int32 [B, T] each."""
        config = self.config
        block_size, key = config.model.block_size, self.seed_key(TRAIN)
        if config.packing == "windows":
            start_B = np.asarray(_window_starts(key, step, len(self.tokens), config.batch_size, block_size))
        else:
            starts = np.arange(0, len(self.tokens) - block_size, block_size)
            epoch, at = divmod(step, len(starts) // config.batch_size)
            order = np.asarray(_permutation(_fold_in(key, epoch), len(starts)))
            start_B = starts[order[at * config.batch_size : (at + 1) * config.batch_size]]
        window_BT = self.tokens[start_B[:, None] + np.arange(block_size + 1)].astype(np.int32)
        return window_BT[:, :-1], window_BT[:, 1:]

    @property
    def end_of_text(self) -> int | None:
        """With packed documents the end-of-text token, here the last of the vocabulary; None without."""
        return self.vocab_size - 1 if self.config.packing == "documents" else None

    def masks(self, step: int) -> list[np.ndarray] | None:
        """The dropout masks that the trainer's step draws, bool [B, T, C] each; None without dropout."""
        return masks_of(self.config, step)

    def seed_key(self, stream: int) -> Any:
        return stream_key(self.config.seed, stream)


def masks_of(config: TrainConfig | FinetuneConfig, step: int, n_time: int | None = None) -> list[np.ndarray] | None:
    """The dropout masks that the trainer's step draws, bool [B, T, C] each, T a block or `n_time`; None: no dropout."""
    model = config.model
    if not model.has_dropout:
        return None
    step_key = jax.random.fold_in(stream_key(config.seed, DROPOUT), step)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(step_key, np.arange(config.batch_size))
    n_time, n_sites = n_time or model.block_size, 2 * model.n_layer + 1
    masks = [np.array(_keep_mask(keys, site, (n_time, model.n_embd), model.dropout)) for site in range(n_sites)]
    if model.attention_dropout:
        shape = (model.n_head * n_time, n_time)
        for site in range(n_sites, n_sites + model.n_layer):
            mask = np.array(_keep_mask(keys, site, shape, model.attention_dropout))
            masks.append(mask.reshape(config.batch_size, model.n_head, n_time, n_time))
    return masks


_window_starts = jax.jit(window_starts, static_argnums=(2, 3, 4))
_permutation, _fold_in = jax.random.permutation, jax.random.fold_in
_keep_mask = jax.jit(keep_mask, static_argnums=(1, 2, 3))


def small(name: str, preset: str = "minigpt", model: ModelConfig = SIZES, **changes: Any) -> Case:
    """A case with the sizes above, and the other values of a preset."""
    return Case(name, dataclasses.replace(PRESETS[preset], **{"batch_size": BATCH, "model": model, **changes}))


def preset_cases() -> list[Case]:
    """The tutorials' presets with their models.

    nanoGPT's presets have nothing without a check of its own: the tied head, GPT-2's start, the mask, the warm-up.
    """
    return [preset_case(name) for name in VOCABULARIES]


def preset_case(preset: str, variant: str = "", **changes: Any) -> Case:
    """A preset or a variant of it, with a smaller batch, to save time, whose size differs from all others."""
    batch = {"wikitext2": 2}.get(preset, BATCH)  # there a row's logits are 6 million numbers
    config = dataclasses.replace(PRESETS[preset], batch_size=batch, **changes)
    return Case(f"{preset}, {variant}" if variant else preset, config, VOCABULARIES[preset])


# ---------------------------------------------------------------------------------------------------- the PyTorch side


def torch_model(case: Case, precision: str, device: str = "cpu") -> GPT:
    """The reference with the case's weights. For bfloat16, a compute dtype only, its parameters are float32."""
    model = GPT(case.config.model, case.vocab_size, torch.bfloat16 if precision == "bfloat16" else None)
    model.load_state_dict({name: torch.tensor(p) for name, p in case.start.items()})
    return model.to(device, TORCH_DTYPES[precision])


def torch_batch(case: Case, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [B, T] each."""
    idx_BT, target_BT = case.batch(step)
    return torch.from_numpy(idx_BT).long(), torch.from_numpy(target_BT).long()


def torch_masks(case: Case, step: int) -> list[torch.Tensor] | None:
    masks = case.masks(step)
    return masks and [torch.from_numpy(mask) for mask in masks]


@dataclass(frozen=True)
class Results:
    """One batch's logits [B, T, V], mean loss, and gradients by torch name, as numpy."""

    logits: np.ndarray
    loss: float
    grads: dict[str, np.ndarray]


@cache
def torch_results(case: Case, precision: str, step: int = 0, device: str = "cpu") -> Results:
    """The reference's logits, loss and gradients of a step's batch."""
    model = torch_model(case, precision, device)
    idx_BT, target_BT = (x.to(device) for x in torch_batch(case, step))
    keep = torch_masks(case, step)
    keep = keep and [mask.to(device) for mask in keep]
    logits = model(idx_BT, keep, case.end_of_text)
    loss = mean_loss(model, idx_BT, target_BT, keep, case.end_of_text)
    loss.backward()
    grads = {name: p.grad.cpu().numpy() for name, p in model.named_parameters()}
    return Results(logits.detach().cpu().numpy(), loss.item(), grads)


class TorchTraining:
    """The reference's loop over the case's batches."""

    def __init__(self, case: Case, precision: str, clip: Any = torch.nn.utils.clip_grad_norm_):
        self.case, self.clip, self.step = case, clip, 0
        self.model = torch_model(case, precision)
        self.optimizer = make_optimizer(self.model, case.config)

    def run(self, n_steps: int) -> list[float]:
        """The losses of the next steps."""
        steps, case = range(self.step, self.step + n_steps), self.case
        batch_of, keep_of = partial(torch_batch, case), partial(torch_masks, case)
        self.step += n_steps
        loop = train(self.model, self.optimizer, case.config, batch_of, steps, keep_of, self.clip, case.end_of_text)
        return [loss for _, loss in loop]

    def params(self) -> dict[str, np.ndarray]:
        """The weights by torch name, copied."""
        return {name: p.detach().numpy().copy() for name, p in self.model.named_parameters()}


# -------------------------------------------------------------------------------------------------------- the JAX side


def objective_of(case: Case, precision: str) -> LanguageModelingObjective:
    """The trainer's objective in float64, float32, or float32 weights with bfloat16 products."""
    config = dataclasses.replace(case.config, dtype=precision)
    dtypes = ("float32", "bfloat16") if precision == "bfloat16" else (precision, precision)
    numerics = Numerics(*(jax.numpy.dtype(name) for name in dtypes), fused_qkv=case.fused_qkv)
    return LanguageModelingObjective(config, case.vocab_size, numerics, case.end_of_text)


def flax_params(case: Case, objective: LanguageModelingObjective) -> dict[str, np.ndarray]:
    """The case's weights under the Flax names, in the objective's dtype."""
    like = objective.param_shapes
    dtype = objective.numerics.param_dtype
    return from_torch({name: p.astype(dtype) for name, p in case.start.items()}, like)


def flax_results(case: Case, precision: str, step: int = 0) -> Results:
    """Our logits of a step's batch, and its loss and gradients as `train_step` computes them."""
    return flax_results_of([case], precision, step)[0]


def flax_results_of(
    cases: list[Case], precision: str, step: int = 0, compiler_options: dict[str, Any] | None = None
) -> list[Results]:
    """The same for several cases of one configuration, in one compiled program."""
    case = cases[0]
    objective = objective_of(case, precision)

    @partial(jax.jit, compiler_options=compiler_options)
    def compute(params: Any, idx_BT: Any, target_BT: Any) -> Any:
        keys = objective.dropout_keys(jax.numpy.int32(step))
        packed = () if case.end_of_text is None else documents(idx_BT, case.end_of_text)
        logits_BTV = objective.model(params)(idx_BT, keys, *packed)
        state = TrainState(jax.numpy.int32(step), params, objective.optimizer.init(params))
        _, result = train_step(objective, state, (idx_BT, target_BT), SINGLE_DEVICE)
        return logits_BTV, result.loss, result.grads

    results = []
    for each in cases:
        logits, loss, grads = compute(flax_params(each, objective), *each.batch(step))
        results.append(Results(np.asarray(logits), float(loss), to_torch(grads)))
    return results


class FlaxTraining:
    """The trainer's own compiled program over the case's tokens, from the case's weights."""

    def __init__(self, case: Case, precision: str, devices: list[Any] | None = None, mesh: str = ""):
        objective = objective_of(case, precision)
        self.executor = parallel.Executor(objective, devices or jax.devices()[:1], mesh)
        params = flax_params(case, objective)
        opt_state = objective.optimizer.init(params)
        self.state = self.executor.put(TrainState(np.int32(0), params, opt_state))
        self.loader = DeviceLoader(case.tokens, BatchSampler(case.config, len(case.tokens)), self.executor.put)

    def run(self, n_steps: int) -> list[float]:
        """The losses of the next steps, all in one dispatch."""
        source = self.loader.take(int(self.state.step), n_steps)
        self.state, metrics = self.executor.train_steps(self.state, source, n_steps)
        return metrics[:, 0].tolist()

    def params(self) -> dict[str, np.ndarray]:
        """The weights by torch name."""
        return to_torch(self.state.params)
