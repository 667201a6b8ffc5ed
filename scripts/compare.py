"""Train the same model several ways and compare: python scripts/compare.py --optimizer sgd,adamw --preset minigpt

Takes the flags of scripts/train.py, one or more of them with several values, separated by commas (--lr 1e-4,3e-4,1e-3;
--model.tied-head false,true), and trains each combination with the same seed and batches. All but --dataset,
--text-column and --prompt, whose values may themselves hold commas, can be compared.
"""

import sys
from pathlib import Path

from jaxgpt.cli import run_command
from jaxgpt.comparison import compare


def main() -> int:
    return compare(sys.argv[1:], __doc__, [sys.executable, str(Path(__file__).with_name("train.py"))])


if __name__ == "__main__":
    run_command(main)
