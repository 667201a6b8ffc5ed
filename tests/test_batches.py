"""Batches are a function of (seed, step), uniform over the text, and shifted by one."""

import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxgpt import batches
from jaxgpt.config import ModelConfig, TrainConfig
from jaxgpt.loader import DeviceLoader, HostLoader


def starts(seed, step, n_tokens=1000, batch_size=8, block_size=16):
    return np.asarray(
        batches.window_starts(batches.stream_key(seed, batches.TRAIN), step, n_tokens, batch_size, block_size)
    )


def test_the_same_step_sees_the_same_batch():
    expected = [starts(1, step) for step in range(5)]
    for step in (3, 0, 4, 1, 2):
        np.testing.assert_array_equal(starts(1, step), expected[step])
        np.testing.assert_array_equal(jax.jit(lambda s: starts_traced(s))(step), expected[step])
    assert not np.array_equal(expected[0], expected[1]) and not np.array_equal(starts(2, 0), expected[0])


def starts_traced(step):
    return batches.window_starts(batches.stream_key(1, batches.TRAIN), step, 1000, 8, 16)


def test_starts_do_not_change_between_versions():
    """A run resumed after an upgrade must see the batches it would have seen: a change here breaks that promise."""
    np.testing.assert_array_equal(starts(1337, 0, n_tokens=1003854, batch_size=4, block_size=128), PINNED)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(starts(1337, 0, n_tokens=1003854, batch_size=4, block_size=128), PINNED)


PINNED = [492565, 29910, 950499, 169577]


def test_the_order_of_chunks_does_not_change_between_versions():
    assert batches.epoch_orders(1337, 517)(3)[:5].tolist() == [327, 476, 293, 425, 196]


def test_every_window_is_drawn_equally_often():
    """Of 20 tokens and a block of 16 there are the windows 0..3, the last of which ends with the text."""
    drawn = np.concatenate([starts(0, step, n_tokens=20, batch_size=1000) for step in range(10)])
    counts = np.bincount(drawn, minlength=4)
    assert len(counts) == 4
    assert np.abs(counts - 2500).max() < 5 * np.sqrt(2500 * 0.75)  # five standard deviations


def test_targets_are_inputs_shifted_by_one():
    tokens = np.arange(100, dtype=np.uint8)
    idx_BT, target_BT = batches.inputs_and_targets(batches.windows(tokens, np.array([0, 83]), 16))
    np.testing.assert_array_equal(idx_BT, [range(16), range(83, 99)])
    np.testing.assert_array_equal(target_BT, [range(1, 17), range(84, 100)])


@pytest.mark.parametrize("stride", [None, 1, 5, 15, 16])
@pytest.mark.parametrize("n_tokens", [17, 18, 32, 33, 100, 129])
def test_whole_split_counts_each_target_once(n_tokens, stride):
    tokens = np.arange(n_tokens)
    counted, context = [], []
    for window_BT, counts_BT in batches.whole_split(tokens, 3, 16, stride):
        assert window_BT.shape == (3, 17) and counts_BT.shape == (3, 16)
        counted += window_BT[:, 1:][counts_BT].tolist()
        context += (np.arange(1, 17) * np.ones((3, 1)))[counts_BT].tolist()  # tokens before each
    n_counted = (n_tokens - 1) // 16 * 16 if stride is None else n_tokens - 1  # the ragged rest is left out, or not
    assert counted == list(range(1, n_counted + 1))
    if stride:
        assert all(seen >= min(target, 16 - stride + 1) for target, seen in zip(counted, context, strict=True))


def order(packing="chunks", n_tokens=200, **values):
    config = TrainConfig(packing=packing, batch_size=3, model=ModelConfig(block_size=16), **values)
    return batches.Order(config, n_tokens)


def test_an_epoch_is_every_chunk_once_and_each_has_an_order_of_its_own():
    """200 tokens: 12 chunks, starts 0, 16, ... 176, so four steps of three."""
    one = order()
    assert one.steps_per_epoch == 4
    epochs = [one.starts(4 * e, 4).ravel().tolist() for e in range(3)]
    assert all(sorted(epoch) == list(range(0, 192, 16)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])
    np.testing.assert_array_equal(one.starts(2, 7), one.starts(0, 12)[2:9])  # across the border
    np.testing.assert_array_equal(order().starts(9, 1), one.starts(9, 1))  # whatever came before
    assert not np.array_equal(order(seed=5).starts(0, 4), one.starts(0, 4))


@pytest.mark.parametrize("n_tokens, n_chunks", [(145, 9), (146, 10), (160, 10), (161, 10), (162, 11)])
def test_chunks_are_those_of_the_write_up(n_tokens, n_chunks):
    """start in range(0, N - T, T); a ragged last batch is left out."""
    one = order(n_tokens=n_tokens)
    assert one.steps_per_epoch == len(range(0, n_tokens - 16, 16)) // 3
    assert one.starts(0, one.steps_per_epoch).max() <= 16 * (n_chunks - 1)


def test_random_windows_are_those_of_window_starts():
    one = order("windows", n_tokens=1000, seed=1)
    assert one.steps_per_epoch is None
    for step in (0, 1023, 1024, 5000):
        expected = batches.window_starts(batches.stream_key(1, batches.TRAIN), step, 1000, 3, 16)
        np.testing.assert_array_equal(one.starts(step, 1)[0], expected)


@pytest.mark.parametrize("packing", ["windows", "chunks"])
def test_the_host_loader_gives_the_same_batches(packing):
    tokens = np.random.default_rng(0).integers(0, 500, 300).astype(np.uint16)
    host, device = HostLoader(tokens, order(packing, 300)), DeviceLoader(tokens, order(packing, 300), lambda x: x)
    try:
        for step, n_steps in [(0, 0), (0, 1), (1, 5), (6, 40), (3, 2), (100, 7)]:  # in a row, and begun anew
            feed, other = host.take(step, n_steps), device.take(step, n_steps)
            for k in range(n_steps):
                cut = batches.windows(tokens, other.start_KB[k], 16)
                np.testing.assert_array_equal(feed.window_KBT[k], cut)
            assert feed.window_KBT.shape[0] == host.max_steps
    finally:
        host.close()
    assert host._thread is None


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what is resident")
@pytest.mark.parametrize("reader", ["windows", "whole split", "host loader"])
def test_a_mapped_file_is_read_without_holding_it(tmp_path, monkeypatch, reader):
    n_tokens, path = 2**26, tmp_path / "tokens.bin"  # 128 MiB
    with path.open("wb") as f:
        for at in range(0, n_tokens, 2**20):
            f.write((np.arange(at, at + 2**20) % 50_000).astype(np.uint16).tobytes())

    def resident_mib():
        mapping = Path("/proc/self/smaps").read_text().split(str(path))[1]
        return int(re.search(r"Rss: +(\d+) kB", mapping)[1]) / 1024

    def read(mapped_N):
        if reader == "whole split":
            yield from (scored.window_BT for scored in batches.whole_split(mapped_N, 8, 2**13))
        elif reader == "host loader":
            config = TrainConfig(packing="chunks", batch_size=8, model=ModelConfig(block_size=2**13))
            host = HostLoader(mapped_N, batches.Order(config, len(mapped_N)))
            yield from (host.take(step, 1).window_KBT[0] for step in range(1000))
            host.close()
        else:
            start_JB = np.random.default_rng(0).integers(0, n_tokens - 30, (1000, 8))
            for start_B, window_BT in zip(start_JB, batches.read_windows(mapped_N, start_JB, 16), strict=True):
                np.testing.assert_array_equal(window_BT, (start_B[:, None] + np.arange(17) + 5) % 50_000)
                yield window_BT

    most = []
    for at_once in (2**30, 16):  # 16 are 32 MiB at most, and 1 of single pages
        monkeypatch.setattr(batches, "WINDOWS_MAPPED", at_once)
        mapped_N = np.memmap(path, np.uint16, "r")[5:]  # as a split is a part of its file
        most.append(max(resident_mib() for at, _ in enumerate(read(mapped_N)) if at % 25 == 0))
        del mapped_N
    assert most[1] < most[0] / 2


def test_what_goes_wrong_in_the_host_loaders_thread_is_told():
    host = HostLoader(np.zeros(20, np.uint16), order("chunks", 300))
    with pytest.raises(IndexError):
        host.take(0, 4)
    host.close()


def test_documents_of_a_window():
    idx_BT = np.array([[5, 9, 7, 7, 9, 9, 3], [9, 1, 2, 3, 4, 5, 6]])
    document_BT, position_BT = batches.documents(idx_BT, 9)
    assert document_BT.tolist() == [[0, 0, 1, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]
    assert position_BT.tolist() == [[0, 1, 0, 1, 2, 0, 0], [0, 0, 1, 2, 3, 4, 5]]
