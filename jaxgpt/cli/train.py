"""Train a GPT: jaxgpt train --dataset tinyshakespeare"""

import time

from jaxgpt.cli.args import TrainFlags, config_of, given_flags, parse_train_flags
from jaxgpt.signals import warning_signals


def main(args: list[str], started: float | None = None) -> int:
    """Runs the command; `started` is `time.perf_counter()` at its start."""
    started = time.perf_counter() if started is None else started
    flags = parse_train_flags(args, __doc__, "jaxgpt train")
    with warning_signals():
        if not flags.distributed:
            return _train(flags, args, started)
        from jaxgpt import distributed, parallel

        with distributed.joined(flags):
            parallel.use_cores_as_devices()  # before JAX is asked for the number of this process
            distributed.connect()
            return _train(flags, args, started, prints=distributed.is_first())


def _train(flags: TrainFlags, args: list[str], started: float, prints: bool = True) -> int:
    # Imported here: bad flags are reported without waiting for these imports.
    from jaxgpt.api import train_or_resume
    from jaxgpt.progress import ProgressDisplay

    _, code = train_or_resume(
        config_of(flags),
        flags.out_dir,
        flags.data_dir,
        flags.overwrite,
        ProgressDisplay(prints),
        started,
        loader=flags.loader,
        summarise=flags.summary,
        policy=flags,
        mesh=flags.mesh,
        init_from=flags.init_from,
        given=given_flags(args),
    )
    return code
