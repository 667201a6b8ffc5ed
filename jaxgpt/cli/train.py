"""Train a GPT: jaxgpt train --dataset tinyshakespeare"""

import dataclasses
import time

from jaxgpt.cli.args import TrainFlags, config_of, parse_train_flags
from jaxgpt.signals import warning_signals


def main(args: list[str], started: float | None = None) -> int:
    """Runs the command; `started` is `time.perf_counter()` at its start."""
    started = time.perf_counter() if started is None else started
    flags = parse_train_flags(args, __doc__, "jaxgpt train")
    with warning_signals():
        if not flags.distributed:
            return _train(flags, started)
        from jaxgpt import distributed, parallel

        with distributed.joined(flags):
            parallel.use_cores_as_devices()  # before JAX is asked for the number of this process
            distributed.connect()
            return _train(flags, started, prints=distributed.is_first())


def _train(flags: TrainFlags, started: float, prints: bool = True) -> int:
    # Imported here, and jax last: bad flags and missing data are reported without waiting for these imports.
    from jaxgpt.data.corpora import load_corpus, streaming_of_run
    from jaxgpt.progress import ProgressDisplay
    from jaxgpt.runs.run_dir import recorded_choice, recorded_dataset

    display = ProgressDisplay(prints)
    spec = recorded_choice(flags.out_dir, flags.dataset)
    recorded = None if flags.overwrite else recorded_dataset(flags.out_dir)
    streaming = streaming_of_run(recorded, flags.streaming) if recorded else flags.streaming
    corpus = load_corpus(spec, flags.data_dir, display.line, flags.text_column, streaming)
    from jaxgpt.tasks.language_modeling import train

    config = dataclasses.replace(config_of(flags), dataset=corpus.name)
    rest = (display, started, flags.data_dir, flags.loader, flags.summary)
    return train(config, corpus, flags.out_dir, flags.overwrite, *rest, flags, flags.mesh, flags.init_from)
