"""Compile the training step for accelerators that are not here: python scripts/plan.py --target v5e:2x2"""

from jaxgpt.cli.main import script

if __name__ == "__main__":
    script("plan")
