"""Compile the training step for accelerators that are not here: python scripts/plan.py --preset gpt2 --target v5e:4x4"""

from jaxgpt.cli.main import script

if __name__ == "__main__":
    script("plan")
