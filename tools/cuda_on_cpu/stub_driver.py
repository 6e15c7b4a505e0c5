"""A CUDA driver for machines without a GPU: numba-cuda's own runtime, kernels executed by ptxrun.

`install` loads a libcuda.so.1 (stub_driver.c) before numba-cuda looks for one.  From then on the
process has GPUs whose memory is the host's, and whatever is launched there is executed from its PTX
on the CPU and checked as ptxrun.py does.  So the host's side runs as it is: contexts, streams,
copies, the marshalling of arguments.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ptxrun
from ptx import bits, translate


class _Allocation(ctypes.Structure):
    _fields_ = (("base", ctypes.c_uint64), ("size", ctypes.c_uint64), ("device", ctypes.c_int))


class Calls(ctypes.Structure):
    """How often memory was allocated, copied or set, and waited for."""

    _fields_ = tuple((name, ctypes.c_int) for name in ("allocations", "copies", "waits"))


_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint),
    ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip


#: What code for a child process begins with, before it installs the driver: see `child.python`.
CHILD = f"""
import sys, warnings
warnings.simplefilter("ignore")  # numba-cuda's, of small grids and of the linker
sys.path.insert(0, {str(Path(__file__).parent)!r})
import numpy as np
import stub_driver
"""
#: What the driver calls has to live as long as the process.
_KEPT: list[Any] = []
#: The code that executes a kernel has its state in globals.
_ONE_AT_A_TIME = threading.Lock()


@dataclass
class Launch:
    """One that was made: the kernel's name, dimensions, the stream, what was found."""

    name: str
    dims: tuple[int, ...]
    stream: int
    report: ptxrun.Report


@dataclass
class Driver:
    """The driver that is installed, with all launches so far."""

    library: ctypes.CDLL
    launches: list[Launch] = field(default_factory=list)

    def calls(self) -> Calls:
        """Those since this was asked last."""
        calls = Calls()
        self.library.stub_calls(ctypes.byref(calls))
        return calls

    def launch(self, ptx: bytes, name: bytes, dims: Any, stream: int | None, values: Any) -> int:
        """Execute a kernel; 0, or 1 if something was found, which the driver calls a failure."""
        text = ptx.decode()
        kinds = [kind for _, kind in translate(text).parameters]
        read = [ctypes.string_at(values[i], bits(kind) // 8) for i, kind in enumerate(kinds)]
        allocations = (_Allocation * (1 << 16))()
        count = self.library.stub_allocations(allocations)
        spans = [(a.base, a.size) for a in allocations[:count]]
        grid, block, shared = tuple(dims[:3]), tuple(dims[3:6]), dims[6]
        with _ONE_AT_A_TIME:
            report, _ = ptxrun.execute_raw(text, grid, block, read, spans, dynamic_bytes=shared)
        self.launches.append(Launch(name.decode(), (*grid, *block), stream or 0, report))
        if not report.ok:
            sys.stderr.write(f"{name.decode()[:60]}: {report}\n")
        return int(not report.ok)


def install(*, devices: int = 1, version: int = 13000, memory: int = 1 << 32) -> Driver:
    """Load the driver; `devices` = -1: there are none.  Once a process, before numba-cuda."""
    if "numba.cuda" in sys.modules:
        raise RuntimeError("numba.cuda has been imported already")
    with tempfile.TemporaryDirectory(prefix="stub_driver") as folder:
        path = Path(folder, "libcuda.so.1")
        source = Path(__file__).with_suffix(".c")
        command = ["gcc", "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", source, "-o", path]
        subprocess.run([*command, "-ldl"], check=True)
        driver = Driver(ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL))
    callback = _LAUNCH(driver.launch)
    _KEPT.extend((driver, callback))
    driver.library.stub_configure(devices, version, ctypes.c_uint64(memory), callback)
    return driver
