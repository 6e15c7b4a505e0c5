"""Memory that is used again step after step: a large array that is made anew is slow to touch.

While an optimiser lives, what large arrays leave behind when they die is kept for the next ones of
their size; what a whole step has not used is let go.  Nobody has to give anything back.  No more is
ever kept than was in use at a time.
"""

from __future__ import annotations

import math
import threading
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
#: Bytes that are kept, that are in use, and the most that ever were.
_bytes = {"kept": 0, "used": 0, "most": 0}
_lock = threading.RLock()


class _Memory:
    """The owner of some bytes; arrays are views of it, and when the last is gone they are free."""

    def __init__(self, raw: npt.NDArray[np.uint8]) -> None:
        self.raw = raw
        self.__array_interface__ = raw.__array_interface__
        with _lock:
            _bytes["used"] += raw.size
            _bytes["most"] = max(_bytes["most"], _bytes["used"])

    def __del__(self) -> None:
        size = self.raw.size
        with _lock:
            _bytes["used"] -= size
            if _users and _bytes["kept"] + size <= _bytes["most"]:
                _free.setdefault(size, []).append(self.raw)
                _bytes["kept"] += size


def empty(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return an array whose numbers are anything."""
    if not _users:
        return np.empty(shape, dtype)
    kind = np.dtype(dtype)
    size = math.prod(shape) * kind.itemsize
    if size < LEAST:
        return np.empty(shape, kind)
    whole = -(-size // PAGE) * PAGE
    raw = _taken(whole)
    if raw is None:
        raw = np.empty(whole, np.uint8)
    return np.asarray(_Memory(raw))[:size].view(kind).reshape(shape)


def _taken(size: int) -> npt.NDArray[np.uint8] | None:
    """Take what is kept of a size, if there is any."""
    with _lock:
        kept = _free.get(size)
        if not kept:
            return None
        raw: npt.NDArray[np.uint8] = kept.pop()
        _unused[size] = min(_unused.get(size, 0), len(kept))
        _bytes["kept"] -= size
        return raw


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
        with _lock:
            _free.clear()
            _unused.clear()
            _bytes.update(kept=0, most=_bytes["used"])


def turn() -> None:
    """Let memory go that has been free since the last turn: a step is over."""
    with _lock:
        for size, kept in _free.items():
            del kept[: _unused.get(size, 0)]
            _unused[size] = len(kept)
        _bytes["kept"] = sum(size * len(kept) for size, kept in _free.items())


def held() -> int:
    """Return how many bytes are kept for later."""
    return _bytes["kept"]
