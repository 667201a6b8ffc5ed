"""Every figure that a page quotes stands in a JSON file of docs/, where a comment beside it says.

The comment follows the figure, or its unit: `<!-- FILE / key / ... / key : REDUCER FORMAT -->`. A key may hold `*`,
which matches any characters; `name = value & name = value` picks rows of a list, `*` takes them all. REDUCER is `only`
(of equal values), `max`, `gap` (the largest difference of "ours" and "torch"), `count`, or `caught` (of the mutants'
lines).
"""

import json
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import pytest
from documentation import PAGES, ROOT, read

FIGURE = re.compile(r"(\d[\d.,e+-]*(?: of \d+)?)(?: [A-Za-z%]+)?\s*<!-- (\w+\.json) / (.+?) : (\w+)(?: (\S+))? -->")


def figures(page: str) -> list[tuple[str, ...]]:
    """(figure, file, path, reducer, format) of every comment that names a file."""
    text = read(page)
    found = FIGURE.findall(text)
    assert len(found) == len(re.findall(r"<!-- \w+\.json", text)), f"{page}: a comment without a figure before it"
    return found


def values_at(value: Any, path: list[str]) -> Iterator[Any]:
    """The values at a path of keys, as in the comments."""
    if not path:
        yield value
    elif isinstance(value, dict):
        for key in value:
            if fnmatchcase(key, path[0]):
                yield from values_at(value[key], path[1:])
    elif path[0] == "*":
        for row in value:
            yield from values_at(row, path[1:])
    elif "=" in path[0]:
        wanted = [condition.split(" = ") for condition in path[0].split(" & ")]
        for row in value:
            if all(row[name] == expected for name, expected in wanted):
                yield from values_at(row, path[1:])


def figure_at(file: str, path: str, reducer: str, form: str) -> str:
    """The figure as the page should quote it."""
    found = list(values_at(json.loads((ROOT / "docs" / file).read_text(encoding="utf-8")), path.split(" / ")))
    assert found, f"{file} has nothing at {path}"
    if reducer == "caught":
        lines = [line for lines in found for line in lines]
        return f"{sum(line[2] != 'SURVIVES' for line in lines)} of {len(lines)}"
    if reducer == "count":
        return str(len(found))
    if reducer == "gap":
        return format(max(abs(run["ours"] - run["torch"]) for run in found), form)
    if reducer == "only":
        assert len(set(found)) == 1, f"{file}: {len(found)} values at {path}"
    return format(max(found), form)


QUOTED = [(page, *figure) for page in PAGES for figure in figures(page)]


@pytest.mark.parametrize(("page", "quoted", "file", "path", "reducer", "form"), QUOTED)
def test_a_quoted_figure_is_the_measured_one(page, quoted, file, path, reducer, form):
    assert quoted == figure_at(file, path, reducer, form), f"{page} quotes {quoted}"


def test_the_table_of_the_readme_has_six_figures_each_with_its_source():
    table = [line for line in read("README.md").splitlines() if line.startswith("|")][2:]
    assert len(table) == 6
    assert all(FIGURE.search(line) for line in table)


def test_a_stale_figure_differs_from_the_measured_one():
    _, quoted, *source = next(figure for figure in QUOTED if figure[2] == "benchmarks.json")
    assert figure_at(*source) == quoted != f"{float(quoted) + 0.01:.2f}"
