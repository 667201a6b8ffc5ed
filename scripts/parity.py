"""Hold this machine's JAX side against PyTorch: python scripts/parity.py"""

from jaxgpt.cli.main import script

if __name__ == "__main__":
    script("parity")
