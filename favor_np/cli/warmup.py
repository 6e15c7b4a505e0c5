"""``favor-np warmup``: compile every kernel once, so that later first calls find it cached."""

from __future__ import annotations

import argparse
import time

from favor_np.progress import reporting

from ._options import compilation_told


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Compile the kernels that neither came with the package nor lie in the cache, so that the "
        "first call of any later process is quick."
    )
    parser.add_argument("--float64", action="store_true", help="the kernels of float64 as well")


def run(args: argparse.Namespace) -> int:
    """Load or compile every kernel that may be called here; return the exit status."""
    from favor_np.cpu.code import useful_kernels

    start = time.perf_counter()
    kernels = [k for k in useful_kernels() if args.float64 or k.dtype.itemsize == 4]
    with compilation_told(), reporting(None) as report:
        for done, kernel in enumerate(kernels, 1):
            kernel.load()
            report("kernels", done, len(kernels))
    compiled = sum(kernel.origin == "compiled" for kernel in kernels)
    print(
        f"{len(kernels)} kernels ready in {time.perf_counter() - start:.1f} s, {compiled} of them "
        "compiled now"
    )
    return 0
