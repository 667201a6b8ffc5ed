"""JAX's persistent compilation cache, below the user's cache folder: one folder for each kind of processor.

The cache only saves time. A damaged entry is removed and compiled again, and a program that cannot be written is not
kept, both without a message.
"""

import contextlib
import hashlib
import os
import platform
import re
import sys
import warnings
import zlib
from pathlib import Path

import jax
import jaxlib

# The first jaxlib that loads CPU programs reliably. With 0.10.1 a process hung in `deserialize_executable`, and on some
# processors each load prints a long warning to stderr (docs/design.md).
FIRST_FOR_CPU = (0, 12)
CPU_INFO = Path("/proc/cpuinfo")
CPU_KIND = ("model name", "flags", "Features", "CPU implementer", "CPU part")  # of x86; of ARM
CACHE_WARNING = "Error (reading|writing) persistent compilation cache entry"
CHECKED = "checked"  # an empty file: entries last written before it were found sound
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


def enable_compilation_cache(folder: Path) -> None:
    """Sets JAX's persistent compilation cache to a folder below `folder`, if jaxlib loads programs reliably.

    Settings from the user's environment take precedence.
    """
    on_cpu = jax.default_backend() == "cpu"
    given = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if given is not None or (on_cpu and _jaxlib() < FIRST_FOR_CPU):
        return
    # Python's minor version is part of the name: JAX compresses with zstd where Python has it, under the same keys.
    kept = folder / f"{_processor() if on_cpu else 'accelerator'}-{sys.version_info.major}.{sys.version_info.minor}"
    with contextlib.suppress(OSError):
        kept.mkdir(parents=True, exist_ok=True)
        if _is_private(folder.parent) and os.access(kept, os.W_OK):
            _remove_damaged_entries(kept)
            warnings.filterwarnings("ignore", message=CACHE_WARNING)  # a full disk, another process's removal
            jax.config.update("jax_compilation_cache_dir", str(kept))
            if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
                # A start compiles some thirty small programs besides the large one, which take seconds together.
                jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _is_private(folder: Path) -> bool:
    """Whether only this user can write programs here: without a home the folder is in /tmp, which anyone may write."""
    if not hasattr(os, "getuid"):
        return True
    status = folder.stat()
    return status.st_uid == os.getuid() and not status.st_mode & 0o002


def _jaxlib() -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", jaxlib.version.__version__)[:2])


def _processor() -> str:
    """A name for this kind of CPU: machines that share a home may differ, and code for one may fail on another."""
    kind = platform.machine() + platform.processor()
    with contextlib.suppress(OSError):  # not Linux
        lines = CPU_INFO.read_text(errors="replace").splitlines()
        kind += "".join(sorted({line for line in lines if line.startswith(CPU_KIND)}))
    return f"cpu-{hashlib.sha256(kind.encode()).hexdigest()[:16]}"


def _remove_damaged_entries(folder: Path) -> None:
    """Removes the entries that cannot be decompressed, as a process killed while it wrote leaves one.

    JAX would warn about such an entry at every start, and never replace it. Only entries written since the last check
    are read.
    """
    checked = folder / CHECKED
    since = checked.stat().st_mtime_ns if checked.exists() else 0
    checked.touch()  # before the check: an entry that another process writes meanwhile is checked by the next start
    for path in folder.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another process has removed it
            if path.stat().st_mtime_ns >= since and not _is_sound(path.read_bytes()):
                path.unlink()


def _is_sound(entry: bytes) -> bool:
    """Whether JAX can decompress an entry: zlib, with its checksum, or zstd."""
    try:
        if entry.startswith(ZSTD_MAGIC):
            if sys.version_info >= (3, 14):
                from compression import zstd  # pyright: ignore[reportMissingImports]
            else:
                import zstandard as zstd  # pyright: ignore[reportMissingImports]
            zstd.decompress(entry)
        else:
            zlib.decompress(entry)
    except Exception:  # each library has its own; without the library, JAX cannot read the entry either
        return False
    return True
