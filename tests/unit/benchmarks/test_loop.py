import numpy as np
import pytest

from benchmarks.loop import overhead


def test_overhead_is_taken_over_the_bare_steps_beside_each_interval():
    """By hand: a machine that halves its speed on the way makes no difference."""
    intervals = [
        {"steps": 10, "seconds": 1.0, "parts": {"steps": 1.0}},
        {"steps": 10, "seconds": 3.4, "parts": {"steps": 1.5, "once": 1.4, "evaluation": 0.3}},
        {"steps": 10, "seconds": 2.6, "parts": {"steps": 2.2, "checkpoints": 0.2, "records": 0.1}},
    ]
    found = overhead(intervals, [0.1, 0.2])  # the bare steps would have taken 1, 1.5 and 2 s
    assert found["overhead"] == pytest.approx((7.0 - 1.4) / 4.5 - 1)
    assert found["shares"] == {
        "evaluation": pytest.approx(0.3 / 4.5),
        "checkpoints": pytest.approx(0.2 / 4.5),
        "records": pytest.approx(0.1 / 4.5),
        "dispatches": pytest.approx(0.2 / 4.5),
        "rest": pytest.approx(0.3 / 4.5),
    }
    assert (found["once_s"], found["bare_ms"], found["turns"]) == (1.4, pytest.approx(150), 3)
    off = np.array([1, 1.5, 2.2]) - 4.7 / 4.5 * np.array([1, 1.5, 2])  # of a step that is slower by the same everywhere
    assert found["error"] == pytest.approx((off @ off * 3 / 2) ** 0.5 / 4.5)
