"""Where compiled programs are kept between starts: below the user's cache folder, a folder for each kind of CPU.

A cache only saves time. So an entry that cannot be read is made anew, what cannot be kept is not, and neither is told.
"""

import contextlib
import hashlib
import os
import platform
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import jaxlib

# The first whose CPU programs come back sound: with 0.10.1 a start waited forever inside `deserialize_executable`, and
# on some processors each load writes a long line of warning to stderr (docs/design.md).
FIRST_FOR_CPU = (0, 12)
CPU_INFO = Path("/proc/cpuinfo")
CPU_KIND = ("model name", "flags", "Features", "CPU implementer", "CPU part")  # of x86; of ARM
COMPLAINT = r"Error (?:reading|writing) persistent compilation cache entry for '(.+?)'"


def keep_programs(folder: Path) -> None:
    """Has JAX keep compiled programs below `folder`, where that is sound; what the user's environment sets stays."""
    on_cpu = jax.default_backend() == "cpu"
    if jax.config.jax_compilation_cache_dir is not None or (on_cpu and _jaxlib() < FIRST_FOR_CPU):
        return
    # Python's minor version as well: some compress in another form under the same name.
    kept = folder / f"{_processor() if on_cpu else 'accelerator'}-{sys.version_info.major}.{sys.version_info.minor}"
    with contextlib.suppress(OSError):
        kept.mkdir(parents=True, exist_ok=True)
        if _is_private(folder.parent) and os.access(kept, os.W_OK):
            jax.config.update("jax_compilation_cache_dir", str(kept))
            if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
                # A start compiles some thirty small programs besides the large one, which take seconds together.
                jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
            _mend(kept)


def _is_private(folder: Path) -> bool:
    """Whether nobody else can have put programs here; without a home it is a folder of /tmp that anyone may make."""
    if not hasattr(os, "getuid"):
        return True
    status = folder.stat()
    return status.st_uid == os.getuid() and not status.st_mode & 0o002


def _jaxlib() -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", jaxlib.__version__)[:2])


def _processor() -> str:
    """A name for this CPU's kind: machine code made for another may not run here, where a home is shared by both."""
    kind = platform.machine() + platform.processor()
    with contextlib.suppress(OSError):  # not Linux
        lines = CPU_INFO.read_text(errors="replace").splitlines()
        kind += "".join(sorted({line for line in lines if line.startswith(CPU_KIND)}))
    return f"cpu-{hashlib.sha256(kind.encode()).hexdigest()[:16]}"


def _mend(folder: Path) -> None:
    """Has an entry that cannot be read, as of a process killed while it wrote, removed: JAX would never replace it.

    JAX tells the program's name only, so all entries of that name go.
    """
    warnings.filterwarnings("always", message=COMPLAINT)  # whatever else is ignored, or an error
    show = warnings.showwarning

    def showwarning(message: Any, *rest: Any, **more: Any) -> None:
        complaint = re.match(COMPLAINT, str(message))
        if complaint is None:
            return show(message, *rest, **more)
        with contextlib.suppress(OSError):
            for entry in folder.iterdir():
                if entry.name.startswith(f"{complaint[1]}-"):
                    entry.unlink(missing_ok=True)

    warnings.showwarning = showwarning
