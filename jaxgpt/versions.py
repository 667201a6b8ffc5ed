"""Which jaxlib may compute, and which versions did (for `summary.json`); from package metadata, without jax."""

import platform
from importlib import metadata

from jaxgpt.errors import UserError

# These compute some CPU reductions wrong, silently (`tests/unit/test_versions.py` holds the case that shows it).
WRONG_JAXLIBS = ("0.10.2", "0.11.0")


def require_sound_jaxlib() -> None:
    """Raises `UserError` if the installed jaxlib is one that computes wrong; passes if none is installed."""
    try:
        version = metadata.version("jaxlib")
    except metadata.PackageNotFoundError:
        return
    if version.split("+")[0] in WRONG_JAXLIBS:
        raise UserError(
            f"jaxlib {version} returns wrong sums on CPU without any error; install another: "
            'pip install "jax!=0.10.2,!=0.11.0" "jaxlib!=0.10.2,!=0.11.0"'
        )


def versions() -> dict[str, str]:
    """Python's and the numeric packages' versions by name, for the record of a run."""
    found = {"python": platform.python_version()}
    for package in ("jaxgpt", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
