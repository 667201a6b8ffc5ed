"""What the system refuses, in a sentence."""

import errno
import io

import pytest

from jaxgpt import environment
from jaxgpt.cli.args import exit_code
from jaxgpt.errors import OutputError, UserError


def fail(error):
    def main():
        raise error

    return main


OUT_OF_MEMORY = "out of memory; give this process more, or less to compute at a time"


@pytest.mark.parametrize(
    "error, message",
    [
        (MemoryError(), OUT_OF_MEMORY),
        (
            RuntimeError("RESOURCE_EXHAUSTED: 4 TB"),
            "out of memory; give this process more, or less to compute at a time",
        ),
        (OSError(errno.EMFILE, "Too many open files", "a/b"), "a/b: Too many open files; see to it, and start again"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "x: Permission denied; see to it, and start again"),
    ],
)
def test_what_the_system_refuses_is_one_line(capsys, error, message):
    assert exit_code(fail(error)) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize("error", [ValueError("a fault of ours"), OSError("without a number"), AssertionError()])
def test_a_fault_of_the_program_is_not_hidden(error):
    with pytest.raises(type(error)):
        exit_code(fail(error))


@pytest.mark.parametrize("number, kind", [(errno.EPIPE, BrokenPipeError), (errno.ENOSPC, OutputError)])
@pytest.mark.parametrize("method", ["write", "flush"])
def test_checked_output(method, number, kind):
    class Broken(io.StringIO):
        def write(self, text):
            raise OSError(number, "failed")

        def flush(self):
            raise OSError(number, "failed")

    output = environment.CheckedOutput(Broken())
    with pytest.raises(kind, match="failed"):
        output.write("x") if method == "write" else output.flush()


def test_checked_output_is_its_stream_otherwise():
    stream = io.StringIO()
    print("words", file=environment.CheckedOutput(stream))
    assert stream.getvalue() == "words\n" and not environment.CheckedOutput(stream).isatty()


def test_limits(monkeypatch):
    limits = {"RLIMIT_AS": None, "RLIMIT_NOFILE": 64}
    monkeypatch.setattr(environment, "_limit", limits.__getitem__)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    environment.require_usable()
    limits["RLIMIT_AS"] = 3 * 2**30 - 1
    with pytest.raises(UserError, match="ulimit -v 3145727: .* give at least 3145728"):
        environment.require_usable()
