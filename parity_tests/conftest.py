"""PyTorch is set up for comparisons during these tests only."""

import jax
import pytest

from parity_tests.rungs.devices import N_DEVICES
from parity_tests.sides import prepare_torch

jax.config.update("jax_num_cpu_devices", N_DEVICES)
jax.config.update("jax_enable_compilation_cache", False)  # what is compared is what is compiled here


@pytest.fixture(autouse=True)
def _prepared():
    prepare_torch()
    yield
    prepare_torch(False)
