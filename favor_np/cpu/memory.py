"""Memory of kernels: arrays that begin on cache lines, and what each thread works on.

How large a workspace is says the code that cuts it, in `measure`.
"""

from __future__ import annotations

import functools
import math
import threading
from collections import Counter
from dataclasses import dataclass
from types import FunctionType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np.cpu import tuning
from favor_np.cpu.kernels.simd import VECTOR_BYTES
from favor_np.cpu.kernels.state import PAD, TAIL

Array: TypeAlias = npt.NDArray[Any]
Shape: TypeAlias = tuple[int, ...]


def padded(count: int, itemsize: int) -> int:
    """Return `count` rounded up to whole vectors."""
    lanes = VECTOR_BYTES // itemsize
    return -(-count // lanes) * lanes


def integer_of(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the integer dtype of the same width: that of the exponents c."""
    return np.dtype(np.int32 if dtype.itemsize == 4 else np.int64)


def aligned(shape: Shape, dtype: npt.DTypeLike) -> Array:
    """Return zeros that begin on a cache line: a vector that crosses two is loaded twice."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def aligned_copy(array: Array) -> Array:
    """Return a copy in C order that begins on a cache line."""
    new = aligned(array.shape, array.dtype)
    new[...] = array
    return new


def state_shapes(count: int, features: int, columns: int) -> tuple[Shape, Shape, Shape]:
    """Return the shapes of (c, S, z) for so many slots: see ``kernels.state``."""
    rows = 2 * features + TAIL
    return (count, features + PAD), (count, rows, columns), (count, (2 + TAIL) * features)


def state_arrays(
    count: int, features: int, columns: int, dtype: np.dtype[Any]
) -> tuple[Array, ...]:
    """Return zeros for so many slots."""
    c, s, z = state_shapes(count, features, columns)
    return aligned(c, integer_of(dtype)), aligned(s, dtype), aligned(z, dtype)


@dataclass(frozen=True, eq=False)
class Workspace:
    """The memory that a thread of a kernel works on: one object for all of the same size."""

    dtype: np.dtype[Any]
    floats: int
    ints: int
    state: tuple[int, int] | None  # features and columns, if each thread has one

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of one thread."""
        shapes = () if self.state is None else state_shapes(1, *self.state)
        return (self.floats + self.ints + sum(map(math.prod, shapes))) * self.dtype.itemsize

    def make(self, threads: int) -> tuple[Array, ...]:
        """Return the arrays: (c, S, z) if there is a state, floats and integers; a row a thread."""
        whole = integer_of(self.dtype)
        state: tuple[Array, ...] = ()
        if self.state is not None:
            state = state_arrays(threads, *self.state, self.dtype)
        floats = aligned((threads, self.floats), self.dtype)
        return *state, floats, aligned((threads, self.ints), whole)


@functools.lru_cache(maxsize=256)
def workspace(
    dtype: np.dtype[Any], floats: int, ints: int, state: tuple[int, int] | None = None
) -> Workspace:
    """Return the one workspace of this size; rows begin on cache lines."""
    return Workspace(dtype, -(-floats // 16) * 16, ints, state)


def measure(carve: Any, *args: Any) -> Counter[np.dtype[Any]]:
    """Return how many numbers of each dtype a kernel's `carve` cuts from the workspaces in `args`.

    The source of `carve` is run in Python, with a `cut` that only counts.
    """
    sizes: Counter[np.dtype[Any]] = Counter()

    def count(buffer: Array, start: int, rows: int, columns: int) -> tuple[Array, int]:
        end = start + rows * columns
        sizes[buffer.dtype] = max(sizes[buffer.dtype], end)
        return np.zeros((rows, columns), buffer.dtype), end

    def source(function: Any) -> Any:
        names = {name: function.__globals__.get(name) for name in function.__code__.co_names}
        called = {name: source(x.py_func) for name, x in names.items() if hasattr(x, "py_func")}
        return FunctionType(function.__code__, {**function.__globals__, **called, "cut": count})

    source(carve.py_func)(*args)
    return sizes


@functools.lru_cache(maxsize=256)
def sizes_of(carve: Any, dtype: np.dtype[Any], *args: Any) -> tuple[int, int]:
    """Return how many floats and integers `carve` cuts for these arguments."""
    kinds = dtype, integer_of(dtype)
    sizes = measure(carve, *(np.empty(0, kind) for kind in kinds), *args)
    return sizes[kinds[0]], sizes[kinds[1]]


class _Spare(threading.local):
    """Workspaces that this Python thread used before and may use again."""

    def __init__(self) -> None:
        self.kept: dict[tuple[Workspace, int], tuple[Array, ...]] = {}


_spare = _Spare()


def borrow(of: Workspace, threads: int) -> tuple[Array, ...]:
    """Take the arrays that were given back, or make them: nobody else has them meanwhile."""
    return _spare.kept.pop((of, threads), None) or of.make(threads)


def give_back(of: Workspace, threads: int, arrays: tuple[Array, ...]) -> None:
    """Keep arrays for the next calls of this Python thread; the oldest go if they are too many."""
    kept = _spare.kept
    kept[of, threads] = arrays
    if (
        len(kept) <= tuning.MAX_SPARE
        and of.nbytes * threads <= tuning.MAX_SPARE_BYTES // tuning.MAX_SPARE
    ):
        return
    # A signal handler may have called since, or call now: no iterator may be open.
    held = list(kept)
    total = sum(space.nbytes * count for space, count in held)
    for oldest in held:
        if len(held) <= tuning.MAX_SPARE and total <= tuning.MAX_SPARE_BYTES:
            break
        held = held[1:]
        total -= oldest[0].nbytes * oldest[1]
        kept.pop(oldest, None)
