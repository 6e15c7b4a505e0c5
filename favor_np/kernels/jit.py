"""The one place that calls ``numba.njit``: compilation flags, fewer compilations, the disk cache.

Two things differ from plain Numba.  A function that only kernels call is optimised and turned into
machine code as part of the kernels alone, which halves the time of a first call.  And the cache on
disk never raises, never serves code of other sources or another signature, and survives damaged
files and any number of processes.  Set ``FAVOR_NP_CACHE=0`` to compile in memory always.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import os
import pickle
import stat
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba import types
from numba.core import serialize
from numba.core.caching import FunctionCache
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.np import linalg

#: Reassociation is allowed (it is what vectorises a sum), NaN and infinity stay what they are.
FAST = frozenset({"contract", "reassoc", "nsz", "arcp", "afn"})
#: Products and sums may fuse and nothing else: for code that rounds by adding a large number.
EXACT = frozenset({"contract"})

_PACKAGE = Path(__file__).parent


@functools.cache
def sources_digest() -> str:
    """Digest of everything compiled code depends on that a kernel's signature does not tell."""
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    for path in sorted(_PACKAGE.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class _Store(FunctionCache):  # type: ignore[misc]
    """Numba's function cache, for which no fault of the disk is the user's problem.

    One sealed file an entry, named by its key.  (Numba's own index can give one process the code
    that another stored for a different signature, if both fill it at once.)
    """

    flags: tuple[object, ...] = ()

    def _file(self, sig: Any, codegen: Any) -> Path:
        key = hashlib.sha256(repr((sig, codegen.magic_tuple(), self.flags)).encode()).hexdigest()
        return Path(self.cache_path, f"{self._stem()}{sources_digest()}-{key[:16]}.nbc")

    def _stem(self) -> str:
        return f"{self._py_func.__name__}-{sys.implementation.cache_tag}-"

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        target_context.refresh()
        try:
            content = self._file(sig, target_context.codegen()).read_bytes()
            seal, data = content[:32], content[32:]
            if hashlib.sha256(data).digest() == seal:
                return self._impl.rebuild(target_context, pickle.loads(data))
        except Exception:  # no such file, no permission, ...: compile
            pass
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            if not self._impl.check_cachable(data):
                return
            path = self._file(sig, data.codegen)
            content = serialize.dumps(self._impl.reduce(data))
            draft = path.with_suffix(f".{uuid.uuid4().hex}")
            try:
                draft.write_bytes(hashlib.sha256(content).digest() + content)
                draft.replace(path)
            finally:
                draft.unlink(missing_ok=True)
            for old in path.parent.glob(f"{self._stem()}*"):
                if not old.name.startswith(f"{self._stem()}{sources_digest()}"):
                    old.unlink()
        except Exception:  # disk full, folder gone, ...: this process has its code already
            pass

    def flush(self) -> None:
        for old in Path(self.cache_path).glob(f"{self._stem()}*"):
            old.unlink(missing_ok=True)


def _store(function: Callable[..., Any], flags: tuple[object, ...]) -> _Store | None:
    """Return the cache of a kernel, or None if there is no good place for it."""
    if os.environ.get("FAVOR_NP_CACHE", "1") == "0":
        return None
    try:
        store = _Store(function)
        folder = Path(store.cache_path)
        # An entry is a pickle: it must not lie where anybody can put one, a bare /tmp above all.
        anybody = os.name == "posix" and folder.stat().st_mode & stat.S_IWOTH
        if anybody and _PACKAGE not in folder.parents:
            return None
    except Exception:  # no folder to write to, a strange locator, ...
        return None
    config = numba.config
    store.flags = (*flags, config.BOUNDSCHECK, config.OPT, config.DEBUGINFO_DEFAULT)
    return store


class _Part(JITCodeLibrary):  # type: ignore[misc]
    """Code that is only ever linked into a kernel, and optimised there: none of its own runs."""

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:  # noqa: ARG002
        self._ensure_finalized()
        return 0

    @property
    def codegen(self) -> Any:
        return self

    def set_env(self, name: str, env: Any) -> None:
        """Do nothing: there is no machine code that could look for it."""


class _PartCompiler(Compiler):  # type: ignore[misc]
    def __init__(self, typingctx: Any, targetctx: Any, library: Any, *args: Any) -> None:
        library = _Part(targetctx.codegen(), "part")
        library.enable_object_caching()
        super().__init__(typingctx, targetctx, library, *args)


def _not_callable(*args: Any, **kwargs: Any) -> None:
    raise TypeError("this function has no machine code of its own: only kernels can call it")


def jit(*, fastmath: frozenset[str] = FAST, cache: bool = False) -> Callable[..., Any]:
    """Compile for kernels: no GIL, IEEE division, no exceptions, no new arrays.

    ``cache`` belongs on the kernels that Python calls; what they call is compiled into them, and
    cannot be called from Python.
    """
    if numba.config.DISABLE_JIT:
        raise RuntimeError("favor_np computes in compiled code only: unset NUMBA_DISABLE_JIT")

    def decorate(function: Callable[..., Any]) -> Any:
        options: dict[str, Any] = {"fastmath": set(fastmath), "no_cfunc_wrapper": True}
        if not cache:
            options |= {"pipeline_class": _PartCompiler, "no_cpython_wrapper": True}
        dispatcher = numba.njit(nogil=True, error_model="numpy", _nrt=False, **options)(function)
        specialise = dispatcher.get_call_template
        # A literal 0 or True at a call site is no reason to compile the callee once more.
        dispatcher.get_call_template = lambda args, kws: specialise(
            [types.unliteral(a) for a in args], {k: types.unliteral(a) for k, a in kws.items()}
        )
        if not cache:
            dispatcher._compile_for_args = _not_callable
            dispatcher.add_overload = lambda result: dispatcher.overloads.update(
                {tuple(result.signature.args): result}
            )
        elif (store := _store(function, (tuple(sorted(fastmath)),))) is not None:
            dispatcher._cache = store
        return dispatcher

    return decorate


def _without_blas() -> None:
    """Load Numba's array functions without scipy.linalg, a third of the time of a warm first call.

    Numba imports it then to know whether ``np.dot`` would compile (we require scipy: it would),
    and checks it again whenever something with ``np.dot`` is compiled.
    """
    check, linalg.ensure_blas = linalg.ensure_blas, lambda: None
    try:
        importlib.import_module("numba.np.arraymath")
    finally:
        linalg.ensure_blas = check


with contextlib.suppress(AttributeError):
    _without_blas()
