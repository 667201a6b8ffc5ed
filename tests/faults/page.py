"""docs/reliability.md: written from docs/reliability.json, which keeps what the fault suite found."""

import json
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.faults.engine import BAD, Outcome, Result
from tests.faults.table import ALL

FOLDER = Path(__file__).resolve().parents[2] / "docs"

HEAD = """# Reliability

The fault suite, `tests/faults/`, makes faults on purpose: it kills trainings, damages the files of runs, fills disks,
takes away power, and puts NaN into gradients. After each fault it runs real commands and compares what they print and
write with the same commands without the fault, bit for bit. `python -m tests.faults --docs` writes this page.

<!-- not run: the whole suite takes about an hour; tests/faults/test_faults.py runs a part of it -->
```bash
python -m tests.faults                    # every fault; exit code 1 if anything was lost or silent
python -m tests.faults --quick            # a sample of each
python -m tests.faults --only power       # the faults whose names hold a word
python -m tests.faults --share 3/8        # every eighth case, from the fourth on
python -m tests.faults --docs             # also write this page
```

## How to read the table
- **tried**: how many times the fault was made.
- **equal**: the end is that of a run without the fault: weights, moments and records, bit for bit but for times.
- **without effect**: the commands print and write what they do without the fault.
- **told**: one line on standard error names what is wrong, with exit code 2 or 4 (3 for numbers that are not finite);
  or a line names it, and the command goes on from what is sound. Every other file is as it was.
- **lost**: work is lost that the disk held, or a file outside the run was changed.
- **silent**: another result, and no word about it.
- **tracebacks**, **hangs**: the command ended with a Python traceback or a crash, or not at all.

Commands run in processes of their own: kills, signals and limits in fresh ones; corruptions, failing calls and losses
of power in one that is kept warm for many cases, and every 25th of the corruptions in fresh ones.
"""


def record(results: Sequence[Result]) -> None:
    """Keeps results in docs/reliability.json, by fault, and writes docs/reliability.md anew."""
    path = FOLDER / "reliability.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for result in results:
        kept[result.fault.name] = result.to_json() | {"environment": environment()}
    kept = {fault.name: kept[fault.name] for fault in ALL if fault.name in kept}
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    (FOLDER / "reliability.md").write_text(page(kept), encoding="utf-8")


def environment() -> dict[str, str]:
    """The commit, and the versions of what the commands run on."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=FOLDER, capture_output=True, text=True).stdout.strip()

    # The page itself is no part of the program.
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)docs/reliability.*")
    versions = {name: metadata.version(name) for name in ("jax", "orbax-checkpoint")}
    commit = git("describe", "--always") + ("-dirty" if changed else "")
    return {"commit": commit, "python": platform.python_version(), **versions}


def page(kept: dict[str, Any]) -> str:
    """The whole page."""
    columns = [outcome.value for outcome in Outcome if outcome != Outcome.SKIPPED]
    bad = sum(found[outcome] for found in kept.values() for outcome in BAD)
    tried = sum(found["tried"] for found in kept.values())
    parts = [HEAD, "## What was found\n", f"{tried:,} faults were made; {bad} of them ended badly.\n"]
    lines = [["fault", "tried", *columns]]
    for name, found in kept.items():
        lines.append([name, f"{found['tried']:,}", *(f"{found[column]:,}" for column in columns)])
    parts.append(_table(lines))
    parts.append("## How each fault is made, and what is run after it\n")
    for name, found in kept.items():
        skipped = "".join(f" Not run here: {why}." for why in found["why skipped"])
        e = found["environment"]
        on = f"Python {e['python']}, jax {e['jax']}, orbax {e['orbax-checkpoint']}, commit `{e['commit']}`"
        parts.append(f"- **{name}**: {found['how']}. After it: {found['then']}.{skipped} ({on})")
        parts += [f"  - {failure}" for failure in found["failures"]]
    return "\n".join(parts) + "\n"


def _table(lines: list[list[str]]) -> str:
    rows = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([rows[0], "|---" * len(lines[0]) + "|", *rows[1:]]) + "\n"
