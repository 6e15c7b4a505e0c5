"""Kernels as the device runs them: compiled before and kept on disk, or compiled now.

What is kept is machine code for one compute capability (a cubin), with the kernel's name in it
before: see `favor_np.store`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from favor_np import numerics, store
from favor_np.cuda import device
from favor_np.sources import Sources

#: Dtype and number of axes of an argument; of a number 0.
Kind = tuple[np.dtype[Any], int]
Function = Callable[..., Any]

_SOURCES = Sources("favor_np.cuda.kernels", (), (numerics,))
#: Their digest now, before an editor changes what is being imported.
SOURCES = _SOURCES.digest()
#: Threads of a block, and how many blocks a multiprocessor holds at least: it bounds the registers.
BOUNDS = THREADS, RESIDENT = 256, 2
#: What the names of all files of kernels begin with.
PREFIX = "favor_np_cuda"
#: By which variables of its environment Numba makes other code.
_OPTIONS = ("BOUNDSCHECK", "CUDA_DEBUGINFO_DEFAULT", "DEBUGINFO", "OPT")

#: Called with the symbol of each kernel that is about to be compiled.
LISTENERS: list[Callable[[str], None]] = []
#: How many kernels this process has compiled, and how many it has found on disk.
counts = {"compiled": 0, "stored": 0}

_LOCK = threading.RLock()
_functions: dict[tuple[Function, tuple[Kind, ...], int], Any] = {}


def bounds(kernel: Function) -> tuple[int, int]:
    """Return the bounds of a kernel, of which fewer may be resident."""
    return THREADS, getattr(kernel, "resident", RESIDENT)


def symbol(kernel: Function) -> str:
    """Return the name of a kernel, and what its factory made it for.

    >>> def make(kind):
    ...     def fold(x):
    ...         x[0] = kind
    ...
    ...     return fold
    >>> symbol(make(3))
    'favor_np_cuda_fold_kind3'
    """
    made_for = (
        f"{name}{int(cell.cell_contents)}"
        for name, cell in zip(kernel.__code__.co_freevars, kernel.__closure__ or (), strict=True)
    )
    return "_".join((PREFIX, kernel.__name__, *made_for))


def header(
    kernel: Function, kinds: tuple[Kind, ...], capability: tuple[int, int]
) -> dict[str, str]:
    """Return what the machine code of a kernel depends on."""
    return {
        "sources": SOURCES,
        "target": "sm_{}{}".format(*capability),
        "arguments": " ".join(f"{axes}{dtype.str}" for dtype, axes in kinds),
        "bounds": "{} {}".format(*bounds(kernel)),
        "compiler": _compiler(),
    }


def _compiler() -> str:
    """Return what compiles, and how."""
    import llvmlite
    import numba
    import numba_cuda

    versions = {
        "numba-cuda": numba_cuda.__version__,
        "numba": numba.__version__,
        "llvmlite": llvmlite.__version__,
        "cuda": "{}.{}".format(*device.toolkit_version()),
        "driver": "{}.{}".format(*device.driver_version()),  # which links, without nvJitLink
    }
    options = {name: os.environ.get(f"NUMBA_{name}", "") for name in _OPTIONS}
    return " ".join(f"{name}={value}" for name, value in (versions | options).items())


def function(kernel: Function, kinds: tuple[Kind, ...]) -> Any:
    """Return a kernel for arguments of these kinds as the current device runs it."""
    current = device.numba_cuda().get_current_device()
    key = kernel, kinds, int(current.id)
    found = _functions.get(key)
    if found is None:
        with _LOCK:
            found = _functions.get(key) or _loaded(kernel, kinds, current.compute_capability)
            _functions[key] = found
    return found


def _loaded(kernel: Function, kinds: tuple[Kind, ...], capability: tuple[int, int]) -> Any:
    """Load a kernel's code into the driver: what was kept, or what is compiled now and kept."""
    from cuda.core import ObjectCode

    name, head = symbol(kernel), header(kernel, kinds, capability)
    code = store.load(name, head) if SOURCES else None
    counts["compiled" if code is None else "stored"] += 1
    if code is None:
        for listener in LISTENERS:
            listener(name)
        code = _compile(kernel, kinds)
        if SOURCES and _SOURCES.digest() == SOURCES:  # nobody has changed what was just imported
            store.save(name, head, code)
    entry, _, cubin = code.partition(b"\n")
    return ObjectCode.from_cubin(cubin, name=name).get_kernel(entry.decode())


def _compile(kernel: Function, kinds: tuple[Kind, ...]) -> bytes:
    """Compile a kernel for the current device: its name there, a line, and the machine code."""
    from numba import cuda, types
    from numba.np.numpy_support import from_dtype

    signature = tuple(
        types.Array(from_dtype(dtype), axes, "C") if axes else from_dtype(dtype)
        for dtype, axes in kinds
    )
    dispatcher = cuda.jit(kernel, launch_bounds=bounds(kernel))
    library = dispatcher.compile(signature)._codelibrary
    entry: str = library._entry_name
    code: bytes = library.get_cubin().code
    return entry.encode() + b"\n" + code


def kept() -> int:
    """Return how many kernels are kept on disk, of these sources."""
    return store.count(PREFIX, SOURCES)
