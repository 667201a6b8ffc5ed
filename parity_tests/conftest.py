"""JAX is set up for comparisons, PyTorch during these tests only."""

import pytest

from parity_tests.ladder import prepare_jax
from parity_tests.sides import prepare_torch

prepare_jax()


@pytest.fixture(autouse=True)
def _prepared():
    prepare_torch()
    yield
    prepare_torch(False)
