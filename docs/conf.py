"""The documentation site: ``sphinx-build -W -b html docs build/docs``.

Pages are Markdown (MyST). Those files that must also be read in the repository, such as
``METHODS.md`` and ``results/*.md``, lie there and are included. Their links are written for the
repository; :func:`links_of_the_site` turns them into links between pages.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import recbole_rcekd  # mends RecBole, before autodoc imports any of it

ROOT = Path(__file__).resolve().parents[1]

project = "recbole_rcekd"
author = "the authors of recbole_rcekd"
html_show_copyright = False
release = version = recbole_rcekd.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
]
exclude_patterns = ["_build"]
# A single ` in a docstring is code, as it is in Markdown.
default_role = "literal"

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "deflist"]

html_theme = "furo"
html_title = f"recbole_rcekd {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": True}
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_preprocess_types = False

# Where other files of the repository can be looked at; without it their names stay plain text.
REPOSITORY_URL = os.environ.get("REPOSITORY_URL", "").rstrip("/")

# Files outside of docs/ that a page includes, and the page.
PAGES = {
    "METHODS.md": "methods",
    "CHANGELOG.md": "changelog",
    "CONTRIBUTING.md": "contributing",
    "benchmarks/README.md": "performance",
    "results/README.md": "results/index",
    "results/methods.md": "results/methods",
    "results/schedule.md": "results/schedule",
    "README.md": "index",
}
LINK = re.compile(r"(?<!!)\[((?:[^\[\]`]|`[^`]*`)*)\]\(([^()\s]+)\)")


def links_of_the_site(text: str, folder: Path, page: str) -> str:
    """Markdown whose links lead to pages of the site.

    Args:
        text: as it stands in the repository.
        folder: that the links are relative to.
        page: which it becomes a part of, without suffix, relative to ``docs/``.
    """

    def link(found: re.Match[str]) -> str:
        words, target = found[1], found[2]
        if target.startswith(("http:", "https:", "mailto:", "#")):
            return found[0]
        path, _, anchor = target.partition("#")
        file = os.path.relpath(os.path.normpath(folder / path), ROOT)
        if not (ROOT / file).exists():
            raise FileNotFoundError(f"docs/{page}.md links to {target}, but there is no {file}.")
        if file in PAGES or (file.startswith("docs/") and file.endswith(".md")):
            goal = f"{PAGES.get(file, file.removeprefix('docs/').removesuffix('.md'))}.md"
            here = os.path.relpath(goal, os.path.dirname(page) or ".")
            return f"[{words}]({here}{'#' + anchor if anchor else ''})"
        return f"[{words}]({REPOSITORY_URL}/{file})" if REPOSITORY_URL else words

    return LINK.sub(link, text)


def _page_read(app: Any, docname: str, content: list[str]) -> None:
    content[0] = links_of_the_site(content[0], (ROOT / "docs" / docname).parent, docname)


def _include_read(app: Any, path: Path, stem: str, content: list[str]) -> None:
    file = (ROOT / "docs" / path).resolve()
    content[0] = links_of_the_site(content[0], file.parent, app.env.docname)


def _whole_sentences(
    app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """Keep napoleon from reading ``λ of the loss: the first key`` of a property as a type."""
    if what in ("attribute", "data", "property") and lines:
        lines[0] = lines[0].replace(": ", "\N{RATIO} ")  # looks like a colon and is none


def setup(app: Any) -> None:
    """Register what adapts Markdown and docstrings to the site."""
    app.connect("autodoc-process-docstring", _whole_sentences, priority=400)
    app.connect("source-read", _page_read)
    app.connect("include-read", _include_read)
