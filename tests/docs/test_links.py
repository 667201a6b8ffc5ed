"""Links between pages lead to a file that exists, and to a heading that it has; all pictures are shown."""

import re

import pytest
from documentation import COMMANDS, PAGES, ROOT, blocks, read

LINK = re.compile(r"\]\(([^)\s]+)\)")
OTHER_LANGUAGES = {"text", "diff", "shell", "yaml"}  # shell: of a cluster; test_commands.py parses their flags


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: str) -> list[str]:
    text = re.sub(r"```.*?```", "", read(page), flags=re.DOTALL)
    return [target for target in LINK.findall(text) if not target.startswith(("http://", "https://"))]


@pytest.mark.parametrize("page", [page for page in PAGES if links(page)])
def test_links_lead_to_files_and_headings(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), f"{page}: {target}"


def test_every_picture_in_docs_is_on_a_page():
    shown = {name for page in PAGES for name in re.findall(r"([\w-]+\.(?:png|gif))\)", read(page))}
    assert {path.name for path in (ROOT / "docs").glob("*.[pg][ni][gf]")} == shown


@pytest.mark.parametrize("page", PAGES)
def test_every_block_names_its_language(page):
    """A block of commands without a language would be run by no test."""
    for block in blocks(page):
        known = block.language in {*COMMANDS, *OTHER_LANGUAGES} or block.language.startswith("{")
        assert known, f"{page}:{block.line}: ```{block.language}"
