"""Faults of a GPT-2: its fused projection in Conv1D's layout, its approximate GELU, the tied head, AdamW."""

import dataclasses
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity_pairs.planting import (
    Level,
    Plant,
    Planted,
    adamw,
    function,
    late,
    optimizer,
    patched,
    scaled,
    token_loss,
)
from tests.parity_pairs.planting import cross_entropy as token_cross_entropy


def configured(**changes: Any) -> Plant:
    """The JAX model of another configuration."""
    return patched({"config": lambda m: dataclasses.replace(m.config, **changes)})


def tensors(change: Any) -> Plant:
    """Changes Hugging Face's tensors before they are converted, in place."""

    def wrapper(original: Any) -> Any:
        def to_params(state_dict: Any) -> Any:
            state_dict = dict(state_dict)
            change(state_dict)
            return original(state_dict)

        return to_params

    return function("to_params", wrapper)


def of_each_layer(leaf: str, change: Any) -> Plant:
    """Changes one tensor of each layer."""

    def changed(state_dict: dict[str, Any]) -> None:
        for name in state_dict:
            if name.endswith(f".{leaf}"):
                state_dict[name] = change(state_dict[name])

    return tensors(changed)


def positions_one_on(state_dict: dict[str, Any]) -> None:
    state_dict["transformer.wpe.weight"] = np.roll(state_dict["transformer.wpe.weight"], -1, axis=0)


def layers_swapped(state_dict: dict[str, Any]) -> None:
    first = {n: p for n, p in state_dict.items() if n.startswith("transformer.h.0.")}
    for name, tensor in first.items():
        other = name.replace(".h.0.", ".h.1.")
        state_dict[name], state_dict[other] = state_dict[other], tensor


def parts_in_order(order: str) -> Any:
    """The parts of the fused projection [C, 3 C] or its bias [3 C] in another order."""

    def change(tensor: Any) -> Any:
        parts = dict(zip("qkv", np.split(tensor, 3, axis=-1), strict=True))
        return np.concatenate([parts[part] for part in order], axis=-1)

    return change


def by_heads(tensor: Any) -> Any:
    """[..., H, 3, D] for [..., 3, H, D], the layout of GPT-NeoX."""
    heads = tensor.reshape(*tensor.shape[:-1], 3, 5, -1)
    return heads.swapaxes(-2, -3).reshape(tensor.shape)


def qkv(change: Any) -> Plant:
    def changed(state_dict: dict[str, Any]) -> None:
        for name in state_dict:
            if ".c_attn." in name:
                state_dict[name] = change(state_dict[name])

    return tensors(changed)


def head_of_its_own(module: ModuleType) -> Any:
    """The converter to a model whose head is a copy of the embedding."""
    config = dataclasses.replace(module.config, tied_head=False)

    def to_params(state_dict: Any) -> Any:
        tensors = module.tutorial_names(state_dict)
        tensors = {**tensors, "lm_head.weight": tensors["token_emb.weight"]}
        numerics = module.Numerics(param_dtype=tensors["token_emb.weight"].dtype)
        init = partial(module.init_params, jax.random.key(0), config, module.N_VOCAB, numerics)
        return module.from_torch(tensors, jax.eval_shape(init))

    return to_params


def rounded_logits(module: ModuleType) -> Any:
    original = module.logits

    def logits(params: Any, batch: Any) -> Any:
        logits_BTV = original(params, batch)
        return logits_BTV.astype(jnp.bfloat16).astype(logits_BTV.dtype)

    return logits


untied = patched({"config": lambda m: dataclasses.replace(m.config, tied_head=False), "to_params": head_of_its_own})
BLOCK = r"transformer\.h\.0"


def fault(name: str, plant: Plant, layer: str, cause: str, level: Level = "forward") -> Planted:
    return Planted(f"GPT-2: {name}", "gpt2", plant, layer, cause, level)


FAULTS = [
    fault("exact GELU", configured(gelu="erf"), rf"{BLOCK}\.mlp(\.act)?", "activation"),
    fault("epsilon 1e-6", configured(layer_norm_eps=1e-6), rf"{BLOCK}\.ln_1", "epsilon"),
    fault(
        "Conv1D's square kernel transposed as a Linear's",
        of_each_layer("attn.c_proj.weight", np.transpose),
        rf"{BLOCK}\.attn\.c_proj",
        "kernel transposed",
    ),
    fault("keys, queries, values", qkv(parts_in_order("kqv")), rf"{BLOCK}\.attn\.c_attn", "weights swapped"),
    fault("the fused projection by heads", qkv(by_heads), rf"{BLOCK}\.attn(\.c_attn)?", "heads interleaved"),
    fault("positions from 1", tensors(positions_one_on), r"transformer\.wpe", "positions shifted"),
    fault(
        "the projection's bias zero",
        of_each_layer("attn.c_proj.bias", np.zeros_like),
        rf"{BLOCK}\.attn\.c_proj",
        "bias missing",
        "parameters",
    ),
    fault("two blocks swapped", tensors(layers_swapped), rf"{BLOCK}(\..*)?", "layers swapped"),
    fault("logits in bfloat16", patched({"logits": rounded_logits}), "lm_head", "rounded to bfloat16"),
    fault("a head of its own", untied, r"lm_head|transformer\.wte", "tie cut", "parameters"),
    fault(
        "the target two tokens ahead",
        token_loss(lambda *x: token_cross_entropy(*x).mean(), shift=2),
        "loss",
        "label shift missing",
        "loss",
    ),
    fault(
        "the schedule of 1 % more",
        optimizer(lambda m: adamw(m, schedule=scaled(m.schedule, 1.01))),
        "optimizer",
        "learning rate",
        "updates",
    ),
    fault(
        "a schedule one step late",
        optimizer(lambda m: adamw(m, schedule=late(m.schedule))),
        "optimizer",
        "schedule late",
        "updates",
    ),
    fault("decay of every tensor", optimizer(lambda m: adamw(m, mask=None)), "optimizer", "decay mask", "updates"),
    fault("decay 0.01", optimizer(lambda m: adamw(m, weight_decay=0.01)), "optimizer", "weight decay", "updates"),
]
