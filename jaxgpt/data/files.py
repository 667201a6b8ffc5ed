"""Data files: where they are searched for, verified downloads, streamed reading, atomic writing."""

import contextlib
import errno
import hashlib
import mmap
import os
import shutil
import socket
import stat
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import platformdirs

from jaxgpt.errors import UserError

CHECKOUT = Path(__file__).resolve().parents[2]
PARTIAL = ".partial"  # the end of the temporary name of a file that is being written
PIECE_BYTES = 2**20  # a file is read this much at a time, because a corpus may be larger than the memory
DOWNLOAD_RETRIES = 2  # after a failed connection or a wrong digest; pooch waits 1 s, then 2 s
PROBE_SECONDS = 3.0
ABANDONED_SECONDS = 24 * 3600.0  # a temporary folder this old belongs to a process that was killed


class NotAvailable(UserError):
    """The data exists, but this machine cannot get it. In a list of datasets, the next one is tried."""


# -------------------------------------------------------------------------------------------------------------- folders


def cache_folder() -> Path:
    """The user's cache folder for this project; `$XDG_CACHE_HOME/jaxgpt` or `~/.cache/jaxgpt` on Linux."""
    with contextlib.suppress(RuntimeError):  # recent platformdirs: neither HOME nor a passwd entry for this user
        folder = platformdirs.user_cache_path("jaxgpt", appauthor=False)
        if folder.is_absolute():  # older platformdirs return "~/.cache" in that case
            return folder
    return Path(tempfile.gettempdir()) / f"jaxgpt-{os.getuid()}"


def require_folder(data_dir: Path | None) -> None:
    """Raises `UserError` if `--data-dir` is given and is not a folder."""
    if data_dir is not None and not os.path.isdir(data_dir):
        raise UserError(f"--data-dir {data_dir}: no such folder; create it or leave the flag out")


def data_folders(data_dir: Path | None) -> list[Path]:
    """The folders in which data is searched, in order.

    Args:
        data_dir: the value of `--data-dir`, which is searched first; None without the flag.

    Returns:
        `data_dir`, `$JAXGPT_DATA_DIR`, `data` and `../shared/data` beside the working directory and beside the
        checkout, and last the cache, into which downloads go. None of them needs to exist.
    """
    from_env = os.environ.get("JAXGPT_DATA_DIR")
    folders = [data_dir, Path(from_env) if from_env else None]
    # Beside the checkout as well, so that a script works from any directory.
    folders += [base / folder for folder in ("data", "../shared/data") for base in (Path(), CHECKOUT)]
    distinct = {os.path.abspath(folder): folder for folder in folders if folder is not None}
    return [*distinct.values(), cache_folder() / "data"]


# -------------------------------------------------------------------------------------------------------------- reading


class NotRegular(OSError):
    """A FIFO, a device or a socket where a file should be: reading it might never end."""

    def __init__(self, path: Path):
        super().__init__(errno.EINVAL, "a pipe or a device, not a regular file", str(path))


def open_regular(path: Path) -> IO[bytes]:
    """A regular file, open for reading. Unlike `open`, it does not wait for the other end of a FIFO.

    Raises:
        NotRegular: the path is, or links to, something else than a file.
        OSError: the file cannot be opened.
    """
    f = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        mode = os.fstat(f).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise NotRegular(path)
        return os.fdopen(f, "rb")  # refuses a folder
    except BaseException:
        os.close(f)
        raise


def read_small(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file that has at most `max_bytes`. Raises what `open_regular` raises.

    Raises:
        OSError: the file has more.
    """
    with open_regular(path) as f:
        data = f.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"more than {max_bytes:,} bytes", str(path))
    return data


def read_pieces(path: Path, option: str) -> Iterator[bytes]:
    """A file's bytes in order, at most `PIECE_BYTES` at a time.

    Args:
        option: the flag and its value, with which error messages begin.

    Raises:
        NotAvailable: there is no such file.
        UserError: the path is not a regular file, or it cannot be read.
    """
    try:
        with open_regular(path) as f:
            while piece := f.read(PIECE_BYTES):
                yield piece
    except (FileNotFoundError, ValueError):  # ValueError: the name contains a NUL
        raise NotAvailable(f"{option}: no such file; check the path") from None
    except NotRegular:
        raise UserError(f"{option}: a pipe or a device; give a regular file") from None
    except OSError as e:
        raise UserError(f"{option}: cannot be read ({e.strerror}); give a readable text file") from None


def sha256_of(path: Path, option: str) -> str:
    """The SHA-256 of a file, in hexadecimal. Raises what `read_pieces` raises."""
    digest = hashlib.sha256()
    for piece in read_pieces(path, option):
        digest.update(piece)
    return digest.hexdigest()


def drop_mapped_pages(array: np.ndarray) -> None:
    """Drops the resident pages of a memory-mapped file (MADV_DONTNEED), so that they do not count as this process's.

    The kernel keeps the data in its page cache while there is room, so reading it again is cheap. Other arrays are left
    as they are. Not for a copy-on-write mapping (`mode="c"`): it would lose its changes.
    """
    mapped: Any = array
    while isinstance(mapped, np.ndarray):
        mapped = mapped.base
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):  # Windows has no madvise
        with contextlib.suppress(OSError):  # the pages are locked in memory
            mapped.madvise(mmap.MADV_DONTNEED)


# ------------------------------------------------------------------------------------------------------------ downloads


@dataclass(frozen=True)
class RemoteFile:
    """A file on the network, verified by its digest.

    Args:
        url: where to download it.
        sha256: the digest of its content, in hexadecimal.
        file: its path below a data folder.
    """

    url: str
    sha256: str
    file: str


def find_or_download(
    remote: RemoteFile,
    option: str,
    folders: list[Path],
    say: Callable[[str], None],
    alternative: str,
    own_file_flag: str = "",
) -> Path:
    """The path of a remote file's verified copy: the first in `folders`, else a download into the last of them.

    Args:
        option: the flag and its value, with which messages begin.
        folders: where to look, in order. The last is the cache: a damaged file there is downloaded again.
        say: receives a line when that happens.
        alternative: the flag and value that need no such file, for the error messages.
        own_file_flag: the flag that accepts any file, for an error about a file whose digest differs; "" if none does.

    Raises:
        NotAvailable: no folder has the file, and it cannot be downloaded.
        UserError: a folder other than the cache has a different file under this name.
    """
    for folder in folders:
        path = folder / remote.file
        if not os.path.isfile(path):
            continue
        digest = sha256_of(path, option)
        if digest == remote.sha256:
            return path
        if folder is not folders[-1]:
            train_on_it = f", or train on it with {own_file_flag}{path}" if own_file_flag else ""
            raise UserError(
                f"{option}: {path} is another file (sha256 {digest[:12]}..., expected {remote.sha256[:12]}...); "
                f"remove it{train_on_it}"
            )
        say(f"{path} is damaged; downloading it again")
    if reason := unreachable_reason(remote.url):
        searched = ", ".join(os.path.abspath(folder) for folder in folders)
        raise NotAvailable(
            f"{option}: not on this machine and no network ({reason}); looked for {remote.file} in {searched}; "
            f"put the file from {remote.url} into one of them, or use {alternative}"
        )
    return _download(remote, option, folders[-1], alternative)


def unreachable_reason(url: str, seconds: float = PROBE_SECONDS, any_answer: bool = False) -> str | None:
    """The reason why a URL does not answer a HEAD request, or None if it does.

    A probe before the download, because the timeouts of the libraries that download are minutes in all. It runs in a
    thread, because the lookup of a host name has no timeout.

    Args:
        seconds: how long to wait for the answer.
        any_answer: an HTTP error counts as an answer as well.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    reason: str | None = "no answer"

    def probe() -> None:
        nonlocal reason
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds):
                reason = None
        except urllib.error.HTTPError as e:
            reason = None if any_answer else f"{e.code} {e.reason}"
        except (OSError, ValueError) as e:
            cause = getattr(e, "reason", e)
            host = urllib.parse.urlsplit(url).hostname
            reason = f"{host} not found" if isinstance(cause, socket.gaierror) else str(cause)

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(seconds)
    return reason


def _download(remote: RemoteFile, option: str, folder: Path, alternative: str) -> Path:
    """Downloads a file below a folder with pooch: under a temporary name until its digest is verified, with retries."""
    import pooch
    from tqdm import tqdm

    def download(*args: Any, **kwargs: Any) -> None:
        # A new bar for each attempt. pooch sets the total; a bar without one counts as False.
        with tqdm(desc=path.parent.name, total=1, unit="B", unit_scale=True) as progress:
            pooch.HTTPDownloader(progressbar=progress)(*args, **kwargs)  # pyright: ignore[reportArgumentType]

    path = folder / remote.file
    pooch.get_logger().setLevel("WARNING")  # the progress bar shows what it would log
    repository = pooch.create(
        folder,
        base_url="",
        registry={remote.file: f"sha256:{remote.sha256}"},
        urls={remote.file: remote.url},
        retry_if_failed=DOWNLOAD_RETRIES,
    )
    try:
        repository.fetch(remote.file, downloader=download)
    except OSError as e:  # those of requests as well
        reason = (str(e).splitlines() or [""])[0]
        raise NotAvailable(
            f"{option}: the download into {path.parent} failed ({type(e).__name__}: {reason}); "
            f"try again, put the file there yourself from {remote.url}, or use {alternative}"
        ) from e
    except ValueError as e:  # pooch's error for a wrong digest
        raise NotAvailable(
            f"{option}: what {remote.url} sent is not the file (expected sha256 {remote.sha256[:12]}...); "
            f"try again, or use {alternative}"
        ) from e
    return path


# ------------------------------------------------------------------------------------------------------- atomic writing


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A context manager that yields a temporary folder to fill, and renames it to `path` if the block succeeds.

    It replaces an existing folder at `path`. If the block raises, it removes the temporary folder. Several processes
    may write the same folder at once, provided that they write the same content.

    Raises:
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in path.parent.glob(f".{path.name}-*"):
        with contextlib.suppress(FileNotFoundError):  # another process has renamed or removed it
            if time.time() - abandoned.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(abandoned, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield partial
        shutil.rmtree(path, ignore_errors=True)
        try:
            os.replace(partial, path)
        except OSError:  # another process has renamed its folder in the meantime
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def atomic_replace(path: Path) -> Iterator[Path]:
    """A context manager that yields a temporary path to write, and renames it to `path` if the block succeeds.

    If the block raises, it removes the temporary file. One process may write `path` at a time.
    """
    partial = path.with_name(path.name + PARTIAL)
    partial.unlink(missing_ok=True)  # a link there would be followed
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the error that is raised already says more
            partial.unlink(missing_ok=True)
        raise


def atomic_write(path: Path, data: bytes) -> None:
    """Writes a file, and its parent folders, such that a reader sees the whole content or none of it.

    Several processes may write the same file at once.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as f:
        try:
            f.write(data)
            f.close()
            os.replace(f.name, path)
        except BaseException:
            os.unlink(f.name)
            raise
