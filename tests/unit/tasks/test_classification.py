"""Precision, recall and F1 of a classifier."""

import math

import numpy as np
import pytest

from jaxgpt.tasks.classification import scores


def test_scores_of_a_confusion():
    result = scores(np.array([[8, 2, 0], [1, 4, 0], [0, 0, 0]]))
    assert result.accuracy == pytest.approx(12 / 15) and result.support == [10, 5, 0]
    assert result.precision[:2] == pytest.approx([8 / 9, 4 / 6]) and result.recall[:2] == pytest.approx([0.8, 0.8])
    assert result.f1[0] == pytest.approx(16 / 19) and math.isnan(result.precision[2]) and math.isnan(result.recall[2])
