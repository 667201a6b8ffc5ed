"""JAX is set up for comparisons, PyTorch during these tests only."""

import pytest
import torch

from jaxgpt.parity.torch_side import prepare_torch
from parity_tests.suite import prepare_jax

prepare_jax()


@pytest.fixture(autouse=True)
def _prepared():
    """One thread, as in the suite's processes: the models are too small for more."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    prepare_torch()
    yield
    prepare_torch(False)
    torch.set_num_threads(n_threads)
