"""The processor: the vectors and the matrix products that code is compiled for.

Code is compiled for a level, not for one processor: so machines of one level compute the same bits,
share what was compiled, and run what was compiled elsewhere.  ``NUMBA_CPU_NAME`` and
``NUMBA_CPU_FEATURES`` name another target, as for Numba.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from favor_np.cpu import shipped

_MACHINE = platform.machine().lower()
_X86 = ("x86_64", "amd64")
_ARM = ("aarch64", "arm64")  # with NEON, whatever LLVM reports

#: What x86-64-v3 and -v4 have, as far as compilers use it.
_V3 = frozenset(["avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe"])
_V4 = _V3 | frozenset(["avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"])

_LEVELS = {"x86-64-v3": _V3, "x86-64-v4": _V4}
_AVX512_NAMES = (
    "avx512",
    "lake-server",
    "cascade",
    "cooper",
    "cannon",
    "icelake",
    "tigerlake",
    "rocketlake",
    "sapphire",
    "emerald",
    "granite",
    "diamond",
    "znver4",
    "znver5",
    "x86-64-v4",
)
_AVX2_NAMES = (
    "haswell",
    "broadwell",
    "skylake",
    "znver1",
    "znver2",
    "znver3",
    "alderlake",
    "raptorlake",
    "meteorlake",
    "x86-64-v3",
)
#: Processors whose vector products of bfloat16 are faster than those of float32: twice on AMD's,
#: while Intel's take as long, or twice as long.
_FAST_PRODUCTS = ("znver4", "znver5")


@dataclass(frozen=True)
class Target:
    """What code is compiled for.

    Attributes
    ----------
    level : str
        The name of the level, or of the processor.
    isa : str
        The widest vectors: avx512, avx2, neon or plain.
    cpu, features : str
        The same for LLVM.
    amx, dots : bool
        Whether products of bfloat16 are computed by the matrix unit, or by AVX512_BF16.
    """

    level: str
    isa: str
    cpu: str
    features: str
    amx: bool = False
    dots: bool = False

    @property
    def way(self) -> str:
        """How products of bfloat16 are computed."""
        return "amx" if self.amx else "dots" if self.dots else "plain"

    def features_for(self, way: str) -> str:
        """Return LLVM's features for code that computes products of bfloat16 in this way."""
        if self.isa != "avx512":
            return self.features
        more = {"amx": "+avx512bf16,+amx-tile,+amx-bf16", "dots": "+avx512bf16"}.get(way, "")
        return ",".join(filter(None, (self.features, more)))


def named_target(name: str, features: str, machine: str = _MACHINE) -> Target:
    """Return the target of this name, and with these features besides."""
    more = frozenset(part[1:] for part in features.split(",") if part.startswith("+"))
    if name in _LEVELS:
        return target_of(_LEVELS[name] | more, "AuthenticAMD")
    isa, dots = "plain", False
    if any(part in name for part in _AVX512_NAMES):
        isa = "avx512"
        dots = any(part in name for part in _FAST_PRODUCTS)
        if features:
            dots = "avx512bf16" in more
    elif any(part in name for part in _AVX2_NAMES):
        isa = "avx2"
    elif machine in _ARM:
        isa = "neon"
    if machine in _X86:  # also of a name that LLVM does not know, and passes over
        features = ",".join(filter(None, ("+64bit,+cx8,+sse2", features)))
    return Target(name, isa, name, features, dots=dots)


def target_of(features: frozenset[str], vendor: str = "") -> Target:
    """Return the target for an x86-64 processor with these features, and of this maker."""
    if features >= _V4:
        amx = sys.platform == "linux" and features >= {"amx-tile", "amx-bf16"}
        dots = not amx and "avx512bf16" in features and vendor == "AuthenticAMD"
        # Twice as wide as LLVM would have them, as the kernels' own vectors are.
        return Target("x86-64-v4", "avx512", "x86-64-v4", "-prefer-256-bit", amx, dots)
    if features >= _V3:
        return Target("x86-64-v3", "avx2", "x86-64-v3", "")
    return Target("x86-64", "plain", "x86-64", "")


def find_target(
    environ: Mapping[str, str] = os.environ, machine: str = _MACHINE, system: str = sys.platform
) -> Target:
    """Return the target that the environment names, or that of the machine."""
    name, features = environ.get("NUMBA_CPU_NAME", "host"), environ.get("NUMBA_CPU_FEATURES")
    if name not in ("", "host"):
        return named_target(name, features or "", machine)
    if features is None and machine in _ARM:
        cpu = "apple-m1" if system == "darwin" else "generic"
        return Target("aarch64", "neon", cpu, "+neon")
    if features is None and machine in _X86:
        return target_of(*features_here())
    import llvmlite.binding

    return named_target(llvmlite.binding.get_host_cpu_name(), features or "", machine)


def features_here() -> tuple[frozenset[str], str]:
    """Return what this x86-64 processor and system can do, in LLVM's words, and who made it."""
    found = shipped.features()
    if found is not None:
        return found
    import llvmlite.binding as llvm

    names = frozenset(name for name, there in llvm.get_host_cpu_features().items() if there)
    return names, "AuthenticAMD" if llvm.get_host_cpu_name().startswith("znver") else ""


TARGET = find_target()
VECTOR_BYTES = {"avx512": 64, "avx2": 32, "neon": 16, "plain": 16}[TARGET.isa]


@functools.cache
def amx_unavailable() -> str:
    """Ask the system for AMX, and return why this process may not use it, or "" if it may.

    A process must ask before it, or a child of it, uses the unit.
    """
    if not TARGET.amx:
        return "there is none"
    arch_prctl, request, tile_data = 158, 0x1023, 18
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(arch_prctl, request, tile_data):
        return os.strerror(ctypes.get_errno())
    return ""


def bfloat16_pays() -> bool:
    """Whether products of bfloat16 are faster than those of float32 here."""
    return TARGET.dots or not amx_unavailable()
