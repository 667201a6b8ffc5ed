"""Our GPT against torch_ref as pairs: jaxgpt parity --pair parity_tests/pairs.py:minigpt

The recipes of the three training loops, at the suite's sizes. The suite holds the levels of each, too.
"""

import dataclasses
from typing import Any

import numpy as np
import torch

from jaxgpt.interop.torch_names import from_torch
from jaxgpt.model.gpt import Numerics
from jaxgpt.objective import LanguageModelingObjective
from jaxgpt.parity import Pair
from jaxgpt.presets import PRESETS
from parity_tests.cases import SIZES, Case, small
from torch_ref.model import GPT, mean_loss
from torch_ref.train_step import learning_rate, make_optimizer

N_UPDATES = 8


def pair_of(case: Case) -> Pair:
    """The model, the loss and the optimizer of a case without dropout, from the case's weights."""
    config = case.config

    def torch_model() -> torch.nn.Module:
        model = GPT(config.model, case.vocab_size)
        model.load_state_dict({name: torch.tensor(p) for name, p in case.start.items()})
        return model

    def objective(dtype: Any) -> LanguageModelingObjective:
        numerics = Numerics(dtype, dtype, fused_qkv=case.fused_qkv)
        return LanguageModelingObjective(config, case.vocab_size, numerics, case.end_of_text)

    def objective_of(params: dict[str, Any]) -> LanguageModelingObjective:
        return objective(next(iter(params.values())).dtype)

    def jax_loss(params: dict[str, Any], batch: dict[str, Any]) -> Any:
        loss_sum, n_tokens = objective_of(params).loss_sum(params, batch["inputs"], batch["targets"], None)
        return loss_sum / n_tokens

    def to_params(state_dict: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return from_torch(state_dict, objective(next(iter(state_dict.values())).dtype).param_shapes)

    def batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
        inputs_BT, targets_BT = case.batch(int(rng.integers(1000)))
        return {"inputs": inputs_BT, "targets": targets_BT}

    return Pair(
        torch_model=torch_model,
        torch_loss=lambda model, b: mean_loss(model, b["inputs"], b["targets"], None, case.end_of_text),
        torch_logits=lambda model, b: model(b["inputs"], None, case.end_of_text),
        jax_loss=jax_loss,
        jax_logits=lambda params, b: objective_of(params).model(params)(b["inputs"]),
        to_params=to_params,
        batch=batch,
        torch_optimizer=lambda model: make_optimizer(model, config),
        torch_schedule=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate(config, step) / config.lr
        ),
        optax_optimizer=lambda params: objective_of(params).optimizer,
        clip=config.clip or None,
        n_updates=N_UPDATES,
        name=case.name,
    )


def recipe(preset: str) -> Case:
    """A preset's options and optimizer at the suite's sizes, with the schedule in so many updates as the pair makes."""
    config = PRESETS[preset]
    model = dataclasses.replace(
        SIZES, tied_head=config.model.tied_head, gelu=config.model.gelu, bias=config.model.bias, dropout=0.0
    )
    schedule = {} if config.schedule == "constant" else {"warmup_steps": 2, "decay_steps": N_UPDATES}
    return small(preset, preset, model=model, steps=N_UPDATES, **schedule)


tinygpt, minigpt, wikitext2, nanogpt = (
    pair_of(recipe(preset)) for preset in ("tinygpt", "minigpt", "wikitext2", "nanogpt-char")
)
