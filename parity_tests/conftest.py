"""PyTorch is set up for comparisons during these tests only."""

import pytest

from parity_tests.sides import prepare_torch


@pytest.fixture(autouse=True)
def _prepared():
    prepare_torch()
    yield
    prepare_torch(False)
