"""Weights from PyTorch and to PyTorch: python scripts/convert.py import | export ..."""

from jaxgpt.cli.main import script

if __name__ == "__main__":
    script("convert")
