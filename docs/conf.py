"""The site: every page of the repository, the API from the docstrings. ``make site`` builds it into ``build/site``.

The source folder is the whole repository, so that links between pages are the same here and where the repository is looked
at; the navigation is the lists of ``docs/index.md``.
"""

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

project = "lightning-gradnorm"
author = "The lightning-gradnorm developers"
copyright = author
version = release = importlib.import_module("lightning_gradnorm").__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "site_pages"]
root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "docs/tutorials/*.py",
    "examples/*.py",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "benchmarks/suite/README.md",
    "benchmarks/suite/references.py",
    "benchmarks/results/README.md",
]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
exclude_patterns = ["examples/_*.py"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

python_maximum_signature_line_length = 100
pygments_dark_style = "monokai"

html_theme = "furo"
html_title = "lightning-gradnorm"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["_front"]
html_copy_source = False
html_show_sourcelink = False
