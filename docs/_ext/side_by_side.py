"""The directive `side-by-side`: objects of two source files in two columns, read when the page is built.

```{side-by-side}
:left: torch_ref/model.py Attention
:right: jaxgpt/model/gpt.py Attention
```

Each side is a file of the repository and names in it, functions, classes or `Class.method`. A name that the file does
not have is a warning, and so fails a build with -W.
"""

from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.directives.code import LiteralIncludeReader
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[2]
logger = logging.getLogger(__name__)


class SideBySide(SphinxDirective):
    option_spec = {"left": directives.unchanged_required, "right": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        grid = nodes.container(classes=["side-by-side"])
        grid += [self.column(self.options[side]) for side in ("left", "right")]
        return [grid]

    def column(self, source: str) -> nodes.container:
        path, *names = source.split()
        self.env.note_dependency(str(ROOT / path))
        column = nodes.container()
        column += nodes.paragraph("", "", nodes.literal("", path), classes=["source-file"])
        for name in names:
            reader = LiteralIncludeReader(str(ROOT / path), {"pyobject": name}, self.config)
            try:
                text, _ = reader.read(location=self.get_location())
            except ValueError as e:
                logger.warning("side-by-side: %s", e, location=self.get_location())
                continue
            code = nodes.literal_block(text, text, language="python")
            column += code
        return column


def setup(app):
    app.add_directive("side-by-side", SideBySide)
    return {"parallel_read_safe": True}
