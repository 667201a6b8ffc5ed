"""The display of a training run: a progress bar on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from typing import Any

from jaxgpt.callbacks import Callback
from jaxgpt.environment import output_errors

QUIET_SECONDS = 20.0  # where there is no terminal: the longest time between two lines


class ProgressDisplay(Callback):
    """Displays a training run. `line` works at any time; `on_train_begin` starts the bar and `close` removes it.

    Where standard output cannot be written, `line` raises `BrokenPipeError` or `OutputError`, once.

    Args:
        prints: if False, it displays nothing: of several processes one speaks for all.
    """

    def __init__(self, prints: bool = True):
        self._prints = prints
        self._bar = None
        self._last_line = time.monotonic()

    def line(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        self._last_line = time.monotonic()
        if not self._prints:
            return
        with output_errors():
            if self._bar is not None:
                self._bar.console.print(text, markup=False, highlight=False)
            else:
                print(text, flush=True)

    def on_train_begin(self, step: int, n_steps: int) -> None:
        self._total = n_steps
        if not (self._prints and sys.stdout.isatty()):
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
        )
        self._task = self._bar.add_task("", total=n_steps, completed=step, status="")
        self._val_loss = ""
        self._bar.start()

    def on_dispatch(self, step: int, loss: float, tokens_per_s: float) -> None:
        if self._bar is not None:
            status = f"loss {loss:.3f}{self._val_loss}  {tokens_per_s:,.0f} tokens/s"
            self._bar.update(self._task, completed=step, status=status)
        elif time.monotonic() - self._last_line > QUIET_SECONDS:
            number = str(step - 1).zfill(len(str(self._total)))
            self.line(f"step {number}  train loss {loss:.3f}  {tokens_per_s:,.0f} tokens/s")

    def on_report(self, report: dict[str, Any], line: str) -> None:
        self._val_loss = f"  val {report['val_loss']:.3f}"
        if self._bar is not None:
            self.on_dispatch(report["step"] + 1, report["train_loss"], report["tokens_per_s"])
        self.line(line)

    def on_train_end(self, step: int) -> None:
        self.close()

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            bar, self._bar = self._bar, None
            with contextlib.suppress(OSError):  # the terminal has gone
                bar.stop()
