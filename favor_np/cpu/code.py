"""Kernels as Python calls them: where their machine code comes from, and how it is called.

It is what came with the package, or what was compiled before and lies on disk, or it is compiled
now; only that needs Numba.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import os
import platform
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from favor_np import store
from favor_np.cpu import records, shipped, tiles
from favor_np.cpu.processor import TARGET, amx_unavailable, bfloat16_pays
from favor_np.cpu.sources import SOURCES, digest

#: One compilation, or load, at a time; a fork waits for it.
LOCK = threading.RLock()
_held: list[Any] = []

#: Called with each kernel that is about to be compiled.
LISTENERS: list[Callable[[Kernel], None]] = []

#: Where each kernel is written, what it takes, what its threads work on, and of what there are
#: variants: in float32 and float64, and in float32 alone.
KERNELS: dict[str, tuple[str, Any, Any, list[str], list[str]]] = {
    "attend": (
        "favor",
        records.Attend,
        tiles.ChunkTiles,
        ["", "pipeline", "error_bars", "pipeline error_bars"],
        ["pairs", "pairs pipeline", "parts", "parts pipeline"],
    ),
    "attend_tokens": ("favor", records.Attend, tiles.ChunkTiles, [""], []),
    "pull": ("favor_vjp", records.Pull, tiles.GradientTiles, [""], ["parts"]),
    "attend_exact": ("exact", records.Exact, tiles.ExactTiles, [""], ["pairs", "parts"]),
    "differentiate_exact": ("exact_vjp", records.ExactPull, tiles.ExactGradientTiles, [""], []),
    "merge": ("state", records.Merge, None, [""], []),
    "holds_large": ("pack", records.Numbers, None, [""], []),
    "normalize": ("layers", records.Normalize, None, [""], []),
    "normalize_back": ("layers", records.NormalizeBack, None, [""], []),
    "activate": ("layers", records.Activate, None, [""], []),
    "activate_back": ("layers", records.ActivateBack, None, [""], []),
    "split_heads": ("heads", records.Heads, None, [""], []),
    "merge_heads": ("heads", records.Heads, None, [""], []),
    "cross_entropy": ("learning", records.Entropy, None, [""], []),
    "square_sums": ("learning", records.Squares, None, [""], []),
    "adam": ("learning", records.Adam, None, [""], []),
}


class Kernel:
    """A variant of a kernel in one precision.  Its code is found when it is first called.

    Attributes
    ----------
    origin : str
        Where its code came from: "shipped", "stored" or "compiled"; "" before the first call.
    """

    def __init__(self, name: str, dtype: np.dtype[Any], variant: frozenset[str]) -> None:
        self.module, self.cls, self.room, *_ = KERNELS[name]
        self.name, self.dtype, self.variant = name, dtype, variant
        self.symbol = "_".join(("favor_np", name, *sorted(variant), dtype.name))
        #: How products of bfloat16 are computed, if there are any.
        self.way = TARGET.way if "pairs" in variant else ""
        if "parts" in variant:
            self.way = "amx" if TARGET.amx else "plain"
        self.origin = ""
        self._function: Callable[[bytes], int] | None = None

    @property
    def library(self) -> str:
        """The name of the library in which it is shipped."""
        return f"{TARGET.level}-{self.way}" if self.way else TARGET.level

    def __call__(self, block: bytes) -> int:
        """Run it on a block of `record.pack`, whose record is kept meanwhile."""
        return self.load()(block)

    def load(self) -> Callable[[bytes], int]:
        """Return the function that takes a block."""
        function = self._function
        if function is None:
            with LOCK:
                function = self._function = self._function or self._shipped()
        if function is None:
            _watch_forks_before_compiling()
            with LOCK:
                function = self._function = self._function or self._compiled()
        return function

    def _shipped(self) -> Callable[[bytes], int] | None:
        found: Callable[[bytes], int] | None = None
        if shipped.manifest().get("sources") == SOURCES != "":
            found = shipped.function(self.library, self.symbol, ctypes.c_char_p)
        if found is not None:
            self.origin = "shipped"
        return found

    def _compiled(self) -> Callable[[bytes], int]:
        return _link(self.object_code(), self.symbol)

    def object_code(self) -> bytes:
        """Return its object code: as it was kept, or compiled now and kept."""
        code = store.load(self.symbol, self.header) if SOURCES else None
        if code is not None:
            self.origin = "stored"
            return code
        code = self.compile()
        self.origin = "compiled"
        if SOURCES and digest() == SOURCES:  # nobody has changed what was just imported
            store.save(self.symbol, self.header, code)
        return code

    @property
    def header(self) -> dict[str, str]:
        """What its code depends on."""
        features = TARGET.features_for(self.way)
        where = f"{sys.platform} {platform.machine().lower()}"
        return {
            "sources": SOURCES,
            "target": f"{where} {TARGET.cpu} {features}".strip(),
            "compiler": _compiler(),
        }

    def compile(self) -> bytes:
        """Compile it, by Numba, to object code."""
        for listener in LISTENERS:
            listener(self)
        from favor_np.cpu.kernels import block, jit

        body = getattr(importlib.import_module(f"favor_np.cpu.kernels.{self.module}"), self.name)
        variant, dtype = self.variant, self.dtype
        room = self.room and block.Block(self.room, variant, dtype, None, is_room=True)
        kind = block.Block(self.cls, variant, dtype, room, is_room=False)
        return jit.compile_kernel(body, kind, self.symbol, self.way)


_kernels: dict[tuple[Any, ...], Kernel] = {}


@functools.cache
def kernel(name: str, dtype: np.dtype[Any], variant: frozenset[str] | None = None) -> Kernel:
    """Return the kernel of this name: one object, however it is asked for."""
    if variant is None:
        return kernel(name, dtype, frozenset())
    key = name, dtype, variant
    return _kernels.get(key) or _kernels.setdefault(key, Kernel(*key))


def every_kernel() -> Iterator[Kernel]:
    """Go through all kernels, in all variants and precisions."""
    for name, (*_, both, single) in KERNELS.items():
        for kind in (np.float32, np.float64):
            for variant in both + (single if kind is np.float32 else []):
                yield kernel(name, np.dtype(kind), frozenset(variant.split()))


def useful_kernels() -> Iterator[Kernel]:
    """Go through those that calls on this processor may take."""
    for each in every_kernel():
        parts, pairs = ("parts" in each.variant), ("pairs" in each.variant)
        if (not parts or not amx_unavailable()) and (not pairs or bfloat16_pays()):
            yield each


def _hold() -> None:
    """Let nobody load or compile during a fork: the child could never take a lock held then."""
    numba = sys.modules.get("numba.core.compiler_lock")
    for lock in (LOCK, getattr(numba, "global_compiler_lock", None)):
        if lock is not None:
            lock.acquire()
            _held.append(lock)


def _let_go() -> None:
    while _held:
        _held.pop().release()


def _watch_forks() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_hold, after_in_parent=_let_go, after_in_child=_let_go)


_watch_forks()


@functools.cache
def _watch_forks_before_compiling() -> None:
    """Hold our lock at a fork before logging does its own, which Numba may need to finish.

    Hooks run in reverse order of registration.
    """
    import logging  # noqa: F401

    _watch_forks()


#: By which variables of its environment Numba makes other code.
_OPTIONS = ("BOUNDSCHECK", "DEBUGINFO", "LOOP_VECTORIZE", "OPT", "SLP_VECTORIZE")


def _compiler() -> str:
    """Return what compiles, and how; Numba, which takes long to import, is not imported for it."""
    import llvmlite

    found = [f"{name}={os.environ.get(f'NUMBA_{name}', '')}" for name in _OPTIONS]
    return " ".join((f"llvmlite={llvmlite.__version__}", f"numba={_numba_version()}", *found))


@functools.cache
def _numba_version() -> str:
    spec = importlib.util.find_spec("numba")
    if spec is not None and spec.origin is not None:
        with contextlib.suppress(OSError):  # in an archive, or a frozen program
            text = Path(spec.origin).with_name("_version.py").read_text(encoding="utf-8")
            found = re.search(r'"version": "(.+)"', text)
            if found:
                return found[1]
    import numba

    return str(numba.__version__)


@functools.cache
def _linker() -> Any:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(reloc="pic", jit=True)
    return llvm.create_lljit_compiler(machine, use_jit_link=True, suppress_errors=False)


_libraries: list[Any] = []


_FUNCTION = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_char_p)


def _link(code: bytes, symbol: str) -> Callable[[bytes], int]:
    """Load object code; return its function."""
    import llvmlite.binding as llvm

    builder = llvm.JITLibraryBuilder().add_object_img(code).add_current_process()
    linked = builder.export_symbol(symbol).link(_linker(), f"{symbol}_{len(_libraries)}")
    _libraries.append(linked)
    return _FUNCTION(linked[symbol])


def described() -> str:
    """Say which code runs here, and why."""
    found = shipped.manifest()
    level = TARGET.level
    if not found:
        off = os.environ.get("FAVOR_NP_PREBUILT", "1") == "0"
        why = "FAVOR_NP_PREBUILT=0" if off else "this installation came without machine code"
    elif found.get("sources") != SOURCES:
        why = "the sources are not those of the code that came along"
    elif shipped.library(level) is None:
        why = "what came along has none for it, or is damaged"
    else:
        return f"shipped for {level}"
    return f"compiled here for {level}: {why}"
