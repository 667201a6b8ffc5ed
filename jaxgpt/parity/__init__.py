"""Parity of any JAX model with any PyTorch model."""
