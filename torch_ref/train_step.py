"""The tutorials' optimiser, learning-rate schedule, and one training step."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from jaxgpt.config import OptimizerConfig, TrainConfig
from torch_ref.model import GPT, mean_loss


def make_optimizer(model: GPT, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW, Adam or SGD with two parameter groups, with and without decay. Each update sets the learning rate."""

    def decays(name: str, p: Tensor) -> bool:
        return config.decay_mask == "all" or (p.ndim >= 2 and "ln" not in name.split(".")[-2])

    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if decays(name, p)], "weight_decay": config.decay},
        {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer != "sgd":
        kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
        return kind(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """The learning rate of a step, counted from 0; skipped updates are not counted.

    constant: lr. warmup-cosine: lr * step / warmup_steps, so 0 at step 0; then half a cosine from lr down to min_lr at
    step decay_steps (0: the last), and min_lr after. cosine: the same without warm-up.
    """
    if config.schedule == "constant":
        return config.lr
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    end = config.decay_steps or config.steps
    if step >= end:
        return config.min_lr
    progress = (step - config.warmup_steps) / (end - config.warmup_steps)
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress))


class SkippedUpdates:
    """Decides which updates to skip, by --on-nonfinite and --skip-spikes, and counts them.

    The running mean of the gradient norms is ZClip's (arXiv:2504.02507): the plain mean of the first 25, and from then
    on 0.97 mean + 0.03 norm. Of the first 25 none is compared, and the norm of a skipped update does not enter.
    """

    def __init__(self, config: OptimizerConfig):
        self.config = config
        self.applied = self.total = self.in_a_row = 0
        self.norm_mean = 0.0

    def skips(self, loss: Tensor, model: torch.nn.Module) -> bool:
        """Whether to skip the update for a loss, after its backward pass and before the clip."""
        if not self.config.skips_updates:
            return False
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
        finite = math.isfinite(loss.item()) and math.isfinite(norm)
        factor = self.config.skip_spikes
        spike = factor and self.applied >= 25 and norm > factor * self.norm_mean
        if spike or (self.config.on_nonfinite == "skip" and not finite):
            self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
            return True
        weight = 1 / (self.applied + 1) if self.applied < 25 else 1 - 0.97
        self.norm_mean += weight * (norm - self.norm_mean)
        self.applied, self.in_a_row = self.applied + 1, 0
        return False

    def reason_to_stop(self, loss: float) -> str:
        """Why training has to stop after a step of this loss; empty if it goes on."""
        if self.config.on_nonfinite == "stop" and not math.isfinite(loss):
            return f"loss {loss}; try a lower --lr or --clip 1"
        return f"loss {loss}; the fifth update skipped in a row; try a lower --lr" if self.in_a_row == 5 else ""


def update(
    model: GPT,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    lr: float,
    idx_BT: Tensor,
    target_BT: Tensor,
    keep: Sequence[Tensor] | None = None,
    clip: Callable[[Iterable[Tensor], float], Any] = torch.nn.utils.clip_grad_norm_,
    end_of_text: int | None = None,
    skipped: SkippedUpdates | None = None,
) -> float:
    """One training step of a language model; returns the loss before the update.

    Args:
        lr: the learning rate.
        idx_BT, target_BT: the batch, int64.
        keep, end_of_text: dropout masks and packed documents, as in `GPT.hidden`.
        clip: clips the gradients' global norm; by default PyTorch's function, which divides by norm + 1e-6.
        skipped: as in `apply`.
    """
    return apply(mean_loss(model, idx_BT, target_BT, keep, end_of_text), model, optimizer, config, lr, clip, skipped)


def apply(
    loss: Tensor,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    config: OptimizerConfig,
    lr: float,
    clip: Callable[[Iterable[Tensor], float], Any] = torch.nn.utils.clip_grad_norm_,
    skipped: SkippedUpdates | None = None,
) -> float:
    """Backward pass, clipping and optimiser step for a loss; returns the loss.

    Args:
        skipped: decides whether parameters and optimiser state stay as they are; None: never.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    if skipped and skipped.skips(loss, model):
        return loss.item()
    if config.clip:
        clip(model.parameters(), config.clip)
    optimizer.step()
    return loss.item()


def gradient_report(model: GPT) -> dict[str, tuple[float, float]]:
    """The mean |g| and the standard deviation of each parameter's gradient g, after a backward pass.

    Healthy gradients are neither zero nor exploding.
    """
    return {name: (p.grad.abs().mean().item(), p.grad.std().item()) for name, p in model.named_parameters()}


# The names of torch's optimiser state. In files a tensor is called <state>.<parameter>; "step" is there once.
STATES = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "adam": ("exp_avg", "exp_avg_sq"),
    "sgd": ("momentum_buffer",),
}


def optimizer_tensors(
    model: GPT, optimizer: torch.optim.Optimizer, config: TrainConfig, step: int
) -> dict[str, Tensor]:
    """The optimiser's state by name, such as `exp_avg.blocks.0.ln1.weight`, and `step`, the number of updates done."""
    tensors = {"step": torch.tensor(step)}
    for state in _states(config):
        for name, p in model.named_parameters():
            value = optimizer.state[p].get(state)
            tensors[f"{state}.{name}"] = torch.zeros_like(p) if value is None else value
    return tensors


def load_optimizer_tensors(
    model: GPT, optimizer: torch.optim.Optimizer, config: TrainConfig, tensors: dict[str, Tensor]
) -> int:
    """The inverse of `optimizer_tensors`; returns the number of updates done."""
    step = int(tensors["step"].item())
    for name, p in model.named_parameters():
        optimizer.state[p] = {state: tensors[f"{state}.{name}"].clone() for state in _states(config)}
        if config.optimizer != "sgd":
            optimizer.state[p]["step"] = torch.tensor(float(step))
    return step


def _states(config: TrainConfig) -> tuple[str, ...]:
    return STATES[config.optimizer] if config.optimizer != "sgd" or config.momentum else ()
