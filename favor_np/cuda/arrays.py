"""Arrays of the caller: found on a device, read there, and given back as what they came as."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from favor_np import validation
from favor_np.cuda import device, runtime


class Place(NamedTuple):
    """Where a call is computed: on which stream, and for what kind of arrays.

    `kind` is the library of the caller's arrays, one of numpy, numba, cupy, torch and jax, and
    `half` the 16-bit dtype, of that library, that the result is cast to.
    """

    device: device.Device
    stream: Any
    kind: str
    half: Any = None

    @property
    def launch(self) -> Any:
        """What launches kernels here, as the module `favor_np.launch` does on the CPU."""
        from favor_np.cuda.launch import Launch

        return Launch(self)

    def refuse(self, **options: object) -> None:
        """Refuse options that only the CPU has."""
        for name, value in options.items():
            if value not in (None, False):
                raise ValueError(f"{name} cannot be used on a CUDA device")

    def on_tensor_cores(self, precision: object) -> bool:
        """Whether ``precision`` is "tf32x3"; the device has to have what that needs."""
        if precision == "bfloat16":
            raise ValueError("precision='bfloat16' cannot be used on a CUDA device")
        if validation.choice("precision", precision, ("full", "tf32x3")) == "full":
            return False
        if self.device.compute_capability < (8, 0):
            raise ValueError(
                f"precision='tf32x3' needs a GPU of compute capability 8.0 or newer, got {self.device}"
            )
        return True

    def views(self, **arrays: Any) -> list[Any]:
        """Return device arrays as Numba's in float32, or bool; NumPy's and None as they are."""
        return [self._view(name, array) for name, array in arrays.items()]

    def _view(self, name: str, array: Any) -> Any:
        if self.kind == "numpy" or array is None:
            return array
        short = array.dtype.itemsize == 2
        if self.kind == "torch":
            array = (array.float() if short else array).detach().contiguous()
        elif self.kind == "cupy":
            import cupy

            array = cupy.ascontiguousarray(array, "float32" if short else None)
        elif self.kind == "jax" and short:
            array = array.astype("float32")
        array = runtime.view(array)
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

    def attention_call(
        self, q: Any, k: Any, v: Any, *, key_mask: Any, **options: Any
    ) -> validation.AttentionCall:
        """Check the arguments of attention, arrays on the device by their shapes and dtypes."""
        arrays = q, k, v, key_mask
        shapes = [_stand_in(array) for array in arrays]
        call = validation.attention_call(*shapes[:3], key_mask=shapes[3], **options)
        if call.compute != np.float32:
            raise TypeError(
                "q, k and v must be float32 or 16-bit floats on a CUDA device, which computes in"
                f" float32: got {call.compute}"
            )
        return call if self.kind == "numpy" else call._replace(q=q, k=k, v=v, mask=key_mask)

    def host(self, array: Any) -> Any:
        """Return an array in main memory."""
        if device.on_device(array):
            array = runtime.to_host(runtime.view(array), self.stream)
        return array

    def put(self, array: Any, dtype: Any = np.float32) -> Any:
        """Return an array that was checked as one that kernels read: NumPy's is copied there."""
        if self.kind != "numpy":
            return array
        return runtime.to_device(np.ascontiguousarray(array, dtype), self.stream)

    def give(self, array: Any, dtype: Any) -> Any:
        """Return a result, in float32, as an array of the caller's kind and dtype."""
        if self.kind == "numpy":
            return runtime.to_host(array, self.stream).astype(dtype, copy=False)
        if self.kind == "torch":
            import torch

            array = torch.as_tensor(array, device="cuda")
            return array if self.half is None else array.to(self.half)
        if self.kind == "cupy":
            import cupy

            array = cupy.asarray(array)
        elif self.kind == "jax":
            import jax.numpy

            array = jax.numpy.asarray(array)
        return array if self.half is None else array.astype(self.half)


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
    kind = type(there[0]).__module__.partition(".")[0]
    kind = {"jaxlib": "jax"}.get(kind, kind)
    halves = {array.dtype for array in there if array.dtype.itemsize <= 2} - {np.dtype(bool)}
    dtypes = {array.dtype for array in there if array.dtype.itemsize > 1}
    half = halves.pop() if halves and len(dtypes) == 1 else None
    if half is not None and kind == "numba":
        raise TypeError(f"arrays of Numba must be float32 on a CUDA device, got {half}")
    return Place(found, runtime.stream_of(kind, there[0]), kind, half)


def _stand_in(array: Any) -> Any:
    """Return what validation may ask of a device array, its shape and dtype, as a NumPy array."""
    if isinstance(array, np.ndarray) or not device.on_device(array):
        return array
    return np.broadcast_to(np.zeros((), array.dtype), array.shape)
