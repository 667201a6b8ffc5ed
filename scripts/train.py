"""Train a GPT: python scripts/train.py --dataset tinyshakespeare"""

import time

STARTED = time.perf_counter()

import dataclasses  # noqa: E402  (the clock of "time to the first step" starts before the imports)
import sys  # noqa: E402

from jaxgpt.cli import parse_train_flags, run_command  # noqa: E402
from jaxgpt.console import Display  # noqa: E402
from jaxgpt.datasets import load_corpus  # noqa: E402


def main() -> int:
    flags = parse_train_flags(sys.argv[1:], __doc__)
    display = Display()
    corpus = load_corpus(flags.dataset, flags.data_dir, display.line)
    from jaxgpt.trainer import train  # imports jax: after what can be refused without it

    config = dataclasses.replace(flags.config, dataset=corpus.name)
    return train(config, corpus, flags.out_dir, flags.overwrite, display, STARTED)


if __name__ == "__main__":
    run_command(main)
