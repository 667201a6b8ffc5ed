"""scripts/train.py with a clock around the parts of its loop, started by scripts/bench.py --loop.

After each dispatch that ends its turn it stops itself, threads in the background and all (SIGSTOP), until it is
continued; the clock stands still meanwhile. At the loop's end it does so once more.
Arguments: the file to write, a turn's seconds, and train.py's own.
"""

import functools
import json
import os
import runpy
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

TRAIN = Path(__file__).resolve().parents[1] / "train.py"


class Watch:
    """Seconds by part of the loop, turn by turn, from the first step to the last checkpoint on the disk."""

    def __init__(self, path: Path, turn_seconds: float):
        self.path, self.turn_seconds = path, turn_seconds
        self.turns: list[dict[str, Any]] = []
        self.stood = 0.0  # seconds that this process was stopped for
        self.begun: float | None = None  # of this turn; None before the first step and after the last
        self.seen: set[str] = set()

    def now(self) -> float:
        return time.perf_counter() - self.stood

    def begin(self) -> None:
        self.begun, self.steps, self.parts = self.now(), 0, defaultdict(float)

    def end(self) -> None:
        turn = {"steps": self.steps, "seconds": self.now() - self.begun, "parts": self.parts}
        self.turns.append(turn)
        self.begun = None

    def around(self, owner: Any, name: str, part_of: Callable[..., str]) -> None:
        """Puts the clock around a function of a module or class."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            part = part_of(*args, **kwargs)
            if part == "steps" and self.begun is None and not self.turns:
                self.begin()
            begun = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                if self.begun is not None:
                    # The first evaluation is compiled and the first checkpoint sets orbax up: once in a run.
                    first = part in ("evaluation", "checkpoints") and part not in self.seen
                    self.seen.add(part)
                    self.parts["once" if first else part] += self.now() - begun

        setattr(owner, name, watched)

    def dispatched(self, n_steps: int) -> None:
        """The end of a dispatch, and of the turn if its time is over, or if it was the very first."""
        self.steps += n_steps
        if not self.turns or self.now() - self.begun > self.turn_seconds:
            self.end()
            stopped = time.perf_counter()
            os.kill(os.getpid(), signal.SIGSTOP)
            self.stood += time.perf_counter() - stopped
            self.begin()

    def finished(self) -> None:
        """The end of the loop: what was measured is written, and the rest of the run waits to be continued."""
        self.end()
        self.path.write_text(json.dumps(self.turns))
        os.kill(os.getpid(), signal.SIGSTOP)


def main() -> None:
    path, turn_seconds, *arguments = sys.argv[1:]
    from jaxgpt import checkpoint
    from jaxgpt.language_model import LanguageModel
    from jaxgpt.parallel import Executor
    from jaxgpt.run_folder import RunFolder

    watch = Watch(Path(path), float(turn_seconds))
    watch.around(Executor, "updates", lambda self, state, feed, n_steps: "steps" if n_steps else "compiling")
    watch.around(
        LanguageModel,
        "validate",
        # Of one batch: the trainer looks at a state before it keeps it.
        lambda self, params, step, n_batches=None: "checkpoints" if n_batches == 1 else "evaluation",
    )
    for owner, name, part in (
        (checkpoint, "save", "checkpoints"),
        (checkpoint, "wait", "checkpoints"),
        (RunFolder, "flush", "checkpoints"),
        (RunFolder, "append_steps", "records"),
        (RunFolder, "append", "records"),
    ):
        watch.around(owner, name, lambda *args, part=part, **kwargs: part)
    recorded, waited = RunFolder.append_steps, checkpoint.wait

    def append_steps(self: RunFolder, rows: list[Any]) -> None:
        recorded(self, rows)
        watch.dispatched(len(rows))

    def wait(manager: Any) -> None:
        waited(manager)
        watch.finished()

    RunFolder.append_steps, checkpoint.wait = append_steps, wait
    sys.argv = [str(TRAIN), *arguments]
    runpy.run_path(str(TRAIN), run_name="__main__")


if __name__ == "__main__":
    main()
