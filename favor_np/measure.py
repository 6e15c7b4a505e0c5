"""Time and memory of a call, measured the same way wherever the package reports them."""

import contextvars
import ctypes
import sys
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["best_time", "peak_memory"]


def best_time(call: Callable[[], object], *, budget: float = 0.5, least: int = 2) -> float:
    """Seconds of the fastest of several calls: at least ``least``, more while ``budget`` lasts."""
    best, spent, calls = float("inf"), 0.0, 0
    while calls < least or spent + best < budget:
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        best, spent, calls = min(best, seconds), spent + seconds, calls + 1
        if seconds > 4 * budget:  # one call is long enough to be its own average
            break
    return best


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes by which the memory of this process grows at most during one call, results included.

    The greater of two measurements: what NumPy and Python allocated (which cannot see what
    compiled code allocates by itself) and, on Linux, the growth of the resident set (which cannot
    see freed memory that is used again). The call is made by a new thread, because workspaces are
    kept for the thread that used them: a repeated call would seem to need none.
    """
    context = contextvars.copy_context()
    with ThreadPoolExecutor(1) as executor:
        executor.submit(int).result()  # starts the thread, which is no part of the call
        tracing = tracemalloc.is_tracing()
        if not tracing:
            tracemalloc.start()
        try:
            resident = _reset_peak()
            tracemalloc.reset_peak()
            allocated = tracemalloc.get_traced_memory()[0]
            executor.submit(context.run, call).result()
            allocated = tracemalloc.get_traced_memory()[1] - allocated
            resident = _status("VmHWM") - resident if resident else 0
        finally:
            if not tracing:
                tracemalloc.stop()
    return max(allocated, resident, 0)


def _reset_peak() -> int:
    """Make the present size of the resident set its peak and return it; 0 where that cannot be."""
    if not sys.platform.startswith("linux"):
        return 0
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return 0


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
