"""Where the batches of a dispatch come from: tokens on the device, or windows cut on the host ahead of time.

Both give step s the same batch, a function of (seed, s), whatever was taken before.
"""

import queue
import threading
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np

from jaxgpt.batches import Order, Resident, Streamed, read_windows, steps_at_once
from jaxgpt.errors import UserError
from jaxgpt.parallel import Executor
from jaxgpt.tokens import release

BYTES_AHEAD = 2**25  # of windows on their way to the device


class DeviceLoader:
    """Tokens whole on every device; a dispatch brings only the windows' starts.

    Args:
        put: places an array on the devices.
    """

    def __init__(self, tokens_N: np.ndarray, order: Order, put: Callable[[Any], Any]):
        assert len(tokens_N) < 2**31, "int32 starts"
        self._tokens_N, self._order, self._put = put(np.asarray(tokens_N)), order, put
        release(tokens_N)
        self.max_steps = steps_at_once(order.batch_size)

    def take(self, step: int, n_steps: int) -> Resident:
        """The batches of `n_steps` steps from `step` on; always of the same shape, so that one program serves all."""
        start_KB = np.zeros((self.max_steps, self._order.batch_size), np.int32)
        start_KB[:n_steps] = self._order.starts(step, n_steps or 1)[:n_steps]  # with 0 steps it compiles
        return Resident(self._tokens_N, self._put(start_KB))

    def close(self) -> None:
        pass


class HostLoader:
    """Tokens anywhere on the host, memory-mapped for instance: a thread cuts the windows of the steps to come."""

    def __init__(self, tokens_N: np.ndarray, order: Order):
        self._tokens_N, self._order = tokens_N, order
        self._window = order.block_size + 1
        step_bytes = order.batch_size * self._window * tokens_N.dtype.itemsize
        self.max_steps = max(1, min(128, BYTES_AHEAD // step_bytes))
        self._next = -1  # the step that the queue holds next
        self._thread: threading.Thread | None = None

    def take(self, step: int, n_steps: int) -> Streamed:
        """As `DeviceLoader.take`; steps in a row come without a wait if the device is the slower part."""
        shape = (self.max_steps, self._order.batch_size, self._window)
        window_KBT = np.zeros(shape, self._tokens_N.dtype.newbyteorder("="))
        if step != self._next:
            self._start(step)
        for k in range(n_steps):
            item = self._queue.get()
            if isinstance(item, BaseException):
                self._next = -1  # its thread has ended
                raise item
            window_KBT[k] = item
        self._next = step + n_steps
        return Streamed(window_KBT)

    def close(self) -> None:
        """Ends the thread."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None

    def _start(self, step: int) -> None:
        self.close()
        self._queue: queue.Queue = queue.Queue(self.max_steps)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._cut, args=(step, self._queue, self._stop), daemon=True)
        self._thread.start()

    def _cut(self, step: int, ahead: queue.Queue, stop: threading.Event) -> None:
        batch_starts = (self._order.starts(s, 1)[0] for s in count(step))
        steps = read_windows(self._tokens_N, batch_starts, self._order.block_size)
        while not stop.is_set():
            try:
                item: Any = next(steps)
            except BaseException as e:
                item = e
            while not stop.is_set():
                try:
                    ahead.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return


Loader = DeviceLoader | HostLoader


def make_loader(tokens_N: np.ndarray, order: Order, executor: Executor, where: str) -> Loader:
    """The loader that is asked for: "device", "host", or "auto", which takes the host if the tokens are many.

    Raises:
        UserError: more tokens than "device" can number.
    """
    if where == "auto":
        where = "device" if tokens_N.nbytes <= executor.bytes_for_tokens and len(tokens_N) < 2**31 else "host"
    if where == "device" and len(tokens_N) >= 2**31:
        raise UserError(f"--loader device: {len(tokens_N):,} tokens are more than it can number; leave it out")
    return DeviceLoader(tokens_N, order, executor.put) if where == "device" else HostLoader(tokens_N, order)
