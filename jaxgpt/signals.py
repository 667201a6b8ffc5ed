"""Signals that stop a run: SIGINT, SIGTERM and SIGHUP."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has no SIGHUP
STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, HANGUP}


def handle_stop_signals(handler: Callable[[int, Any], None]) -> dict[int, Any]:
    """Installs a handler for the stop signals, except for a SIGHUP that is ignored, as under nohup.

    Returns:
        The previous handler of each signal.
    """
    ignored = {HANGUP} if signal.getsignal(HANGUP) == signal.SIG_IGN else set()
    return {number: signal.signal(number, handler) for number in STOP_SIGNALS - ignored}


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
