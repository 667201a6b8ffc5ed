from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import alternating
from jaxgpt.errors import UserError


class Fake:
    """A contender with a given time per step, which writes down when it runs."""

    def __init__(self, name, seconds, log):
        self.name, self.seconds, self.log = name, seconds, log
        self.step_seconds, self.losses = [], []

    def run(self, n_steps):
        self.log.append((self.name, n_steps))
        return self.seconds


def test_contenders_compute_one_after_the_other_for_about_the_same_time():
    log = []
    contenders = [Fake("a", 0.1, log), Fake("b", 0.25, log)]
    alternating.measure_alternately(contenders, SimpleNamespace(rounds=2, turn_seconds=1.0), "label")
    assert log == [("a", 2), ("a", 3), ("b", 2), ("b", 3)] + 2 * [("a", 10), ("b", 4)]
    assert [contender.step_seconds for contender in contenders] == [[0.1, 0.1], [0.25, 0.25]]


def test_a_round_has_at_least_one_step():
    assert alternating.steps_per_round(Fake("a", 10.0, []), 1.0) == 1


def test_losses_that_differ_or_are_no_numbers_win_nothing():
    ours = SimpleNamespace(losses=[4.0, 3.0], step_seconds=[9.0, 1.0, 2.0])
    other = SimpleNamespace(implementation="compile", losses=[4.0, 3.00001], step_seconds=[2.0, 3.0])
    found = alternating.compare(ours, 1, other, "float32")
    assert found == {"ratio": 1.75, "loss_gap": pytest.approx(1 / 300_000, rel=1e-3)}
    for losses in ([4.0, 3.01], [4.0, float("nan")]):
        other.losses = losses
        with pytest.raises(UserError, match="--sides compile"):
            alternating.compare(ours, 1, other, "float32")


def test_random_tokens_have_something_to_learn():
    tokens_N = alternating.random_tokens(65).astype(int)
    follows = tokens_N[1:] == (7 * tokens_N[:-1] + 3) % 65
    assert tokens_N.min() == 0 and tokens_N.max() == 64 and 0.5 < follows.mean() < 0.6
    assert np.array_equal(tokens_N, alternating.random_tokens(65))
