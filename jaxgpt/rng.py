"""Random streams: every random number is a function of the run's seed, the purpose it serves, and the step.

So a resumed run draws what an uninterrupted one would, on any number of devices.
"""

import jax
from jax import Array

# One number for each purpose. A stream's key depends on the seed and on this number alone.
INIT, TRAIN, VALIDATION, DROPOUT, SAMPLE, EXAMPLES = range(6)


def stream_key(seed: int, stream: int) -> Array:
    """The key of one random stream. The generator is named, so a change of JAX's default changes no run."""
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), stream)


def row_keys(seed: int, step: Array, row_B: Array) -> Array:
    """The dropout keys [B] of a step's rows: each row of the global batch has its own, whatever device it is on."""
    step_key = jax.random.fold_in(stream_key(seed, DROPOUT), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(step_key, row_B)
