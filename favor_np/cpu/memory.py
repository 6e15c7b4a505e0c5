"""Memory of kernels: arrays that begin on cache lines, and what each thread works on."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np.cpu import tuning
from favor_np.cpu.code import Kernel
from favor_np.cpu.record import Room
from favor_np.cpu.threads import POOL
from favor_np.cpu.tiles import PAD, TAIL

Array: TypeAlias = npt.NDArray[Any]
Shape: TypeAlias = tuple[int, ...]


def integer_of(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the integer dtype of the same width: that of the exponents c."""
    return np.dtype(np.int32 if dtype.itemsize == 4 else np.int64)


def aligned(shape: Shape, dtype: npt.DTypeLike, make: Callable[..., Array] = np.zeros) -> Array:
    """Return what `make` makes, from a cache line on: a vector across two is loaded twice."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    raw = make(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def aligned_copy(array: Array) -> Array:
    """Return a copy in C order that begins on a cache line."""
    new = aligned(array.shape, array.dtype, np.empty)
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
    """The memory that kernels work on: a room for each thread and, of some kernels, states.

    `state` says how many features and columns of values these have; `keys` is the shape of the
    features of a chunk of keys.
    """

    dtype: np.dtype[Any]
    room: Room
    state: tuple[int, int] | None = None
    keys: Shape = ()

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes for one thread, as far as every call has them."""
        size = self.room.nbytes
        if self.state is not None:
            size += self.dtype.itemsize * sum(map(math.prod, state_shapes(1, *self.state)))
        return size

    def make(self, threads: int, pipeline: int = 0) -> tuple[Array, ...]:
        """Return rooms and, if there are any, states: one a thread, or those of a pipeline.

        A pipeline gets the features of the keys of so many states as well.
        """
        rooms = aligned((threads, self.room.nbytes), np.uint8)
        words = self.room.words
        rooms[:, : words.nbytes].view(np.int64)[...] = words
        if self.state is None:
            return (rooms,)
        states = state_arrays(pipeline or threads, *self.state, self.dtype)
        if not pipeline:
            return *states, rooms
        return *states, rooms, aligned((pipeline, *self.keys), self.dtype)

    def run(
        self,
        kernel: Kernel,
        arrays: tuple[Any, ...],
        rest: tuple[Any, ...],
        count: int,
        threads: int,
    ) -> Array:
        """Run jobs on threads with such memory each; the control words.

        `arrays` are the fields up to this memory, `rest` those behind the control words.
        """
        mine = borrow(self, threads)
        try:
            return POOL.call(kernel, arrays + mine, rest, count, threads)
        finally:
            give_back(self, threads, mine)


@functools.lru_cache(maxsize=256)
def _workspace(words: bytes, nbytes: int, *more: Any) -> Workspace:
    dtype, state, keys = more
    return Workspace(dtype, Room(np.frombuffer(words, np.int64), nbytes), state, keys)


def workspace(
    dtype: np.dtype[Any], room: Room, state: tuple[int, int] | None = None, keys: Shape = ()
) -> Workspace:
    """Return the one workspace of this kind."""
    return _workspace(room.words.tobytes(), room.nbytes, dtype, state, keys)


class _Spare(threading.local):
    """Workspaces that this Python thread used before and may use again."""

    def __init__(self) -> None:
        self.kept: dict[tuple[Workspace, int, int], tuple[Array, ...]] = {}


_spare = _Spare()


def borrow(of: Workspace, threads: int, pipeline: int = 0) -> tuple[Array, ...]:
    """Take the arrays that were given back, or make them: nobody else has them meanwhile."""
    return _spare.kept.pop((of, threads, pipeline), None) or of.make(threads, pipeline)


def _nbytes(arrays: tuple[Array, ...]) -> int:
    return sum([array.nbytes for array in arrays])


def give_back(of: Workspace, threads: int, arrays: tuple[Array, ...], pipeline: int = 0) -> None:
    """Keep arrays for the next calls of this Python thread; the oldest go if they are too many."""
    kept = _spare.kept
    kept[of, threads, pipeline] = arrays
    if (
        len(kept) <= tuning.MAX_SPARE
        and of.nbytes * threads <= tuning.MAX_SPARE_BYTES // tuning.MAX_SPARE
        and not pipeline
    ):
        return
    # A signal handler may have called since, or call now: no iterator may be open.
    held = list(kept.items())
    total = sum(_nbytes(them) for _, them in held)
    for oldest, them in list(held):
        if len(held) <= tuning.MAX_SPARE and total <= tuning.MAX_SPARE_BYTES:
            break
        held = held[1:]
        total -= _nbytes(them)
        kept.pop(oldest, None)
