"""Loaders: hand the batches of a dispatch to the devices.

`DeviceLoader` keeps the tokens on every device, and sends the starts of the windows. `HostLoader` keeps the tokens on
the host, cuts the windows in a thread ahead of time, and sends them. Both deliver the batches of a `BatchSampler`, so
they train the same model. `ShardLoader` is a `HostLoader` for a corpus in shards. `ExampleLoader` keeps labeled
examples on every device.

A loader has `take(step, n_steps)`, the source of the batches of these steps; `max_steps`, the largest `n_steps`; and
`close()`. The shape of a source does not depend on `n_steps`, so one compiled program serves all.
Axes as in `sampler`.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.data.files import drop_mapped_pages
from jaxgpt.data.sampler import (
    PADDING,
    BatchSampler,
    BatchSource,
    ExampleSampler,
    ExampleSource,
    RowSource,
    ShardSampler,
    TokenSource,
    WindowSource,
    read_windows,
    steps_per_dispatch,
)
from jaxgpt.data.shards import TokenShards
from jaxgpt.errors import UserError

PREFETCH_BYTES = 2**25  # windows that wait in the queue
MAX_HOST_STEPS = 128
MAX_EXAMPLE_STEPS = 256
POLL_SECONDS = 0.1  # how often the thread looks whether it should stop, while the queue is full


class ProcessRows(NamedTuple):
    """The rows of a batch that one of several processes reads."""

    rows: slice
    source: Callable[[np.ndarray], RowSource]  # the windows [K, rows, T + 1] -> all processes' windows


class DeviceLoader:
    """Keeps all tokens on every device; a dispatch receives the starts of its windows.

    Args:
        tokens_N: the training split, fewer than 2**31 tokens.
        put: places an array on the devices.
    """

    def __init__(self, tokens_N: np.ndarray, batch_sampler: BatchSampler, put: Callable[[Any], Any]):
        assert len(tokens_N) < 2**31, "starts are int32"
        self._tokens_N, self._sampler, self._put = put(np.asarray(tokens_N)), batch_sampler, put
        drop_mapped_pages(tokens_N)
        self.max_steps = steps_per_dispatch(batch_sampler.batch_size)

    def take(self, step: int, n_steps: int) -> TokenSource:
        """The batches of `n_steps` steps from `step` on; with 0 steps, a source of the same shape to compile with."""
        start_KB = np.zeros((self.max_steps, self._sampler.batch_size), np.int32)
        # Draws one step even for 0, so that the draw is compiled too.
        start_KB[:n_steps] = self._sampler.starts(step, n_steps or 1)[:n_steps]
        return TokenSource(self._tokens_N, self._put(start_KB))

    def close(self) -> None:
        pass


class HostLoader:
    """Keeps the tokens on the host; a thread cuts the windows of the next steps while the devices work.

    Args:
        tokens_N: the training split, in memory or in a memory-mapped file that is larger than it.
        process_rows: of several processes, which rows of a batch this one reads, and what makes a source of them.
    """

    def __init__(
        self,
        tokens_N: np.ndarray,
        batch_sampler: BatchSampler | ShardSampler,
        process_rows: ProcessRows | None = None,
    ):
        self._tokens_N, self._sampler = tokens_N, batch_sampler
        self._rows = process_rows.rows if process_rows else slice(0, batch_sampler.batch_size)
        self._n_rows = self._rows.stop - self._rows.start
        self._source: Callable[[np.ndarray], BatchSource] = process_rows.source if process_rows else WindowSource
        self._window_size = batch_sampler.block_size + 1
        step_bytes = self._n_rows * self._window_size * tokens_N.dtype.itemsize
        self.max_steps = max(1, min(MAX_HOST_STEPS, PREFETCH_BYTES // step_bytes))
        self._next_step = -1  # the first step in the queue; -1 while no thread fills it
        self._thread: threading.Thread | None = None

    def take(self, step: int, n_steps: int) -> BatchSource:
        """The batches of `n_steps` steps from `step` on, prefetched if these steps follow those of the last call.

        Raises:
            Exception: what the thread raised while it read the tokens.
        """
        shape = (self.max_steps, self._n_rows, self._window_size)
        window_KBT = np.zeros(shape, self._tokens_N.dtype.newbyteorder("="))
        if step != self._next_step:
            self._start(step)
        for k in range(n_steps):
            item = self._queue.get()
            if isinstance(item, BaseException):
                self._next_step = -1
                raise item
            window_KBT[k] = item
        self._next_step = step + n_steps
        return self._source(window_KBT)

    def close(self) -> None:
        """Stops the thread."""
        self._stop_thread()

    def _stop_thread(self) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None

    def _start(self, step: int) -> None:
        self._stop_thread()
        self._queue: queue.Queue = queue.Queue(self.max_steps)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(step, self._queue, self._stop), daemon=True)
        self._thread.start()

    def _batches(self, step: int) -> Iterator[np.ndarray]:
        """The windows [B, T + 1] of each step from `step` on."""
        assert isinstance(self._sampler, BatchSampler)
        batch_starts = (self._sampler.starts(s, 1)[0][self._rows] for s in count(step))
        return read_windows(self._tokens_N, batch_starts, self._sampler.block_size)

    def _fill(self, step: int, windows: queue.Queue, stop: threading.Event) -> None:
        """The thread: puts the windows [B, T + 1] of each step from `step` on into the queue, or an exception."""
        steps = self._batches(step)
        while not stop.is_set():
            try:
                item: Any = next(steps)
            except BaseException as e:
                item = e
            while not stop.is_set():
                try:
                    windows.put(item, timeout=POLL_SECONDS)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return


class ShardLoader(HostLoader):
    """A `HostLoader` of a corpus in shards.

    Args:
        shards: of the corpus; `close` closes them, too.
        shard_sampler: which cuts the rows of this process alone.
        process_rows: as of `HostLoader`.
    """

    def __init__(self, shards: TokenShards, shard_sampler: ShardSampler, process_rows: ProcessRows | None = None):
        super().__init__(np.zeros(0, shards.dtype), shard_sampler, process_rows)
        self._shards = shards

    def _batches(self, step: int) -> Iterator[np.ndarray]:
        assert isinstance(self._sampler, ShardSampler)
        return self._sampler.batches(step)

    def close(self) -> None:
        self._shards.close()  # first: the thread may wait for a shard
        super().close()


class ExampleLoader:
    """Keeps all labeled examples on every device; a dispatch receives the numbers of its examples.

    Args:
        idx_NT: encoded texts, int32, padded with PADDING.
        label_N: their classes, int32.
        put: places an array on the devices.
    """

    max_steps = MAX_EXAMPLE_STEPS

    def __init__(
        self, idx_NT: np.ndarray, label_N: np.ndarray, example_sampler: ExampleSampler, put: Callable[[Any], Any]
    ):
        self._idx_NT, self._label_N, self._sampler, self._put = put(idx_NT), put(label_N), example_sampler, put

    def take(self, step: int, n_steps: int) -> ExampleSource:
        """The batches of `n_steps` steps from `step` on."""
        row_KB = np.full((self.max_steps, self._sampler.batch_size), PADDING, np.int32)
        for k in range(n_steps):
            row_KB[k] = self._sampler.rows(step + k)
        return ExampleSource(self._idx_NT, self._label_N, self._put(row_KB))

    def close(self) -> None:
        pass


Loader = DeviceLoader | HostLoader | ExampleLoader


def make_loader(
    tokens_N: np.ndarray,
    batch_sampler: BatchSampler,
    put: Callable[[Any], Any],
    device_bytes: int,
    where: str,
    process_rows: ProcessRows | None = None,
) -> DeviceLoader | HostLoader:
    """The loader for `--loader`.

    Args:
        tokens_N: the training split.
        put: places an array on the devices.
        device_bytes: the memory of a device that tokens may take.
        where: "device", "host", or "auto": the device if the tokens fit there, and this process has all rows.
        process_rows: as of `HostLoader`.

    Raises:
        UserError: "device" is given, and there are more tokens than int32 can number.
    """
    if where == "auto":
        fits = tokens_N.nbytes <= device_bytes and len(tokens_N) < 2**31
        where = "device" if fits and process_rows is None else "host"
    if where == "device" and len(tokens_N) >= 2**31:
        raise UserError(f"--loader device: {len(tokens_N):,} tokens are more than it can number; leave it out")
    if where == "device":
        return DeviceLoader(tokens_N, batch_sampler, put)
    return HostLoader(tokens_N, batch_sampler, process_rows)
