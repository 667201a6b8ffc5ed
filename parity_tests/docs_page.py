"""docs/parity.md: written from docs/parity.json, which keeps what each command found on each set of versions."""

import json
from pathlib import Path
from typing import Any

from jaxgpt import strict_json
from jaxgpt.errors import UserError
from jaxgpt.parity.harness import Row
from jaxgpt.parity.report import COLUMNS, MUTANT_COLUMNS, SURVIVES, cells, markdown, worst_rows
from jaxgpt.runs import files
from parity_tests.tolerances import TOLERANCES

FOLDER = Path(__file__).resolve().parents[1] / "docs"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "numpy")  # whose versions a result names

HEAD = """# Parity with PyTorch

The parity suite compares jaxgpt with a PyTorch program that computes the same: operations, logits, losses, gradients,
updates, whole trainings, sampled text, files and data. `scripts/parity.py --docs` writes this page. It shows the last
result of each part: the suite on each set of versions, the mutants, and whole training runs.

<!-- not run: the suite takes a quarter of an hour; parity_tests/test_commands.py runs the command -->
```bash
python scripts/parity.py                    # the whole suite on this machine
python scripts/parity.py --quick            # its core, about a minute
python scripts/parity.py --json FILE.json   # also write every row, and a picture of the trajectories beside it
python scripts/parity.py --run RUN          # a run of yours: both frameworks on its own validation split
python scripts/parity.py --locate           # on a failure: the first tensor that departs
python scripts/parity.py --mutants          # plant faults on purpose, and show the check that catches each
python scripts/parity.py --mutant NAME --locate      # plant one of them, and show where it is found
python scripts/parity.py --end-to-end minigpt        # whole training runs, five seeds: about an hour
```
The exit code is 0 if every comparison that ran has passed, and 1 otherwise. The suite needs a checkout of the
repository and the parity extra.

## How to read the table
Each line is one check in one precision. It shows the case that comes nearest to the tolerance; `--json` has all
cases.
- **error**: in float64 lines, the relative difference of our result from PyTorch's (L2 over a tensor), unless the
  reason for the tolerance names another measure. In lines with R, the root mean square of our error against the
  truth, which is **PyTorch in float64, from the same float32 weights**.
- **PyTorch's own**: the same error for PyTorch in float32, or in bfloat16 with the same casts.
- **R**: the first divided by the second. R near 1 means that jaxgpt is as exact as PyTorch; below 1, more exact. In
  low precision two correct programs differ, so R is the fair measure there.
- **tolerance**: the largest value that passes: of R where the line has one, otherwise of the error.
- **margin**: how many times the value fits into the tolerance; "exact" for a difference of 0.
- **not run**: with the reason. Such a line counts neither as passed nor as failed.

Before two arrays are compared, the suite checks their shapes, dtypes and finiteness, and that the reference is not
near zero everywhere. A refused comparison fails. Batch, time, width, heads, head size and vocabulary all have
different sizes, so that no swapped axis goes unseen. The PyTorch side is `torch_ref/`: the training
loop of the tutorials, with nothing compiled or fused. Operations are compared with `torch.nn.functional`, the whole
model also with Hugging Face's GPT-2. Our side is the program that the trainer compiles, with several steps in each
dispatch.

## Where the two frameworks differ
- **Bias correction.** optax computes 1 - b2^t in float32. At b2 = 0.999 its first Adam updates are off by up to a
  hundred units in the last place; PyTorch, which computes in double precision, is off by two. `jaxgpt/optimizer.py`
  computes -expm1(t log b2) and is as exact as PyTorch. (The mutant "optax's bias correction in float32" restores
  optax's.)
- **Biases in bfloat16.** `nnx.Linear` adds its bias in bfloat16. In the backward pass it sums a bias's gradient over
  all tokens in bfloat16, too: the error was 1.3 to 1.6 times PyTorch's. `jaxgpt/model/gpt.py` adds the bias in
  float32: 1.0.
- **Clipping.** `clip_grad_norm_` divides by norm + 1e-6, optax by the norm. Ours is compared with the formula without
  the epsilon at float64's precision, and with PyTorch's function within exactly that epsilon. Trajectories with a
  clip appear twice for the same reason.
- **Weight decay.** PyTorch multiplies weights by 1 - lr * decay, which it rounds once. After a thousand steps its
  float64 weights are 3e-14 away from AdamW's formula in 80-bit arithmetic, ours 3e-15. That row has a wider
  tolerance, and the 80-bit formula has a row of its own.
- **Matrix products.** On a CPU without AVX-512, XLA sums a product over fewer partial sums than PyTorch's library:
  alone, `x @ w.T` over 256 values has R 1.4, over 1,024 values R 2.4 (AMD EPYC with AVX2). The preset `wikitext2`, with
  an MLP of 1,024, has R 1.4 to 1.5 for its logits with AVX-512 and 1.6 to 1.7 without.
- **Key biases** have a true gradient of 0: softmax does not change when all scores of a query shift. The computed
  values are rounding errors, which Adam turns into steps. Their gradient has a row of its own, against 0, and float32
  comparisons of weights leave key biases out.
- **The documented start** has flat attention. The gradients of its queries and keys are small differences of large
  numbers; in float32 PyTorch itself is wrong by 1.7e-6. The relative tolerance for this start is 1e-5; R has the same
  tolerance as everywhere. All other cases use weights as after training.
- **Perplexity** is exp of the loss: its relative error is the loss's absolute error. Its float32 tolerance is the
  loss's 5e-7 times a loss of 4.2.
- **The one-ulp perturbed run** of a trajectory is PyTorch's own run from weights one unit in the last place away.
  Part of our distance from PyTorch is PyTorch's rounding of the decay, so the case with a tied head trains without
  decay.
- **bfloat16.** XLA leaves out casts where it may keep more digits. R is measured on what the trainer compiles. The
  row "every cast made" takes that freedom away and compares with PyTorch's bfloat16 itself.
- **Dropout.** The suite passes the masks that our step draws to PyTorch, and tests the drawing itself statistically.
- **Attention in float64** is written out: `jax.nn.dot_product_attention` takes its softmax in float32 in any case.
- **The attention kernel of TPUs** runs in interpret mode on this CPU, with float32 inputs: it computes in float32
  whatever it is given, so these rows hold its masks, its softmax over blocks and its backward pass to every digit.
- **Data.** Each side reads and tokenizes the same texts with code of its own; the tokens must be equal.
"""


def record(part: str, key: str, value: dict[str, Any]) -> None:
    """Keeps a result in docs/parity.json and writes docs/parity.md anew.

    Args:
        part: "suite", "mutants" or "end_to_end".
        key: the versions or the preset; an older result of the same key is replaced.
    """
    path = FOLDER / "parity.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept.setdefault(part, {})[key] = value
    write_json(path, kept)
    (FOLDER / "parity.md").write_text(page(kept), encoding="utf-8")


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes whole or not at all. Raises `UserError` where it cannot."""
    try:
        files.write_text(path, strict_json.dumps(values, indent=1) + "\n")
    except OSError as e:
        path.with_name(path.name + ".partial").unlink(missing_ok=True)
        raise UserError(f"--json {path}: cannot be written ({e.strerror}); choose a writable place") from None


def versions_line(environment: dict[str, str]) -> str:
    """The key and title of a set of versions."""
    e = environment
    return f"jax {e['jax']}, PyTorch {e['torch'].split('+')[0]}, Python {e['python']}, {e['device']}"


def page(kept: dict[str, Any]) -> str:
    """The whole page."""
    parts = [HEAD]
    for title, suite in sorted(kept.get("suite", {}).items()):
        rows = [Row.from_json(values) for values in suite["rows"]]
        n_run = sum(not row.not_run for row in rows)
        n_passed = sum(row.status == "passed" for row in rows)
        parts.append(f"## The suite on {title}\n")
        parts.append(
            f"{n_passed} of {n_run} comparisons passed, {len(rows) - n_run} not run, in {suite['seconds']:.0f} s.\n"
        )
        parts.append(markdown((cells(row, count) for row, count in worst_rows(rows)), COLUMNS) + "\n")
    if kept.get("suite"):
        parts.append("![Both trajectories and their difference](parity.png)\n")
    parts.append("## The tolerances and their reasons\n")
    lines = (
        (check, precision, f"{t.value:g}", "not yet" if t.measured is None else f"{t.measured:.2g}", t.reason)
        for (check, precision), t in TOLERANCES.items()
    )
    parts.append(markdown(lines, ("check", "precision", "tolerance", "worst measured", "reason")) + "\n")
    for title, mutants in kept.get("mutants", {}).items():
        n_caught = sum(line[2] != SURVIVES for line in mutants["lines"])
        parts.append("## Mutants\n")
        parts.append(
            "Each mutant is one fault, patched into the JAX side alone. The signal is the value of the row that "
            'catches it over its tolerance. "refused": a NaN, another dtype or another shape, which is not compared at '
            'all; "infinite": a difference where the tolerance is 0; "raised": an error. '
            f"{n_caught} of {len(mutants['lines'])} are caught, each with a signal of at least ten, on {title}.\n"
        )
        parts.append(markdown(mutants["lines"], MUTANT_COLUMNS) + "\n")
    if runs := kept.get("end_to_end"):
        parts.append("## Whole training runs\n")
        parts.append(
            "The documented training from its first step to its last in both frameworks, in float32, from the same "
            "initial weights, on the same batches: the loss over the whole validation split.\n"
        )
        for preset, run in sorted(runs.items()):
            results = [
                (seed, f"{r['ours']:.6f}", f"{r['torch']:.6f}", f"{r['ours'] - r['torch']:+.1e}")
                for seed, r in run["results"].items()
            ]
            parts.append(f"`{preset}`, {run['versions']}: {run['note']}.\n")
            parts.append(markdown(results, ("seed", "jaxgpt", "PyTorch", "difference")) + "\n")
    return "\n".join(parts)
