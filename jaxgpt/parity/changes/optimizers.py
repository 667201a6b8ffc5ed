"""Changes of PyTorch's optimizer: the mistakes that ports of AdamW and SGD make, made on purpose.

Adam is written out once more, after Kingma and Ba (arXiv 1412.6980, algorithm 1) and Loshchilov and Hutter (arXiv
1711.05101, algorithm 2), with a switch for each mistake; without one it is held against PyTorch's own first.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from jaxgpt.parity.torch_side import TorchSide, Trajectory, Update

MakeUpdate = Callable[[Update], None]
FACTORS = (1.01, 0.99, 10.0, 0.1, 2.0, 0.5)
DECAYS = (0.0, 1e-4, 1e-2, 1e-1)


@dataclass(frozen=True)
class OptimizerChange:
    """One mistake: its kind, what is changed to what, and the update that makes it."""

    cause: str
    detail: str
    make_update: MakeUpdate
    layer: str = "optimizer"

    @property
    def name(self) -> str:
        return f"{self.cause}: {self.detail}"


@dataclass(frozen=True)
class Recipe:
    """An update, with a switch for each mistake. The fields that are None are as the pair has them.

    Attributes:
        clip: "own", "none", or "each tensor".
        decay: "own", "all", "matrices", "vectors" (what has one axis), or "none"; or its size.
        schedule: how many steps late the learning rate comes; `from_zero`: the first then is 0.
        toggled: names of tensors that are decayed if the pair's are not, and the other way round.
    """

    learning_rate: float = 1.0
    epsilon: float | None = None
    epsilon_inside: bool = False
    betas: tuple[float, float] | None = None
    bias_correction: bool = True
    coupled: bool | None = None
    decay: str | float = "own"
    clip: str = "own"
    clip_norm: float | None = None
    schedule: int = 0
    from_zero: bool = False
    toggled: frozenset[str] = frozenset()
    momentum: float | None = None
    nesterov: bool | None = None

    def __call__(self, update: Update) -> None:
        """Makes one update."""
        self.make_clip(update)
        lrs = self._rates(update)
        for group, lr in zip(update.optimizer.param_groups, lrs, strict=True):
            for parameter in group["params"]:
                if parameter.grad is not None:
                    with torch.no_grad():
                        self._step(update, group, parameter, lr * self.learning_rate)

    def make_clip(self, update: Update) -> None:
        norm = self.clip_norm or update.pair.clip
        if norm is None or self.clip == "none":
            return
        if self.clip == "own":
            update.clip(norm)
            return
        for parameter in update.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(torch.clamp(norm / parameter.grad.norm(), max=1.0))

    def _rates(self, update: Update) -> list[float]:
        """The learning rates of this update; the scheduler itself runs on, once, ahead of the first."""
        if "rates" not in update.memory:
            rates = []
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch's, of a scheduler that steps before its optimizer
                for _ in range(update.pair.n_updates + abs(self.schedule) + 1):
                    rates.append([float(group["lr"]) for group in update.optimizer.param_groups])
                    if update.schedule is not None:
                        update.schedule.step()
            update.memory["rates"] = rates
        rates = update.memory["rates"][max(0, update.step - self.schedule)]
        return [0.0] * len(rates) if self.from_zero and update.step < self.schedule else rates

    def _decay(self, update: Update, group: dict[str, Any], parameter: torch.Tensor) -> float:
        own = float(group.get("weight_decay", 0.0))
        if self.toggled:
            names = {id(p): name for name, p in update.model.named_parameters()}
            if names[id(parameter)] in self.toggled:
                return 0.0 if own else max(float(g.get("weight_decay", 0.0)) for g in update.optimizer.param_groups)
        if self.decay == "own":
            return own
        if isinstance(self.decay, float):
            return self.decay if own else 0.0
        largest = max(float(g.get("weight_decay", 0.0)) for g in update.optimizer.param_groups)
        taken = {"all": True, "none": False, "matrices": parameter.ndim > 1, "vectors": parameter.ndim < 2}
        return largest if taken[str(self.decay)] else 0.0

    def _step(self, update: Update, group: dict[str, Any], parameter: torch.Tensor, lr: float) -> None:
        memory = update.memory.setdefault(id(parameter), {})
        assert parameter.grad is not None
        grad = parameter.grad.clone()
        decay = self._decay(update, group, parameter)
        is_adam = "betas" in group
        coupled = self.coupled
        if coupled is None:
            coupled = not (
                isinstance(update.optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay", False)
            )
        if coupled:
            grad += decay * parameter
        else:
            parameter.mul_(1 - lr * decay)
        if not is_adam:
            momentum = group.get("momentum", 0.0) if self.momentum is None else self.momentum
            if momentum:
                trace = memory.setdefault("trace", torch.zeros_like(grad))
                trace.mul_(momentum).add_(grad if update.step == 0 else grad * (1 - group.get("dampening", 0.0)))
                nesterov = group.get("nesterov", False) if self.nesterov is None else self.nesterov
                grad = grad + momentum * trace if nesterov else trace
            parameter.sub_(lr * grad)
            return
        b1, b2 = self.betas or group["betas"]
        epsilon = group["eps"] if self.epsilon is None else self.epsilon
        first = memory.setdefault("first", torch.zeros_like(grad))
        second = memory.setdefault("second", torch.zeros_like(grad))
        first.mul_(b1).add_(grad * (1 - b1))
        second.mul_(b2).add_(grad.square() * (1 - b2))
        t = update.step + 1
        m, v = (first / (1 - b1**t), second / (1 - b2**t)) if self.bias_correction else (first, second)
        root = torch.sqrt(v + epsilon) if self.epsilon_inside else torch.sqrt(v) + epsilon
        parameter.sub_(lr * m / root)


def optimizer_changes(
    torch_side: TorchSide,
    batches: Sequence[Mapping[str, np.ndarray]],
    truth: Trajectory,
    factors: Sequence[float] = (),
    toggled: Sequence[str] = (),
) -> list[OptimizerChange]:
    """The changes of a pair's optimizer; none where it is another one than SGD and Adam.

    Args:
        batches: of the updates, and `truth`: what the pair's own optimizer makes of them in float64.
        factors: further factors of the learning rate to try.
        toggled: names of tensors that only one side may decay.
    """
    pair = torch_side.pair
    model = torch_side.model("float64")
    optimizer = pair.torch_optimizer(model) if pair.torch_optimizer else None
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW | torch.optim.SGD):
        return []
    again = torch_side.train(batches, "float64", Recipe())
    if not all(np.allclose(again.params[-1][n], p, rtol=1e-9, atol=1e-12) for n, p in truth.params[-1].items()):
        return []  # an option that is not written out here: amsgrad, a closure
    group = optimizer.param_groups[0]
    plain = Recipe()
    found: list[OptimizerChange] = []

    def add(cause: str, detail: str, **values: Any) -> None:
        found.append(OptimizerChange(cause, detail, replace(plain, **values)))

    if pair.torch_schedule is not None:
        add("schedule late", "one step late", schedule=1)
        add("schedule late", "one step late, its first rate 0", schedule=1, from_zero=True)
        add("schedule early", "one step early", schedule=-1)
    for factor in dict.fromkeys((*FACTORS, *factors)):
        add("learning rate", f"times {factor:.4g}", learning_rate=factor)
    decays = {float(g.get("weight_decay", 0.0)) for g in optimizer.param_groups}
    if any(decays):
        is_decoupled = isinstance(optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay", False)
        add(
            *(
                ("coupled decay", "decay added to the gradient")
                if is_decoupled
                else ("decoupled decay", "decay of the weights")
            ),
            coupled=is_decoupled,
        )
        for of, text in (
            ("all", "decay of every tensor"),
            ("matrices", "decay of matrices alone"),
            ("vectors", "decay of vectors alone"),
        ):
            if of != "all" or len(decays) > 1:
                add("decay mask", text, decay=of)
        if toggled:
            names = ", ".join(toggled[:6]) + (f" and {len(toggled) - 6} more" if len(toggled) > 6 else "")
            add("decay mask", f"another decay of {names}", toggled=frozenset(toggled))
        add("decay missing", "no decay", decay="none")
        for decay in DECAYS[1:]:
            if decay not in decays:
                add("weight decay", f"decay {decay:g}", decay=decay)
    if pair.clip is not None:
        add("clip missing", "no clip", clip="none")
        add("clip per tensor", "each tensor by its own norm", clip="each tensor")
        for factor in (10.0, 0.1, 2.0, 0.5):
            add("clip norm", f"norm {pair.clip * factor:g}", clip_norm=pair.clip * factor)
    if "betas" in group:
        b1, b2 = group["betas"]
        for value in (1e-6, 1e-5, 1e-7, 1e-8, 1e-10, 1e-12, 1e-15, 1e-4):
            if value != group["eps"]:
                add("optimizer epsilon", f"eps {value:g}", epsilon=value)
        add("optimizer epsilon inside the root", "sqrt(v + eps)", epsilon_inside=True)
        for betas in dict.fromkeys(
            ((b1, 0.95), (b1, 0.99), (b1, 0.999), (0.9, b2), (0.95, b2), (b2, b1), (b1, b1), (0.0, b2))
        ):
            if betas != (b1, b2):
                add("optimizer betas", f"betas {betas[0]:g}, {betas[1]:g}", betas=betas)
        add("bias correction missing", "no bias correction", bias_correction=False)
    else:
        own = group.get("momentum", 0.0)
        for value in (0.0, 0.9, 0.95, 0.99):
            if value != own:
                add("momentum", f"momentum {value:g}", momentum=value)
        if own:
            add("nesterov", "the other momentum", nesterov=not group.get("nesterov", False))
    return found


def decayed_on_one_side(ours: Trajectory, theirs: Trajectory, start: Mapping[str, np.ndarray]) -> list[str]:
    """Names of the tensors of which the first updates that differ do so along the tensor itself, as a decay does."""
    for mine, truth in zip(ours.params, theirs.params, strict=True):
        differences = {name: mine[name] - truth[name] for name in start}
        sizes = {name: float(np.linalg.norm(difference)) for name, difference in differences.items()}
        found = [name for name in start if sizes[name] > 1e-9 * float(np.linalg.norm(start[name]))]
        if found:
            return [name for name in found if _is_along(differences[name], start[name])]
    return []


def _is_along(difference: np.ndarray, tensor: np.ndarray) -> bool:
    share = float(np.sum(difference * tensor)) / (float(np.sum(tensor**2)) or 1.0)
    return float(np.linalg.norm(difference - share * tensor)) < 1e-3 * float(np.linalg.norm(difference))


def estimated_factor(
    ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], start: dict[str, np.ndarray]
) -> float | None:
    """The factor by which one side's first update is larger, by least squares; None for no update."""
    above = sum(float(np.sum((ours[n] - start[n]) * (theirs[n] - start[n]))) for n in theirs)
    below = sum(float(np.sum((theirs[n] - start[n]) ** 2)) for n in theirs)
    return above / below if below else None
