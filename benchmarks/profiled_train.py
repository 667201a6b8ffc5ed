"""`jaxgpt train` with a profiler around the parts of its loop, started by `jaxgpt bench --loop`.

The process stops itself (SIGSTOP) after each dispatch that completes an interval, background threads included, until
it is continued; the profiler's clock stands still meanwhile. It stops once more at the loop's end.
Arguments: the file to write, an interval's seconds, and those of `jaxgpt train`.
"""

import functools
import json
import math
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxgpt.cli.main import script


class LoopProfiler:
    """Seconds by part of the loop, interval by interval, from the first step to the last checkpoint on the disk.

    Args:
        path: the file that the intervals are written to, as JSON.
        interval_seconds: about how long an interval is.
    """

    def __init__(self, path: Path, interval_seconds: float):
        self.path, self.interval_seconds = path, interval_seconds
        self.intervals: list[dict[str, Any]] = []
        self.stopped_s = 0.0  # how long this process was stopped
        self.begun = math.nan  # of this interval; only while it is active
        self.active = False  # between the first step and the last checkpoint
        self.seen: set[str] = set()

    def now(self) -> float:
        """Seconds of a clock that stands still while the process is stopped."""
        return time.perf_counter() - self.stopped_s

    def begin(self) -> None:
        self.active, self.begun, self.steps, self.parts = True, self.now(), 0, defaultdict(float)

    def end(self) -> None:
        self.intervals.append({"steps": self.steps, "seconds": self.now() - self.begun, "parts": self.parts})
        self.active = False

    def instrument(self, owner: Any, name: str, part_of: Callable[..., str]) -> None:
        """Replaces a function of a module or class by one that adds its time to a part.

        Args:
            part_of: the function's arguments -> the part's name.
        """
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            part = part_of(*args, **kwargs)
            if part == "steps" and not self.active and not self.intervals:
                self.begin()
            begun = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                if self.active:
                    # The first evaluation is compiled and the first checkpoint sets orbax up: once in a run.
                    first = part in ("evaluation", "checkpoints") and part not in self.seen
                    self.seen.add(part)
                    self.parts["once" if first else part] += self.now() - begun

        setattr(owner, name, timed)

    def on_dispatch(self, n_steps: int) -> None:
        """Ends the interval if its time is over, or if this was the very first dispatch."""
        self.steps += n_steps
        if not self.intervals or self.now() - self.begun > self.interval_seconds:
            self.end()
            stopped = time.perf_counter()
            os.kill(os.getpid(), signal.SIGSTOP)
            self.stopped_s += time.perf_counter() - stopped
            self.begin()

    def on_train_end(self) -> None:
        """Writes the intervals; the rest of the run waits to be continued."""
        self.end()
        self.path.write_text(json.dumps(self.intervals))
        os.kill(os.getpid(), signal.SIGSTOP)


def main() -> None:
    path, interval_seconds, *arguments = sys.argv[1:]
    from jaxgpt.parallel import Executor
    from jaxgpt.runs.checkpoint import Checkpoints
    from jaxgpt.runs.run_dir import RunDir
    from jaxgpt.tasks.language_modeling import LanguageModelingTask
    from jaxgpt.trainer import Trainer

    profiler = LoopProfiler(Path(path), float(interval_seconds))
    profiler.instrument(Executor, "train_steps", lambda self, state, source, n: "steps" if n else "compiling")
    profiler.instrument(
        LanguageModelingTask,
        "validate",
        # The trainer evaluates one batch before it saves a state, to be sure that it is finite.
        lambda self, params, step, n_batches=None: "checkpoints" if n_batches == 1 else "evaluation",
    )
    for owner, name, part in (
        (Checkpoints, "save", "checkpoints"),
        (Trainer, "_require_finite_state", "checkpoints"),
        (Trainer, "_finish_saves", "checkpoints"),
        (RunDir, "append_steps", "records"),
        (RunDir, "append", "records"),
    ):
        profiler.instrument(owner, name, lambda *args, part=part, **kwargs: part)
    timed_append, timed_finish = RunDir.append_steps, Trainer._finish_saves

    def append_steps(self: RunDir, rows: list[Any]) -> None:
        timed_append(self, rows)
        profiler.on_dispatch(len(rows))

    def finish_saves(self: Trainer) -> None:
        timed_finish(self)
        profiler.on_train_end()

    RunDir.append_steps, Trainer._finish_saves = append_steps, finish_saves
    sys.argv = ["jaxgpt train", *arguments]
    script("train")


if __name__ == "__main__":
    main()
