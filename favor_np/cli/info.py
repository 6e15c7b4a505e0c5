"""``favor-np info``: what is installed here and what the kernels will make of it."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import textwrap
from collections.abc import Callable
from pathlib import Path

import favor_np
from favor_np import store
from favor_np.cuda import code, device

from ._text import WIDTH

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
    lines = textwrap.TextWrapper(
        WIDTH, subsequent_indent=" " * 12, break_long_words=False, break_on_hyphens=False
    )
    for name, value in facts.items():
        print(lines.fill(f"{name:<12}{value}"))
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
    """What the compiled side is set to: code, vectors, matrix unit, threads, cache."""
    from favor_np.cpu import code
    from favor_np.cpu.processor import TARGET, VECTOR_BYTES
    from favor_np.cpu.threads import default_threads

    return {
        "processor": f"{_processor()}, {os.cpu_count()} CPUs",
        "code": code.described(),
        "vectors": f"{TARGET.isa}, {VECTOR_BYTES} bytes",
        "bfloat16": _bfloat16(),
        "threads": str(default_threads()),
        "cache": store.cache_path() or "none: every process compiles its kernels anew",
    }


def _processor() -> str:
    """Return what the system calls the processor, or what it is."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _bfloat16() -> str:
    """What there is to multiply bfloat16, and float32 that is cut into it."""
    from favor_np.cpu.processor import TARGET, amx_unavailable

    if TARGET.amx and amx_unavailable():
        return f"as float32: the system refuses the matrix unit (AMX): {amx_unavailable()}"
    if TARGET.amx:
        return "by the matrix unit (AMX)"
    return "by AVX512_BF16" if TARGET.dots else "as float32: nothing here is faster"


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
        "gpu-code": f"{code.kept()} kernels kept" if store.enabled() else "not kept",
        "targets": " ".join(f"sm_{major}{minor}" for major, minor in device.ARCHITECTURES),
    }


def _cuda(version: Callable[[], tuple[int, int]]) -> str:
    try:
        return "CUDA {}.{}".format(*version())
    except (ImportError, RuntimeError):
        return "none"
