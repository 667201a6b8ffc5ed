"""The trainer's own compiled steps on given tokens, without its loop: what is timed as "ours"."""

from typing import Any

import numpy as np
from jax import Array

from jaxgpt.data.loader import DeviceLoader
from jaxgpt.data.sampler import BatchSampler
from jaxgpt.parallel import Executor
from jaxgpt.train_step import StepContext, TrainState, train_steps


class TrainerSteps:
    """Trains from the seed on, many steps in one dispatch as the trainer does.

    Args:
        tokens_N: the tokens, of which every device gets a copy.
    """

    def __init__(self, executor: Executor, tokens_N: np.ndarray):
        self.executor = executor
        self.sampler = BatchSampler(executor.config, len(tokens_N))
        self.state, self.done = executor.init_state(), 0
        self._loader = DeviceLoader(tokens_N, self.sampler, executor.put)

    def run(self, n_steps: int) -> list[float]:
        """Trains `n_steps` further; returns their losses."""
        losses: list[float] = []
        while len(losses) < n_steps:
            n = min(n_steps - len(losses), self._loader.max_steps)
            self.state, metrics_K2 = self.train_steps(self.state, self._loader.take(self.done, n), n)
            self.done += n
            losses += metrics_K2[:, 0].tolist()
        return losses

    def train_steps(self, state: TrainState, source: Any, n_steps: int) -> tuple[TrainState, np.ndarray]:
        """As `Executor.train_steps`."""
        return self.executor.train_steps(state, source, n_steps)


class MicrobatchedSteps(TrainerSteps):
    """The same with microbatches of another size than the machine's tuning says.

    Args:
        microbatch_tokens: about how many tokens a microbatch has; None: all of a device's rows are one microbatch.
    """

    def __init__(self, executor: Executor, tokens_N: np.ndarray, microbatch_tokens: int | None):
        super().__init__(executor, tokens_N)

        def steps(state: TrainState, source: Any, n: Array, ctx: StepContext) -> tuple[TrainState, Array]:
            return train_steps(executor.objective, state, source, n, ctx._replace(microbatch_tokens=microbatch_tokens))

        self._train_steps = executor.compiled(steps, donate=True)

    def train_steps(self, state: TrainState, source: Any, n_steps: int) -> tuple[TrainState, np.ndarray]:
        state, metrics_K2 = self._train_steps(state, source, np.int32(n_steps))
        return state, np.asarray(metrics_K2)[:n_steps]
