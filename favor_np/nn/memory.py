"""Memory that is used again step after step: a large array that is made anew is slow to touch.

While an optimiser lives, what large arrays leave behind when they die is kept for the next ones of
their size; what a whole step has not used is let go.  Nobody has to give anything back.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

#: Smaller arrays are left to NumPy.
LEAST = 1 << 16
#: Sizes are multiples of it: a page.
PAGE = 1 << 12

_free: dict[int, list[Any]] = {}
#: How many of each size have been free all the time since the last turn.
_unused: dict[int, int] = {}
_users = 0


class _Memory:
    """The owner of some bytes; arrays are views of it, and when the last is gone they are free."""

    def __init__(self, raw: npt.NDArray[np.uint8]) -> None:
        self.raw = raw
        self.__array_interface__ = raw.__array_interface__

    def __del__(self) -> None:
        if _users:
            _free.setdefault(self.raw.size, []).append(self.raw)


def empty(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return an array whose numbers are anything."""
    kind = np.dtype(dtype)
    size = math.prod(shape) * kind.itemsize
    if size < LEAST or not _users:
        return np.empty(shape, kind)
    whole = -(-size // PAGE) * PAGE
    try:
        kept = _free[whole]
        raw = kept.pop()
        _unused[whole] = min(_unused.get(whole, 0), len(kept))
    except (KeyError, IndexError):
        raw = np.empty(whole, np.uint8)
    return np.asarray(_Memory(raw))[:size].view(kind).reshape(shape)


def empty_like(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return such an array of the shape and dtype of another."""
    return empty(array.shape, array.dtype)


def begin() -> None:
    """Keep memory from now on: an optimiser has been made."""
    global _users
    _users += 1


def end() -> None:
    """Keep it no longer, if that was the last one."""
    global _users
    _users -= 1
    if not _users:
        _free.clear()
        _unused.clear()


def turn() -> None:
    """Let memory go that has been free since the last turn: a step is over."""
    for size, kept in list(_free.items()):
        del kept[: _unused.get(size, 0)]
        _unused[size] = len(kept)


def held() -> int:
    """Return how many bytes are kept for later."""
    return sum(size * len(kept) for size, kept in _free.items())
