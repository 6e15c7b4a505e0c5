"""``favor-np info``: what is installed here and what the kernels will make of it."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import favor_np
from favor_np.cuda import device

PACKAGES = ("numpy", "numba", "llvmlite", "scipy", "matplotlib", "tqdm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = "Print versions, processor, threads, cache and GPU of this installation."
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    """Print; return the exit status."""
    facts = describe()
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    for name, value in facts.items():
        print(f"{name:<12}{value}")
    return 0


def describe() -> dict[str, str]:
    """Facts by name, in the order in which they are printed."""
    return {
        "favor_np": f"{favor_np.__version__} in {Path(favor_np.__file__).parent}",
        "python": f"{platform.python_version()} ({platform.python_implementation()}, "
        f"{platform.system()} {platform.machine()})",
        **{name: _version(name) for name in PACKAGES},
        **_kernels(),
        **_gpu(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _kernels() -> dict[str, str]:
    """What the compiled side is set to: vectors, matrix unit, threads, cache."""
    import llvmlite.binding

    from favor_np.cpu.kernels import favor, simd
    from favor_np.cpu.threads import default_threads

    return {
        "processor": f"{llvmlite.binding.get_host_cpu_name()}, {os.cpu_count()} CPUs",
        "vectors": f"{simd.ISA}, {simd.VECTOR_BYTES} bytes",
        "matrix-unit": _matrix_unit(),
        "threads": str(default_threads()),
        "cache": _cache_path(favor.attend) or "none: every process compiles its kernels anew",
    }


def _matrix_unit() -> str:
    """What there is to multiply bfloat16, and float32 that is cut into it."""
    from favor_np.cpu.kernels import bfloat16

    if bfloat16.AMX:
        why_not = bfloat16.amx_unavailable()
        return f"AMX, but the system refuses it: {why_not}" if why_not else "AMX"
    return "none: bfloat16 " + ("by AVX512_BF16" if bfloat16.DOTS else "is slow")


def _cache_path(kernel: Any) -> str | None:
    """Directory in which a kernel's machine code is kept; None without a cache."""
    return getattr(getattr(kernel, "_cache", None), "cache_path", None)


def _gpu() -> dict[str, str]:
    """The GPU, and what is missing to use one; nothing of CUDA is loaded without numba-cuda."""
    problem = device.problem()
    gpu = f"none: {problem}" if problem else str(device.current())
    facts = {"gpu": gpu, "numba-cuda": _version("numba-cuda")}
    try:
        implementation = device.numba_cuda().implementation
    except ImportError:
        return facts
    return facts | {
        "numba-cuda": f"{facts['numba-cuda']}, implementation {implementation}",
        "driver": _cuda(device.driver_version),
        "toolkit": _cuda(device.toolkit_version),
        "targets": " ".join(f"sm_{major}{minor}" for major, minor in device.ARCHITECTURES),
    }


def _cuda(version: Callable[[], tuple[int, int]]) -> str:
    try:
        return "CUDA {}.{}".format(*version())
    except (ImportError, RuntimeError):
        return "none"
