"""jit and pmap, on one device and several, with a sharded state and with accumulation, are the same training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


# float32: sums over other groupings of rows; 3 units in the last place measured, of the 4 that 1e-6 allows.
# Dropout as well: its masks belong to rows, so they do not depend on the devices either.
@pytest.mark.parametrize(
    "dtype, dropout, tolerance",
    [
        pytest.param("float64", 0, 1e-10, marks=pytest.mark.slow),
        pytest.param("float32", 0, 1e-6, marks=pytest.mark.slow),
        pytest.param("float64", 0.2, 1e-10, marks=pytest.mark.slow),
    ],
)
def test_one_device_and_several_give_the_same_losses(tmp_path, dtype, dropout, tolerance):
    script = Path(__file__).with_name("device_losses.py")
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    out = subprocess.run(
        [sys.executable, script, dtype, str(dropout), tmp_path], env=env, capture_output=True, text=True, check=True
    )
    runs = json.loads(out.stdout)
    one = runs["jit 1  1"]
    assert len(one["loss"]) == 50 and len(set(one["loss"])) == 50 and np.isfinite(one["loss"]).all()
    assert max(one["grad_norm"]) > 0.1  # the clip was at work
    assert len(runs) == 10
    for run in runs.values():
        assert not run["shapes_have_device_axis"] and run["step"] == 50 and run["count"] == 80 * 24
        np.testing.assert_allclose(run["loss"], one["loss"], rtol=0, atol=tolerance)
        np.testing.assert_allclose(run["grad_norm"], one["grad_norm"], rtol=tolerance)
        np.testing.assert_allclose(run["whole"], one["whole"], rtol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["sgd", "tied head", "classification", "skipped updates", "bfloat16", "no clip"])
def test_a_sharded_state_trains_the_same(case):
    """With each optimizer, head, task and dtype; beyond the rounding of sums, nothing depends on the devices."""
    script = Path(__file__).with_name("sharded_losses.py")
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, script, case], env=env, capture_output=True, text=True, check=True)
    one, *sharded = (np.array(rows) for rows in json.loads(done.stdout).values())
    losses = one[:, 0]
    assert len(sharded) == 2 and losses[-1] < losses[0] - 0.05 and len(set(losses)) == len(losses)
    # float64: sums in another order, 1e-16 each, which Adam amplifies. bfloat16 rounds products by 4e-3, and sums in
    # another order move some of them by that; a gradient's norm follows more of them than the loss.
    for_losses, for_norms = (5e-3, 0.1) if case == "bfloat16" else (1e-8, 1e-8)
    for rows in sharded:
        np.testing.assert_allclose(rows[:, 0], losses, rtol=for_losses)
        np.testing.assert_allclose(rows[:, 1], one[:, 1], rtol=for_norms)
        np.testing.assert_array_equal(rows[:, 2:], one[:, 2:])
    if case == "skipped updates":
        assert 0 < one[:, 2].sum() < len(one)
    elif case == "no clip":
        assert one[:, 1].max() > 0.2  # where the other cases clip


@pytest.mark.slow
def test_a_checkpoint_of_any_layout_goes_on_in_any_other(tmp_path):
    """8 devices to 1, fsdp 4 to data 2, and others: the state to the last bit, and the same next 20 losses."""
    script = Path(__file__).with_name("restored_layouts.py")
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, script, tmp_path], env=env, capture_output=True, text=True, check=True)
    pairs = json.loads(done.stdout)
    assert len(pairs) == 4
    for pair in pairs:
        assert pair["equal"] and len(set(pair["losses"])) == 20
        # float64: sums in another order, 1e-16 each, which Adam amplifies.
        np.testing.assert_allclose(pair["losses"], pair["expected"], rtol=0, atol=1e-10)
