"""Bugs planted in the package's modules of kernels."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager

#: The modules of kernels, each after those that it imports from.
MODULES = tuple(
    f"favor_np.cuda.{name}"
    for name in (
        "kernels.tiles",
        "kernels.pack",
        "kernels.favor",
        "kernels.favor_vjp",
        "kernels.step",
        "launch",
    )
)


def source_of(module: str) -> str:
    """The text of a module."""
    return inspect.getsource(importlib.import_module(module))


@contextmanager
def planted(module: str, start: int, old: str, new: str) -> Iterator[None]:
    """Let a module of kernels have `new` in place of `old`, at a position of its text."""
    text = source_of(module)
    if not text.startswith(old, start) or old.count("\n") != new.count("\n"):
        raise ValueError(f"{old!r} is not there, or has other lines than {new!r}")
    text = text[:start] + new + text[start + len(old) :]
    loaded = importlib.import_module(module)
    after = [importlib.import_module(x).__name__ for x in MODULES[MODULES.index(module) + 1 :]]
    try:
        exec(compile(text, str(loaded.__file__), "exec"), vars(loaded))
        for name in after:
            importlib.reload(sys.modules[name])
        yield
    finally:
        for name in (module, *after):
            importlib.reload(sys.modules[name])
