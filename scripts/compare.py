"""Train the same model several ways and compare: python scripts/compare.py --optimizer sgd,adamw"""

from jaxgpt.cli.main import script

if __name__ == "__main__":
    script("compare")
