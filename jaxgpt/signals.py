"""Signals during a training: those that stop it, and the warnings that a scheduler sends before it stops it."""

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has no SIGHUP
STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, HANGUP}
# SLURM's --signal=USR1@120 sends the first two minutes before the time limit. Windows has neither.
WARNING_SIGNALS = {getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name)}


def exit_code(received: Sequence[int]) -> int:
    """The exit code of a training that signals have stopped: 128 + the first stop signal, 0 after warnings alone."""
    return next((128 + number for number in received if number not in WARNING_SIGNALS), 0)


def handle_stop_signals(handler: Callable[[int, Any], None]) -> dict[int, Any]:
    """Installs a handler for the stop signals, except for a SIGHUP that is ignored, as under nohup.

    Returns:
        The previous handler of each signal.
    """
    ignored = {HANGUP} if signal.getsignal(HANGUP) == signal.SIG_IGN else set()
    return {number: signal.signal(number, handler) for number in STOP_SIGNALS - ignored}


def handle_warning_signals(handler: Callable[[int, Any], None]) -> dict[int, Any]:
    """Installs a handler for the warning signals; returns the previous ones."""
    return {number: signal.signal(number, handler) for number in WARNING_SIGNALS}


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yields a list that collects the first stop signal; a second one acts as it would without this context."""
    received: list[int] = []
    before: dict[int, Any] = {}

    def handle(number: int, _frame: Any) -> None:
        received.append(number)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before |= handle_stop_signals(handle)
    try:
        yield received
    finally:
        restore()


class _Collector:
    """A handler that collects signals."""

    def __init__(self):
        self.received: list[int] = []

    def __call__(self, number: int, _frame: Any) -> None:
        self.received.append(number)


@contextlib.contextmanager
def warning_signals() -> Iterator[list[int]]:
    """Yields a list that collects every warning signal; within another such context, the list of that one.

    A command enters it at its start and the trainer again, so that a warning during the preparation waits.
    """
    outer = {signal.getsignal(number) for number in WARNING_SIGNALS}
    collector = next((handler for handler in outer if isinstance(handler, _Collector)), _Collector())
    before = handle_warning_signals(collector)
    try:
        _mask_warning_signals("SIG_UNBLOCK")  # of a process that was started in `warning_signals_held`
        yield collector.received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def warning_signals_held() -> Iterator[None]:
    """Holds warning signals back: from a process started within, until it enters `warning_signals`."""
    _mask_warning_signals("SIG_BLOCK")
    try:
        yield
    finally:
        _mask_warning_signals("SIG_UNBLOCK")


def _mask_warning_signals(how: str) -> None:
    if WARNING_SIGNALS:
        signal.pthread_sigmask(getattr(signal, how), WARNING_SIGNALS)
