"""Kernels with planted bugs: a function written anew from its source with one place changed."""

from __future__ import annotations

import importlib
import inspect
import itertools
import linecache
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_count = itertools.count()


def function_of(source: str, **scope: Any) -> Callable[..., Any]:
    """The function that `source` defines; its lines can be looked up, as Numba does."""
    path = f"<source {next(_count)}>"
    linecache.cache[path] = len(source), None, source.splitlines(keepends=True), path
    exec(compile(source, path, "exec"), scope)
    return scope[source.removeprefix("def ").split("(")[0]]


def mutate(function: Callable[..., Any], old: str, new: str, **names: Any) -> Callable[..., Any]:
    """Return `function` with `old` in its source replaced by `new`, once.

    `names` stand in for globals of the same name, for instance for a device function that has
    been changed itself.
    """
    function = getattr(function, "py_func", function)
    source = textwrap.dedent(inspect.getsource(function))
    source = source[source.index("def ") :]  # without decorators
    if source.count(old) != 1:
        raise ValueError(f"{old!r} occurs {source.count(old)} times in {function.__name__}")
    scope = function.__globals__ | inspect.getclosurevars(function).nonlocals | names
    return function_of(source.replace(old, new), **scope)


#: The modules of kernels, each after those that it imports from.
MODULES = tuple(
    f"favor_np.cuda.{name}"
    for name in ("kernels.tiles", "kernels.pack", "kernels.favor", "kernels.favor_vjp", "launch")
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
