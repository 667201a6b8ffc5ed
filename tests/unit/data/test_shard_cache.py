"""The shard cache: what its workers write, what they refuse, and that damage and interruptions change no token."""

import errno
import multiprocessing
import os
import shutil
from concurrent.futures import Future
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet
from unit.data.samples import config_of, write_hub_folder

from jaxgpt.data import shard_cache, shards
from jaxgpt.data.corpora import load_corpus, streaming_of_run
from jaxgpt.data.files import NotAvailable
from jaxgpt.data.sampler import ShardSampler
from jaxgpt.data.shard_cache import ShardCache, ShardMaker
from jaxgpt.data.shards import digest_of, parquet_files
from jaxgpt.data.token_cache import tokenize_corpus
from jaxgpt.data.tokenizer import ByteTokenizer, make_tokenizer
from jaxgpt.errors import UserError
from tests.hub import COMMIT, NAME, serve

ONE_GROUP = 10  # so few bytes that each row group is a shard
PROCESSES = shard_cache._Workers


class InThisProcess:
    """`_Workers` without processes: a task is done when it is submitted."""

    submitted: list[tuple]

    def __init__(self, work, n_workers):
        self._maker = ShardMaker(work)

    def submit(self, function, *args):
        self.submitted.append((function.__name__, *args))
        future: Future = Future()
        try:
            future.set_result(getattr(self._maker, function.__name__.strip("_"))(*args))
        except Exception as e:
            future.set_exception(e)
        return shard_cache._Task(function, args, None, future)

    def wait(self, task):
        task.future.result()

    def close(self):
        pass


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    InThisProcess.submitted = []
    monkeypatch.setattr(shard_cache, "_Workers", InThisProcess)


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_hub_folder(tmp_path / "corpus", 3)


def cache(folder, tokenizer=None, said=None, **values) -> ShardCache:
    corpus = load_corpus(f"hf:{folder}", None, print, streaming="always")
    say = (lambda line: None) if said is None else said.append
    values = {"min_chars": 0, "n_workers": 1, "shard_bytes": ONE_GROUP, **values}
    return ShardCache(corpus.name, corpus.shards, tokenizer or ByteTokenizer(), np.dtype("<u2"), say=say, **values)


def first_epoch(shards: ShardCache, n_files=3) -> list:
    """All shards of one epoch in the order of the files."""
    passes = ((epoch, file) for epoch in range(10**6) for file in range(n_files))
    read = shards.read(passes, 0)
    found = [next(read)]
    for shard in read:
        if shard.epoch:
            break
        found.append(shard)
    return found


def tokens_of(folder, number) -> list[int]:
    texts = parquet.read_table(sorted(folder.glob("*.parquet"))[number])["text"].to_pylist()
    return [token for text in texts for token in text.encode()]


def test_the_shards_hold_each_token_once_and_the_first_validates(folder):
    shards = cache(folder)
    val_N = shards.validation()
    found = first_epoch(shards)
    assert [(shard.file_number, shard.number) for shard in found] == [
        (file, number) for file in range(3) for number in range(6) if (file, number) != (0, 0)
    ]
    for file in range(3):
        tokens = [val_N] * (file == 0) + [shard.tokens_N for shard in found if shard.file_number == file]
        assert np.concatenate(tokens).tolist() == tokens_of(folder, file)
    counts = [shards.known_counts(file) for file in range(3)]
    assert [len(numbers) for numbers, _ in counts] == [5, 6, 6] and all(complete for _, complete in counts)
    assert sum(counts[1][0]) == len(tokens_of(folder, 1))


def test_row_groups_share_a_shard_up_to_its_size(folder):
    shards = cache(folder, shard_bytes=2**20)
    shards.validation()
    assert [(shard.file_number, shard.number) for shard in first_epoch(shards)] == [(1, 0), (2, 0)]
    assert shard_cache._row_groups_of_shards([5, 5, 5, 20, 1], 10) == [(0, 2), (2, 4), (4, 5)]


def test_texts_end_with_the_end_of_text_and_short_ones_are_left_out(folder, bpe):
    shards = cache(folder, bpe, min_chars=20)
    texts = parquet.read_table(folder / "train-00001-of-00003.parquet")["text"].to_pylist()
    expected = [i for text in texts if len(text) > 20 for i in (*bpe.encode(text), bpe.end_of_text)]
    found = np.concatenate([shard.tokens_N for shard in first_epoch(shards) if shard.file_number == 1])
    assert found.tolist() == expected and len(expected) < sum(len(bpe.encode(text)) + 1 for text in texts)


def test_a_split_to_validate_on_validates(folder):
    shutil.copy(folder / "train-00002-of-00003.parquet", folder / "validation-00000-of-00001.parquet")
    (folder / "train-00002-of-00003.parquet").unlink()
    for number in range(2):
        os.rename(folder / f"train-0000{number}-of-00003.parquet", folder / f"train-0000{number}-of-00002.parquet")
    shards = cache(folder)
    n = len(shards.validation())
    assert shards.validation().tolist() == tokens_of(folder, 2)[:n] and shards.n_files == 2
    assert sum(len(shard.tokens_N) for shard in first_epoch(shards, 2)) == sum(
        len(tokens_of(folder, i)) for i in (0, 1)
    )


def test_what_is_there_is_not_made_again_and_what_is_missing_is(folder):
    shards = cache(folder)
    before = [shard.tokens_N.tolist() for shard in first_epoch(shards)]
    InThisProcess.submitted.clear()
    again = cache(folder)
    assert [shard.tokens_N.tolist() for shard in first_epoch(again)] == before
    assert not [call for call in InThisProcess.submitted if call[0] == "_prepare"]
    for path in again.work.folder.glob("00001-*.bin"):
        path.unlink()
    assert [shard.tokens_N.tolist() for shard in first_epoch(cache(folder))] == before


def flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage, said",
    [
        (flipped, True),
        (lambda path: path.write_bytes(path.read_bytes()[:-2]), True),
        (lambda path: path.write_bytes(b""), True),
        (lambda path: path.unlink(), False),
        (lambda path: path.with_suffix(".json").unlink(), False),
        (lambda path: flipped(path.with_suffix(".json")), False),
        (lambda path: (path.parent / "00001.json").unlink(), False),
        (lambda path: (path.parent / "00001-00003.bin.partial").write_text("half"), False),
    ],
)
def test_damage_is_told_and_changes_no_token(folder, damage, said):
    before = [shard.tokens_N.tolist() for shard in first_epoch(cache(folder))]
    lines: list[str] = []
    shards = cache(folder, said=lines)
    damage(shards.work.tokens(1, 3))
    assert [shard.tokens_N.tolist() for shard in first_epoch(shards)] == before
    assert len(lines) == said and all("00001-00003.bin is damaged; tokenizing it again" in line for line in lines)


def test_tokens_that_come_out_otherwise_than_before_are_refused(folder, monkeypatch):
    shards = cache(folder)
    first_epoch(shards)
    shards.work.tokens(1, 3).unlink()
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, text: np.full(len(text), 7, np.int32))
    with pytest.raises(UserError, match="00001-00003.bin has other tokens than when it was first made"):
        first_epoch(cache(folder))


def test_the_disk_is_bounded_and_the_batches_stay(tmp_path):
    folder, n_steps = write_hub_folder(tmp_path / "corpus", 3, 300), 2000
    config = config_of(packing="chunks")
    whole = cache(folder)
    whole.validation()
    expected = list(islice(ShardSampler(config, whole).batches(0), n_steps))
    shutil.rmtree(whole.work.folder)
    bounded = cache(folder, max_bytes=4000)
    bounded.validation()
    sizes = []
    for step, batch in enumerate(islice(ShardSampler(config, bounded).batches(0), n_steps)):
        np.testing.assert_array_equal(batch, expected[step])
        if step % 20 == 0:
            sizes.append(sum(path.stat().st_size for path in bounded.work.folder.glob("*.bin")))
    total = sum(len(tokens_of(folder, file)) for file in range(3)) * 2
    largest = max(path.stat().st_size for path in bounded.work.folder.glob("*.bin"))
    assert max(sizes) <= 4000 + 5 * largest < total / 2  # validation, the shard read, and those ahead
    resumed = ShardSampler(config, cache(folder, max_bytes=4000))  # from a shard that has been removed
    np.testing.assert_array_equal(next(resumed.batches(100)), expected[100])


# -------------------------------------------------------------------------------------------------------- bad input


def test_a_missing_column_is_told_before_anything_else(folder):
    corpus = load_corpus(f"hf:{folder}", None, print, "body", "always")
    with pytest.raises(
        UserError, match="--text-column body: train-00000-of-00003.parquet: no column 'body'; it has 't"
    ):
        tokenize_corpus(config_of(packing="chunks"), corpus, tokenizer=ByteTokenizer())


def test_a_file_that_changes_or_vanishes_is_told(folder):
    shards = cache(folder)
    shards.validation()
    flipped(folder / "train-00001-of-00003.parquet")
    with pytest.raises(UserError, match="train-00001-of-00003.parquet is another file than the list of the corpus has"):
        first_epoch(shards)
    (folder / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(UserError, match="train-00001-of-00003.parquet is gone; bring it back"):
        first_epoch(shards)
    os.mkfifo(folder / "train-00001-of-00003.parquet")
    with pytest.raises(UserError, match="train-00001-of-00003.parquet cannot be read"):
        first_epoch(shards)


def test_a_full_disk_is_told(folder, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shard_cache, "atomic_replace", full)
    with pytest.raises(UserError, match="cannot be written .No space left on device.; make room there, or set XDG"):
        cache(folder).validation()


def test_a_corpus_without_anything_to_train_on_is_refused(tmp_path):
    folder = write_hub_folder(tmp_path / "small", 1, n_rows=5)
    with pytest.raises(UserError, match="too short to stream: its only shard validates; give --streaming never"):
        cache(folder).validation()
    path = folder / "train-00000-of-00001.parquet"
    parquet.ParquetWriter(path, parquet.read_schema(path)).close()
    with pytest.raises(UserError, match="train-00000-of-00001.parquet has no rows; give a file with texts"):
        cache(folder).validation()


def test_shards_that_are_shorter_than_a_block_are_refused(folder):
    shards = cache(folder)
    with pytest.raises(UserError, match="no shard of the corpus holds a block plus one"):
        next(ShardSampler(config_of(10**6, packing="chunks"), shards).batches(0))
    first_epoch(shards)  # now all counts are known
    with pytest.raises(UserError, match="no shard of the corpus holds a block plus one"):
        next(ShardSampler(config_of(10**6, packing="chunks"), shards).batches(5))


def test_tokenizers_that_need_all_texts_are_refused(folder):
    corpus = load_corpus(f"hf:{folder}", None, print, streaming="always")
    for kind in ("char", "bpe:300"):
        with pytest.raises(UserError, match=f"--tokenizer {kind}: is made from all texts, and .* is streamed"):
            make_tokenizer(kind, corpus)


def test_other_datasets_are_not_streamed():
    with pytest.raises(UserError, match="--streaming always: pydoc is no dataset hf:NAME"):
        load_corpus("pydoc", None, print, streaming="always")
    assert load_corpus("pydoc", None, print, streaming="auto").shards is None


def test_a_run_of_an_earlier_version_goes_on_without_streaming(folder):
    assert streaming_of_run("hf:a/b", "auto") == streaming_of_run("hf:a/b:c", "auto") == "never"
    for name in (f"hf:a/b:c@{COMMIT}", f"hf:{folder}", "pydoc"):
        assert streaming_of_run(name, "auto") == "auto"
    assert streaming_of_run("hf:a/b", "always") == "always"


def test_only_large_datasets_are_streamed_unasked(folder, monkeypatch):
    assert load_corpus(f"hf:{folder}", None, print, streaming="auto").shards is None
    monkeypatch.setattr("jaxgpt.data.corpora.STREAMED_BYTES", 1000)
    corpus = load_corpus(f"hf:{folder}", None, print, streaming="auto")
    assert corpus.shards and corpus.name == f"hf:{folder}"
    assert load_corpus(f"hf:{folder}", None, print, streaming="never").shards is None


# -------------------------------------------------------------------------------------------------------- downloads


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the hub with a corpus of three files, and the waits between two downloads."""
    folder = write_hub_folder(tmp_path / "hub/data", 3)
    (tmp_path / "hub/README.md").write_text("A corpus.")
    monkeypatch.setattr(shard_cache.time, "sleep", lambda seconds: None)
    with serve(tmp_path / "hub") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub
    assert folder.is_dir()


def downloaded(hub, **values) -> ShardCache:
    urls = [f"hf://datasets/{NAME}@{COMMIT}/data/train-{number:05}-of-00003.parquet" for number in range(3)]
    files = parquet_files({"train": urls}, "", "text", hub.url)
    assert (files.repo, files.revision) == (NAME, COMMIT)
    values = {"min_chars": 0, "say": print, "n_workers": 1, "shard_bytes": ONE_GROUP, **values}
    return ShardCache(NAME, files, ByteTokenizer(), np.dtype("<u2"), **values)


def test_downloaded_files_give_the_shards_of_local_ones_and_are_removed(hub):
    local, remote = cache(hub.folder / "data"), downloaded(hub)
    assert remote.work.files.train[0].digest == local.work.files.train[0].digest
    for ours, theirs in zip(first_epoch(remote), first_epoch(local), strict=True):
        assert ours[:3] == theirs[:3] and ours.tokens_N.tolist() == theirs.tokens_N.tolist()
    left = {path.name for path in remote.work.folder.rglob("*.parquet")}
    assert len(left) <= 2 and sorted(set(hub.downloads())) == sorted(
        path.name for path in (hub.folder / "data").iterdir()
    )


def test_a_cut_or_changed_download_is_tried_again(hub):
    hub.n_cut, hub.n_changed = 2, 1
    assert downloaded(hub).validation().tolist() == cache(hub.folder / "data").validation().tolist()
    assert len(hub.downloads()) >= 4
    hub.n_changed = 2
    shutil.rmtree(downloaded(hub).work.folder)
    with pytest.raises(UserError, match="train-00000-of-00003.parquet is another file than the list of the corpus has"):
        downloaded(hub).validation()


def test_a_file_that_the_hub_has_no_longer_is_told_at_once(hub):
    shards = downloaded(hub)
    hub.gone.add("data/train-00000-of-00003.parquet")
    with pytest.raises(NotAvailable, match="cannot be had from .*EntryNotFoundError.*; it is no longer there"):
        shards.validation()
    assert not hub.downloads()[1:]


def test_a_hub_that_does_not_answer_is_told_after_some_attempts(hub, monkeypatch):
    shards = downloaded(hub)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(NotAvailable, match="cannot be had from http://127.0.0.1:9 .*; start again: it goes on"):
        shards.validation()


def test_the_digest_of_a_small_file_of_the_hub_is_its_blobs(hub):
    (file,) = shards._hub_files(NAME, COMMIT, ["README.md"], hub.url)
    assert file.size == 9 and file.digest == digest_of(hub.folder / "README.md", "git")


def test_downloads_of_a_run_that_was_abandoned_are_removed(hub, monkeypatch):
    cache = downloaded(hub)
    path = cache.work.parquet(2)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"left")
    next(cache.read(iter([(0, 0), (0, 1)]), 0))
    assert path.exists()
    os.utime(path, (0, 0))
    next(cache.read(iter([(0, 0), (0, 1)]), 0))
    assert not path.exists()


# -------------------------------------------------------------------------------------------------------- processes


def test_processes_make_the_shards_and_one_that_is_killed_is_replaced(folder, monkeypatch):
    monkeypatch.setattr(shard_cache, "_Workers", PROCESSES)
    expected = [tokens_of(folder, file) for file in range(3)]
    shards = cache(folder)
    read = shards.read(((epoch, file) for epoch in range(9) for file in range(3)), 0)
    try:
        found = [next(read)]
        for process in shards._workers._pool._processes.values():
            process.kill()
        found += [next(read) for _ in range(16)]
    finally:
        shards.close()
    assert np.concatenate([shard.tokens_N for shard in found if shard.file_number == 2]).tolist() == expected[2]
    assert not multiprocessing.active_children()
