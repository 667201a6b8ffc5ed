"""Batches are a function of (seed, step), uniform over the text, and shifted by one."""

import jax
import numpy as np

from jaxgpt import batches


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


def test_every_window_is_drawn_equally_often():
    """Of 20 tokens and a block of 16 there are the windows 0..3, the last of which ends with the text."""
    drawn = np.concatenate([starts(0, step, n_tokens=20, batch_size=1000) for step in range(10)])
    counts = np.bincount(drawn, minlength=4)
    assert len(counts) == 4
    assert np.abs(counts - 2500).max() < 5 * np.sqrt(2500 * 0.75)  # five standard deviations


def test_targets_are_inputs_shifted_by_one():
    tokens = np.arange(100, dtype=np.uint8)
    idx_BT, target_BT = batches.windows(tokens, np.array([0, 83]), 16)
    np.testing.assert_array_equal(idx_BT, [range(16), range(83, 99)])
    np.testing.assert_array_equal(target_BT, [range(1, 17), range(84, 100)])


def test_whole_split_covers_each_target_once():
    for n_tokens in (17, 32, 33, 100, 129):
        start_JB, real_JB = batches.whole_split_starts(n_tokens, batch_size=3, block_size=16)
        assert start_JB.shape[1] == 3
        real = start_JB[real_JB]
        np.testing.assert_array_equal(real, 16 * np.arange((n_tokens - 1) // 16))  # the ragged rest is left out


def test_tokens_take_the_smallest_type():
    tokens = np.array([0, 64])
    assert [batches.device_tokens(tokens, v).dtype for v in (256, 257, 65537)] == [np.uint8, np.uint16, np.int32]
