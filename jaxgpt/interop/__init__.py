"""Weights to and from PyTorch: tensor names, safetensors files, import and export of runs."""
