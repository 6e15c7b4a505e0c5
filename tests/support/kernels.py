"""Kernels of tests, compiled as those of the package are: they take records."""

import itertools

import numpy as np

from favor_np.cpu import code, record

_numbers = itertools.count()


def object_code(body, cls, dtype=np.float32, *, variant=(), room=None, way="", symbol="kernel"):
    """The object code of ``body(call)``, `call` being a record `cls`, its ``room`` a `room`."""
    from favor_np.cpu.kernels import block, jit

    variant, dtype = frozenset(variant), np.dtype(dtype)
    if room is not None:
        room = block.Block(room, variant, dtype, None, is_room=True)
    kind = block.Block(cls, variant, dtype, room, is_room=False)
    return jit.compile_kernel(body, kind, symbol, way)


def compiled(body, cls, dtype=np.float32, **options):
    """A function that calls it with the fields of a record; the optional ones may be left out."""
    symbol = f"test_kernel_{next(_numbers)}"
    function = code._link(object_code(body, cls, dtype, symbol=symbol, **options), symbol)
    return lambda *arrays: function(record.pack(arrays))
