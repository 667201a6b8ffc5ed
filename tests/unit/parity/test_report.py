"""Tables and JSON of rows and mutants."""

import json
import math

from jaxgpt.parity import report
from jaxgpt.parity.harness import Row
from jaxgpt.parity.tolerances import RAISED, Tolerance, Tolerances

ROWS = [
    Row("loss", "float64", "small", 1e-13, 1e-15),
    Row("loss", "float64", "large", 1e-13, 4e-14),
    Row("logits", "float32", "small", 1.5, 3e-7, 2e-7, 1.5),
    Row("data", "int64", "text", 0.0, 0.0),
    Row("GPU", "float32", "small", 1.5, note="no GPU here", not_run=True),
]


def test_the_worst_row_of_each_check_and_precision():
    assert [(row.case, count) for row, count in report.worst_rows(ROWS)] == [
        ("large", 2),
        ("small", 1),
        ("text", 1),
        ("small", 1),
    ]


def test_a_row_that_ran_is_shown_before_one_that_did_not():
    rows = [Row("loss", "float64", "first", 1.0, not_run=True), Row("loss", "float64", "second", 1.0, 0.5)]
    assert report.worst_rows(rows)[0][0].case == "second"


def test_cells():
    found = [report.cells(row, count) for row, count in report.worst_rows(ROWS)]
    assert found == [
        ("loss", "float64", "2: large", "4e-14", "", "", "1e-13", "2.5x", "passed"),
        ("logits", "float32", "small", "3e-07", "2e-07", "1.5", "1.5", "1x", "passed"),
        ("data", "int64", "text", "0", "", "", "0", "exact", "passed"),
        ("GPU", "float32", "small", "", "", "", "1.5", "", "not run: no GPU here"),
    ]


def test_a_failure_says_why():
    row = Row("loss", "float64", "small", 1e-13, math.inf, note="refused: not finite")
    assert report.cells(row, 1)[3:] == ("refused", "", "", "1e-13", "", "FAILED: refused: not finite")


def test_the_table_is_aligned():
    lines = report.table(ROWS).splitlines()
    assert len(lines) == 5 and {line.index("float") for line in lines[1:3]} == {lines[0].index("precision")}


def test_markdown_escapes_bars():
    text = report.markdown([("mean |g|", "1")], ("check", "value"))
    assert text.splitlines() == ["| check | value |", "|---|---|", "| mean \\|g\\| | 1 |"]


def test_a_mutant_and_its_signals():
    rows = {
        "model": ROWS[1],
        "ops": Row(RAISED, "any", "ops", 0.0, math.inf),
        "data": Row("data", "int64", "", 0.0, 1.0),
    }
    assert report.mutant_cells("fault", rows, True) == (
        "fault",
        "model",
        "loss (float64)",
        "0.4",
        "ops raised, data infinite",
    )
    assert report.mutant_cells("fault", rows, False)[2] == report.SURVIVES


def test_the_json_is_json():
    rows = [*ROWS, Row("loss", "float64", "refused", 1e-13, math.inf)]
    tolerances = Tolerances({("loss", "float64"): Tolerance(1e-13, None, "rounding")})
    values = report.suite_json(rows, 1.23, True, tolerances, report.environment(("jax", "no-such-package")))
    read = json.loads(json.dumps(values, allow_nan=False))
    assert [Row.from_json(row) for row in read["rows"]] == rows
    assert read["reasons"] == {"loss, float64": "rounding"} and read["seconds"] == 1.2 and read["quick"]
    assert read["environment"]["no-such-package"] == "not installed" and read["environment"]["device"]
