"""The figures of `jaxgpt bench` as pictures, and as the measured part of docs/benchmarks.md."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxgpt import strict_json
from jaxgpt.analysis.targets import chip_of

FOLDER = Path(__file__).resolve().parents[1] / "docs"
BEGIN, END = "<!-- measured: written by scripts/bench.py --docs -->", "<!-- end of what is measured -->"


def title_of(result: dict[str, Any]) -> str:
    """The hardware and the versions of a result."""
    m = result["machine"]
    torch = f", PyTorch {m['torch'].split('+')[0]}" if "torch" in m else ""
    return f"{m['device']}, {m['dtype']}, Python {m['python']}, jax {m['jax']}{torch}"


def draw_steps(results: list[dict[str, Any]], path: Path) -> None:
    """One panel for each configuration, one bar for each implementation; shorter is faster."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    n_bars = [len(result["rows"]) for result in results]
    height = 0.9 + sum(0.75 + 0.42 * n for n in n_bars)
    figure, axes = plt.subplots(
        len(results), 1, figsize=(10, height), layout="constrained", squeeze=False, height_ratios=n_bars
    )
    for axis, result in zip(axes[:, 0], results, strict=True):
        rows = result["rows"][::-1]
        ms = [row["ms_per_step"] for row in rows]
        spread = [[m - row["ms_min"] for m, row in zip(ms, rows, strict=True)]]
        spread.append([row["ms_max"] - m for m, row in zip(ms, rows, strict=True)])
        colours = ["tab:blue" if row["side"] == "ours" else "tab:gray" for row in rows]
        axis.barh([row["name"] for row in rows], ms, color=colours, xerr=spread, ecolor="0.3", capsize=3)
        for y, (row, m) in enumerate(zip(rows, ms, strict=True)):
            ratio = f"  ({row['ratio']:.2f} x ours)" if "ratio" in row else ""
            axis.text(row["ms_max"], y, f"  {m:.3g} ms{ratio}", va="center")
        axis.set_xlim(0, 1.35 * max(row["ms_max"] for row in rows))
        axis.set_title(f"{result['preset']}, batch {result['batch_size']}", loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("ms per step: median of the rounds, and their range")
    figure.suptitle(title_of(results[0]), fontsize=10)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_scaling(results: list[dict[str, Any]], path: Path) -> None:
    """A panel for each configuration: the step's time over the preset's, by the factor of T, C or L."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    figure, axes = plt.subplots(
        1, len(results), figsize=(2 + 4.5 * len(results), 4.6), layout="constrained", squeeze=False, sharey=True
    )
    for axis, result in zip(axes[0], results, strict=True):
        rows = result["growth"]["rows"]
        for what, colour in (("T", "tab:blue"), ("C", "tab:orange"), ("L", "tab:green")):
            for side in dict.fromkeys(row["side"] for row in rows):
                points = [
                    (r["factor"], r["over_preset"]) for r in rows if r["side"] == side and r["what"] in ("", what)
                ]
                ours, name = side == "ours", next(row["name"] for row in rows if row["side"] == side)
                axis.plot(
                    *zip(*sorted(points), strict=True),
                    color=colour,
                    linestyle="-" if ours else "--",
                    marker="o" if ours else "s",
                    label=f"{what}, {name}",
                )
        axis.plot([0.5, 2], [0.5, 2], color="0.8", zorder=0, label="in proportion")
        axis.set(xscale="log", yscale="log", xlabel="times the preset's T, C or L", xlim=(0.45, 2.2))
        sizes = rows[0]["sizes"]
        axis.set_title(f"{result['preset']}: T {sizes['T']}, C {sizes['C']}, L {sizes['L']}", loc="left", fontsize=10)
        for scale, ticks in ((axis.xaxis, (0.5, 1, 2)), (axis.yaxis, (0.25, 0.5, 1, 2, 4))):
            scale.set_major_locator(FixedLocator(ticks))
            scale.set_minor_locator(NullLocator())
            scale.set_minor_formatter(NullFormatter())
            scale.set_major_formatter(lambda value, _: f"{value:g}")
        axis.grid(color="0.93")
        axis.legend(fontsize=7, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("time of a step over the preset's")
    figure.suptitle(title_of(results[0]), fontsize=9)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def record(results: list[dict[str, Any]]) -> None:
    """Keeps results in docs/benchmarks.json, by machine and preset; writes the measured part of docs/benchmarks.md."""
    path = FOLDER / "benchmarks.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for result in results:
        # One run measures the steps, the scaling or the loop; what it does not measure stays.
        kept.setdefault(title_of(result), {}).setdefault(result["preset"], {}).update(result)
    path.write_text(strict_json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    write_between(FOLDER / "benchmarks.md", BEGIN, END, tables(kept))


def write_between(page: Path, begin: str, end: str, content: str) -> None:
    """Replaces what stands between two lines of a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    page.write_text(f"{before}{begin}\n{content}{end}{after}", encoding="utf-8")


def tables(kept: dict[str, Any]) -> str:
    """A section for each machine: tables of steps and of scaling, and lines about rates and loops."""
    parts = []
    for title, presets in kept.items():
        parts.append(f"## {title}\n")
        timed = {preset: result for preset, result in presets.items() if "rows" in result}
        if timed:
            lines = [line for preset, result in timed.items() for line in steps_rows(preset, result)]
            parts.append(table(STEPS_HEAD, lines))
            parts.append("\n".join(f"- `{preset}`: {rates(result)}" for preset, result in timed.items()) + "\n")
        scaling = {preset: result["growth"] for preset, result in presets.items() if "growth" in result}
        if scaling:
            lines = [line for preset, found in scaling.items() for line in _scaling(preset, found)]
            parts.append(table(_SCALING, lines))
        loops = [f"- `{preset}`: {loop_line(result['loop'])}" for preset, result in presets.items() if "loop" in result]
        if loops:
            parts.append("The trainer's loop over its bare step:\n")
            parts.append("\n".join(loops) + "\n")
    return "\n".join(parts)


STEPS_HEAD = [
    "configuration",
    "implementation",
    "ms per step (range)",
    "tokens/s",
    "times ours",
    "first step",
    "memory",
    "loss gap",
]
_SCALING = [
    "configuration",
    "T, C, L",
    "implementation",
    "ms per step (range)",
    "tokens/s",
    "times the preset's",
    "times ours",
]


def table(head: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown."""
    rows = [f"| {' | '.join(cells)} |" for cells in (head, *lines)]
    return "\n".join([rows[0], "|---" * len(head) + "|", *rows[1:]]) + "\n"


def _times(row: dict[str, Any]) -> str:
    return f"{row['ms_per_step']:.2f} ({row['ms_min']:.2f} to {row['ms_max']:.2f})"


def steps_rows(preset: str, result: dict[str, Any]) -> Iterator[list[str]]:
    """The rows of a configuration's measured implementations, under `STEPS_HEAD`."""
    for row in result["rows"]:
        ours = row["side"] == "ours"
        yield [
            f"`{preset}`" if ours else "",
            row["name"],
            _times(row),
            f"{row['tokens_s']:,.0f}",
            "" if ours else f"{row['ratio']:.2f}",
            f"{row['first_step_s']:.1f} s",
            f"{row['memory_mib']:,.0f} MiB",
            "" if ours else f"{row['loss_gap']:.0e}",
        ]


def _scaling(preset: str, scaling: dict[str, Any]) -> Iterator[list[str]]:
    for number, row in enumerate(scaling["rows"]):
        ours, sizes = row["side"] == "ours", row["sizes"]
        yield [
            "" if number else f"`{preset}`, batch {scaling['batch_size']}",
            ", ".join(f"**{sizes[n]}**" if n == row["what"] else str(sizes[n]) for n in "TCL") if ours else "",
            row["name"],
            _times(row),
            f"{row['tokens_s']:,.0f}",
            f"{row['over_preset']:.2f}" if row["what"] else "",
            "" if ours else f"{row['ratio']:.2f}",
        ]


def loop_line(loop: dict[str, Any]) -> str:
    """One line: how much time the loop adds to the bare step's, and its parts."""
    shares = ", ".join(f"{name} {100 * share:.1f}" for name, share in loop["shares"].items())
    return (
        f"{loop['steps']} steps cost {100 * loop['overhead']:.1f} % more than bare ones of {loop['bare_ms']:.2f} ms "
        f"(standard error {100 * loop['error']:.1f}): {shares}; once, for the first evaluation and checkpoint, "
        f"{loop['once_s']:.1f} s; at the end {loop['end_s']:.1f} s"
    )


def rates(result: dict[str, Any]) -> str:
    """One line: FLOP/s by both counts and as shares, the first step of a second start, and the rate of sampling."""
    ours = result["rows"][0]
    product = ours["product"]["flop_s"]
    sampled = [ours[name] for name in ("generate", "generate_batch") if name in ours]  # earlier results have one
    sampling = ", ".join(f"{g['tokens_s']:,.0f} tokens/s, batch {g['batch']}" for g in sampled)
    shares = []
    for count, flop in result["flop_per_token"].items():
        rate = flop * ours["tokens_s"]
        of = f"{100 * rate / product:.0f} %" + sheet_share(rate, result["machine"])
        shares.append(f"{count} {rate / 1e9:,.0f} GFLOP/s ({of})")
    return (
        f"{', '.join(shares)} of a large product's {product / 1e9:,.0f}; first step of a second start "
        f"{ours['first_step_warm_s']:.1f} s; sampling {sampling}"
    )


def sheet_share(rate: float, machine: dict[str, str]) -> str:
    """The share of the data sheet's rate, where the device is known; else nothing."""
    share = share_of_peak(rate, machine)
    return "" if share is None else f", {100 * share:.0f} % of the data sheet"


def share_of_peak(rate: float, machine: dict[str, str]) -> float | None:
    """A rate in FLOP/s over the peak of the device's data sheet; None for an unknown device, or in float32."""
    chip = chip_of(machine["device"])
    return rate / chip.device_flop_per_s if chip and machine["dtype"] == "bfloat16" else None
