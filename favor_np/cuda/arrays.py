"""Arrays of the caller: found on a device, read there, and given back as what they came as."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from favor_np import validation
from favor_np.call import Call
from favor_np.cuda import device, runtime

#: Numbers that kernels read and write, and as what: words of bfloat16, see `kernels.storage`.
HELD: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("f4"),
    "float16": np.dtype("f2"),
    "bfloat16": np.dtype("i2"),
}


class Place(NamedTuple):
    """Where a call is computed: on which stream, and for what kind of arrays.

    `kind` is the library of the caller's arrays: numpy, numba, cupy, torch, jax, or one of which
    nothing is known but the memory that it shows, and which gets Numba's arrays.
    """

    device: device.Device
    stream: Any
    kind: str

    def views(self, **arrays: Any) -> list[Any]:
        """Return device arrays as Numba's of what kernels read; NumPy's and None as they are."""
        return [self._view(name, array) for name, array in arrays.items()]

    def _view(self, name: str, array: Any, *, ordered: bool = True) -> Any:
        """Return an array as kernels see it; with `ordered` its library may copy it to C order."""
        if self.kind == "numpy" or array is None:
            return array
        if self.kind not in ("numba", "torch", "cupy", "jax"):
            array = _shown(name, array)
        found = _name(array.dtype)
        if found not in HELD and name != "key_mask":
            raise TypeError(f"{name} must be {' or '.join(HELD)} on a CUDA device, got {found}")
        if self.kind == "torch":
            array = array.detach().contiguous() if ordered else array.detach()
        elif self.kind == "cupy" and ordered:
            import cupy

            array = cupy.ascontiguousarray(array)
        if found == "bfloat16":  # which the interface between libraries has no name for
            array = array.view(self._dtype("int16"))
        array = _shown(name, array)
        if not array.flags["C_CONTIGUOUS"]:
            raise ValueError(f"{name} must be C-contiguous, got strides {array.strides}")
        return array

    def taken(self, name: str, array: Any) -> Any:
        """Return a further array of the caller, of the same kind, as one that kernels read."""
        if self.kind == "numpy":
            return self.put(validation.tensor(name, array))
        if not device.on_device(array):
            raise TypeError(f"{name} lies in main memory, the other arrays on a CUDA device")
        return self._view(name, array)

    def held(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        """Return what kernels have for the dtype of an array that was checked."""
        return HELD.get(_name(dtype), HELD["float32"]) if self.kind == "numpy" else dtype

    def host(self, array: Any) -> Any:
        """Return numbers that the host has to know in main memory, wherever they lie."""
        if device.on_device(array):
            if _library(array) == "torch":
                array = array.detach().contiguous()
            array = runtime.to_host(
                _shown("cu_seqlens, key_bias, decay or grad_state", array), self.stream
            )
        return array

    def empty(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        """Return a new array of Numba, in memory of the caller's library if that has a pool."""
        if self.kind in ("torch", "cupy"):
            return runtime.view(runtime.pooled(self.kind, shape, dtype, self.device.number))
        return runtime.empty(shape, dtype, self.stream)

    def room(self, call: Call, out: Any = None) -> Any:
        """Return the array for the result of a call: `out`, checked, or a new one."""
        dtype = self.held(call.result)
        if out is None:
            return self.empty(call.out_shape, dtype)
        if self.kind not in ("numba", "torch", "cupy"):  # others copy, or know arrays to read only
            raise ValueError(f"out cannot be used with arrays of {self.kind} on a CUDA device")
        if not device.on_device(out) or _library(out) != self.kind:
            raise TypeError(
                f"out must be an array of {self.kind} on the CUDA device, got {type(out)}"
            )
        device.check_placement({"out": out})
        target = self._view("out", out, ordered=False)
        if target.dtype != dtype:
            names = {held: name for name, held in HELD.items()}
            raise TypeError(f"out must have dtype {names[dtype]}, got {names[target.dtype]}")
        if target.shape != call.out_shape:
            raise ValueError(f"out must have shape {call.out_shape}, got {target.shape}")
        for name, array in {"q": call.q, "k": call.k, "v": call.v, "key_mask": call.mask}.items():
            if array is not None and _overlap(target, array):
                raise ValueError(f"out must not overlap {name} on a CUDA device")
        return target

    def put(self, array: Any) -> Any:
        """Return an array that was checked as one that kernels read: NumPy's is copied there."""
        if not isinstance(array, np.ndarray):
            return array
        held = array.dtype
        if held != bool and held not in HELD.values():
            held = self.held(held)
        if held.itemsize == 4:
            array = array.astype(held, copy=False)
        return runtime.to_device(np.ascontiguousarray(array).view(held), self.stream)

    def give(self, array: Any, dtype: np.dtype[Any]) -> Any:
        """Return a result as an array of the caller's kind, with NumPy of this dtype."""
        words = array.dtype == HELD["bfloat16"]
        if self.kind == "numpy":
            array = runtime.to_host(array, self.stream)
            return array.view(dtype) if words else array.astype(dtype, copy=False)
        if self.kind == "torch":
            import torch

            array = torch.as_tensor(array, device="cuda")
        elif self.kind == "cupy":
            import cupy

            array = cupy.asarray(array)
        elif self.kind == "jax":
            import jax.numpy

            array = jax.numpy.asarray(array)
        return array.view(self._dtype("bfloat16")) if words else array

    def _dtype(self, name: str) -> Any:
        """A dtype of the caller's library; NumPy knows bfloat16 once there is an array of it."""
        if self.kind == "torch":
            import torch

            return getattr(torch, name)
        return np.dtype(name)


def place(where: object, **arrays: Any) -> Place | None:
    """Return where a call with these arrays is computed; None: by the CPU."""
    if where is not None:
        validation.choice("device", where, ("cpu", "cuda"))
    there = [array for array in arrays.values() if device.on_device(array)]
    if not there:
        return None if where != "cuda" else Place(device.current(), 0, "numpy")
    if where == "cpu":
        raise TypeError("device='cpu' needs arrays in main memory, got one on a CUDA device")
    found = device.current()
    device.check_placement(arrays)
    kind = _library(there[0])
    return Place(found, runtime.stream_of(kind, there[0]), kind)


def _library(array: Any) -> str:
    """The name of the library that an array is of."""
    name = type(array).__module__.partition(".")[0]
    return {"jaxlib": "jax"}.get(name, name)


def _overlap(one: Any, other: Any) -> bool:
    """Whether two arrays of Numba, in C order, share memory."""
    (first, size), (start, length) = ((runtime.address(x), int(x.nbytes)) for x in (one, other))
    return first < start + length and start < first + size


def stand_in(array: Any) -> Any:
    """Return a NumPy array of the same shape and dtype to validate; bfloat16 as float32."""
    if isinstance(array, np.ndarray) or not device.on_device(array):
        return array
    dtype = HELD["float32"] if array.dtype in HELD.values() else array.dtype
    return validation.outline(tuple(array.shape), dtype)


def _shown(name: str, array: Any) -> Any:
    """Return an array as one of Numba's, of the same memory."""
    try:
        return runtime.view(array)
    except (BufferError, NotImplementedError, TypeError) as error:
        raise TypeError(f"{name} cannot be read where it lies: {error}") from None


def _name(dtype: Any) -> str:
    """The name of a dtype of any library."""
    return str(dtype).rpartition(".")[2]
