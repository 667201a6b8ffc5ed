"""nanoGPT's checkpoints, `ckpt.pt`: the model, AdamW's state and the flags of its train.py, in and out.

Both directions keep the moments, so a training goes on in the other program at the loss at which it stopped. nanoGPT's
optimizer numbers its parameters: first those of two axes, which decay, then the others, each in the model's order
(`configure_optimizers` in its model.py).
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.config import TrainConfig
from jaxgpt.errors import UserError
from jaxgpt.interop import torch_files, torch_names
from jaxgpt.interop.torch_model import TorchModel, count_blocks, model_config, shown
from jaxgpt.optimizer import learning_rate

FILE = "ckpt.pt"  # in nanoGPT's --out_dir
MOMENTS = ("exp_avg", "exp_avg_sq")
SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")


def read(path: Path, flag: str) -> TorchModel:
    """The model, the optimizer's state and the recipe in a checkpoint.

    Raises:
        UserError: the file cannot be read, holds more than plain values and tensors, or is no checkpoint of nanoGPT.
    """
    values = torch_files.load(path, flag)
    if not isinstance(values, dict) or not {"model", "model_args"} <= set(values):
        raise UserError("is no checkpoint of nanoGPT (a dictionary with model and model_args); give its ckpt.pt")
    state, args = values["model"], values["model_args"]
    if not _is_state_dict(state) or not isinstance(args, dict) or not set(SHAPE) <= set(args):
        raise UserError("is no checkpoint of nanoGPT: its model or model_args are of another form; give its ckpt.pt")
    weights = {
        name.removeprefix("module.").removeprefix("_orig_mod."): p
        for name, p in state.items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))  # the causal mask, a buffer of early versions
    }
    tensors = torch_names.tutorial_names(weights)
    dropout = args.get("dropout", 0.0)
    model = model_config(
        **{name: args[name] for name in SHAPE if name != "vocab_size"},
        dropout=dropout,
        attention_dropout=dropout,
        tied_head="lm_head.weight" not in tensors,
        gelu="erf",
        init="gpt2",
        bias="blocks.0.ln1.bias" in tensors,
    )
    if count_blocks(tensors) != model.n_layer:
        raise UserError(f"holds {count_blocks(tensors)} blocks, and its model_args say {model.n_layer}; save it again")
    notes = ["GELU is taken as exact (erf): nanoGPT had the tanh approximation until May 2023, and no file says which"]
    step, optimizer_state = _whole_number(values.get("iter_num", 0), "iter_num"), None
    if isinstance(values.get("optimizer"), dict) and step:
        optimizer_state = _optimizer_state(values["optimizer"], weights)
        if optimizer_state is None:
            notes.append("its optimizer's state is not AdamW's over its weights, in the model's order, and is left out")
        else:
            step = int(optimizer_state["step"])
    vocab_size = _whole_number(args["vocab_size"], "vocab_size")
    config = values.get("config")
    recipe = _recipe(config, step) if isinstance(config, dict) else {}
    return TorchModel("nanoGPT", model, tensors, vocab_size, None, step, optimizer_state, recipe, tuple(notes))


def _is_state_dict(values: Any) -> bool:
    return isinstance(values, dict) and all(
        isinstance(name, str) and isinstance(p, np.ndarray) for name, p in values.items()
    )


def _whole_number(value: Any, name: str) -> int:
    number = value.item() if isinstance(value, np.ndarray) and value.size == 1 else value
    whole = isinstance(number, int | float) and not isinstance(number, bool) and number % 1 == 0  # not so of NaN, inf
    if not whole or not 0 <= number < 2**31:
        raise UserError(f"its {name} is {shown(number)}, no whole number; save it again")
    return int(number)


def _numbered(weights: Mapping[str, np.ndarray]) -> list[str]:
    """The names of the weights in the order in which the optimizer numbers them, and how many of them decay."""
    names = [name for name in weights if not name.endswith("lm_head.weight")]  # the token embedding's, again
    return sorted(names, key=lambda name: weights[name].ndim < 2)  # a stable sort


def _optimizer_state(optimizer: dict[Any, Any], weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """AdamW's state under the tutorials' names; None if it is not the state of an AdamW over these weights."""
    states, names = optimizer.get("state"), _numbered(weights)
    if not isinstance(states, dict) or set(states) != set(range(len(names))):
        return None
    moments: dict[str, dict[str, np.ndarray]] = {moment: {} for moment in MOMENTS}
    steps = set()
    for number, name in enumerate(names):
        state = states[number]
        if not isinstance(state, dict) or not {"step", *MOMENTS} <= set(state):
            return None
        steps.add(_whole_number(state["step"], "optimizer's step"))
        for moment in MOMENTS:
            if not isinstance(state[moment], np.ndarray) or state[moment].shape != weights[name].shape:
                return None
            moments[moment][name] = state[moment]
    if len(steps) != 1:
        return None
    found: dict[str, np.ndarray] = {"step": np.array(steps.pop(), np.int64)}
    for moment, tensors in moments.items():
        found |= {f"{moment}.{name}": p for name, p in torch_names.tutorial_names(tensors).items()}
    return found


def _recipe(config: Mapping[Any, Any], step: int) -> dict[str, Any]:
    """The fields of a `TrainConfig` that nanoGPT's flags stand for; none if they are not of its train.py."""
    names = ("batch_size", "gradient_accumulation_steps", "max_iters", "warmup_iters", "lr_decay_iters")
    floats = ("learning_rate", "weight_decay", "beta1", "beta2", "grad_clip", "min_lr")
    if not all(type(config.get(name)) is int for name in names):
        return {}
    if not all(isinstance(config.get(name), int | float) for name in floats):
        return {}
    microbatches = config["gradient_accumulation_steps"]
    recipe = {
        "steps": max(config["max_iters"], step),
        "batch_size": config["batch_size"] * microbatches,
        "grad_accum": microbatches,
        "optimizer": "adamw",
        "lr": float(config["learning_rate"]),
        "beta1": float(config["beta1"]),
        "beta2": float(config["beta2"]),
        "weight_decay": float(config["weight_decay"]),
        "decay_mask": "matrices",
        "clip": float(config["grad_clip"]),
        "schedule": "constant",
        "packing": "windows",
        "warmup_steps": 0,
        "decay_steps": 0,
        "min_lr": 0.0,
    }
    if config.get("decay_lr") is True:
        recipe |= {"schedule": "cosine", "decay_steps": config["lr_decay_iters"], "min_lr": float(config["min_lr"])}
        if config["warmup_iters"]:
            recipe |= {"schedule": "warmup-cosine", "warmup_steps": config["warmup_iters"]}
    for ours, theirs in (("eval_every", "eval_interval"), ("eval_batches", "eval_iters")):
        if type(config.get(theirs)) is int:
            recipe[ours] = config[theirs]
    return recipe


# -------------------------------------------------------------------------------------------------------------- writing


def write(
    path: Path,
    config: TrainConfig,
    params: Mapping[str, np.ndarray],
    opt_state: Any,
    step: int,
    vocab_size: int,
    val_loss: float,
) -> list[str]:
    """Writes a run's state as a checkpoint that nanoGPT's train.py and sample.py take with --init_from=resume.

    Args:
        params, opt_state: by Flax name, on the host.
        val_loss: the validation loss of the state, or infinity (nats per token).

    Returns:
        What nanoGPT does otherwise than the run, as sentences without a full stop.

    Raises:
        UserError: nanoGPT has no such model or optimizer.
        OSError: the file cannot be written.
    """
    model = config.model
    for name, value, theirs in (
        ("model.tied_head", model.tied_head, True),
        ("model.gelu", model.gelu, "erf"),
        ("model.layer_norm_eps", model.layer_norm_eps, 1e-5),
        ("optimizer", config.optimizer, "adamw"),
    ):
        if value != theirs:
            flag_text = "--" + name.replace("_", "-")
            raise UserError(
                f"--to nanogpt: the run has {flag_text} {value}, and nanoGPT {theirs}; give --to huggingface"
            )
    torch = torch_names.to_torch(params)
    weights = torch_names.gpt2_names(torch, conv1d=False)
    moments = torch_names.optimizer_to_torch(opt_state)
    named = {
        moment: torch_names.gpt2_names({name: moments[f"{moment}.{name}"] for name in torch}, conv1d=False)
        for moment in MOMENTS
    }
    names = _numbered(weights)
    n_decayed = sum(weights[name].ndim >= 2 for name in names)
    states = {
        number: {"step": np.array(float(moments["step"]), np.float32), **{m: named[m][name] for m in MOMENTS}}
        for number, name in enumerate(names)
    }
    group = {
        "lr": learning_rate(config, step),
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "amsgrad": False,
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
        "fused": None,
        "decoupled_weight_decay": True,
    }
    groups = [
        {**group, "weight_decay": config.decay, "params": list(range(n_decayed))},
        {**group, "weight_decay": 0.0, "params": list(range(n_decayed, len(names)))},
    ]
    model_args = {
        "n_layer": model.n_layer,
        "n_head": model.n_head,
        "n_embd": model.n_embd,
        "block_size": model.block_size,
        "bias": model.bias,
        "vocab_size": vocab_size,
        "dropout": model.dropout,
    }
    rows = config.batch_size // config.grad_accum
    dataset = os.path.basename(config.dataset.rstrip("/")).partition(".")[0]
    if (config.dataset, config.tokenizer) == ("tinyshakespeare", "char"):
        dataset = "shakespeare_char"  # nanoGPT's name of this text; its sample.py takes the characters from there
    flags = {
        **model_args,
        "dataset": dataset,
        "batch_size": rows,
        "gradient_accumulation_steps": config.grad_accum,
        "learning_rate": config.lr,
        "max_iters": config.steps,
        "weight_decay": config.decay,
        "beta1": config.beta1,
        "beta2": config.beta2,
        "grad_clip": config.clip,
        "decay_lr": config.schedule != "constant",
        "warmup_iters": config.warmup_steps,
        "lr_decay_iters": config.cosine_end,
        "min_lr": config.min_lr,
    }
    del flags["vocab_size"]
    torch_files.save(
        path,
        {
            "model": {**weights, "lm_head.weight": weights["transformer.wte.weight"]},
            "optimizer": {"state": states, "param_groups": groups},
            "model_args": model_args,
            "iter_num": step,
            "best_val_loss": val_loss,
            "config": flags,
        },
    )
    notes = []
    if config.decay and config.decay_mask != "matrices":
        notes.append(f"nanoGPT decays matrices alone, and the run has --decay-mask {config.decay_mask}")
    if model.attention_dropout != model.dropout:
        notes.append(
            f"nanoGPT has one rate of dropout, {model.dropout} by the checkpoint, and the run has "
            f"--model.attention-dropout {model.attention_dropout}"
        )
    return notes
