"""Every module of jaxgpt is on a page of docs/api, and on the map in docs/design.md."""

import re

from documentation import PAGES, ROOT, read

ENTRY_POINT = "__main__"
ROOMS_ON_THE_MAP = {"cli"}  # without their modules


def modules() -> set[str]:
    paths = (path.relative_to(ROOT).with_suffix("") for path in (ROOT / "jaxgpt").rglob("*.py"))
    return {".".join(path.parts) for path in paths if path.name not in ("__init__", ENTRY_POINT)}


def test_the_api_pages_have_every_module():
    documented = {name for page in PAGES for name in re.findall(r"automodule:: (\S+)", read(page))}
    # A command's module holds its flags, which --help shows.
    commands = {name for name in modules() if name.startswith("jaxgpt.cli.")} - {"jaxgpt.cli.main", "jaxgpt.cli.args"}
    assert documented == modules() - commands


def test_the_map_has_every_module():
    (tree,) = re.findall(r"```text\njaxgpt/\n(.*?)\ntorch_ref/", read("docs/design.md"), re.DOTALL)
    words = set(re.findall(r"\w+", tree))
    parts = {part for name in modules() for part in name.split(".")[1:] if name.split(".")[1] not in ROOMS_ON_THE_MAP}
    assert parts <= words, parts - words
