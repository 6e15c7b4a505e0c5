"""One thread for each of NumPy's matrix products, while several of ours multiply at a time.

OpenBLAS has threads of its own, which spin for a tenth of a second when they have nothing to do,
and would do so beside ours.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_lock = threading.RLock()
#: Who multiplies now, and how many threads BLAS had before the first of them came.
_inside = 0
_before = 0


@functools.cache
def _thread_functions() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """Return what gets and sets the number of BLAS threads; None if this BLAS is no OpenBLAS."""
    try:
        # A library also finds what it was linked with.
        library = ctypes.CDLL(importlib.import_module("numpy._core._multiarray_umath").__file__)
    except (ImportError, OSError):
        return None
    for prefix in ("scipy_openblas", "openblas"):
        for suffix in ("64_", "_64", ""):
            get = getattr(library, f"{prefix}_get_num_threads{suffix}", None)
            put = getattr(library, f"{prefix}_set_num_threads{suffix}", None)
            if get is not None and put is not None:
                return get, put
    return None


@contextmanager
def one_thread() -> Iterator[None]:
    """Let each product have one BLAS thread; the limit holds for the process, and is put back."""
    global _inside, _before
    functions = _thread_functions()
    if functions is None:
        yield
        return
    get, put = functions
    with _lock:
        if not _inside:
            _before = get()
            put(1)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                put(_before)


def _begin_anew() -> None:
    """Forget the other threads: none of them lives in the child of a fork."""
    global _lock, _inside
    _lock = threading.RLock()
    functions = _thread_functions() if _inside else None
    if functions is not None:
        functions[1](_before)
    _inside = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
