"""Train a GPT: python scripts/train.py --dataset tinyshakespeare"""

from jaxgpt.cli.main import script

if __name__ == "__main__":
    script("train")
