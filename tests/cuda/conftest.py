"""Kernels of numba.cuda without a GPU: compiled to PTX and executed on the CPU.

By tools/cuda_on_cpu, whose README tells how; `PtxDevice` lets the host's code launch kernels there.
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
