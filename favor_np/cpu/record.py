"""What kernels take: one pointer to one block, whose fields Python and kernels know by name.

A record is a tuple of arrays, whose fields a ``NamedTuple`` names.  Its block has the addresses of
the array objects: where their data are and how long their axes are, the kernel reads there itself,
in the layout of NumPy's C API.  A room is a block of the tiles that one thread works on, which lie
behind it.

Each field says what its array is: a kind and a number of axes, all in C order, and of which
variants of the kernel it is, if not of all.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypeAlias, get_args, get_type_hints

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]

#: Kinds: floats of the precision that is computed in, integers of the same width, and these.
FLOAT, WHOLE = "float", "whole"
DTYPES = {
    "f8": np.dtype(np.float64),
    "i8": np.dtype(np.int64),
    "bool": np.dtype(np.bool_),
    "u1": np.dtype(np.uint8),
}


@dataclass(frozen=True)
class Field:
    """What a field holds: an array of `ndim` axes or, of a room, a `block` of more tiles.

    It is there in `variants`; if there are none, always.
    """

    kind: Any = FLOAT
    ndim: int = 1
    variants: tuple[str, ...] = ()
    block: Any = None
    #: Whether any number of leading axes, or none, counts as the first: the kernel does not ask for
    #: its length.
    rows: bool = False

    def dtype(self, float_dtype: np.dtype[Any]) -> np.dtype[Any]:
        """Return the dtype in kernels of this precision."""
        if self.kind == FLOAT:
            return float_dtype
        if self.kind == WHOLE:
            return np.dtype(np.int32 if float_dtype.itemsize == 4 else np.int64)
        return DTYPES[self.kind] if isinstance(self.kind, str) else np.dtype(self.kind)


Floats1 = Annotated[Array, Field()]
Floats2 = Annotated[Array, Field(ndim=2)]
Floats3 = Annotated[Array, Field(ndim=3)]
Whole1 = Annotated[Array, Field(WHOLE)]
Whole2 = Annotated[Array, Field(WHOLE, 2)]
Doubles1 = Annotated[Array, Field("f8")]
Doubles2 = Annotated[Array, Field("f8", 2)]
Doubles3 = Annotated[Array, Field("f8", 3)]
Ints1 = Annotated[Array, Field("i8")]
Ints2 = Annotated[Array, Field("i8", 2)]
Rows = Annotated[Array, Field(ndim=2, rows=True)]
Log2Bias = Annotated[Array, Field("f8", rows=True)]
Mask = Annotated[Array, Field("bool", rows=True)]
Bytes2 = Annotated[Array, Field("u1", 2)]


@functools.cache
def fields(cls: Any) -> dict[str, Field]:
    """Return the fields of a record or a room by name."""
    hints = get_type_hints(cls, include_extras=True)
    return {name: get_args(hint)[1] for name, hint in hints.items()}


#: How a block begins: with where NumPy's fields are in an array object, behind what every Python
#: object has.
_HEAD = struct.pack("=q", object.__basicsize__)


def pack(record: tuple[Any, ...]) -> bytes:
    """Return the block of a record, which must outlive it: the addresses that the tuple holds."""
    return _HEAD + ctypes.string_at(id(record) + tuple.__basicsize__, 8 * len(record))


#: Words of a tile in the block of a room: where it begins, and its axes.
TILE = 4


class Room(NamedTuple):
    """The block of a room, and how many bytes block and tiles take: both in whole cache lines."""

    words: Array
    nbytes: int


def room(cls: Any, shapes: Mapping[str, Any], dtype: np.dtype[Any]) -> Room:
    """Lay out the tiles of these shapes, in order; those without one are not there."""
    known = fields(cls)
    start = _lines(8 * TILE * len(known))
    words = np.zeros((len(known), TILE), np.int64)
    parts = []
    for number, (name, field) in enumerate(known.items()):
        shape = shapes.get(name)
        if shape is None:
            continue
        words[number, 0] = start
        if field.block is not None:
            inner = room(field.block, shape, dtype)
            parts.append((start, inner.words))
            start += inner.nbytes
        else:
            words[number, 1 : 1 + len(shape)] = shape
            start += _lines(math.prod(shape) * field.dtype(dtype).itemsize)
    block = np.zeros(start // 8, np.int64)
    block[: words.size] = words.ravel()
    for at, more in parts:
        block[at // 8 : at // 8 + len(more)] = more
    used = max([words.size, *(at // 8 + len(more) for at, more in parts)])
    return Room(block[:used], start)


def _lines(nbytes: int) -> int:
    return -(-nbytes // 64) * 64
