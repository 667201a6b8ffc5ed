"""Fixtures of the data room: a cache of the test's own, a machine without data, a stand-in for the network."""

import functools
import hashlib
import http.server
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from jaxgpt.data import files
from jaxgpt.data.files import RemoteFile
from jaxgpt.data.tokenizer import BpeTokenizer


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path) -> Path:
    """The test's own cache folder of the project, not made yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/jaxgpt"


@pytest.fixture
def nowhere(monkeypatch, tmp_path) -> Path:
    """A machine without data: no folder has any, and the cache is empty. The working directory is `place`."""
    monkeypatch.setattr(files, "CHECKOUT", tmp_path / "checkout")
    monkeypatch.delenv("JAXGPT_DATA_DIR", raising=False)
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    (tmp_path / "place").mkdir()
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path


@dataclass
class Server:
    """A stand-in for the network that serves one file.

    `n_broken` downloads from now on are cut off halfway. `requests` records the methods.
    """

    path: Path
    data: bytes
    remote: RemoteFile
    n_broken: int = 0
    requests: list[str] = field(default_factory=list)


@pytest.fixture
def server(nowhere, monkeypatch) -> Iterator[Server]:
    folder = nowhere / "served"
    folder.mkdir()
    data = ("Words, words, words.\n" * 500).encode()
    (folder / "input.txt").write_bytes(data)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_HEAD(self):
            state.requests.append("HEAD")
            super().do_HEAD()

        def do_GET(self):
            state.requests.append("GET")
            if not state.n_broken:
                return super().do_GET()
            state.n_broken -= 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])

    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    url = f"http://127.0.0.1:{http_server.server_port}/input.txt"
    remote = RemoteFile(url, hashlib.sha256(data).hexdigest(), "tinyshakespeare/input.txt")
    state = Server(folder / "input.txt", data, remote)
    monkeypatch.setattr("pooch.core.time.sleep", lambda seconds: None)  # between two attempts
    threading.Thread(target=http_server.serve_forever, args=(0.01,), daemon=True).start()
    yield state
    http_server.shutdown()
    http_server.server_close()


@pytest.fixture(scope="session")
def bpe() -> BpeTokenizer:
    return BpeTokenizer.train(["the cat and the other cat then thought of another theory " * 20], 300)
