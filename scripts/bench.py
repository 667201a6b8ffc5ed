"""Time a training step against PyTorch on this machine: python scripts/bench.py"""

from jaxgpt.cli.main import script

if __name__ == "__main__":
    script("bench")
