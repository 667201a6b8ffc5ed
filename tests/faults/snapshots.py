"""What a run folder holds, so that two can be compared: each file's digest, and each checkpoint's arrays.

Times differ between two runs that are equal otherwise, and the files that orbax writes hold times and random names. So
records and summaries are compared without their times, and checkpoints by their arrays.
"""

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

TIMES = {"tokens_per_s", "elapsed_s", "first_step_s", "wall_s"}
IGNORED = {".lock"}
NOT_FINITE = "not finite"  # of a checkpoint


def snapshot(run: Path) -> dict[str, str]:
    """The entries of a run folder and what they hold; a checkpoint is one entry."""
    found = {}
    for path in walk(run):
        name = path.relative_to(run).as_posix()
        parts = name.split("/")
        if parts[0] == "checkpoints" and len(parts) > 1:
            if len(parts) == 2:
                found[name] = _checkpoint(path) if path.is_dir() and not path.is_symlink() else kind_of(path)
        elif name not in IGNORED:
            found[name] = _without_times(path) if kind_of(path) == "file" else kind_of(path)
    return found


def tree(folder: Path) -> dict[str, str]:
    """The entries of a folder, bit for bit."""
    found = {}
    for path in walk(folder):
        kind = kind_of(path)
        if path.name not in IGNORED:
            content = hashlib.sha256(path.read_bytes()).hexdigest() if kind == "file" else ""
            found[path.relative_to(folder).as_posix()] = f"{kind} {content}"
    return found


def differences(ours: dict[str, str], theirs: dict[str, str]) -> list[str]:
    """The names of the entries in which two folders differ."""
    return sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))


def checkpoint_steps(run: Path) -> list[int]:
    """The steps of the checkpoints that have their final names."""
    folder = run / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def recorded_steps(run: Path) -> int:
    """How many steps steps.csv has."""
    path = run / "steps.csv"
    return max(0, path.read_bytes().count(b"\n") - 1) if path.is_file() else 0


def walk(folder: Path) -> list[Path]:
    """All entries below a folder; links are not followed."""
    found = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        found.append(Path(entry.path))
        if entry.is_dir(follow_symlinks=False):
            found += walk(Path(entry.path))
    return found


def kind_of(path: Path) -> str:
    """ "file", "folder", "link to ..." or "special": of the entry itself."""
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return f"link to {os.readlink(path)}"
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "special"


def _without_times(path: Path) -> str:
    data = path.read_bytes()
    try:
        if path.suffix == ".jsonl":
            data = "\n".join(_canonical(json.loads(line)) for line in data.decode().splitlines()).encode()
        elif path.name == "summary.json":
            data = _canonical(json.loads(data)).encode()
        elif path.name == "manifest.json":
            data = _manifest_without_times(json.loads(data)).encode()
    except (ValueError, AttributeError, KeyError, TypeError):
        pass  # damaged: its bytes
    return hashlib.sha256(data).hexdigest()


def _canonical(record: dict[str, Any]) -> str:
    return json.dumps({name: value for name, value in record.items() if name not in TIMES})


def _manifest_without_times(values: dict[str, Any]) -> str:
    """A manifest without the digests of files that hold times, or random names."""
    content = values["manifest"]
    content["records"].pop("metrics.jsonl", None)
    if "summary.json" in content["files"]:
        del content["files"]["summary.json"], content["files"]["metrics.jsonl"]
    if any(name.startswith("default/") for name in content["files"]):
        content["files"] = None  # the arrays are compared instead
    return json.dumps(content)


def _checkpoint(folder: Path) -> str:
    """A digest of a checkpoint's arrays and of its manifest."""
    manifest = folder / "manifest.json"
    return f"{_arrays(folder)} {_without_times(manifest) if manifest.is_file() else 'no manifest'}"


def _arrays(checkpoint: Path) -> str:
    """A digest of the arrays of a checkpoint, or why they cannot be read; read by orbax alone."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    folders = [folder for folder in (checkpoint, *checkpoint.iterdir()) if (folder / "_METADATA").is_file()]
    if not folders or any(kind_of(path) not in ("file", "folder") for path in walk(checkpoint)):
        return "unreadable"  # orbax would wait for a FIFO
    try:
        with jax.enable_x64(True), ocp.StandardCheckpointer() as reader:
            restored = reader.restore(folders[0].absolute())
    except Exception as e:  # orbax and tensorstore raise without a common class
        return f"unreadable: {type(e).__name__}"
    digest, finite = hashlib.sha256(), True
    for path, array in jax.tree_util.tree_leaves_with_path(restored):
        array = np.asarray(array)
        finite &= bool(np.isfinite(array).all())
        digest.update(f"{path} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest() if finite else NOT_FINITE
