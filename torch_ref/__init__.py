"""The documented loop in plain PyTorch: the reference that `jaxgpt` is held against. Imports no jax."""
