"""The documented optimiser, and one update on one batch."""

import torch
from torch import Tensor

from jaxgpt.config import TrainConfig
from torch_ref.model import GPT, mean_loss


def make_optimizer(model: GPT, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW or SGD over two groups, with and without decay. The learning rate is set before each update."""

    def decays(name: str, p: Tensor) -> bool:
        return config.decay_mask == "all" or (p.ndim >= 2 and "ln" not in name.split(".")[-2])

    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if decays(name, p)], "weight_decay": config.decay},
        {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)


def update(
    model: GPT,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    lr: float,
    idx_BT: Tensor,
    target_BT: Tensor,
) -> float:
    """One update at the given rate; returns the loss before it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss = mean_loss(model, idx_BT, target_BT)
    optimizer.zero_grad()
    loss.backward()
    if config.clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    optimizer.step()
    return loss.item()
