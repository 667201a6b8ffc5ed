"""A dataset's name -> its text and its tokens of train and validation: find, download, verify, tokenise.

Names: `tinyshakespeare`; `pydoc`, the language reference inside every Python; `file:PATH`, any UTF-8 text.
`a,b` takes the first that can be had.
"""

import hashlib
import os
import socket
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from jaxgpt.errors import UserError
from jaxgpt.tokenizer import Tokenizer

TRAIN_FRACTION = 0.9  # the first 90 % train, the rest validates, as documented
DOCUMENTED_PROMPT = "ROMEO:"
CHECKOUT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Remote:
    """A corpus that is one file on the network."""

    url: str
    sha256: str
    file: str  # below a data folder


REMOTES = {
    "tinyshakespeare": Remote(
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        file="tinyshakespeare/input.txt",
    )
}
NAMES = (*REMOTES, "pydoc", "file:PATH")


@dataclass(frozen=True)
class Corpus:
    """A text and where it came from."""

    name: str  # as in a configuration: the one that was taken of a list, a file's path made absolute
    text: str
    sha256: str  # of the text's UTF-8 bytes
    source: str


class NotAvailable(UserError):
    """The dataset exists but cannot be had here; of a list, the next is tried."""


def load_corpus(spec: str, data_dir: Path | None, say: Callable[[str], None]) -> Corpus:
    """The first dataset of a comma-separated list that can be had.

    Args:
        spec: a dataset's name, or several separated by commas.
        data_dir: a folder to look in before all others, or None.
        say: takes the one line that tells which of several was taken.

    Raises:
        UserError: an unknown name, or no dataset of the list can be had.
    """
    # A path may itself hold a comma: a single existing file wins over reading the name as a list.
    if data_dir is not None and not _is(Path.is_dir, data_dir):
        raise UserError(f"--data-dir {data_dir}: no such folder; create it or leave the flag out")
    whole_is_file = spec.startswith("file:") and _is(Path.is_file, _path_of(spec))
    names = [spec] if whole_is_file else [name.strip() for name in spec.split(",")]
    for name in names:
        if name not in REMOTES and name != "pydoc" and not name.startswith("file:"):
            raise UserError(f"--dataset {name!r}: unknown dataset; choose of {', '.join(NAMES)}")
    refusals = []
    for name in names:
        try:
            corpus = _load_one(name, data_dir, say)
        except NotAvailable as e:
            refusals.append(str(e))
            continue
        if len(names) > 1:
            say(f"dataset: {corpus.name}, the first of {spec} that can be had ({corpus.source})")
        return corpus
    raise NotAvailable("; ".join(refusals))


def split_tokens(corpus: Corpus, tokenizer: Tokenizer, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Train and validation tokens, int32 each. Raises `UserError` if either cannot fill one window and its target."""
    tokens = tokenizer.encode(corpus.text)
    n_train = int(TRAIN_FRACTION * len(tokens))
    train, validation = tokens[:n_train], tokens[n_train:]
    needed = block_size + 1
    if len(train) < needed or len(validation) < needed:
        raise UserError(
            f"--dataset {corpus.name}: too short: {len(train)} training and {len(validation)} validation tokens, each "
            f"must hold a block plus one ({needed}); give a longer text or a smaller --model.block-size"
        )
    return train, validation


def sample_prompt(given: str | None, tokenizer: Tokenizer, corpus: Corpus) -> str:
    """What a run's sample continues: the documented prompt where the vocabulary has it, unless one is given.

    Raises:
        UserError: the given `--prompt` has characters outside the vocabulary.
    """
    try:
        tokenizer.encode(given or DOCUMENTED_PROMPT)
    except UserError as e:
        if given:
            raise UserError(f"--prompt: {e}") from None
        return corpus.text[0]
    return given or DOCUMENTED_PROMPT


def cache_folder() -> Path:
    """The user's cache folder of this project."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "jaxgpt"
    except RuntimeError:  # neither HOME nor an entry for this user
        return Path(tempfile.gettempdir()) / f"jaxgpt-{os.getuid()}"


def _path_of(name: str) -> Path:
    """The path of a `file:PATH`."""
    path = Path(name.removeprefix("file:"))
    try:
        return path.expanduser()
    except RuntimeError:  # ~ of a user that does not exist
        return path


def _is(kind: Callable[[Path], bool], path: Path) -> bool:
    """Path.is_file or Path.is_dir, False also where the path cannot be looked at."""
    try:
        return kind(path)
    except (OSError, ValueError):
        return False


def _load_one(name: str, data_dir: Path | None, say: Callable[[str], None]) -> Corpus:
    if name == "pydoc":
        return _pydoc()
    if name.startswith("file:"):
        path = _path_of(name)
        return replace(_corpus(name, _read(path, name), str(path)), name=f"file:{path.resolve()}")
    path = _find(name, data_dir, say)
    return _corpus(name, path.read_bytes(), os.path.abspath(path))


def _corpus(name: str, data: bytes, source: str) -> Corpus:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise UserError(
            f"--dataset {name}: not UTF-8 text (byte {e.start}); convert it, for instance with iconv -t UTF-8"
        ) from None
    if not text:
        raise UserError(f"--dataset {name}: the file is empty; give one with text")
    return Corpus(name, text, hashlib.sha256(data).hexdigest(), source)


def _read(path: Path, name: str) -> bytes:
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(f"--dataset {name}: a pipe or a device; give a regular file")
        return path.read_bytes()
    except (FileNotFoundError, ValueError):  # the latter: a name with a NUL
        raise NotAvailable(f"--dataset {name}: no such file; check the path") from None
    except OSError as e:
        raise UserError(f"--dataset {name}: cannot be read ({e.strerror}); give a readable text file") from None


def _pydoc() -> Corpus:
    try:
        from pydoc_data import topics
    except ImportError:
        raise NotAvailable("--dataset pydoc: this Python comes without pydoc_data; use file:PATH") from None
    text = "\n".join(topics.topics[topic] for topic in sorted(topics.topics))
    return _corpus("pydoc", text.encode(), "pydoc_data.topics of this Python")


def _folders(data_dir: Path | None) -> list[Path]:
    """Where data is looked for, in order; the cache last."""
    from_env = os.environ.get("JAXGPT_DATA_DIR")
    folders = [data_dir, Path(from_env) if from_env else None]
    # Beside the working folder, and beside the checkout, so that a script works from any folder.
    folders += [base / folder for folder in ("data", "../shared/data") for base in (Path(), CHECKOUT)]
    distinct = {os.path.abspath(f): f for f in folders if f is not None}
    return [*distinct.values(), cache_folder() / "data"]


def _find(name: str, data_dir: Path | None, say: Callable[[str], None]) -> Path:
    """The verified file of a remote dataset: from the folders, else downloaded into the cache."""
    remote = REMOTES[name]
    folders = _folders(data_dir)
    for folder in folders:
        path = folder / remote.file
        if not _is(Path.is_file, path):
            continue
        digest = hashlib.sha256(_read(path, name)).hexdigest()
        if digest == remote.sha256:
            return path
        if folder is not folders[-1]:
            raise UserError(
                f"--dataset {name}: {path} is another file (sha256 {digest[:12]}..., expected "
                f"{remote.sha256[:12]}...); remove it, or train on it with --dataset file:{path}"
            )
        say(f"dataset: {path} is damaged; downloading it again")
    path = folders[-1] / remote.file
    if refusal := _unreachable(remote.url):
        looked = ", ".join(os.path.abspath(f) for f in folders)
        raise NotAvailable(
            f"--dataset {name}: not on this machine and no network ({refusal}); looked for {remote.file} in {looked}; "
            f"put the file from {remote.url} into one of them, or use --dataset pydoc"
        )
    _download(name, remote, path)
    return path


def _unreachable(url: str, seconds: float = 3.0) -> str | None:
    """Why a URL does not answer within the time, or None if it does.

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
            answer[0] = f"{e.code} {e.reason}"
        except (OSError, ValueError) as e:
            reason = getattr(e, "reason", e)
            host = urllib.parse.urlsplit(url).hostname
            answer[0] = f"{host} not found" if isinstance(reason, socket.gaierror) else str(reason)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0]


def _download(name: str, remote: Remote, path: Path) -> None:
    """Downloads with a progress bar, verifies, and only then moves the file to its place."""
    from datasets import DownloadConfig, DownloadManager

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            config = DownloadConfig(cache_dir=folder, max_retries=3, download_desc=name)
            fetched = Path(DownloadManager(download_config=config).download(remote.url))
            digest = hashlib.sha256(fetched.read_bytes()).hexdigest()
            if digest != remote.sha256:
                raise NotAvailable(
                    f"--dataset {name}: what {remote.url} sent is not the corpus (sha256 {digest[:12]}..., expected "
                    f"{remote.sha256[:12]}...); try again, or use --dataset pydoc"
                )
            os.replace(fetched, path)
    except UserError:
        raise
    except Exception as e:  # the library's and its transports' errors have no common base class
        raise NotAvailable(
            f"--dataset {name}: the download into {path.parent} failed ({type(e).__name__}: {str(e).splitlines()[0]}); "
            f"try again, put the file there yourself from {remote.url}, or use --dataset pydoc"
        ) from e
