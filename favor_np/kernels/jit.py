"""The one place that calls ``numba.njit``: compilation flags and the on-disk cache.

Numba's own disk cache raises where nothing is writable, keeps a truncated file for ever and does
not notice an edited callee.  Here every such fault ends in "compile in memory", and the key covers
the sources of all kernels, the versions in play and the flags.  Set ``FAVOR_NP_CACHE=0`` to
compile in memory always.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba import types
from numba.core.caching import FunctionCache

#: Reassociation is allowed (it is what vectorises a sum), NaN and infinity stay what they are.
FAST = frozenset({"contract", "reassoc", "nsz", "arcp", "afn"})
#: Products and sums may fuse and nothing else: for code that rounds by adding a large number.
EXACT = frozenset({"contract"})


@functools.cache
def sources_digest() -> bytes:
    """Digest of everything compiled code depends on that Numba's cache key leaves out."""
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.digest()


class _ForgivingCache(FunctionCache):  # type: ignore[misc]
    """Numba's function cache, for which no fault of the disk is the user's problem."""

    flags: tuple[object, ...] = ()

    def _index_key(self, sig: Any, codegen: Any) -> tuple[Any, ...]:
        return (*super()._index_key(sig, codegen), sources_digest(), self.flags)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # whatever a damaged file raises: forget it, compile anew
            try:
                self.flush()
            except OSError:
                pass
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception:  # disk full, directory gone, ...: this process has its code already
            pass


def jit(*, fastmath: frozenset[str] = FAST, cache: bool = False) -> Callable[..., Any]:
    """Compile a kernel: no GIL, IEEE division, no exceptions.

    ``cache`` belongs on the kernels that Python calls; what they call is stored with them.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = numba.njit(nogil=True, error_model="numpy", fastmath=set(fastmath))(function)
        specialise = dispatcher.get_call_template
        # A literal 0 or True at a call site is no reason to compile the callee once more.
        dispatcher.get_call_template = lambda args, kws: specialise(
            [types.unliteral(a) for a in args], {k: types.unliteral(a) for k, a in kws.items()}
        )
        if cache and os.environ.get("FAVOR_NP_CACHE", "1") != "0" and not numba.config.DISABLE_JIT:
            try:
                store = _ForgivingCache(dispatcher.py_func)
            except (RuntimeError, OSError):  # no directory to write to
                return dispatcher
            bounds = os.environ.get("NUMBA_BOUNDSCHECK", "")
            store.flags = (tuple(sorted(fastmath)), bounds)
            dispatcher._cache = store
        return dispatcher

    return decorate
