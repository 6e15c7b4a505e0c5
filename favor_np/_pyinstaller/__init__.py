"""For PyInstaller, which finds this by the package's entry point."""

from __future__ import annotations


def hook_directories() -> list[str]:
    """Return the folders with hooks."""
    return list(__path__)
