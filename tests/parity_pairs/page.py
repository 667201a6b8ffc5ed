"""docs/planted-faults.md: written from docs/planted-faults.json, which keeps the last verdict on each fault."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jaxgpt import strict_json
from jaxgpt.parity import report
from jaxgpt.parity.comparison import PACKAGES
from tests.parity_pairs.planted import PLANTED
from tests.parity_pairs.verdict import Verdict

FOLDER = Path(__file__).resolve().parents[2] / "docs"
NAME = "planted-faults"

HEAD = """# Planted faults

Faults of the kind that ports really have, planted one by one in the JAX side, the converter or the optimizer of the
[example pairs](porting.md), and what `jaxgpt parity --pair` says of each. `python -m tests.parity_pairs --docs` writes
this page; `tests/integration/test_pairs.py` holds it.

<!-- not run: all faults take half an hour; tests/integration/test_pairs.py runs them -->
```bash
python -m tests.parity_pairs                  # every fault; exit code 1 if one is not caught
python -m tests.parity_pairs --only LSTM      # the faults whose names hold a word
```

- **level**: the first that fails.
- **cause**, **where**: the diagnosis' first finding; `*` stands for the layers' numbers.
- **difference**: that of the level before the cause is removed, and after.
- **right**: the level, the cause and the layer are those of the fault.
"""


def record(verdicts: Mapping[str, Verdict]) -> None:
    """Keeps verdicts by the fault's name, and writes the page anew."""
    path = FOLDER / f"{NAME}.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    environment = report.environment(PACKAGES)
    for name, found in verdicts.items():
        kept[name] = asdict(found) | {"environment": environment}
    kept = {fault.name: kept[fault.name] for fault in PLANTED if fault.name in kept}
    path.write_text(strict_json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    (FOLDER / f"{NAME}.md").write_text(page(kept), encoding="utf-8")


def page(kept: Mapping[str, Mapping[str, Any]]) -> str:
    """The page of the kept verdicts."""
    caught = sum(bool(found["level"]) for found in kept.values())
    right = sum(found["right"] for found in kept.values())
    environments = sorted({_versions(found["environment"]) for found in kept.values()})
    lines = [HEAD, f"**{len(kept)} faults: {caught} caught, {right} diagnosed right.** {'; '.join(environments)}.\n"]
    lines += ["| fault | level | cause | where | difference | right |", "|---|---|---|---|---|---|"]
    for name, found in kept.items():
        cause = f"{found['cause']}: {found['detail']}" if found["cause"] else "none"
        where = ", ".join(f"`{layer}`" for layer in found["layer"].split(", ")) if found["layer"] else ""
        difference = f"{_number(found['error'])}, {_number(found['left'])}"
        cells = (name, found["level"] or "not caught", cause, where, difference, "yes" if found["right"] else "**no**")
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "not tried" if value is None else f"{value:.1e}"


def _versions(environment: Mapping[str, Any]) -> str:
    return f"jax {environment['jax']}, torch {environment['torch']}"
