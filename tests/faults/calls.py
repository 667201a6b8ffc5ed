"""The file-system calls of a process: counted, made to fail, or taken as the moment of a kill.

Python announces most calls to audit hooks (PEP 578), and an exception raised there takes the place of the call. `fsync`
and `write` are not announced, so they are wrapped. What a library writes from C++ passes unseen: real limits
(`tests.faults.limits`) are set for that.
"""

import builtins
import errno
import io
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

CALLS = ("open", "write", "fsync", "rename", "mkdir", "remove")  # `open` for writing; `remove` of files and folders
KILL = "kill"
_EVENTS = {
    "os.rename": "rename",
    "os.link": "rename",
    "os.mkdir": "mkdir",
    "os.remove": "remove",
    "os.rmdir": "remove",
}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

Listener = Callable[[str, str], None]
_listener: Listener | None = None
_folder = ""
_hooked = False
_busy = threading.local()


@dataclass(frozen=True)
class Plan:
    """What happens at a call.

    Args:
        folder: only calls on this folder and what lies below it count.
        calls: which of CALLS count.
        nth: the call at which it happens, counted from 1; 0: never, the calls are only counted.
        action: the name of an error, such as "ENOSPC", or KILL.
        lasts: all later calls fail as well, as on a disk that stays full.
    """

    folder: str
    calls: tuple[str, ...] = CALLS
    nth: int = 0
    action: str = "ENOSPC"
    lasts: bool = False


@contextmanager
def planned(plan: Plan) -> Iterator[Counter]:
    """Carries out a plan; yields the counts of each call."""
    counts: Counter = Counter()
    lock = threading.Lock()

    def listener(call: str, path: str) -> None:
        if call not in plan.calls:
            return
        with lock:
            counts[call] += 1
            number = counts.total()
        if plan.nth and (number == plan.nth or (plan.lasts and number > plan.nth)):
            if plan.action == KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            number = getattr(errno, plan.action)
            raise OSError(number, os.strerror(number), path)

    with listening(plan.folder, listener):
        yield counts


@contextmanager
def listening(folder: str, listener: Listener) -> Iterator[None]:
    """Calls `listener(call, path)` before each call of this process on `folder` and what lies below it."""
    global _listener, _folder, _hooked
    if not _hooked:  # an audit hook cannot be removed
        sys.addaudithook(_hook)
        _hooked = True
    _listener, _folder = listener, os.path.realpath(folder)
    fsync, write, opened = os.fsync, os.write, io.open

    def fsync_announced(fd: Any) -> None:
        _announce("fsync", fd if isinstance(fd, int) else fd.fileno())
        fsync(fd)

    def write_announced(fd: int, data: Any) -> int:
        _announce("write", fd)
        return write(fd, data)

    def open_announced(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        f = opened(file, mode, *args, **kwargs)
        return _Written(f) if set(mode) & set("wax+") else f

    of_os = {"fsync": fsync_announced, "fdatasync": fsync_announced, "write": write_announced}
    with mock.patch.multiple(os, **of_os), mock.patch.object(io, "open", open_announced):
        with mock.patch.object(builtins, "open", open_announced):
            try:
                yield
            finally:
                _listener = None


def _hook(event: str, args: tuple) -> None:
    if _listener is None:
        return
    if event == "open":
        if isinstance(args[0], str | bytes) and (args[2] or 0) & _WRITING:
            _announce("open", args[0])
    elif event in _EVENTS:
        _announce(_EVENTS[event], args[1] if event in ("os.rename", "os.link") else args[0])


def _announce(call: str, path: Any) -> None:
    if _listener is None or getattr(_busy, "now", False):
        return
    _busy.now = True  # what the listener does itself is not announced
    try:
        name = _name_of(path)
        if name == _folder or name.startswith(_folder + "/"):
            _listener(call, name)
    finally:
        _busy.now = False


def _name_of(path: Any) -> str:
    """The absolute name of a path or a descriptor; empty for what has none."""
    if isinstance(path, int):
        try:
            return os.readlink(f"/proc/self/fd/{path}")
        except OSError:
            return ""
    folder, name = os.path.split(os.path.abspath(os.fsdecode(path)))
    return os.path.join(os.path.realpath(folder), name)


class _Written:
    """A file whose writes are announced."""

    def __init__(self, file: Any):
        self.__dict__["_file"] = file

    def write(self, data: Any) -> int:
        _announce("write", self._file.fileno())
        return self._file.write(data)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._file, name, value)

    def __enter__(self) -> "_Written":
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._file.__exit__(*error)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)

    def __next__(self) -> Any:
        return next(self._file)
