"""A Flax (NNX) GPT trainer that is held equal to PyTorch. Importing this package imports no jax."""

__version__ = "0.1.0"
