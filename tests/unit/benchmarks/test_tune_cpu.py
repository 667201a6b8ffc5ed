"""The choice of thresholds from measured times: no timing here."""

from dataclasses import replace

import pytest

from benchmarks.tune_cpu import (
    GridPoint,
    choose_microbatch_tokens,
    choose_thresholds,
    mean_slowdown,
    relative_times,
)
from jaxgpt.parallel import CpuTuning

PRESENT = CpuTuning(microbatch_tokens=128, min_device_tokens=64, params_per_token=12_000, max_params=2**24)
TOKENS = (64, 256, 1024, 4096)


def grid(is_faster, n_devices=2, sizes=(100_000, 1_000_000, 4_000_000, 18_000_000)):
    """Points where all devices take 0.6 of the time where `is_faster(n_params, tokens)`, and 1.5 elsewhere."""
    return [
        GridPoint(n_params, 8, tokens, {1: 1.0, n_devices: 0.6 if is_faster(n_params, tokens) else 1.5})
        for n_params in sizes
        for tokens in TOKENS
    ]


def test_microbatch_candidates_of_equal_rows_share_a_time():
    rows = [
        {"microbatch_tokens": [32, 64], "over_present": 1.2},
        {"microbatch_tokens": [128, None], "over_present": 1.0},
    ]
    assert relative_times(rows) == {32: 1.2, 64: 1.2, 128: 1.0, None: 1.0}


def test_the_fastest_microbatch_over_all_presets_is_chosen():
    times = [{64: 0.7, 128: 1.0, 256: 0.8, None: 2.0}, {64: 1.4, 128: 1.0, 256: 0.9, None: 2.0}]
    assert choose_microbatch_tokens(times, PRESENT) == 256  # 64 is the fastest of the first alone


def test_all_rows_can_be_the_fastest_microbatch():
    assert choose_microbatch_tokens([{64: 1.1, 128: 1.0, None: 0.5}], PRESENT) is None


def test_a_microbatch_within_the_noise_changes_nothing():
    assert choose_microbatch_tokens([{64: 0.99, 128: 1.0, None: 1.3}], PRESENT) == 128


def test_of_equally_fast_microbatches_the_nearest_to_the_present_is_chosen():
    times = [{32: 0.8, 64: 0.8, 128: 1.0, 512: 0.8, None: 0.8}]
    assert choose_microbatch_tokens(times, PRESENT) == 64


def test_thresholds_that_decide_right_stay():
    points = grid(lambda n_params, tokens: PRESENT.n_devices(n_params, 8, tokens, 2) == 2)
    assert mean_slowdown(points, PRESENT) == 1
    assert choose_thresholds(points, PRESENT) == PRESENT


@pytest.mark.parametrize(
    "truth",
    [
        replace(PRESENT, min_device_tokens=512),
        replace(PRESENT, params_per_token=1_500),
        replace(PRESENT, max_params=2**26),
    ],
)
def test_thresholds_follow_the_measured_times(truth):
    points = grid(lambda n_params, tokens: truth.n_devices(n_params, 8, tokens, 2) == 2)
    assert mean_slowdown(points, PRESENT) > 1.02
    assert mean_slowdown(points, choose_thresholds(points, PRESENT)) == 1


def test_thresholds_that_the_grid_cannot_tell_from_the_present_stay():
    truth = replace(PRESENT, min_device_tokens=512)
    points = grid(lambda n_params, tokens: truth.n_devices(n_params, 8, tokens, 2) == 2, sizes=(100_000,))
    chosen = choose_thresholds(points, PRESENT)
    assert chosen.min_device_tokens > PRESENT.min_device_tokens
    assert (chosen.params_per_token, chosen.max_params) == (PRESENT.params_per_token, PRESENT.max_params)


def test_a_gain_within_the_noise_changes_no_threshold():
    points = [GridPoint(100_000, 8, tokens, {1: 1.0, 2: 1.01}) for tokens in TOKENS]
    assert choose_thresholds(points, PRESENT) == PRESENT


def test_slowdown_is_of_the_number_of_devices_that_the_tuning_takes():
    point = GridPoint(100_000, 8, 512, {1: 1.0, 2: 0.8, 4: 0.5, 8: 0.4})
    assert point.slowdown(PRESENT) == 1  # 64 tokens for each of 8
    assert point.slowdown(replace(PRESENT, min_device_tokens=128)) == pytest.approx(0.5 / 0.4)
    assert point.slowdown(replace(PRESENT, max_params=1000)) == pytest.approx(1 / 0.4)
