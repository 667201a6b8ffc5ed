"""Manifests: digests of files, and a form that no accident leaves readable."""

import os

import pytest

from jaxgpt.runs import manifest
from jaxgpt.runs.files import Unreadable
from jaxgpt.runs.manifest import FileDigest, Manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a").write_bytes(b"abc" * 1_000_000)
    (tmp_path / "inner" / "b").write_bytes(b"")
    return tmp_path


@pytest.fixture
def digests(folder):
    return manifest.digest_files(folder, ["a", "inner/b", "missing"])


def test_digests_are_those_of_xxhash_and_of_the_files_that_exist(digests):
    assert digests == {
        "a": FileDigest(3_000_000, manifest.digest(b"abc" * 1_000_000)),
        "inner/b": FileDigest(0, "99aa06d3014798d86001c324468d497f"),  # XXH3-128 of nothing, by its specification
    }


def test_a_manifest_is_read_as_it_was_written(folder, digests):
    written = Manifest(7, digests, {"config.json": "00"}, {"steps.csv": FileDigest(3, "11")}, 1.25, True, (1, 7))
    manifest.write(folder / manifest.NAME, written)
    assert manifest.read(folder / manifest.NAME) == written


def test_no_flipped_bit_and_no_cut_leaves_a_manifest_readable(folder, digests):
    path = folder / manifest.NAME
    manifest.write(path, Manifest(7, digests, {}))
    content = path.read_bytes()
    for at in range(len(content)):
        for damaged in (content[:at], content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :]):
            path.write_bytes(damaged)
            if damaged == content[:-1]:  # without its last line end
                assert manifest.read(path).step == 7
                continue
            with pytest.raises(Unreadable):
                manifest.read(path)


def test_what_differs_is_named(folder, digests):
    assert manifest.first_difference(folder, digests) is None
    (folder / "a").write_bytes(b"abc" * 999_999 + b"abd")
    assert manifest.first_difference(folder, digests) == "a is not as it was written"
    (folder / "a").write_bytes(b"abc")
    assert manifest.first_difference(folder, digests) == "a has 3 bytes instead of 3,000,000"
    (folder / "a").unlink()
    assert manifest.first_difference(folder, digests) == "a is missing"
    os.mkfifo(folder / "a")
    assert "a" in manifest.first_difference(folder, {"a": FileDigest(0, "")})
    (folder / "a").unlink()
    (folder / "inner" / "b").unlink()
    (folder / "inner" / "b").symlink_to("/dev/null")
    (folder / "a").write_bytes(b"abc" * 1_000_000)
    assert "inner/b" in manifest.first_difference(folder, digests)


def test_a_file_that_went_on_has_its_beginning(folder, digests):
    with (folder / "a").open("ab") as f:
        f.write(b"more")
    assert manifest.first_difference(folder, digests) == "a has 3,000,004 bytes instead of 3,000,000"
    assert manifest.first_difference(folder, digests, beginning=True) is None
    (folder / "a").write_bytes(b"abc")
    assert manifest.first_difference(folder, digests, beginning=True) == "a has 3 bytes instead of 3,000,000"
