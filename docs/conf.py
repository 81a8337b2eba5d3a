"""Sphinx configuration of the documentation: `make docs`."""

from __future__ import annotations

import sys
from pathlib import Path


HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # for `hf_docstrings`, and for the package as it is here

import diffora_trainer  # noqa: E402


project = "diffora-trainer"
author = "The diffora-trainer authors"
copyright = author
version = release = diffora_trainer.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton", "hf_docstrings"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}

# The anchors of headings are those of GitHub, so that a link works there too.
myst_heading_anchors = 4
myst_enable_extensions = ["html_image"]

# Types stand in the docstrings.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
maximum_signature_line_length = 88
python_display_short_literal_types = True

copybutton_prompt_text = r"\$ "
copybutton_prompt_is_regexp = True
# The names of Markdown's text blocks have no lexer, and what a program prints is not Python.
highlight_language = "none"

html_theme = "furo"
html_title = f"diffora-trainer {version}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_show_sphinx = False
html_show_copyright = False
