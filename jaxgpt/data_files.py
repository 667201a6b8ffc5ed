"""Files of data: the folders they are looked for in, verified downloads, and what is written whole or not at all."""

import contextlib
import hashlib
import os
import shutil
import socket
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from jaxgpt.errors import UserError

CHECKOUT = Path(__file__).resolve().parents[1]
PIECE_BYTES = 2**20  # files are read in pieces: a corpus may be larger than the memory


class NotAvailable(UserError):
    """It exists but cannot be had here; of a list of datasets, the next is tried."""


@dataclass(frozen=True)
class Remote:
    """A file on the network, and its name below a data folder."""

    url: str
    sha256: str
    file: str


def cache_folder() -> Path:
    """The user's cache folder of this project."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "jaxgpt"
    except RuntimeError:  # neither HOME nor an entry for this user
        return Path(tempfile.gettempdir()) / f"jaxgpt-{os.getuid()}"


def is_kind(kind: Callable[[Path], bool], path: Path) -> bool:
    """Path.is_file or Path.is_dir, False also where the path cannot be looked at."""
    try:
        return kind(path)
    except (OSError, ValueError):
        return False


def require_folder(data_dir: Path | None) -> None:
    """Raises `UserError` for a `--data-dir` that is no folder."""
    if data_dir is not None and not is_kind(Path.is_dir, data_dir):
        raise UserError(f"--data-dir {data_dir}: no such folder; create it or leave the flag out")


def data_folders(data_dir: Path | None) -> list[Path]:
    """Where data is looked for, in order; the cache last."""
    from_env = os.environ.get("JAXGPT_DATA_DIR")
    folders = [data_dir, Path(from_env) if from_env else None]
    # Beside the working folder, and beside the checkout, so that a script works from any folder.
    folders += [base / folder for folder in ("data", "../shared/data") for base in (Path(), CHECKOUT)]
    distinct = {os.path.abspath(f): f for f in folders if f is not None}
    return [*distinct.values(), cache_folder() / "data"]


def pieces(path: Path, named: str) -> Iterator[bytes]:
    """A file's bytes in order, a piece at a time.

    Args:
        named: the flag and value that errors begin with.

    Raises:
        NotAvailable: no such file. UserError: not a regular file, or it cannot be read.
    """
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(f"{named}: a pipe or a device; give a regular file")
        with path.open("rb") as f:
            while piece := f.read(PIECE_BYTES):
                yield piece
    except (FileNotFoundError, ValueError):  # the latter: a name with a NUL
        raise NotAvailable(f"{named}: no such file; check the path") from None
    except OSError as e:
        raise UserError(f"{named}: cannot be read ({e.strerror}); give a readable text file") from None


def sha256_of(path: Path, named: str) -> str:
    """The digest of a file. Raises as `pieces` does."""
    digest = hashlib.sha256()
    for piece in pieces(path, named):
        digest.update(piece)
    return digest.hexdigest()


def find(
    remote: Remote, named: str, folders: list[Path], say: Callable[[str], None], instead: str, own: str = ""
) -> Path:
    """The verified file: from the folders, else downloaded into the last of them.

    Args:
        named: the flag and value that messages begin with.
        instead: what the user can do without the file.
        own: the flag that takes any file, for one that is not the expected.

    Raises:
        NotAvailable: on no folder, and no network. UserError: another file stands there under its name.
    """
    for folder in folders:
        path = folder / remote.file
        if not is_kind(Path.is_file, path):
            continue
        digest = sha256_of(path, named)
        if digest == remote.sha256:
            return path
        if folder is not folders[-1]:
            alternative = f", or train on it with {own}{path}" if own else ""
            raise UserError(
                f"{named}: {path} is another file (sha256 {digest[:12]}..., expected {remote.sha256[:12]}...); "
                f"remove it{alternative}"
            )
        say(f"{path} is damaged; downloading it again")
    path = folders[-1] / remote.file
    if refusal := unreachable(remote.url):
        looked = ", ".join(os.path.abspath(f) for f in folders)
        raise NotAvailable(
            f"{named}: not on this machine and no network ({refusal}); looked for {remote.file} in {looked}; "
            f"put the file from {remote.url} into one of them, or use {instead}"
        )
    _download(remote, named, path, instead)
    return path


def unreachable(url: str, seconds: float = 3.0, any_answer: bool = False) -> str | None:
    """Why a URL does not answer within the time, or None if it does; with `any_answer` also if it refuses.

    Asked before the download because the libraries' own time-outs are minutes; in a thread because looking up a
    host's name cannot be given a time-out.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    answer = ["no answer"]

    def ask():
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds):
                answer[0] = None
        except urllib.error.HTTPError as e:
            answer[0] = None if any_answer else f"{e.code} {e.reason}"
        except (OSError, ValueError) as e:
            reason = getattr(e, "reason", e)
            host = urllib.parse.urlsplit(url).hostname
            answer[0] = f"{host} not found" if isinstance(reason, socket.gaierror) else str(reason)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0]


def _download(remote: Remote, named: str, path: Path, instead: str) -> None:
    """Downloads with a progress bar, verifies, and only then moves the file to its place."""
    from datasets import DownloadConfig, DownloadManager

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            config = DownloadConfig(cache_dir=folder, max_retries=3, download_desc=path.parent.name)
            fetched = Path(DownloadManager(download_config=config).download(remote.url))
            digest = sha256_of(fetched, named)
            if digest != remote.sha256:
                raise NotAvailable(
                    f"{named}: what {remote.url} sent is not the file (sha256 {digest[:12]}..., expected "
                    f"{remote.sha256[:12]}...); try again, or use {instead}"
                )
            os.replace(fetched, path)
    except UserError:
        raise
    except Exception as e:  # the library's and its transports' errors have no common base class
        reason = (str(e).splitlines() or [""])[0]
        raise NotAvailable(
            f"{named}: the download into {path.parent} failed ({type(e).__name__}: {reason}); "
            f"try again, put the file there yourself from {remote.url}, or use {instead}"
        ) from e


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name only once the block ends without an error; one that is there goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(f".{path.name}-*"):  # of a process that was killed; not of one that is at it
        if time.time() - old.stat().st_mtime > 24 * 3600:
            shutil.rmtree(old, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield partial
        shutil.rmtree(path, ignore_errors=True)
        try:
            os.replace(partial, path)
        except OSError:  # another process was first: what it wrote is the same
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a place to write to, which takes the path's place if all went well, and is removed if not."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all, and its folder. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as f:
        try:
            f.write(data)
            f.close()
            os.replace(f.name, path)
        except BaseException:
            os.unlink(f.name)
            raise
