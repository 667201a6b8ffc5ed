"""Builds the documentation site: sphinx-build -W -n -b html docs docs/_build/html"""

import importlib.util
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

project = "jaxgpt"
author = "the jaxgpt authors"
copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "side_by_side"]
exclude_patterns = ["_build"]

html_theme = "sphinx_book_theme"  # JAX, Flax and optax use it
html_title = "jaxgpt"
html_static_path = ["_static"]
html_css_files = ["side_by_side.css"]
html_copy_source = False
html_theme_options = {"show_toc_level": 2}

myst_heading_anchors = 3  # so that page.md#heading links resolve, and a broken one fails the build
source_suffix = {".md": "markdown"}

default_role = "code"  # docstrings name objects in single backticks
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "undoc-members": True, "show-inheritance": True}
autodoc_typehints_format = "short"
autodoc_mock_imports = [] if importlib.util.find_spec("torch") else ["torch"]  # the parity engine's other side
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes are listed in their class, not described a second time
napoleon_use_rtype = False

# Only references into jaxgpt are checked: the build needs no network, so other projects' inventories are not read.
# Private base classes and type variables appear in signatures and have no page.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!jaxgpt\b).*"), ("py:.*", r"jaxgpt\..*\.(_\w+|Flags|Value|Entry)")]

_CODE = re.compile(r"(``?[^`]+``?)")


def plain_text_to_markup(app, what, name, obj, options, lines):
    """Makes reStructuredText of docstrings written as plain text.

    `|g|`, `*` and a trailing `_` are no markup, and "`UserError`s" is code and a letter. An indented block in the
    docstring of a module is shown as it stands.
    """
    marked = []
    for previous, line in zip(["", *lines], lines, strict=False):
        verbatim = what == "module" and line.startswith("    ")
        if verbatim and not previous.strip() and not (marked and marked[-1].startswith("    ")):
            marked += ["::", ""]
        if not verbatim:
            parts = _CODE.split(line)
            parts[::2] = [re.sub(r"([*|])|(?<=\w)_(?!\w)", lambda m: "\\" + m[0], part) for part in parts[::2]]
            parts[2::2] = [re.sub(r"^(?=\w)", r"\\ ", part) for part in parts[2::2]]
            line = "".join(parts)
        marked.append(line)
    lines[:] = marked


def setup(app):
    before_napoleon = 400  # whose priority is 500
    app.connect("autodoc-process-docstring", plain_text_to_markup, priority=before_napoleon)
