"""Loaders deliver the sampler's batches, from the device or from the host, and from files larger than the memory."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxgpt.config import ModelConfig, TrainConfig
from jaxgpt.data import sampler
from jaxgpt.data.loader import DeviceLoader, ExampleLoader, HostLoader, make_loader
from jaxgpt.data.sampler import PADDING, BatchSampler, ExampleSampler
from jaxgpt.errors import UserError


def batch_sampler(packing="chunks", n_tokens=200, batch_size=3, block_size=16):
    config = TrainConfig(packing=packing, batch_size=batch_size, model=ModelConfig(block_size=block_size))
    return BatchSampler(config, n_tokens)


@pytest.mark.parametrize("packing", ["windows", "chunks"])
def test_the_host_loader_gives_the_same_batches(packing):
    tokens = np.random.default_rng(0).integers(0, 500, 300).astype(np.uint16)
    host = HostLoader(tokens, batch_sampler(packing, 300))
    device = DeviceLoader(tokens, batch_sampler(packing, 300), lambda x: x)
    try:
        for step, n_steps in [(0, 0), (0, 1), (1, 5), (6, 40), (3, 2), (100, 7)]:  # in a row, and begun anew
            source, other = host.take(step, n_steps), device.take(step, n_steps)
            for k in range(n_steps):
                cut = sampler.windows(tokens, other.start_KB[k], 16)
                np.testing.assert_array_equal(source.window_KBT[k], cut)
            assert source.window_KBT.shape[0] == host.max_steps
    finally:
        host.close()
    assert host._thread is None


def test_the_shape_of_a_source_does_not_depend_on_the_number_of_steps():
    device = DeviceLoader(np.zeros(300, np.uint16), batch_sampler("windows", 300), lambda x: x)
    examples = ExampleLoader(np.zeros((9, 4), np.int32), np.zeros(9, np.int32), ExampleSampler(0, 9, 3), lambda x: x)
    assert device.take(0, 0).start_KB.shape == device.take(5, 7).start_KB.shape == (device.max_steps, 3)
    assert examples.take(0, 0).row_KB.shape == examples.take(5, 7).row_KB.shape == (examples.max_steps, 3)


def test_the_example_loader_gives_the_samplers_rows():
    rows = ExampleSampler(0, 20, 8)
    source = ExampleLoader(np.zeros((20, 4), np.int32), np.zeros(20, np.int32), rows, lambda x: x).take(4, 3)
    for k in range(3):
        np.testing.assert_array_equal(source.row_KB[k], rows.rows(4 + k))
    assert (source.row_KB[3:] == PADDING).all()


def test_an_exception_in_the_host_loaders_thread_is_raised_by_take():
    host = HostLoader(np.zeros(20, np.uint16), batch_sampler("chunks", 300))
    with pytest.raises(IndexError):
        host.take(0, 4)
    host.close()


class ManyTokens:
    """As many tokens as a mapped file can hold, without the file."""

    dtype, nbytes = np.dtype(np.uint16), 2**32

    def __len__(self):
        return 2**31


@pytest.mark.parametrize("where, kind", [("auto", DeviceLoader), ("device", DeviceLoader), ("host", HostLoader)])
def test_few_tokens_lie_where_they_are_asked_for(where, kind):
    loader = make_loader(np.zeros(300, np.uint16), batch_sampler(), lambda x: x, 600, where)
    assert isinstance(loader, kind)


def test_many_tokens_stay_on_the_host():
    assert isinstance(make_loader(np.zeros(300, np.uint16), batch_sampler(), lambda x: x, 599, "auto"), HostLoader)
    assert isinstance(make_loader(ManyTokens(), batch_sampler(), lambda x: x, 2**40, "auto"), HostLoader)
    with pytest.raises(UserError, match="--loader device: 2,147,483,648 tokens are more than it can number"):
        make_loader(ManyTokens(), batch_sampler(), lambda x: x, 2**40, "device")


# ------------------------------------------------------------------------------------- files larger than the memory

N_MAPPED = 2**25  # 64 MiB of uint16


@pytest.fixture(scope="module")
def mapped_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("mapped") / "tokens.bin"
    np.resize(np.arange(50_000, dtype=np.uint16), N_MAPPED).tofile(path)
    yield path
    path.unlink()


def resident_mib(path):
    mapping = Path("/proc/self/smaps").read_text().split(str(path))[1]
    return int(re.search(r"Rss: +(\d+) kB", mapping)[1]) / 1024


def read_by_windows(mapped_N):
    start_JB = np.random.default_rng(0).integers(0, N_MAPPED - 30, (500, 8))
    for start_B, window_BT in zip(start_JB, sampler.read_windows(mapped_N, start_JB, 16), strict=True):
        np.testing.assert_array_equal(window_BT, (start_B[:, None] + np.arange(17) + 5) % 50_000)
        yield


def read_whole_split(mapped_N):
    for _ in sampler.whole_split(mapped_N, 8, 2**13):
        yield


def read_by_host_loader(mapped_N):
    host = HostLoader(mapped_N, batch_sampler("chunks", len(mapped_N), batch_size=8, block_size=2**13))
    for step in range(500):
        host.take(step, 1)
        yield
    host.close()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what is resident")
@pytest.mark.parametrize("read", [read_by_windows, read_whole_split, read_by_host_loader])
def test_a_mapped_file_is_read_without_holding_it(mapped_file, monkeypatch, read):
    most = []
    for max_windows in (2**30, 8):  # 8 are 16 MiB at most, and half a MiB of single pages
        monkeypatch.setattr(sampler, "MAX_MAPPED_WINDOWS", max_windows)
        mapped_N = np.memmap(mapped_file, np.uint16, "r")[5:]  # as a split is a part of its file
        most.append(max(resident_mib(mapped_file) for step, _ in enumerate(read(mapped_N)) if step % 25 == 0))
        del mapped_N
    assert most[1] < most[0] / 2
