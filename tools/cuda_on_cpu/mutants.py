"""Kernels with planted bugs: a function written anew from its source with one place changed."""

from __future__ import annotations

import inspect
import itertools
import linecache
import textwrap
from collections.abc import Callable
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
