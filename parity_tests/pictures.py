"""The picture of both trajectories and their difference."""

from pathlib import Path

import numpy as np

from parity_tests.checks.trajectories import (
    SEEDS,
    cases,
    flax_float64,
    float32_case,
    float32_trajectories,
    torch_trajectory,
)


def trajectories(path: Path, quick: bool) -> None:
    """Both loss curves above, their distance from float64 below, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    case64 = next(case for case in cases(quick) if quick or case.name == "minigpt")
    ours64, truth64 = flax_float64(case64), torch_trajectory(case64, "float64")
    seeds = range(1 if quick else SEEDS)
    runs = [float32_trajectories(seed, quick) for seed in seeds]
    name = float32_case(0, quick).name
    steps = np.arange(1, len(truth64.losses) + 1)

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 8), sharex=True, layout="constrained")
    ours, theirs, truth = runs[0]
    top.plot(steps, theirs.losses, color="#c0392b", linewidth=5, alpha=0.35, label="PyTorch, float32")
    top.plot(steps, ours.losses, color="#1f4e79", linewidth=1.2, label="jaxgpt, float32")
    top.set_ylabel("train loss (nats per token)")
    top.set_title(f"{name}: 100 updates from the same weights on the same batches")
    top.legend()

    def spread(index: int) -> np.ndarray:
        gaps = [np.abs(np.array(run[index].losses) - np.array(run[2].losses)) for run in runs]
        return np.sqrt(np.mean(np.square(gaps), axis=0))

    floor = 1e-17
    bottom.semilogy(steps, np.maximum(spread(1), floor), color="#c0392b", label="PyTorch in float32 against float64")
    bottom.semilogy(steps, np.maximum(spread(0), floor), color="#1f4e79", label="jaxgpt in float32 against float64")
    gap64 = np.abs(np.array(ours64.losses) - np.array(truth64.losses))
    label = f"jaxgpt against PyTorch, both in float64 ({case64.name})"
    bottom.semilogy(steps, np.maximum(gap64, floor), ".", color="#2e7d32", markersize=4, label=label)
    bottom.axhline(1e-10, color="#555555", linestyle=":", linewidth=1)
    bottom.text(steps[-1], 1.3e-10, "tolerance in float64", ha="right", va="bottom", fontsize=9, color="#555555")
    bottom.set_ylabel("difference of the loss")
    bottom.set_xlabel(
        f"update (float32: root mean square over {len(runs)} seed{'s' if len(runs) > 1 else ''}; 0 drawn at 1e-17)"
    )
    bottom.set_ylim(floor / 2, 1e-4)
    bottom.legend(loc="center", bbox_to_anchor=(0.5, 0.36), fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)
