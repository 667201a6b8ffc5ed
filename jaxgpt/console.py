"""What a person sees while a run trains: a progress bar on a terminal, plain lines elsewhere."""

import signal
import sys
import time
from collections.abc import Callable
from typing import Any

HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)  # not every system has it
STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, HANGUP}
QUIET_SECONDS = 20.0  # elsewhere than on a terminal: a line at least this often


def handle_stop_signals(handler: Callable[[int, Any], None]) -> dict[int, Any]:
    """Has the signals that stop a run call a handler; but not a hang-up that is ignored, as under nohup.

    Returns:
        Each signal's handler before.
    """
    ignored = {HANGUP} if signal.getsignal(HANGUP) == signal.SIG_IGN else set()
    return {number: signal.signal(number, handler) for number in STOP_SIGNALS - ignored}


class Display:
    """Shows a training run. `line` may be used at any time; `start` .. `close` enclose the bar."""

    def __init__(self):
        self._bar = None
        self._last_line = time.monotonic()

    def line(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        self._last_line = time.monotonic()
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def start(self, done: int, total: int) -> None:
        """Begins to show progress at `done` of `total` updates."""
        self._total = total
        if not sys.stdout.isatty():
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
        )
        self._task = self._bar.add_task("", total=total, completed=done, status="")
        self._val_loss = ""
        self._bar.start()

    def progress(self, done: int, loss: float, tokens_per_s: float) -> None:
        """The last training loss and the speed after `done` updates."""
        if self._bar is not None:
            status = f"loss {loss:.3f}{self._val_loss}  {tokens_per_s:,.0f} tokens/s"
            self._bar.update(self._task, completed=done, status=status)
        elif time.monotonic() - self._last_line > QUIET_SECONDS:
            step = str(done - 1).zfill(len(str(self._total)))
            self.line(f"step {step}  train loss {loss:.3f}  {tokens_per_s:,.0f} tokens/s")

    def report(self, report: dict[str, Any], line: str) -> None:
        """A line of metrics.jsonl, and the same for a person."""
        self._val_loss = f"  val {report['val_loss']:.3f}"
        if self._bar is not None:
            self.progress(report["step"] + 1, report["train_loss"], report["tokens_per_s"])
        self.line(line)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
