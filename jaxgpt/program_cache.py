"""Where compiled programs are kept between starts: below the user's cache folder, a folder for each kind of CPU.

A cache only saves time. So what is damaged in it is written anew, what cannot be kept is not, and neither is told.
"""

import contextlib
import hashlib
import os
import platform
import re
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

# The first whose CPU programs come back sound: with 0.10.1 a start waited forever inside `deserialize_executable`, and
# on some processors each program is refused with a long line on stderr (docs/design.md).
FIRST_FOR_CPU = (0, 12)
CPU_INFO = Path("/proc/cpuinfo")
COMPLAINT = re.compile(r"Error (?:reading|writing) persistent compilation cache entry for '(.+?)'")


def keep_programs(folder: Path) -> None:
    """Has JAX keep compiled programs below `folder`, where that is sound; a folder that the user names goes before."""
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu and _jaxlib() < FIRST_FOR_CPU:
        return
    if jax.config.jax_compilation_cache_dir is None:
        folder = folder / (_processor() if on_cpu else "accelerator")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return
        if not os.access(folder, os.W_OK):
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # A start compiles some thirty small programs besides the large one, which take seconds together.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    _mend(Path(jax.config.jax_compilation_cache_dir))


def _jaxlib() -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", metadata.version("jaxlib"))[:2])


def _processor() -> str:
    """A name for this CPU's kind: machine code made for another may not run here, where a home is shared by both."""
    kind = platform.machine() + platform.processor()
    with contextlib.suppress(OSError):  # not Linux
        lines = CPU_INFO.read_text().splitlines()
        kind += "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return f"cpu-{hashlib.sha256(kind.encode()).hexdigest()[:16]}"


def _mend(folder: Path) -> None:
    """Has an entry that cannot be read, as of a process killed while it wrote, removed: JAX would never replace it."""
    show = warnings.showwarning

    def showwarning(message: Any, *rest: Any, **more: Any) -> None:
        complaint = COMPLAINT.match(str(message))
        if complaint is None:
            return show(message, *rest, **more)
        with contextlib.suppress(OSError):
            for entry in folder.iterdir():
                if entry.name.startswith(f"{complaint[1]}-"):
                    entry.unlink()

    warnings.showwarning = showwarning
