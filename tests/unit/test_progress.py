"""A line that cannot be printed."""

import errno
import sys

import pytest

from jaxgpt.errors import OutputError
from jaxgpt.progress import ProgressDisplay


class Broken:
    """A standard output whose writes fail, and that has no descriptor."""

    def __init__(self, number):
        self.number = number

    def write(self, text):
        raise OSError(self.number, "failed")

    def flush(self):
        pass

    def fileno(self):
        raise OSError


@pytest.mark.parametrize("number, kind", [(errno.EPIPE, BrokenPipeError), (errno.ENOSPC, OutputError)])
def test_a_line_that_cannot_be_printed(monkeypatch, number, kind):
    monkeypatch.setattr(sys, "stdout", Broken(number))
    with pytest.raises(kind, match="failed"):
        ProgressDisplay().line("a line")


def test_it_is_reported_once(monkeypatch):
    """The rest of the output is discarded, so that the interpreter's last flush does not fail either."""
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(OutputError, match="standard output: cannot be written .No space left on device."):
            ProgressDisplay().line("a line")
        ProgressDisplay().line("another")


def test_a_terminal_that_has_gone(monkeypatch):
    class Bar:
        def stop(self):
            raise OSError(errno.EIO, "no terminal")

    display = ProgressDisplay()
    monkeypatch.setattr(display, "_bar", Bar())
    display.close()
    assert display._bar is None
