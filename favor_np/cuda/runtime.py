"""The seam to the device: all that happens on it goes through these functions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from favor_np.cuda.kernels.tiles import THREADS


@functools.cache
def _compiled(kernel: Callable[..., Any]) -> Any:
    from numba import cuda

    return cuda.jit(kernel, launch_bounds=THREADS)


def launch(
    kernel: Callable[..., Any], grid: tuple[int, ...], args: Sequence[Any], stream: Any
) -> None:
    """Run a kernel, a plain function, on a grid of blocks of THREADS threads."""
    _compiled(kernel)[grid, THREADS, stream](*args)


def to_device(array: npt.NDArray[Any], stream: Any) -> Any:
    """Copy a NumPy array to the device."""
    from numba import cuda

    return cuda.to_device(np.ascontiguousarray(array), stream)


def empty(shape: int | tuple[int, ...], dtype: npt.DTypeLike, stream: Any) -> Any:
    """Return an array on the device, of whatever was there."""
    from numba import cuda

    return cuda.device_array(shape, dtype, stream=stream)


def to_host(array: Any, stream: Any) -> npt.NDArray[Any]:
    """Copy an array to a new NumPy array, when all before it is done."""
    host: npt.NDArray[Any] = array.copy_to_host(stream=stream)
    if stream:
        stream.synchronize()
    return host
