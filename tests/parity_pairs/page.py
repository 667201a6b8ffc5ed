"""docs/planted-faults.md: written from docs/planted_faults.json, which keeps the last verdict on each fault."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jaxgpt import strict_json
from jaxgpt.parity import report
from jaxgpt.parity.comparison import PACKAGES
from tests.parity_pairs.planted import PLANTED
from tests.parity_pairs.verdict import Verdict

FOLDER = Path(__file__).resolve().parents[2] / "docs"
DATA, PAGE = "planted_faults.json", "planted-faults.md"

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
- **verdict**: "right" if the level, the cause and the layer are those of the fault, else only "caught".
"""


def record(verdicts: Mapping[str, Verdict]) -> None:
    """Keeps verdicts by the fault's name, and writes the page anew."""
    path = FOLDER / DATA
    rows = json.loads(path.read_text(encoding="utf-8"))["faults"] if path.exists() else []
    kept = {row["name"]: row for row in rows}
    environment = report.environment(PACKAGES)
    for name, found in verdicts.items():
        verdict = "right" if found.right else "caught" if found.caught else "not caught"
        kept[name] = {"name": name, "verdict": verdict, **asdict(found), "environment": environment}
    rows = [kept[fault.name] for fault in PLANTED if fault.name in kept]
    path.write_text(strict_json.dumps({"faults": rows}, indent=1) + "\n", encoding="utf-8")
    (FOLDER / PAGE).write_text(page(rows), encoding="utf-8")


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """The page of the kept verdicts."""
    n_caught, n_right = (sum(row["verdict"] in names for row in rows) for names in (("right", "caught"), ("right",)))
    environments = sorted({_versions(row["environment"]) for row in rows})
    lines = [
        HEAD,
        f"**{len(rows)} faults: {n_caught} caught, {n_right} diagnosed right** ({'; '.join(environments)}).\n",
    ]
    cells = []
    for row in rows:
        cause = f"{row['cause']}: {row['detail']}" if row["cause"] else "none"
        where = ", ".join(f"`{layer}`" for layer in row["layer"].split(", ")) if row["layer"] else ""
        difference = f"{_number(row['error'])}, {_number(row['left'])}"
        verdict = row["verdict"] if row["verdict"] == "right" else f"**{row['verdict']}**"
        cells.append((row["name"], row["level"], cause, where, difference, verdict))
    columns = ("fault", "level", "cause", "where", "difference", "verdict")
    return "\n".join([*lines, report.markdown(cells, columns)]) + "\n"


def _number(value: float | None) -> str:
    return "not tried" if value is None else f"{value:.1e}"


def _versions(environment: Mapping[str, Any]) -> str:
    return f"jax {environment['jax']}, torch {environment['torch']}"
