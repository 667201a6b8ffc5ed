"""Finding, downloading, reading and writing files."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from jaxgpt.data import files
from jaxgpt.data.files import (
    NotAvailable,
    RemoteFile,
    atomic_folder,
    atomic_replace,
    atomic_write,
    cache_folder,
    data_folders,
    drop_mapped_pages,
    find_or_download,
    read_pieces,
    sha256_of,
    unreachable_reason,
)
from jaxgpt.errors import UserError

# ------------------------------------------------------------------------------------------------------------- folders


def test_the_cache_is_below_xdg_cache_home(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere/cache")
    assert cache_folder() == Path("/somewhere/cache/jaxgpt")


@pytest.mark.parametrize("xdg", [None, ""])
def test_the_cache_is_in_the_home_folder(monkeypatch, xdg):
    monkeypatch.delenv("XDG_CACHE_HOME")
    if xdg is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_folder() == Path("/home/somebody/.cache/jaxgpt")


@pytest.mark.skipif(os.name != "posix", reason="users are in the passwd database")
def test_a_user_without_a_home_has_a_temporary_cache(monkeypatch):
    """As in a container that runs with the number of an unknown user."""
    import pwd

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert cache_folder().name == f"jaxgpt-{os.getuid()}"


def test_data_folders_come_in_order_and_once(nowhere, own_cache, monkeypatch):
    monkeypatch.setenv("JAXGPT_DATA_DIR", str(nowhere / "env"))
    monkeypatch.setattr(files, "CHECKOUT", nowhere / "place")  # the working directory is the checkout
    found = [os.path.abspath(folder) for folder in data_folders(nowhere / "flag")]
    expected = ["flag", "env", "place/data", "shared/data", "cache/jaxgpt/data"]
    assert found == [str(nowhere / folder) for folder in expected]


# ----------------------------------------------------------------------------------------------------------- downloads


def fetch(remote, said=None):
    return find_or_download(
        remote, "--flag value", data_folders(None), (said if said is not None else []).append, "--flag other"
    )


def test_a_download_is_verified_and_cached(server, own_cache, capfd):
    path = fetch(server.remote)
    assert path == own_cache / "data/tinyshakespeare/input.txt"
    assert path.read_bytes() == server.data
    assert [p.name for p in path.parent.iterdir()] == ["input.txt"]  # no temporary file remains
    assert "tinyshakespeare" in capfd.readouterr().err  # the progress bar
    assert fetch(server.remote) == path
    assert server.requests == ["HEAD", "GET"]  # the second time from the cache


def test_a_download_that_breaks_off_is_tried_again(server):
    server.n_broken = files.DOWNLOAD_RETRIES
    assert fetch(server.remote).read_bytes() == server.data
    assert server.requests.count("GET") == 1 + files.DOWNLOAD_RETRIES


def test_a_download_that_always_breaks_off_leaves_nothing(server, own_cache):
    server.n_broken = 100
    with pytest.raises(NotAvailable, match="--flag value: the download into .* failed .*or use --flag other"):
        fetch(server.remote)
    assert not list((own_cache / "data/tinyshakespeare").iterdir())


def test_a_download_of_another_file_is_refused(server, own_cache):
    server.path.write_bytes(b"Something else")
    with pytest.raises(NotAvailable, match="is not the file .expected sha256 .*try again, or use --flag other"):
        fetch(server.remote)
    assert not list((own_cache / "data/tinyshakespeare").iterdir())


def test_a_cache_that_cannot_be_written_is_reported(server, own_cache):
    own_cache.parent.write_text("a file in the place of the folder")
    with pytest.raises(NotAvailable, match="--flag value: the download into .*put the file there yourself from http"):
        fetch(server.remote)


def test_a_damaged_file_of_the_cache_is_downloaded_again(server, own_cache):
    path, said = own_cache / "data/tinyshakespeare/input.txt", []
    path.parent.mkdir(parents=True)
    path.write_bytes(b"damaged")
    assert fetch(server.remote, said).read_bytes() == server.data
    assert said == [f"{path} is damaged; downloading it again"]


def test_a_host_that_never_answers_is_given_up(monkeypatch):
    def never(*args, **kwargs):
        time.sleep(2)
        raise OSError

    monkeypatch.setattr(files.urllib.request, "urlopen", never)
    begun = time.monotonic()
    assert unreachable_reason("http://x/", seconds=0.2) == "no answer"
    assert time.monotonic() - begun < 1.5


def test_an_error_counts_as_an_answer_if_any_does(server):
    missing = server.remote.url.replace("input", "missing")
    assert unreachable_reason(missing) == "404 File not found"
    assert unreachable_reason(missing, any_answer=True) is None


def test_offline_mode_needs_no_probe(server, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert unreachable_reason(server.remote.url) == "HF_HUB_OFFLINE is set"
    assert not server.requests


def test_a_host_that_does_not_exist_is_named():
    assert unreachable_reason("http://does-not-exist.invalid/") in ("does-not-exist.invalid not found", "no answer")


# ------------------------------------------------------------------------------------------------------------- reading


def test_a_file_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PIECE_BYTES", 4)
    (tmp_path / "x").write_bytes(b"123456789")
    assert list(read_pieces(tmp_path / "x", "--flag x")) == [b"1234", b"5678", b"9"]


@pytest.mark.parametrize("name", ["missing", "nul\0byte"])
def test_a_missing_file_is_not_available(tmp_path, name):
    with pytest.raises(NotAvailable, match="--flag x: no such file; check the path"):
        sha256_of(tmp_path / name, "--flag x")


def test_a_folder_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="--flag x: cannot be read .Is a directory."):
        sha256_of(tmp_path, "--flag x")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="--flag x: a pipe or a device; give a regular file"):
        sha256_of(tmp_path / "pipe", "--flag x")


def test_dropping_pages_changes_no_data(tmp_path):
    np.arange(10_000).tofile(tmp_path / "x")
    mapped = np.memmap(tmp_path / "x", np.int64, "r")
    for array in (mapped, mapped[5:], np.arange(10_000)):
        before = array.tolist()
        drop_mapped_pages(array)
        assert array.tolist() == before


# ------------------------------------------------------------------------------------------------------ atomic writing


def test_atomic_folder_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "new/folder"
    with atomic_folder(path) as partial:
        (partial / "x").write_text("x")
        assert not path.exists()
    assert [p.name for p in path.iterdir()] == ["x"]
    assert list(path.parent.iterdir()) == [path]


def test_atomic_folder_replaces_the_one_before(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/old").touch()
    with atomic_folder(tmp_path / "folder") as partial:
        (partial / "new").touch()
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["new"]


def test_atomic_folder_leaves_nothing_after_an_error(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "folder") as partial:
        (partial / "x").touch()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_atomic_folder_removes_what_a_killed_process_left_a_day_ago(tmp_path):
    abandoned, recent = tmp_path / ".folder-abandoned", tmp_path / ".folder-recent"
    for path in (abandoned, recent):
        path.mkdir()
    a_day_ago = time.time() - files.ABANDONED_SECONDS - 60
    os.utime(abandoned, (a_day_ago, a_day_ago))
    with atomic_folder(tmp_path / "folder"):
        pass
    assert not abandoned.exists()
    assert recent.exists()  # another process may be writing it


@pytest.mark.parametrize("write", ["replace", "write"])
def test_a_file_is_replaced_whole(tmp_path, write):
    path = tmp_path / "x"
    path.write_text("old")
    if write == "replace":
        with atomic_replace(path) as partial:
            partial.write_text("new")
            assert path.read_text() == "old"
    else:
        atomic_write(path, b"new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_replace_leaves_the_old_file_after_an_error(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_replace(path) as partial:
        partial.write_text("new")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_leaves_the_old_file_after_an_error(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("no room")

    path = tmp_path / "x"
    path.write_text("old")
    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="no room"):
        atomic_write(path, b"new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_remote_file_is_found_in_the_first_folder_that_has_it(nowhere, server):
    remote = RemoteFile("http://127.0.0.1:9/x", server.remote.sha256, "x")
    for folder in ("b", "c"):
        (nowhere / folder).mkdir()
        (nowhere / folder / "x").write_bytes(server.data)
    folders = [nowhere / folder for folder in ("a", "b", "c")]
    assert find_or_download(remote, "--flag x", folders, print, "--flag y") == nowhere / "b/x"
