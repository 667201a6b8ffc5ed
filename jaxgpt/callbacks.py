"""Callbacks: what happens beside the training. The trainer calls them and knows nothing of what they do."""

from collections.abc import Callable
from typing import Any


class Callback:
    """Base class of callbacks; each method may be left as it is. Steps are counted in updates done."""

    every: int = 0  # steps between calls of `on_step`; 0: never
    at_end: bool = False  # whether `on_step` is also called after the last update

    def on_train_begin(self, step: int, n_steps: int) -> None:
        """Training starts, or resumes, after `step` of `n_steps` updates."""

    def on_step(self, state: Any, step: int) -> None:
        """The state before update `step`, every `every` steps."""

    def on_dispatch(self, step: int, loss: float, tokens_per_s: float) -> None:
        """A dispatch has ended after `step` updates, with the last one's training loss."""

    def on_report(self, report: dict[str, Any], line: str) -> None:
        """A line of metrics.jsonl, and the same for a person."""

    def on_train_end(self, step: int) -> None:
        """Training has stopped after `step` updates, and all checkpoints are written."""

    def close(self) -> None:
        """The run ends, whether or not by an error."""


class EveryN(Callback):
    """Calls a function with the state and the number of updates done, every N steps (0: never).

    Args:
        at_end: also after the last update.
    """

    def __init__(self, every: int, function: Callable[[Any, int], None], at_end: bool = False):
        self.every, self.at_end, self._function = every, at_end and every > 0, function

    def on_step(self, state: Any, step: int) -> None:
        self._function(state, step)
