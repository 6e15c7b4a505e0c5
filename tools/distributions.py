"""What is in a wheel and in an sdist: what has to be, and nothing else.

python -m build && python tools/distributions.py dist/*
"""

import sys
import tarfile
import zipfile
from pathlib import Path

#: Beside every module of the package.
WHEEL = {
    "favor_np/py.typed",
    "favor_np/forecast/data/wti-daily.csv",
    "favor_np/forecast/data/README.md",
}
SDIST = {
    *("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "README.md", "SECURITY.md"),
    *("PKG-INFO", "hatch_build.py", "noxfile.py", "pyproject.toml", ".gitignore"),
    *(".pre-commit-config.yaml", ".readthedocs.yaml"),
}
FOLDERS = ("asv_benchmarks/", "docs/", "favor_np/", "tests/", "tools/")
NEVER = ("__pycache__", ".hypothesis", "docs/_build/", "docs/generated/")


def names(path):
    """The files of a distribution; those of an sdist without its folder."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            return set(archive.namelist())
    with tarfile.open(path) as archive:
        return {m.name.partition("/")[2] for m in archive if m.isfile()}


def faults(path, modules):
    """Say what is wrong with a distribution, if anything: ``modules`` is what it has to have."""
    found = names(path)
    if path.suffix == ".whl":
        missing = (modules | WHEEL) - found
        extra = {
            name for name in found - modules - WHEEL
            if not name.startswith("favor_np/cpu/libraries/") and ".dist-info/" not in name
        }  # fmt: skip
    else:
        missing = (modules | WHEEL | SDIST) - found
        extra = {name for name in found - SDIST if not name.startswith(FOLDERS)}
    extra |= {name for name in found if any(part in name for part in NEVER)}
    return [f"{path.name} lacks {name}" for name in sorted(missing)] + [
        f"{path.name} should not have {name}" for name in sorted(extra)
    ]


def main():
    root = Path(__file__).parents[1]
    modules = {path.relative_to(root).as_posix() for path in root.glob("favor_np/**/*.py")}
    wrong = [fault for path in sys.argv[1:] for fault in faults(Path(path), modules)]
    print("\n".join(wrong) or f"{len(sys.argv) - 1} distributions have what they should")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
