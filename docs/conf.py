"""The documentation's site: ``sphinx-build -W -b html docs docs/_build/html`` builds it, offline, to open from disk."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import fednorm  # noqa: E402 - from this checkout

project = "fednorm"
author = "The fednorm developers"
version = release = fednorm.__version__
copyright = "the fednorm developers, MIT licence"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "_make.site"]
exclude_patterns = ["_build", "_make"]
templates_path: list[str] = []

# Pages are MyST Markdown. Dollars are text; formulas are ```{math} and {math}`…`, set as MathML: no network is needed.
myst_enable_extensions = ["colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 3
suppress_warnings: list[str] = []

# Notebooks under start/ are executed while the site is built; a cell that fails fails the build.
nb_execution_mode = "cache"
nb_execution_cache_path = str(Path(__file__).parent / "_build" / "executed")
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"fednorm {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_search_summary = False  # summaries are fetched, which no browser does from disk
html_theme_options = {"navigation_with_keys": True}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
