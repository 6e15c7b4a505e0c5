"""The seam to the device: all that happens on it goes through these functions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from favor_np.cuda.device import clear_errors

#: Threads of a block, and how many blocks a multiprocessor holds at least: it bounds the registers.
BOUNDS = THREADS, RESIDENT = 256, 2


def bounds(kernel: Callable[..., Any]) -> tuple[int, int]:
    """Return the bounds of a kernel, of which fewer may be resident."""
    return THREADS, getattr(kernel, "resident", RESIDENT)


@functools.cache
def _compiled(kernel: Callable[..., Any]) -> Any:
    from numba import cuda

    return cuda.jit(kernel, launch_bounds=bounds(kernel))


def launch(
    kernel: Callable[..., Any], grid: tuple[int, ...], args: Sequence[Any], stream: Any
) -> None:
    """Run a kernel, a plain function, on a grid of blocks of THREADS threads."""
    with clear_errors():
        _configured(kernel, (*grid, 1, 1)[:3], stream)(*args)


def _configured(kernel: Callable[..., Any], grid: tuple[int, ...], stream: Any) -> Any:
    """Return a kernel with its grid, without Numba's advice against less than 128 blocks.

    A decoder's step has fewer, and filters of warnings belong to the user.
    """
    enough = _compiled(kernel)[(128, 1, 1), THREADS, stream]
    configured = object.__new__(type(enough))
    configured.__dict__.update(vars(enough), griddim=grid)
    return configured


def to_device(array: npt.NDArray[Any], stream: Any) -> Any:
    """Copy a NumPy array to the device."""
    from numba import cuda

    with clear_errors():
        return cuda.to_device(np.ascontiguousarray(array), stream)


def empty(shape: int | tuple[int, ...], dtype: npt.DTypeLike, stream: Any) -> Any:
    """Return an array on the device, of whatever was there."""
    from numba import cuda

    with clear_errors():
        return cuda.device_array(shape, dtype, stream=stream)


def to_host(array: Any, stream: Any) -> npt.NDArray[Any]:
    """Copy an array to a new NumPy array, when all before it is done."""
    host: npt.NDArray[Any] = array.copy_to_host(stream=stream)
    if stream:
        stream.synchronize()
    return host


def copy(array: Any, stream: Any) -> Any:
    """Return a copy, on the device as well."""
    from numba import cuda

    with clear_errors():
        new = cuda.device_array_like(array, stream=stream)
        new.copy_to_device(array, stream=stream)
    return new


def view(array: Any) -> Any:
    """Return an array of any library on the device as one of Numba's, of the same memory.

    BufferError, NotImplementedError or TypeError if the library does not show it as it should.
    """
    from numba import cuda

    if hasattr(array, "__cuda_array_interface__"):
        return cuda.as_cuda_array(array)
    from cuda.core.utils import StridedMemoryView  # numba-cuda needs it as well

    shown = StridedMemoryView.from_dlpack(array, stream_ptr=0)
    size = shown.dtype.itemsize
    interface = {
        "version": 3,
        "shape": shown.shape,
        "typestr": shown.dtype.str,
        "data": (shown.ptr, shown.readonly),
        "strides": None if shown.strides is None else tuple(size * n for n in shown.strides),
    }
    return cuda.from_cuda_array_interface(interface, owner=shown).view(shown.dtype)


def address(array: Any) -> int:
    """Return where an array of Numba begins."""
    return int(array.__cuda_array_interface__["data"][0])


def stream_of(kind: str, array: Any) -> Any:
    """Return the stream on which the caller works with this array."""
    from numba import cuda

    if kind == "cupy":
        import cupy

        return cuda.external_stream(cupy.cuda.get_current_stream().ptr)
    if kind == "torch":
        import torch

        return cuda.external_stream(torch.cuda.current_stream().cuda_stream)
    return (
        (array.stream or 0) if kind == "numba" else 0
    )  # the default one, with which others are in order
