#!/usr/bin/env bash
# matplotlib 3.11.2, myst-parser 5.2.0, sphinx 9.0.4
#
# matplotlib's plot directive numbers the plots of a page. In a Markdown page each {eval-rst} block counts
# from one again, so that all its plots have the same file, and the page shows the first picture everywhere,
# without a warning, even with -W -n. The same two plots in reStructuredText are two pictures.
# (:filename-prefix: gives each a name of its own, and matplotlib refuses a name that is used twice.)
#
# Seen, pictures on a page with two plots:
#   markdown.md: markdown-1.png, markdown-1.png
#   rest.rst: rest-1.png, rest-2.png
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv v
v/bin/pip install -qq --disable-pip-version-check matplotlib==3.11.2 myst-parser==5.2.0 sphinx==9.0.4

mkdir docs
cat > docs/conf.py <<'PYTHON'
extensions = ["myst_parser", "matplotlib.sphinxext.plot_directive"]
root_doc = "rest"
PYTHON
first=$(printf '.. plot::\n\n   import matplotlib.pyplot as plt\n   plt.plot([0, 1])\n')
other=$(printf '.. plot::\n\n   import matplotlib.pyplot as plt\n   plt.plot([1, 0])\n')
fence='```'
printf 'Markdown\n========\n\n%s{eval-rst}\n%s\n%s\n\n%s{eval-rst}\n%s\n%s\n' \
    "$fence" "$first" "$fence" "$fence" "$other" "$fence" > docs/markdown.md
printf 'reStructuredText\n================\n\n.. toctree::\n\n   markdown\n\n%s\n\n%s\n' "$first" "$other" > docs/rest.rst
v/bin/python -m sphinx -W -n -q -b html docs html

v/bin/python - <<'PYTHON'
import re
from pathlib import Path

for page, expected in (
    ("markdown.md", ["markdown-1.png", "markdown-1.png"]),
    ("rest.rst", ["rest-1.png", "rest-2.png"]),
):
    html = Path("html", page).with_suffix(".html").read_text(encoding="utf-8")
    seen = re.findall(r'<img[^>]+src="_images/([^"]+)"', html)
    print(f"{page}: {', '.join(seen)}")
    assert seen == expected
PYTHON
