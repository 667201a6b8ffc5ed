"""The figures of scripts/bench.py as a picture of bars and as the measured part of docs/benchmarks.md."""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "docs"
# Data sheets' dense bfloat16 rates, FLOP/s, by what the device's name holds (the SXM forms).
DATA_SHEET = {"H100 80GB HBM3": 989e12, "H200": 989e12, "A100": 312e12}
BEGIN, END = "<!-- measured: written by scripts/bench.py --docs -->", "<!-- end of what is measured -->"


def title_of(result: dict[str, Any]) -> str:
    """The hardware and the versions."""
    m = result["machine"]
    torch = f", PyTorch {m['torch'].split('+')[0]}" if "torch" in m else ""
    return f"{m['device']}, {m['dtype']}, Python {m['python']}, jax {m['jax']}{torch}"


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """One panel for each configuration, one bar for each side, shorter is faster."""
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
    axes[-1, 0].set_xlabel("ms per step: median of the turns, and their range")
    figure.suptitle(title_of(results[0]), fontsize=10)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def record(results: list[dict[str, Any]]) -> None:
    """Keeps results in docs/benchmarks.json, by machine and preset; writes the measured part of docs/benchmarks.md."""
    path = FOLDER / "benchmarks.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for result in results:
        kept.setdefault(title_of(result), {})[result["preset"]] = result
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    page = (FOLDER / "benchmarks.md").read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    (FOLDER / "benchmarks.md").write_text(f"{before}{BEGIN}\n{tables(kept)}{END}{after}", encoding="utf-8")


def tables(kept: dict[str, Any]) -> str:
    """A section for each machine, a table of all its configurations."""
    parts = []
    for title, presets in kept.items():
        lines = [
            f"## {title}\n",
            "| configuration | side | ms per step (range) | tokens/s | times ours | first step | memory | loss gap |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for preset, result in presets.items():
            for row in result["rows"]:
                ours = row["side"] == "ours"
                lines.append(
                    f"| {f'`{preset}`' if ours else ''} | {row['name']} | {row['ms_per_step']:.2f} "
                    f"({row['ms_min']:.2f} to {row['ms_max']:.2f}) | {row['tokens_s']:,.0f} | "
                    + ("" if ours else f"{row['ratio']:.2f}")
                    + f" | {row['first_step_s']:.1f} s | {row['memory_mib']:,.0f} MiB | "
                    + ("" if ours else f"{row['loss_gap']:.0e}")
                    + " |"
                )
        parts.append("\n".join(lines) + "\n")
        parts.append("\n".join(f"- `{preset}`: {rates(result)}" for preset, result in presets.items()) + "\n")
    return "\n".join(parts)


def rates(result: dict[str, Any]) -> str:
    """One line: FLOP/s in both counts and their shares, the first step of a second start, and sampling."""
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
    for word, sheet in DATA_SHEET.items():
        if word in machine["device"] and machine["dtype"] == "bfloat16":
            return f", {100 * rate / sheet:.0f} % of the data sheet"
    return ""
