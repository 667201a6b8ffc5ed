"""The comparison of a pair as one self-contained page."""

from html import escape

from jaxgpt.parity import report
from jaxgpt.parity.comparison import PACKAGES, Comparison

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .8rem; border-bottom: 1px solid #ddd; vertical-align: top; }
td.passed { color: #17662f; } td.failed { color: #a3121f; font-weight: 600; } td.quiet { color: #666; }
pre { background: #f5f5f5; padding: 1rem; overflow-x: auto; }
@media (prefers-color-scheme: dark) {
  body { background: #16181c; color: #e6e6e6; } th, td { border-color: #3a3d44; } pre { background: #22252b; }
  td.passed { color: #6fd08c; } td.failed { color: #ff8a8f; } td.quiet { color: #a0a0a0; }
}
"""


def html(comparison: Comparison) -> str:
    """The page."""
    c = comparison
    verdict = "equal" if c.passed else "not equal"
    versions = ", ".join(f"{name} {version}" for name, version in report.environment(PACKAGES).items())
    rows = [[*report.cells(row, 1)[:2], *report.cells(row, 1)[3:]] for row in c.rows]
    classes = ["quiet" if row.not_run else row.status.lower() for row in c.rows]
    columns = [*report.COLUMNS[:2], *report.COLUMNS[3:]]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width, initial-scale=1'>",
        f"<title>Parity of {escape(c.name)}</title><style>{STYLE}</style>",
        f"<h1>{escape(c.name)}: {verdict}</h1><p>{escape(versions)}; {c.seconds:.1f} s.</p>",
        "<p>R is the JAX side's error over PyTorch's own, both against PyTorch in float64.</p>",
        _table(columns, rows, classes),
    ]
    if not c.passed:
        parts.append("<h2>Diagnosis</h2>")
        if where := c.diagnosis.departure:
            jax = f" In JAX: <code>{escape(where.jax)}</code>." if where.jax else ""
            at = f"<code>{escape(where.layer or 'the model')}</code> ({escape(where.operation)})"
            parts.append(f"<p>The first value that only one side computes is the output of {at}.{jax}</p>")
        lines = [
            [f.cause, f.layer, f.jax, f.detail, "not tried" if f.left is None else f"{f.left:.1e}"]
            for f in c.diagnosis.findings
        ]
        parts.append(_table(["cause", "layer", "JAX", "detail", "difference without it"], lines))
    if c.mutants:
        parts.append("<h2>Mutants</h2><p>Mistakes made on purpose, and the row that sees each best.</p>")
        lines = [[m.name, m.row, f"{m.signal:.1e}", "caught" if m.caught else "not seen"] for m in c.mutants]
        classes = ["passed" if m.caught else "failed" for m in c.mutants]
        parts.append(_table(["mutant", "row", "times the tolerance", ""], lines, classes))
    if c.converter:
        parts.append(f"<h2>The derived converter</h2><pre>{escape(c.converter)}</pre>")
    parts += [f"<p>{escape(note)}.</p>" for note in c.notes]
    return "\n".join(parts) + "\n"


def _table(columns: list[str], rows: list[list[str]], classes: list[str] | None = None) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = []
    for i, row in enumerate(rows):
        cells = [f"<td>{escape(cell)}</td>" for cell in row[:-1]]
        mark = f" class={classes[i]}" if classes else ""
        body.append(f"<tr>{''.join(cells)}<td{mark}>{escape(row[-1])}</td></tr>")
    return f"<table><tr>{head}</tr>\n" + "\n".join(body) + "</table>"
