"""What surrounds the process: checked before JAX starts, which would abort without a message that names the cause.

Environment variables, limits of the process (`ulimit`), the working directory; and errors of standard output.
"""

import contextlib
import errno
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from jaxgpt.errors import OutputError, UserError

# Of the smallest run on two cores, which takes 2 GB and 24 descriptors. LLVM aborts where it gets no memory.
MIN_ADDRESS_SPACE = 3 * 2**30
MIN_DESCRIPTORS = 64
# What the system may refuse for a reason outside of the program.
SYSTEM_ERRORS = {
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP),
}


def require_usable() -> None:
    """Raises `UserError` if JAX cannot start here: for a limit, a removed working directory, or unknown XLA_FLAGS."""
    limits = (
        ("address space", "v", address_space_limit(), MIN_ADDRESS_SPACE, 1024),
        ("open files", "n", _limit("RLIMIT_NOFILE"), MIN_DESCRIPTORS, 1),
    )
    for what, letter, limit, least, unit in limits:
        if limit is not None and limit < least:
            raise UserError(
                f"ulimit -{letter} {limit // unit}: the limit on this process's {what} is too low; give at least "
                f"{least // unit}, or unlimited"
            )
    try:
        os.getcwd()
    except OSError as e:
        raise UserError(f"the working directory cannot be used ({e.strerror}); change to one that exists") from None
    if os.environ.get("XLA_FLAGS"):
        _require_xla_flags()


def require_device_count() -> None:
    """Raises `UserError` if JAX_NUM_CPU_DEVICES is no number of devices."""
    given = os.environ.get("JAX_NUM_CPU_DEVICES", "1")
    if not re.fullmatch("[0-9]{1,4}", given) or int(given) < 1:
        raise UserError(f"JAX_NUM_CPU_DEVICES={given}: give a number of devices from 1 on, or unset it")


def address_space_limit() -> int | None:
    """The limit on this process's address space in bytes (`ulimit -v`); None without one."""
    return _limit("RLIMIT_AS")


def _limit(name: str) -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit = resource.getrlimit(getattr(resource, name))[0]
    return None if limit == resource.RLIM_INFINITY else limit


def _require_xla_flags() -> None:
    """Has XLA read XLA_FLAGS in another process: it ends its process at an unknown flag."""
    probe = [sys.executable, "-c", "from jaxlib import xla_client; xla_client.CompileOptions()"]
    done = subprocess.run(probe, capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if "XLA_FLAGS" in line or "parse" in line]
        reason = lines[0].rpartition("] ")[2] if lines else f"XLA ended with {done.returncode}"
        raise UserError(f"XLA_FLAGS={os.environ['XLA_FLAGS']}: {reason[:200]}; mend it, or unset it")


def reason(error: Exception) -> str | None:
    """What a person is told of an error that the program did not cause and no module has handled; None for others."""
    text = (str(error).splitlines() or [""])[0]
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        return "out of memory; give this process more, or less to compute at a time"
    if isinstance(error, OSError) and error.errno in SYSTEM_ERRORS:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; see to it, and start again"
    if "jax" not in sys.modules and "jax._src" in sys.modules:  # its import has failed: it reads its variables then
        given = ", ".join(sorted(name for name in os.environ if name.startswith("JAX_")))
        return f"JAX does not start ({text}); mend {given or 'its installation'}"
    return None


# ------------------------------------------------------------------------------------------------------ standard output


class CheckedOutput:
    """A text stream, as standard output, that raises what `output_errors` does."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with output_errors():
            return self._stream.write(text)

    def flush(self) -> None:
        with output_errors():
            self._stream.flush()


@contextlib.contextmanager
def output_errors() -> Iterator[None]:
    """Raises `BrokenPipeError` or `OutputError` for what cannot be printed; all further output is discarded."""
    try:
        yield
    except OSError as e:
        with contextlib.suppress(OSError, ValueError):  # a stand-in that has no descriptor
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(e, BrokenPipeError):
            raise
        raise OutputError(
            f"standard output: cannot be written ({e.strerror}); send it to a place with room, and start again"
        ) from e
