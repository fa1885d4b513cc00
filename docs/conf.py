"""Settings of the site; `python docs/build_site.py` builds it."""

import bnp_analysis

project = "bnp_analysis"
author = copyright = "The bnp_analysis developers"
version = release = bnp_analysis.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
html_theme = "furo"
html_title = "bnp_analysis"
myst_enable_extensions = ["dollarmath", "deflist", "attrs_inline"]
myst_heading_anchors = 4
# Docstrings write code in single backticks, as Markdown does; names that have a place here become links to it.
default_role = "py:obj"
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_use_rtype = False
napoleon_use_ivar = True
# A name such as `value` has several places; it stays code.
suppress_warnings = ["ref.python"]
