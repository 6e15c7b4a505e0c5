"""Kernels as Python calls them: where their machine code comes from, and how it is called.

It is what came with the package, or what was compiled before and lies on disk, or it is compiled
now; only that needs Numba.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from favor_np.cpu import records, shipped, store, tiles
from favor_np.cpu.processor import TARGET, amx_unavailable
from favor_np.cpu.sources import SOURCES, digest

#: One compilation, or load, at a time; a fork waits for it.
LOCK = threading.RLock()

#: Called with each kernel that is about to be compiled.
LISTENERS: list[Callable[[Kernel], None]] = []

#: Where each kernel is written, what it takes, what its threads work on, and of what there are
#: variants: in float32 and float64, and in float32 alone.
KERNELS: dict[str, tuple[str, Any, Any, list[str], list[str]]] = {
    "attend": ("favor", records.Attend, tiles.ChunkTiles, ["", "relay", "spread", "relay spread"],
               ["pairs", "pairs relay", "parts", "parts relay"]),
    "attend_tokens": ("favor", records.Attend, tiles.ChunkTiles, [""], []),
    "pull": ("favor_vjp", records.Pull, tiles.GradientTiles, [""], ["parts"]),
    "attend_exact": ("exact", records.Exact, tiles.ExactTiles, [""], ["pairs", "parts"]),
    "differentiate_exact": ("exact_vjp", records.ExactPull, tiles.ExactGradientTiles, [""], []),
    "holds_large": ("pack", records.Rows, None, [""], []),
}  # fmt: skip


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
        self.way = TARGET.way if variant & {"pairs", "parts"} else ""
        self.origin = ""
        self._function: Callable[[bytes], int] | None = None

    def __repr__(self) -> str:
        return f"<Kernel {self.symbol}>"

    @property
    def library(self) -> str:
        """The name of the library in which it is shipped."""
        return f"{TARGET.level}-{self.way}" if self.way else TARGET.level

    def __call__(self, block: bytes) -> int:
        """Run it on a block of `record.pack`, whose arrays are kept meanwhile."""
        return self.load()(block)

    def load(self) -> Callable[[bytes], int]:
        """Return the function that takes a block."""
        if self._function is None:
            with LOCK:
                if self._function is None:
                    self._function = self._find()
        return self._function

    def _find(self) -> Callable[[bytes], int]:
        if shipped.manifest().get("sources") == SOURCES != "":
            found = shipped.function(self.library, self.symbol)
            if found is not None:
                found.argtypes, found.restype = [ctypes.c_char_p], ctypes.c_int64
                self.origin = "shipped"
                return found  # type: ignore[no-any-return]  # ctypes has no such types
        code = store.load(self.symbol, self.header) if SOURCES else None
        self.origin = "compiled" if code is None else "stored"
        if code is None:
            code = self.compile()
            if SOURCES and digest() == SOURCES:  # nobody has changed what was just imported
                store.save(self.symbol, self.header, code)
        return ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_char_p)(_link(code, self.symbol))

    @property
    def header(self) -> dict[str, str]:
        """What its code depends on."""
        features = TARGET.features_for(self.way)
        return {"sources": SOURCES, "target": f"{_platform()} {TARGET.cpu} {features}".strip()}

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


def kernel(name: str, dtype: np.dtype[Any], variant: frozenset[str] = frozenset()) -> Kernel:
    """Return the one kernel of this name."""
    return _kernel(name, dtype, variant)


_kernel = functools.cache(Kernel)


def every_kernel() -> Iterator[Kernel]:
    """Go through all kernels, in all variants and precisions."""
    for name, (*_, both, single) in KERNELS.items():
        for kind in (np.float32, np.float64):
            for variant in both + (single if kind is np.float32 else []):
                yield kernel(name, np.dtype(kind), frozenset(variant.split()))


def useful_kernels() -> Iterator[Kernel]:
    """Go through those that calls on this processor may take."""
    for each in every_kernel():
        if "parts" in each.variant:
            useful = not amx_unavailable()
        elif "pairs" in each.variant:
            useful = TARGET.dots or not amx_unavailable()
        else:
            useful = True
        if useful:
            yield each


def _platform() -> str:
    import platform
    import sys

    return f"{sys.platform} {platform.machine().lower()}"


@functools.cache
def _linker() -> Any:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(reloc="pic", jit=True)
    return llvm.create_lljit_compiler(machine, use_jit_link=True, suppress_errors=False)


_libraries: list[Any] = []


def _link(code: bytes, symbol: str) -> int:
    """Load object code; the address of its function."""
    import llvmlite.binding as llvm

    builder = llvm.JITLibraryBuilder().add_object_img(code).add_current_process()
    linked = builder.export_symbol(symbol).link(_linker(), symbol)
    _libraries.append(linked)
    return int(linked[symbol])


def described() -> str:
    """Say which code runs here, and why."""
    found = shipped.manifest()
    level = TARGET.level
    if not found:
        off = os.environ.get("FAVOR_NP_PREBUILT", "1") == "0"
        why = "FAVOR_NP_PREBUILT=0" if off else "this installation came without machine code"
        return f"compiled here for {level}: {why}"
    if found.get("sources") != SOURCES:
        return f"compiled here for {level}: the sources are not those of the code that came along"
    if shipped.library(level) is None:
        return f"compiled here for {level}: what came along has none for it"
    return f"shipped for {level}"
