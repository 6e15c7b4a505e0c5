"""Sphinx configuration: warnings are errors, the tutorial is run, tables are computed."""

import doctest
import re
import sys
from pathlib import Path

import numpydoc.xref

import favor_np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tools"))

from looks import LOOKS


def public_classes():
    """Where the reference has the classes whose names stand in docstrings."""
    reference = (HERE / "reference.md").read_text(encoding="utf-8")
    sections = reference.split(".. currentmodule:: ")[1:]
    names = {}
    for module, text in (section.split("\n", 1) for section in sections):
        for name in re.findall(r"^   ([A-Z]\w+)$", text, re.MULTILINE):
            names.setdefault(name, f"{module}.{name}")
    return names


project = "favor_np"
author = "favor_np developers"
copyright = "2026, favor_np developers"
release = version = favor_np.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "numpydoc",
    "matplotlib.sphinxext.plot_directive",
]
exclude_patterns = ["_build", "generated/*.md"]
nitpicky = True
default_role = "literal"

myst_enable_extensions = ["amsmath", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 3

autosummary_generate = True
autodoc_mock_imports = ["jax", "torch"]  # gigabytes, for two signatures
autodoc_typehints = "none"  # the docstrings say more
numpydoc_show_class_members = False
numpydoc_xref_param_type = True  # types of this package are links, others are left as they are
numpydoc_xref_ignore = "all"
numpydoc_xref_aliases = public_classes()
numpydoc.xref.DEFAULT_LINKS.clear()  # they lead to pages of Python and NumPy, which are not asked for
numpydoc_validation_checks = {"GL03", "PR01", "PR02", "PR03", "PR10", "RT01", "SS03"}
numpydoc_validation_exclude = {  # classes are told by their attributes
    r"favor_np\.AttentionState$",
    r"favor_np\.AttentionState\.copy$",
    r"favor_np\.compare\.[A-Z]",
    r"favor_np\.forecast\.[A-Z]",
    r"favor_np\.(diagnostics|exact|gradients|recommendation)\.[A-Z]",
    r"favor_np\.features\.Calibration\.",
    r"favor_np\.nn\.[A-Z]",
}

plot_formats = [("png", 150)]
plot_html_show_formats = False
plot_html_show_source_link = False
plot_rcparams = LOOKS
plot_apply_rcparams = True  # in every plot, also in those that go on from another

html_theme = "furo"
html_title = f"favor_np {release}"
templates_path = ["_templates"]
html_static_path = ["_static"]
html_css_files = ["pages.css"]


def run_examples(app):
    """Run the examples of the pages: a page that is wrong is not built."""
    from sphinx.errors import ExtensionError

    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    for page in sorted(HERE.glob("*.md")):
        result = doctest.testfile(str(page), module_relative=False, optionflags=flags)
        if result.failed:
            raise ExtensionError(f"{result.failed} of {result.attempted} examples in {page.name}")


def write_tables(app):
    """Compute the tables that pages include."""
    import roofline
    import variance_tables

    (HERE / "generated").mkdir(exist_ok=True)
    for name, table in (variance_tables.TABLES | roofline.TABLES).items():
        (HERE / "generated" / f"{name}.md").write_text(table(), encoding="utf-8")


def trim_examples(app, page, source):
    """Drop the blank line by which doctest knows where an example ends."""
    source[0] = source[0].replace("\n\n```\n", "\n```\n")


def setup(app):
    app.connect("builder-inited", run_examples)
    app.connect("builder-inited", write_tables)
    app.connect("source-read", trim_examples)
