"""``favor-np info``: what is installed here and what the kernels will make of it."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import favor_np

PACKAGES = ("numpy", "numba", "llvmlite", "scipy", "matplotlib", "tqdm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options: none."""
    parser.description = "Print versions, processor, threads and cache of this installation."


def run(args: argparse.Namespace) -> int:  # noqa: ARG001
    """Print; return the exit status."""
    for name, value in describe().items():
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
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _kernels() -> dict[str, str]:
    """What the compiled side is set to: vectors, threads, cache."""
    import llvmlite.binding

    from favor_np.kernels import favor, simd
    from favor_np.threads import default_threads

    return {
        "processor": f"{llvmlite.binding.get_host_cpu_name()}, {os.cpu_count()} CPUs",
        "vectors": f"{simd.ISA}, {simd.VECTOR_BYTES} bytes",
        "threads": str(default_threads()),
        "cache": _cache_path(favor.attend) or "none: every process compiles its kernels anew",
    }


def _cache_path(kernel: Any) -> str | None:
    """Directory in which a kernel's machine code is kept; None without a cache."""
    return getattr(getattr(kernel, "_cache", None), "cache_path", None)
