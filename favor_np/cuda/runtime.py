"""The seam to the device: all that happens on it goes through these functions."""

from __future__ import annotations

import ctypes
import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from favor_np.cuda import code
from favor_np.cuda.code import THREADS
from favor_np.cuda.device import clear_errors


class Array:
    """A light view of memory on the device, in C order: cheaper to build than Numba's."""

    __slots__ = ("address", "dtype", "fields", "kind", "owner", "shape", "size")

    def __init__(
        self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any], owner: Any
    ) -> None:
        self.address, self.shape, self.dtype, self.owner = address, shape, dtype, owner
        self.size = math.prod(shape)
        self.kind = dtype, len(shape)
        strides = [dtype.itemsize] * len(shape)
        for i in range(len(shape) - 1, 0, -1):
            strides[i - 1] = strides[i] * shape[i]
        #: As Numba's kernels have them: two pointers that are not used, sizes, the address, the
        #: shape.
        self.fields = (0, 0, self.size, dtype.itemsize, address, *shape, *strides)


def plain(array: Any, shape: tuple[int, ...] | None = None) -> Any:
    """Return an array of Numba, in C order, as kernels see it."""
    at, owner = (
        (array.address, array.owner) if isinstance(array, Array) else (address(array), array)
    )
    return Array(at, array.shape if shape is None else shape, array.dtype, owner)


def rows(array: Any) -> Any:
    """Return (..., L, d) as a matrix of all its rows."""
    return plain(array, (math.prod(array.shape[:-1]), array.shape[-1]))


def flat(array: Any) -> Any:
    """Return an array with a single axis."""
    return plain(array, (array.size,))


@functools.lru_cache(maxsize=256)
def _config(grid: tuple[int, int, int]) -> Any:
    from cuda.core import LaunchConfig

    return LaunchConfig(grid=grid, block=(THREADS, 1, 1))


@functools.lru_cache(maxsize=64)
def _core_stream(handle: int) -> Any:
    from cuda.core import Stream

    return Stream.from_handle(handle)


def handle_of(stream: Any) -> int:
    """The driver's number of a stream of Numba."""
    return int(stream.handle or 0) if stream else 0


def launch(
    kernel: Callable[..., Any], grid: tuple[int, ...], args: Sequence[Any], stream: Any
) -> None:
    """Run a kernel, a plain function, on a grid of blocks of THREADS threads.

    Numba's own way takes several times as long: it looks at every argument anew, and it would warn
    of the few blocks that a decoder's step has.
    """
    from cuda.core import launch as start

    kinds: list[tuple[Any, int]] = []
    values: list[Any] = []
    for x in args:
        if isinstance(x, np.float32):
            kinds.append((x.dtype, 0))
            values.append(ctypes.c_float(float(x)))
        else:
            array = x if isinstance(x, Array) else plain(x)
            kinds.append(array.kind)
            values.extend(array.fields)
    with clear_errors():
        function = code.function(kernel, tuple(kinds))
        start(_core_stream(handle_of(stream)), _config((*grid, 1, 1)[:3]), function, *values)


class Scratch:
    """Memory that a thread's calls on one stream use one after the other.

    The device works them off in this order, so nothing has to wait, and nothing is allocated anew.
    """

    #: Bytes that are not given back at the end of a call.
    KEPT = 2**30

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._blocks: list[Array] = []
        #: Bytes taken of the last block, of all, and at most.
        self._used = self._taken = self._most = 0

    @contextmanager
    def call(self) -> Iterator[None]:
        """A call, which may overwrite what was taken before."""
        self._used = self._taken = self._most = 0
        yield
        large = self._most > self.KEPT
        if large or len(self._blocks) > 1:  # a single one will do the next time
            self._blocks = []
            if not large:
                self._add(self._most)

    @contextmanager
    def part(self) -> Iterator[None]:
        """A part of a call, at whose end what was taken in it is given back."""
        blocks, used, taken = len(self._blocks), self._used, self._taken
        yield
        self._used = used if len(self._blocks) == blocks else 0
        self._taken = taken

    def _add(self, size: int) -> None:
        self._blocks.append(plain(empty((size,), np.uint8, self._stream)))
        self._used = 0

    def empty(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Return an array of whatever was there, at a multiple of 256 bytes."""
        shape, dtype = (shape,) if isinstance(shape, int) else shape, np.dtype(dtype)
        size = -(-math.prod(shape) * dtype.itemsize // 256) * 256
        if not self._blocks or self._used + size > self._blocks[-1].size:
            self._add(max(size, 1 << 20))
        found = Array(self._blocks[-1].address + self._used, shape, dtype, self._blocks[-1])
        self._used += size
        self._taken += size
        self._most = max(self._most, self._taken)
        return found


_LOCAL = threading.local()


def scratch(device: int, stream: Any) -> Scratch:
    """Return the scratch memory of this thread for a stream of a device; the last few are kept."""
    held = _LOCAL.__dict__.setdefault("scratch", {})
    key = device, handle_of(stream)
    found: Scratch = held.pop(key, None) or Scratch(stream)
    held[key] = found
    if len(held) > 4:
        del held[next(iter(held))]
    return found


def to_device(array: npt.NDArray[Any], stream: Any) -> Any:
    """Copy a NumPy array to the device."""
    from numba import cuda

    with clear_errors():
        return cuda.to_device(np.ascontiguousarray(array), stream)


def constant(array: npt.NDArray[Any], handle: int | None = None) -> Any:
    """Copy a NumPy array to the device for good, for one stream or, with None, for any."""
    from numba import cuda

    there = plain(to_device(array, cuda.external_stream(handle) if handle else 0))
    if handle is None:
        with clear_errors():
            cuda.default_stream().synchronize()
    return there


def empty(shape: int | tuple[int, ...], dtype: npt.DTypeLike, stream: Any) -> Any:
    """Return an array on the device, of whatever was there."""
    from numba import cuda

    with clear_errors():
        return cuda.device_array(shape, dtype, stream=stream)


def pooled(kind: str, shape: int | tuple[int, ...], dtype: npt.DTypeLike, number: int) -> Any:
    """Return a new array of CuPy or PyTorch, on the device of this number, from its pool."""
    if kind == "torch":
        import torch

        name = getattr(torch, np.dtype(dtype).name)
        return torch.empty(shape, dtype=name, device=f"cuda:{number}")
    import cupy

    return cupy.empty(shape, dtype)


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

    if isinstance(array, cuda.devicearray.DeviceNDArray):
        return array
    if hasattr(array, "__cuda_array_interface__"):
        # CuPy's current stream, which it names there, is the one that we work on: no need to wait
        # for it
        return cuda.as_cuda_array(array, sync=not type(array).__module__.startswith("cupy"))
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
    return int(array.device_ctypes_pointer.value or 0)


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
