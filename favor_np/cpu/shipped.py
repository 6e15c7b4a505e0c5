"""Machine code that came with the package: a shared library for each level, compiled elsewhere.

Beside the libraries lies ``manifest.json``: from which sources they were compiled, and their
SHA-256.  Without it, or with ``FAVOR_NP_PREBUILT=0``, code is compiled here.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "libraries"


@functools.cache
def manifest() -> dict[str, Any]:
    """Return what is there: {} if it is nothing, or not to be used."""
    if os.environ.get("FAVOR_NP_PREBUILT", "1") == "0":
        return {}
    try:
        found = json.loads((FOLDER / "manifest.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@functools.cache
def library(name: str) -> Any:
    """Return a library, or None if it is not there or not whole."""
    try:
        entry = manifest()["libraries"][name]
        path = FOLDER / entry["file"]
        if path.parent != FOLDER:
            return None
        if hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
            return None
        return ctypes.CDLL(str(path))
    except (OSError, LookupError, TypeError, ValueError):
        return None


def function(name: str, symbol: str, *arguments: Any) -> Any:
    """Return a function of a library, with such arguments, or None."""
    found = getattr(library(name), symbol, None)
    if found is not None:
        found.argtypes, found.restype = arguments, ctypes.c_int64
    return found


#: Where CPUID has what: leaf, subleaf, register (eax to edx), bit.
_BITS = {
    "avx": (1, 0, 2, 28),
    "f16c": (1, 0, 2, 29),
    "fma": (1, 0, 2, 12),
    "movbe": (1, 0, 2, 22),
    "bmi": (7, 0, 1, 3),
    "avx2": (7, 0, 1, 5),
    "bmi2": (7, 0, 1, 8),
    "avx512f": (7, 0, 1, 16),
    "avx512dq": (7, 0, 1, 17),
    "avx512cd": (7, 0, 1, 28),
    "avx512bw": (7, 0, 1, 30),
    "avx512vl": (7, 0, 1, 31),
    "amx-bf16": (7, 0, 3, 22),
    "amx-tile": (7, 0, 3, 24),
    "avx512bf16": (7, 1, 0, 5),
    "lzcnt": (0x80000001, 0, 2, 5),
}
#: Which state of a thread the system has to keep for what begins like this: bits of XCR0.
_KEPT = {"avx512": 0xE6, "amx": 0x60000, "avx": 0x6, "f16c": 0x6, "fma": 0x6}


def features() -> tuple[frozenset[str], str] | None:
    """Return what this x86-64 processor and system can do, and its maker; None if nobody knows."""
    numbers = ctypes.c_int64, ctypes.c_int64
    ask = function("processor", "favor_np_cpuid", *numbers, ctypes.c_void_p)
    ask_kept = function("processor", "favor_np_xgetbv")
    if ask is None or ask_kept is None:
        return None

    @functools.cache
    def registers(leaf: int, subleaf: int) -> tuple[int, ...]:
        found = (ctypes.c_uint32 * 4)()
        ask(leaf, subleaf, found)
        return tuple(found)

    _, b, c, d = registers(0, 0)
    vendor = b"".join(word.to_bytes(4, "little") for word in (b, d, c)).decode("ascii", "replace")
    kept = ask_kept() if registers(1, 0)[2] >> 27 & 1 else 0

    def there(name: str) -> bool:
        leaf, subleaf, register, bit = _BITS[name]
        if registers(leaf & 0x80000000, 0)[0] < leaf or registers(leaf, 0)[0] < subleaf == 1:
            return False
        needs = next((bits for start, bits in _KEPT.items() if name.startswith(start)), 0)
        return kept & needs == needs and bool(registers(leaf, subleaf)[register] >> bit & 1)

    return frozenset(filter(there, _BITS)), vendor
