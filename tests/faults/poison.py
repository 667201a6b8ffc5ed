"""Numbers that are not finite, put into a training of this process: its losses, gradients, moments or weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

PLACES = ("loss", "gradients", "moments", "weights")
MARK = "!"  # batches that hold it are poisoned; the first character of the vocabulary but for the space


@dataclass(frozen=True)
class Poison:
    """What is not finite, and when.

    Args:
        place: one of PLACES.
        value: "nan" or "inf".
        always: in each step; else loss and gradients of the batches that hold MARK, moments and weights after step 8.
    """

    place: str
    value: str
    always: bool


@contextmanager
def poisoned(poison: Poison) -> Iterator[None]:
    """Carries it out."""
    import jax
    import jax.numpy as jnp

    from jaxgpt.objective import LanguageModelingObjective
    from jaxgpt.parallel import Executor

    value = float(poison.value)
    loss_sum, train_steps = LanguageModelingObjective.loss_sum, Executor.train_steps

    @jax.custom_vjp
    def zero(params: Any, bad: Any) -> Any:
        """0, with a gradient that is not finite where `bad`."""
        return jnp.zeros(())

    def backward(residuals: Any, _: Any) -> tuple:
        params, bad = residuals
        return jax.tree.map(lambda p: jnp.where(bad, jnp.full_like(p, value), 0), params), None

    zero.defvjp(lambda params, bad: (jnp.zeros(()), (params, bad)), backward)

    def poisoned_loss_sum(objective: Any, params: Any, idx_BT: Any, *rest: Any, **more: Any) -> tuple:
        loss, count = loss_sum(objective, params, idx_BT, *rest, **more)
        bad = jnp.asarray(True) if poison.always else (idx_BT == 1).any()
        if poison.place == "loss":
            return loss * jnp.where(bad, value, 1.0), count
        return loss + zero(params, bad), count

    def poisoned_steps(executor: Any, state: Any, *rest: Any) -> tuple:
        state, metrics = train_steps(executor, state, *rest)
        if int(state.step) > (0 if poison.always else 8):
            part = ".nu" if poison.place == "moments" else ".params"
            state = jax.tree_util.tree_map_with_path(
                lambda path, x: jnp.full_like(x, value) if _is_part(jax.tree_util.keystr(path), part) else x, state
            )
        return state, metrics

    if poison.place in ("loss", "gradients"):
        patch = mock.patch.object(LanguageModelingObjective, "loss_sum", poisoned_loss_sum)
    else:
        patch = mock.patch.object(Executor, "train_steps", poisoned_steps)
    with patch:
        yield


def _is_part(path: str, part: str) -> bool:
    return part in path and "ln_f.bias" in path
