"""A stand-in for the Hugging Face hub: an HTTP server with one dataset, or model, the files of a folder."""

import hashlib
import json
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

NAME, COMMIT = "someone/corpus", "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """The server's state.

    Args:
        folder: of the dataset's files. All but README.md are in large file storage, which has SHA-256 digests.
        gone: paths that are listed, and no longer there.
        n_cut: so many downloads of Parquet files from now on end halfway.
        delay: seconds that each of these downloads stops for, halfway.
        n_changed: so many downloads of Parquet files from now on have another content.
        requests: methods and paths, as they came.
    """

    folder: Path
    url: str = ""
    gone: set[str] = field(default_factory=set)
    n_cut: int = 0
    n_changed: int = 0
    delay: float = 0.0
    requests: list[str] = field(default_factory=list)

    def downloads(self) -> list[str]:
        """The Parquet files that were downloaded, in their order."""
        return [line.rpartition("/")[2] for line in self.requests if line.startswith("GET") and "parquet" in line]


@contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    """A context manager that serves a folder's files as the dataset, and model, `NAME`; `HF_ENDPOINT` is its `url`."""
    hub = Hub(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            if not path.startswith(("/datasets/", "/api/datasets/")):  # a model's, which the hub names without a prefix
                path = path.replace(f"/models/{NAME}", f"/datasets/{NAME}")
                path = path.replace(f"/{NAME}/resolve/", f"/datasets/{NAME}/resolve/")
            kind, _, rest = path.lstrip("/").partition(f"datasets/{NAME}")
            siblings = [{"rfilename": str(p.relative_to(folder))} for p in sorted(folder.rglob("*")) if p.is_file()]
            if kind == "api/" and (not rest or rest.startswith("/revision/")):
                self.answer({"id": NAME, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings})
            elif kind == "api/" and rest.startswith(f"/tree/{COMMIT}"):
                below = rest.removeprefix(f"/tree/{COMMIT}").strip("/")
                found = [
                    entry(p) for p in sorted(folder.rglob("*")) if str(p.parent.relative_to(folder)) == (below or ".")
                ]
                self.answer(found)
            elif kind == "" and rest.startswith("/resolve/"):
                self.file(rest.split("/", 3)[3])
            else:
                self.missing("EntryNotFound" if rest else "RepoNotFound") if path != "/" else self.answer({})

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            hub.requests.append(f"POST {self.path}")
            if self.headers["Content-Type"].startswith("application/json"):
                paths = json.loads(body)["paths"]
            else:
                paths = urllib.parse.parse_qs(body)["paths"]
            self.answer([entry(folder / path) for path in paths if (folder / path).exists()])

        def file(self, name: str):
            path = folder / name
            if name in hub.gone or not path.is_file():
                return self.missing("EntryNotFound")
            data = path.read_bytes()
            served = self.command == "GET" and name.endswith(".parquet")
            if served and hub.n_changed and not hub.n_cut:
                hub.n_changed -= 1
                data = data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
            first = int((self.headers["Range"] or "bytes=0-")[6:].split("-")[0])
            self.send_response(206 if self.headers["Range"] else 200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(path.read_bytes()).hexdigest()}"')
            self.send_header("Content-Length", str(len(data) - first))
            self.end_headers()
            if self.command == "GET":
                if served and hub.n_cut:
                    hub.n_cut -= 1
                    self.wfile.write(data[first : max(first, len(data) // 2)])
                    self.close_connection = True
                else:
                    half = max(first, len(data) // 2)
                    self.wfile.write(data[first:half])
                    time.sleep(hub.delay if served else 0)
                    self.wfile.write(data[half:])

        def missing(self, code: str):
            self.answer({"error": code}, 404, code)

        def answer(self, value, status: int = 200, code: str = ""):
            data = json.dumps(value).encode()
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

    def entry(path: Path) -> dict:
        name = str(path.relative_to(folder))
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
        data = path.read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        large = {} if name == "README.md" else {"lfs": lfs}
        return {"type": "file", "path": name, "oid": blob, "size": len(data), **large}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
