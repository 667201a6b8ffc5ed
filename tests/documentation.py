"""The project's documentation as the tests of tests/docs read it: its pages and the code blocks in them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"))
    if "_build" not in path.parts
)
COMMANDS = ("bash", "console", "python")  # the languages of blocks that a reader runs
NOT_RUN = re.compile(r"<!-- not run: (.+) -->")


@dataclass(frozen=True)
class Block:
    """A fenced code block. `not_run`: the reason of a `<!-- not run: reason -->` before it."""

    page: str
    line: int
    language: str
    text: str
    not_run: str | None

    @property
    def first_command(self) -> str:
        return re.split(r"\s+# ", self.text.splitlines()[0])[0].removeprefix("$ ")


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> Iterator[Block]:
    """The fenced code blocks of a page, in order."""
    before, inside, language, start = "", None, "", 0
    for number, line in enumerate(read(page).splitlines(), 1):
        if line.startswith("```"):
            if inside is None:
                inside, language, start = [], line.removeprefix("```").strip(), number
            else:
                marker = NOT_RUN.fullmatch(before)
                yield Block(page, start, language, "\n".join(inside), marker[1] if marker else None)
                inside, before = None, ""
        elif inside is not None:
            inside.append(line)
        elif line.strip():
            before = line.strip()
