"""Kernels of numba.cuda without a GPU: compiled to PTX and executed on the CPU.

``ptxrun.run(function, grid, block, (array, ..., np.int32(n)), outputs=[3])`` compiles a plain Python
kernel for the types of its arguments, executes the PTX in place on NumPy arrays, and returns a
report: ``assert report.ok, report``.  `stub_driver` puts numba-cuda's own runtime on top.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ptxdevice import PtxDevice


@pytest.fixture
def gpu() -> Iterator[PtxDevice]:
    """An H100 for calls with device="cuda": NumPy's arrays, kernels executed from their PTX."""
    with PtxDevice().installed() as device:
        yield device
