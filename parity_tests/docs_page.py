"""docs/parity.md: written from docs/parity.json, which keeps what each command found on each set of versions."""

import json
from pathlib import Path
from typing import Any

from parity_tests.harness import Row
from parity_tests.report import COLUMNS, MATRIX_COLUMNS, cells, markdown, worst_rows, write_json
from parity_tests.tolerances import TOLERANCES

FOLDER = Path(__file__).resolve().parents[1] / "docs"

HEAD = """# Parity with PyTorch

This page is written by `scripts/parity.py --docs` and never edited. It holds the last result of every part: the ladder,
for each set of versions it was run on; the mutants; whole training runs.

```
python scripts/parity.py                    # the whole ladder on this machine
python scripts/parity.py --quick            # its core, under a minute
python scripts/parity.py --json FILE.json   # every row, and a picture of the trajectories beside it
python scripts/parity.py --run RUN          # a run of yours: both frameworks on its own validation split
python scripts/parity.py --locate           # on a failure: the first tensor that departs
python scripts/parity.py --mutants          # faults put in on purpose, and the rung that catches each
python scripts/parity.py --mutant NAME --locate      # one of them, and where it is found
python scripts/parity.py --end-to-end minigpt        # whole documented runs, five seeds: about an hour
```
The exit code is 0 if every row that ran has passed, 1 if one has not.

## How to read the table
A line is a gate. Of all its cases it shows the one nearest to the gate; `--json` has every case.
- **error**: in float64 lines ours against PyTorch's, relative (L2 over a tensor) unless the gate's reason
  says otherwise. In lines with R, the root mean square of ours against the truth: **PyTorch in float64, from the same
  float32 weights**.
- **PyTorch's own**: the same for PyTorch in float32 (or bfloat16 with the same casts).
- **R**: the first over the second. R near 1 says that we are as exact as PyTorch; below 1, more exact. It is the honest
  measure in low precision, where two right programs differ.
- **headroom**: how many times the value fits into the gate; "exact" for a difference of 0.
- **not run**: with the reason. It counts neither as passed nor as failed.

Before anything is compared, shape, dtype and finiteness are checked, and that the reference is not near zero
everywhere; what is refused has failed. The sizes of batch, time, width, heads, head size and vocabulary all differ.
PyTorch's side is [torch_ref/](../torch_ref), the write-ups' loop with nothing compiled or fused; operations are held
against `torch.nn.functional`, the whole model also against Hugging Face's GPT-2. Our side is the trainer's own compiled
program, several steps a dispatch.

## Where the two differ, and what was done about it
- **Bias correction.** optax computes 1 - b2^t in float32: at b2 = 0.999 Adam's first updates are off by up to a hundred
  units in their last place, where PyTorch, in double precision, is off by two. `jaxgpt/optimizer.py` computes it as
  -expm1(t log b2) and is then as exact as PyTorch. (The mutant "optax's bias correction in float32" puts it back.)
- **Biases in bfloat16.** `nnx.Linear` adds its bias in bfloat16, and going backward adds up a bias' gradient over all
  tokens in bfloat16: its error was 1.3 to 1.6 times PyTorch's. `jaxgpt/model.py` adds it in float32: 1.0.
- **Clipping.** `clip_grad_norm_` divides by norm + 1e-6, optax by the norm. Ours is held to the formula without the
  epsilon at float64's precision, and to PyTorch's function within exactly that epsilon. Trajectories with a clip appear
  twice for the same reason.
- **Decay.** PyTorch multiplies weights by 1 - lr * decay, rounded once: after a thousand steps its float64 weights
  are 3e-14 away from AdamW's formula computed with 80 bits, ours 3e-15. So that row has a wider gate, and the 80-bit
  formula a row of its own.
- **Key biases** have a true gradient of 0: softmax does not change when all scores of a query shift. What is
  computed is rounding, which Adam turns into steps. The gradient is held to 0 by itself, and key biases are left out
  of float32 comparisons of weights.
- **The documented start** has flat attention, whose queries' and keys' gradients are small differences of large
  numbers: in float32 PyTorch itself is wrong by 1.7e-6 there, so the relative gate is 1e-5 for this start; R is held as
  everywhere. All other cases use weights as after training.
- **Perplexity** is exp of the loss: its relative error is the loss's absolute one, so in float32 its gate is the loss's
  5e-7 times a loss of 4.2.
- **The twin** of a trajectory is PyTorch's own run from weights one unit in the last place away. Of our distance from
  PyTorch a part is PyTorch's rounding of the decay, above; so the case with a tied head trains without decay.
- **bfloat16.** XLA leaves out casts where it may keep more digits. R is measured on what the trainer compiles; the row
  "every cast made" takes that freedom away and compares with PyTorch's bfloat16 itself.
- **Dropout.** The masks that our step draws are passed to PyTorch; our drawing itself is held against chance.
- **Attention in float64** is written out: `jax.nn.dot_product_attention` takes its softmax in float32 in any case.
"""


def record(part: str, key: str, value: dict[str, Any]) -> None:
    """Keeps a result in docs/parity.json and writes docs/parity.md anew.

    Args:
        part: "ladder", "mutants" or "end_to_end".
        key: the versions or the preset; an older result of the same key is replaced.
    """
    path = FOLDER / "parity.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept.setdefault(part, {})[key] = value
    write_json(path, kept)
    (FOLDER / "parity.md").write_text(page(kept), encoding="utf-8")


def versions_line(environment: dict[str, str]) -> str:
    """The key and title of a set of versions."""
    e = environment
    return f"jax {e['jax']}, PyTorch {e['torch'].split('+')[0]}, Python {e['python']}, {e['device']}"


def page(kept: dict[str, Any]) -> str:
    """The whole page."""
    parts = [HEAD]
    for title, ladder in sorted(kept.get("ladder", {}).items()):
        rows = [_row(values) for values in ladder["rows"]]
        n_run = sum(not row.not_run for row in rows)
        n_passed = sum(row.status == "passed" for row in rows)
        parts.append(f"## The ladder on {title}\n")
        parts.append(
            f"{n_passed} of {n_run} comparisons passed, {len(rows) - n_run} not run, in {ladder['seconds']:.0f} s.\n"
        )
        parts.append(markdown((cells(row, count) for row, count in worst_rows(rows)), COLUMNS) + "\n")
    if kept.get("ladder"):
        parts.append("![Both trajectories and their difference](parity.png)\n")
    parts.append("## The gates and their reasons\n")
    gates = (
        (rung, precision, f"{t.gate:g}", "not yet" if t.measured is None else f"{t.measured:.2g}", t.reason)
        for (rung, precision), t in TOLERANCES.items()
    )
    parts.append(markdown(gates, ("rung", "precision", "gate", "worst measured", "reason")) + "\n")
    for title, mutants in kept.get("mutants", {}).items():
        n_caught = sum(line[2] != "SURVIVES" for line in mutants["lines"])
        parts.append("## Mutants\n")
        parts.append(
            f"{n_caught} of {len(mutants['lines'])} caught, each with a signal of at least ten gates, on {title}. Each "
            'is one fault patched into the JAX side alone. "refused": a NaN, another dtype or another shape, which is '
            'not compared at all; "infinite": a difference where the gate is equality, or an error raised.\n'
        )
        parts.append(markdown(mutants["lines"], MATRIX_COLUMNS) + "\n")
    if runs := kept.get("end_to_end"):
        parts.append("## Whole training runs\n")
        parts.append(
            "The documented loop from its first step to its last in both frameworks, in float32, from the same initial "
            "weights and batches: the loss over the whole validation split.\n"
        )
        for preset, run in sorted(runs.items()):
            lines = [
                (seed, f"{r['ours']:.6f}", f"{r['torch']:.6f}", f"{r['ours'] - r['torch']:+.1e}")
                for seed, r in run["results"].items()
            ]
            parts.append(f"`{preset}`, {run['versions']}: {run['note']}.\n")
            parts.append(markdown(lines, ("seed", "jaxgpt", "PyTorch", "difference")) + "\n")
    return "\n".join(parts)


def _row(values: dict[str, Any]) -> Row:
    """The inverse of `Row.to_json`."""
    fields = ("rung", "precision", "case", "error", "torch_error", "ratio", "note", "not_run")
    numbers = {
        k: float(v) if isinstance(v, str) and k in ("error", "torch_error", "ratio") else v for k, v in values.items()
    }
    return Row(**{name: numbers[name] for name in fields})
