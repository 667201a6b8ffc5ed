"""Train a GPT: python scripts/train.py --dataset tinyshakespeare"""

import time

STARTED = time.perf_counter()

import dataclasses  # noqa: E402  (the clock of "time to the first step" starts before the imports)
import sys  # noqa: E402

from jaxgpt.cli import config_of, parse_train_flags, run_command  # noqa: E402


def main() -> int:
    flags = parse_train_flags(sys.argv[1:], __doc__)
    # Imported here, and jax last: after what can be refused without them.
    from jaxgpt.console import Display
    from jaxgpt.datasets import load_corpus
    from jaxgpt.run_folder import recorded_choice

    display = Display()
    spec = recorded_choice(flags.out_dir, flags.dataset)
    corpus = load_corpus(spec, flags.data_dir, display.line, flags.text_column)
    from jaxgpt.language_model import train

    config = dataclasses.replace(config_of(flags), dataset=corpus.name)
    rest = (display, STARTED, flags.data_dir, flags.loader, flags.summary)
    return train(config, corpus, flags.out_dir, flags.overwrite, *rest)


if __name__ == "__main__":
    run_command(main)
