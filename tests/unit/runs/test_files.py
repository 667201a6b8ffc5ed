"""Reading a run's files of any content and kind, and writing that follows no link."""

import os
from dataclasses import dataclass

import pytest

from jaxgpt.runs import files
from jaxgpt.runs.files import Unreadable


@dataclass(frozen=True)
class Point:
    x: int
    name: str = ""


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b"[" * 10**6, b'{"x": 1.5}', b'{"x": true}', b'{"x": "1"}', b'{"x": null}', b"\xff"]
    + [b'{"x": NaN}', b'{"x": 1, "name": ["a"]}', b'{"x": ' + b"1" * 5000 + b"}", b'{"x": 1}{"x": 2}', b"\0" * 100],
)
def test_json_of_another_type_is_refused(tmp_path, content):
    (tmp_path / "point.json").write_bytes(content)
    with pytest.raises(Unreadable, match=r"point\.json"):
        files.read_json(tmp_path / "point.json", Point)


def test_json_of_the_type_is_read(tmp_path):
    files.write_json(tmp_path / "point.json", {"x": 3, "name": "é"})
    assert files.read_json(tmp_path / "point.json", Point) == Point(3, "é")


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "endless").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name in ("fifo", "endless", "folder"):
        with pytest.raises(Unreadable, match=name):
            files.read_bytes(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        files.read_bytes(tmp_path / "missing")


def test_a_file_larger_than_any_of_ours_is_refused(tmp_path):
    with (tmp_path / "sparse").open("wb") as f:
        f.truncate(2**40)
    with pytest.raises(Unreadable, match="more than 134,217,728 bytes"):
        files.read_bytes(tmp_path / "sparse")


def test_no_link_is_followed_when_a_file_is_written(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    for name in ("whole.json", "whole.json.partial", "lines.csv", "cut.csv"):
        (tmp_path / name).symlink_to(precious)
    files.write_json(tmp_path / "whole.json", {"x": 1})
    assert files.read_json(tmp_path / "whole.json", Point) == Point(1) and not (tmp_path / "whole.json").is_symlink()
    for write in (lambda: files.append(tmp_path / "lines.csv", "1\n"), lambda: files.truncate(tmp_path / "cut.csv", 1)):
        with pytest.raises(OSError):
            write()
    assert precious.read_text() == "precious"


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "point.json"
    files.write_json(path, {"x": 1})
    for call in ("fsync", "replace"):

        def full(*_):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch, pytest.raises(OSError):
            patch.setattr(os, call, full)
            files.write_json(path, {"x": 2})
        assert files.read_json(path, Point) == Point(1) and [p.name for p in tmp_path.iterdir()] == ["point.json"]
