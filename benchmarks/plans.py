"""The table of docs/accelerators.md: plans of presets on accelerators, kept in docs/accelerators.json.

    python -m benchmarks.plans                # all of them: half an hour on two cores
    python -m benchmarks.plans gpt2 v5e:1     # those whose names hold all these words
    python -m benchmarks.plans --page         # only writes the table anew

Each plan is made by `jaxgpt plan` in a process of its own; the compilers are in the extras aot-tpu and aot-gpu.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import page
from jaxgpt import strict_json

ROOT = Path(__file__).resolve().parents[1]
RECORD, PAGE = ROOT / "docs" / "accelerators.json", ROOT / "docs" / "accelerators.md"
BEGIN, END = "<!-- plans: written by python -m benchmarks.plans -->", "<!-- end of the plans -->"
TARGETS = {"v5e:1": 1, "v5e:2x2": 4, "v6e:1": 1, "H100": 1, "H100:8": 8}  # and their devices
GPT2_ROWS = 8  # of a device
Case = tuple[str, str, int | None, str]  # preset, target, batch (None: the preset's), other flags
CASES: list[Case] = [
    *((preset, target, None, "") for preset in ("minigpt", "nanogpt-char") for target in TARGETS if target != "v6e:1"),
    *(("gpt2", target, GPT2_ROWS * n, "") for target, n in TARGETS.items()),
    ("gpt2", "v5e:1", GPT2_ROWS, "--remat dots"),
    ("gpt2", "v5e:1", GPT2_ROWS, "--remat block"),
    ("gpt2", "H100", GPT2_ROWS, "--remat dots"),
    ("gpt2", "H100", GPT2_ROWS, "--remat block"),
    ("gpt2", "v5e:1", 4 * GPT2_ROWS, "--grad-accum 4"),
    ("gpt2", "v5e:1", 4 * GPT2_ROWS, ""),
    ("gpt2", "v5e:2x2", 4 * GPT2_ROWS, "--mesh fsdp=4"),
    ("gpt2", "H100:8", 8 * GPT2_ROWS, "--mesh fsdp=8"),
]


def name_of(case: Case) -> str:
    preset, target, batch_size, flags = case
    batch = f" batch {batch_size}" if batch_size else ""
    return f"{preset} {target}{batch} {flags}".strip()


def make(case: Case) -> dict[str, Any]:
    """A plan, with the commit, the flags, and the seconds that it took."""
    preset, target, batch_size, more = case
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        flags = ["--preset", preset, "--target", target, "--json", str(path)]
        flags += ["--batch-size", str(batch_size)] if batch_size else []
        flags += more.split()
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-m", "jaxgpt", "plan", *flags], cwd=ROOT, check=True)
        plan = strict_json.loads(path.read_text(encoding="utf-8"))
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return plan | {"flags": more, "seconds": round(time.perf_counter() - begun), "commit": git.stdout.strip()}


def record(name: str, plan: dict[str, Any]) -> None:
    """Keeps a plan in docs/accelerators.json, and writes the table anew."""
    kept = read_record() | {name: plan}
    kept = {name: kept[name] for name in map(name_of, CASES) if name in kept}
    RECORD.write_text(strict_json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    write_page(kept)


def read_record() -> dict[str, Any]:
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}


def write_page(kept: dict[str, Any]) -> None:
    page.write_between(PAGE, BEGIN, END, f"\n{table(kept)}\n\n")


def table(kept: dict[str, Any]) -> str:
    """The plans as Markdown; what stands right of "estimated step" is estimated, too."""
    heads = [
        *("preset", "target", "batch", "flags", "peak memory", "flash attention", "float32 products", "FLOP of F12"),
        *("memory traffic", "collectives", "estimated step", "bound by", "tokens/s", "MFU", "hours for 1e9 tokens"),
    ]
    rows = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *(_row(plan) for plan in kept.values())]
    versions = sorted({", ".join(f"{name} {v}" for name, v in plan["versions"].items()) for plan in kept.values()})
    commits = sorted({plan["commit"] for plan in kept.values()})
    return "\n".join([*rows, "", f"Compiled with {'; '.join(versions)}, at commit {', '.join(commits)}."])


def _row(plan: dict[str, Any]) -> str:
    memory, flash, estimated = plan["bytes_per_device"], plan["flash_attention"], plan["estimated"]
    fits = f"{memory['peak'] / 2**30:.2f} of {memory['memory'] / 2**30:.0f} GiB"
    cells = [
        f"`{plan['preset']}`",
        plan["target"],
        str(plan["batch_size"]),
        f"`{plan['flags']}`" if plan["flags"] else "",
        fits if plan["fits"] else f"**does not fit**: {fits}",
        f"{flash['forward']} + {flash['backward']} of {flash['layers']} layers" if flash["forward"] else "none",
        f"{plan['float32_products']['count']} of {sum(plan['products'].values())}",
    ]
    if estimated is None:
        return f"| {' | '.join([*cells, *[''] * 8])} |"
    flop = plan["flop_per_device"]
    cells += [
        f"{flop['compiled'] / flop['F12']:.2f}",
        _size(plan["bytes_accessed_per_device"]["device_memory"]),
        _size(sum(plan["collectives"].values())),
        f"{1e3 * estimated['step_s']:.3g} ms",
        estimated["bound"],
        f"{estimated['tokens_per_s']:,.0f}",
        f"{estimated['mfu']:.0%}",
        f"{estimated['hours']:.3g}",
    ]
    return f"| {' | '.join(cells)} |"


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.3g} GB" if n_bytes else ""


def main(words: list[str]) -> None:
    if words == ["--page"]:
        return write_page(read_record())
    for case in CASES:
        if set(words) <= set(name_of(case).split()):
            record(name_of(case), make(case))


if __name__ == "__main__":
    main(sys.argv[1:])
