"""What was compiled once, by this process or by others that share the folder $PTXRUN_CACHE."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import marshal
import os
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

_OWN = tempfile.TemporaryDirectory(prefix="ptxrun")  # goes with the process
FOLDER = Path(os.environ.get("PTXRUN_CACHE") or _OWN.name)
#: Packages whose functions and types a name stands for: their versions are looked at.
_KNOWN = ("builtins", "math", "numpy", "numba", "numba_cuda", "llvmlite")
_CHANGEABLE = (list, dict, set, np.ndarray)
_COMPILERS = ("numpy", "numba", "llvmlite", "cuda", "nvidia")


def file(parts: tuple[bytes, ...], make: Callable[[Path], Any], folder: Path = FOLDER) -> Path:
    """The file that `make` writes to a path, of which `parts` are all that it depends on."""
    digest = hashlib.sha256(b"".join(b"%d " % len(part) + part for part in parts))
    path = folder / digest.hexdigest()
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as own:
            written = Path(own, "file")
            make(written)
            written.replace(path)  # others see it whole or not at all
    return path


@functools.cache
def _versions() -> bytes:
    found = {(x.name, x.version) for x in importlib.metadata.distributions()}
    return repr(sorted(x for x in found if x[0].startswith(_COMPILERS))).encode()


def parts_of(function: Callable[..., Any]) -> tuple[bytes, ...]:
    """What the code of a kernel depends on.

    That is its own code and that of all functions it calls, the values of names in them, and the
    files they come from: what they register there by `overload`, no name leads to.  TypeError if
    there is a value whose text may not say all about it.
    """
    return (_versions(), *_parts(function, set()))


def _parts(value: Any, seen: set[Any]) -> Iterator[bytes]:
    if hasattr(value, "py_func"):
        yield repr(sorted(value.targetoptions.items())).encode()
    value = getattr(value, "py_func", getattr(value, "_defn", value))  # of an intrinsic
    if isinstance(value, types.ModuleType):
        home, text = value.__name__, ""
    elif isinstance(value, types.FunctionType | types.BuiltinFunctionType | type):
        home, text = value.__module__ or "", value.__qualname__
    else:
        home, text = type(value).__module__, repr(value)
    known = home.split(".")[0] in _KNOWN
    if isinstance(value, tuple):
        for item in value:
            yield from _parts(item, seen)
    elif known and " at 0x" not in text and not isinstance(value, _CHANGEABLE):
        yield f"{home} {text}".encode()
    elif not isinstance(value, types.FunctionType):
        raise TypeError(f"{value!r} may stand for anything")
    elif value not in seen:
        seen.add(value)
        yield from _function(value, seen)


def _function(function: types.FunctionType, seen: set[Any]) -> Iterator[bytes]:
    code = function.__code__
    path = Path(code.co_filename)
    yield path.read_bytes() if path.is_file() else b""
    yield marshal.dumps(code, 2)  # which does not depend on who else has its constants
    for cell in function.__closure__ or ():
        yield from _parts(cell.cell_contents, seen)
    yield from _parts(function.__defaults__, seen)
    for name in sorted(_names(code) & function.__globals__.keys()):
        yield name.encode()
        yield from _parts(function.__globals__[name], seen)


def _names(code: types.CodeType) -> set[str]:
    inner = (x for x in code.co_consts if isinstance(x, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))
