"""A device that is NumPy and ptxrun: it stands for favor_np.cuda.runtime under the host's real code."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import ptxrun


class PtxDevice:
    """Stands for favor_np.cuda.runtime; its attributes may be set, `launches` looked at."""

    def __init__(self) -> None:
        self.cc = (9, 0)
        self.seed = 0
        self.name = "H100"
        self.launches: list[tuple[Callable[..., Any], tuple[int, ...], Sequence[Any]]] = []

    def launch(
        self, kernel: Callable[..., Any], grid: tuple[int, ...], args: Sequence[Any], stream: Any
    ) -> None:
        """Execute a kernel; whatever is found is an error."""
        from favor_np.cuda.code import THREADS, bounds

        self.launches.append((kernel, grid, args))
        options = {"launch_bounds": bounds(kernel)}
        report = ptxrun.run(
            kernel, grid, THREADS, args, cc=self.cc, seed=self.seed, options=options
        )
        assert report.ok, f"{kernel.__qualname__}: {report}"

    def to_device(self, array: Any, stream: Any = None) -> Any:
        """A copy, aligned as the device's arrays are."""
        copy = self.empty(np.shape(array), np.asarray(array).dtype)
        copy[...] = array
        return copy

    def empty(self, shape: int | tuple[int, ...], dtype: Any, stream: Any = None) -> Any:
        """An array of NaN, or of large numbers: what nothing writes is seen in the result."""
        dtype = np.dtype(dtype)
        count = int(np.prod(shape, dtype=np.int64))
        raw = np.full(count * dtype.itemsize + 256, 0xFF, np.uint8)
        first = -raw.ctypes.data % 256
        array = raw[first : first + count * dtype.itemsize].view(dtype).reshape(shape)
        if dtype.kind in "iu":
            array[...] = np.iinfo(dtype).max // 2
        return array

    def constant(self, array: Any, handle: int | None = None) -> Any:
        """A copy."""
        return self.to_device(array)

    def scratch(self, device: int, stream: Any) -> Any:
        """Memory for a call: new, so that what nothing writes is seen there too."""
        return self

    @contextmanager
    def call(self) -> Iterator[None]:
        """A call."""
        yield

    part = call

    def rows(self, array: Any) -> Any:
        """A matrix of all its rows."""
        return array.reshape(math.prod(array.shape[:-1]), array.shape[-1])

    def plain(self, array: Any, shape: tuple[int, ...]) -> Any:
        """The same numbers in another shape."""
        return array.reshape(shape)

    def flat(self, array: Any) -> Any:
        """A single axis."""
        return array.reshape(-1)

    def to_host(self, array: Any, stream: Any = None) -> Any:
        """A copy."""
        return np.array(array)

    def copy(self, array: Any, stream: Any = None) -> Any:
        """A copy."""
        return self.to_device(array)

    @contextmanager
    def installed(self) -> Iterator[PtxDevice]:
        """Let what goes through favor_np.cuda.runtime come here, planned for an H100."""
        from favor_np.cuda import device, launch, runtime

        names = (
            "launch", "to_device", "constant", "scratch", "rows", "plain", "flat", "empty", "to_host",
            "copy",
        )  # fmt: skip
        launch.forget()  # what is kept on one device is not on another
        with (
            mock.patch.multiple(runtime, **{name: getattr(self, name) for name in names}),
            mock.patch.object(device, "current", return_value=device.KNOWN[self.name]),
        ):
            yield self
        launch.forget()
