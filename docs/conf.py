"""How the pages are built (``make docs``): the repository's Markdown, and the reference from the docstrings."""

from __future__ import annotations

import incckpt

project = "incckpt"
author = "The incckpt developers"
copyright = author
version = release = incckpt.__version__

# The source folder is the repository, so that links between the README, the examples and docs/ hold in both places.
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/RESULTS.md", "docs/**"]
exclude_patterns = ["docs/conf.py"]
root_doc = "docs/index"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

napoleon_google_docstring = False
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
default_role = "any"
nitpicky = False

html_theme = "furo"
html_title = f"incckpt {release}"
html_copy_source = False
html_static_path = []
suppress_warnings = ["ref.any", "myst.header"]
