"""Batches are a function of (seed, step), uniform over the text, and shifted by one."""

from itertools import islice

import jax
import numpy as np
import pytest

from jaxgpt.config import ModelConfig, TrainConfig
from jaxgpt.data import sampler
from jaxgpt.data.sampler import PADDING, ExampleSampler, ShardSampler, file_order
from jaxgpt.data.shards import Shard, TokenShards


def starts(seed, step, n_tokens=1000, batch_size=8, block_size=16):
    return np.asarray(
        sampler.window_starts(sampler.stream_key(seed, sampler.TRAIN), step, n_tokens, batch_size, block_size)
    )


def test_the_same_step_sees_the_same_batch():
    expected = [starts(1, step) for step in range(5)]
    for step in (3, 0, 4, 1, 2):
        np.testing.assert_array_equal(starts(1, step), expected[step])
        np.testing.assert_array_equal(jax.jit(lambda s: starts_traced(s))(step), expected[step])
    assert not np.array_equal(expected[0], expected[1]) and not np.array_equal(starts(2, 0), expected[0])


def starts_traced(step):
    return sampler.window_starts(sampler.stream_key(1, sampler.TRAIN), step, 1000, 8, 16)


def test_starts_do_not_change_between_versions():
    """A run resumed after an upgrade must see the batches it would have seen: a change here breaks that promise."""
    np.testing.assert_array_equal(starts(1337, 0, n_tokens=1003854, batch_size=4, block_size=128), PINNED)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(starts(1337, 0, n_tokens=1003854, batch_size=4, block_size=128), PINNED)


PINNED = [492565, 29910, 950499, 169577]


def test_permutations_do_not_change_between_versions():
    assert sampler.epoch_permutations(1337, 517)(3)[:5].tolist() == [327, 476, 293, 425, 196]


def test_every_window_is_drawn_equally_often():
    """Of 20 tokens and a block of 16 there are the windows 0..3, the last of which ends with the text."""
    drawn = np.concatenate([starts(0, step, n_tokens=20, batch_size=1000) for step in range(10)])
    counts = np.bincount(drawn, minlength=4)
    assert len(counts) == 4
    assert np.abs(counts - 2500).max() < 5 * np.sqrt(2500 * 0.75)  # five standard deviations


def test_targets_are_inputs_shifted_by_one():
    tokens = np.arange(100, dtype=np.uint8)
    idx_BT, target_BT = sampler.inputs_and_targets(sampler.windows(tokens, np.array([0, 83]), 16))
    np.testing.assert_array_equal(idx_BT, [range(16), range(83, 99)])
    np.testing.assert_array_equal(target_BT, [range(1, 17), range(84, 100)])


@pytest.mark.parametrize("stride", [None, 1, 5, 15, 16])
@pytest.mark.parametrize("n_tokens", [17, 18, 32, 33, 100, 129])
def test_whole_split_counts_each_target_once(n_tokens, stride):
    tokens = np.arange(n_tokens)
    counted, context = [], []
    for window_BT, counts_BT in sampler.whole_split(tokens, 3, 16, stride):
        assert window_BT.shape == (3, 17) and counts_BT.shape == (3, 16)
        counted += window_BT[:, 1:][counts_BT].tolist()
        context += (np.arange(1, 17) * np.ones((3, 1)))[counts_BT].tolist()  # tokens before each
    n_counted = (n_tokens - 1) // 16 * 16 if stride is None else n_tokens - 1  # the ragged rest is left out, or not
    assert counted == list(range(1, n_counted + 1))
    if stride:
        assert all(seen >= min(target, 16 - stride + 1) for target, seen in zip(counted, context, strict=True))


def batch_sampler(packing="chunks", n_tokens=200, **values):
    config = TrainConfig(packing=packing, batch_size=3, model=ModelConfig(block_size=16), **values)
    return sampler.BatchSampler(config, n_tokens)


def test_an_epoch_is_a_permutation_of_all_chunks():
    """200 tokens: 12 chunks, starts 0, 16, ... 176, so four steps of three."""
    one = batch_sampler()
    assert one.steps_per_epoch == 4
    epochs = [one.starts(4 * e, 4).ravel().tolist() for e in range(3)]
    assert all(sorted(epoch) == list(range(0, 192, 16)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])
    np.testing.assert_array_equal(one.starts(2, 7), one.starts(0, 12)[2:9])  # across the border
    np.testing.assert_array_equal(batch_sampler().starts(9, 1), one.starts(9, 1))  # whatever came before
    assert not np.array_equal(batch_sampler(seed=5).starts(0, 4), one.starts(0, 4))


@pytest.mark.parametrize("n_tokens, n_chunks", [(145, 9), (146, 10), (160, 10), (161, 10), (162, 11)])
def test_chunks_are_the_documented_ones(n_tokens, n_chunks):
    """start in range(0, N - T, T); a ragged last batch is left out."""
    one = batch_sampler(n_tokens=n_tokens)
    assert one.steps_per_epoch == len(range(0, n_tokens - 16, 16)) // 3
    assert one.starts(0, one.steps_per_epoch).max() <= 16 * (n_chunks - 1)


def test_random_windows_are_those_of_window_starts():
    one = batch_sampler("windows", n_tokens=1000, seed=1)
    assert one.steps_per_epoch is None
    for step in (0, 1023, 1024, 5000):
        expected = sampler.window_starts(sampler.stream_key(1, sampler.TRAIN), step, 1000, 3, 16)
        np.testing.assert_array_equal(one.starts(step, 1)[0], expected)


def test_documents_of_a_window():
    idx_BT = np.array([[5, 9, 7, 7, 9, 9, 3], [9, 1, 2, 3, 4, 5, 6]])
    document_BT, position_BT = sampler.documents(idx_BT, 9)
    assert document_BT.tolist() == [[0, 0, 1, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]
    assert position_BT.tolist() == [[0, 1, 0, 1, 2, 0, 0], [0, 0, 1, 2, 3, 4, 5]]


def test_every_epoch_takes_every_example_once():
    examples = ExampleSampler(0, 20, 8)
    assert examples.steps_per_epoch == 3
    epochs = [np.concatenate([examples.rows(3 * e + k) for k in range(3)]) for e in range(2)]
    for row in epochs:
        assert sorted(row[row != PADDING]) == list(range(20)) and (row[20:] == PADDING).all()
    assert epochs[0].tolist() != epochs[1].tolist()
    np.testing.assert_array_equal(ExampleSampler(0, 20, 8).rows(4), examples.rows(4))


def test_evaluated_windows_count_all_their_targets():
    (batch,) = sampler.eval_windows(np.arange(100), np.array([[3, 50]]), 16)
    assert batch.window_BT.tolist() == [list(range(3, 20)), list(range(50, 67))]
    assert batch.counts_BT.shape == (2, 16) and batch.counts_BT.all()


# --------------------------------------------------------------------------------------------------------------- shards


class CountedShards(TokenShards):
    """Shards whose tokens are all different; `known` says of how many of them the counts are known."""

    dtype = np.dtype(np.int64)

    def __init__(self, sizes, known=0):
        self.sizes, self.n_files, self.known = sizes, len(sizes), known
        self.opened = []

    def known_counts(self, file):
        before = sum(map(len, self.sizes[:file]))
        counts = self.sizes[file][: max(0, self.known - before)]
        return counts, len(counts) == len(self.sizes[file]) and self.known > before

    def read(self, passes, first):
        for epoch, file in passes:
            for number in range(first, len(self.sizes[file])):
                start = 10**6 * file + 10**4 * number
                self.opened.append((epoch, file, number))
                yield Shard(epoch, file, number, np.arange(start, start + self.sizes[file][number]))
            first = 0

    def close(self):
        pass


SIZES = [[100, 57, 3], [], [81, 80, 0, 200], [33], [64, 65]]
N_WINDOWS = sum((n - 1) // 8 for sizes in SIZES for n in sizes if n > 8)


def shard_sampler(shards, rows=slice(None), batch_size=6, **values):
    config = TrainConfig(packing="chunks", batch_size=batch_size, model=ModelConfig(block_size=8), **values)
    return ShardSampler(config, shards, rows)


def first_batches(n, step=0, known=0, **values):
    return np.array(list(islice(shard_sampler(CountedShards(SIZES, known), **values).batches(step), n)))


def test_every_epoch_of_shards_has_every_window_once():
    """A window's first token tells which it is; batches go on from shard to shard and from epoch to epoch."""
    starts_W = first_batches(3 * N_WINDOWS // 6 + 1)[:, :, 0].ravel()
    shards = [(file, number, n) for file, sizes in enumerate(SIZES) for number, n in enumerate(sizes)]
    expected = {10**6 * file + 10**4 * number + t for file, number, n in shards for t in range(0, n - 8, 8)}
    assert len(expected) == N_WINDOWS
    epochs = [starts_W[N_WINDOWS * e : N_WINDOWS * (e + 1)].tolist() for e in range(3)]
    for epoch in epochs:
        assert len(epoch) == N_WINDOWS and set(epoch) == expected
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0][0] < 10**6  # the first file first
    windows_BT = first_batches(5).reshape(-1, 9)
    np.testing.assert_array_equal(windows_BT, windows_BT[:, :1] + np.arange(9))


@pytest.mark.parametrize("known", range(0, 12))
def test_a_resumed_run_sees_the_same_batches_of_shards(known):
    """From any step, whatever is known of the shards."""
    whole = first_batches(40)
    for step in (0, 1, 7, 9, 10, 11, 23, 30):
        np.testing.assert_array_equal(first_batches(3, step, known), whole[step : step + 3])


def test_shards_before_the_position_are_not_opened_if_their_counts_are_known():
    shards = CountedShards(SIZES, 10)
    next(shard_sampler(shards).batches(11))
    order = [(0, file, number) for file in file_order(5, 1337, 0) for number in range(len(SIZES[file]))]
    assert len(shards.opened) < 4 and shards.opened[0] != order[0] and set(shards.opened) <= set(order)


def test_rows_of_a_batch_are_those_of_the_whole_batch():
    whole = first_batches(20)
    for cuts in ([0, 3, 6], [0, 1, 2, 5, 6]):
        parts = [first_batches(20, rows=slice(a, b)) for a, b in zip(cuts, cuts[1:], strict=False)]
        assert [part.shape[1] for part in parts] == np.diff(cuts).tolist()
        np.testing.assert_array_equal(np.concatenate(parts, 1), whole)


def test_batches_of_shards_depend_on_the_seed_and_not_on_the_version():
    assert not np.array_equal(first_batches(1), first_batches(1, seed=1))
    assert first_batches(1, seed=7)[0, :, 0].tolist() == PINNED_SHARDS
    assert [file_order(6, 3, epoch) for epoch in (0, 1)] == PINNED_ORDERS


PINNED_SHARDS = [64, 32, 24, 48, 16, 8]
PINNED_ORDERS = [[0, 1, 2, 5, 4, 3], [5, 3, 0, 1, 2, 4]]
