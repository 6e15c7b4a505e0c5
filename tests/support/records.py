"""Checks of what kernels get: they themselves would read anything."""

import functools

import numpy as np

from favor_np.cpu import record
from favor_np.cpu.code import Kernel
from favor_np.cpu.records import CONTROL


def check(kernel, arrays):
    """Every field of a record has an array of its kind, or is of another variant."""
    known = record.fields(kernel.cls)
    absent = [name for name, field in known.items() if field.variants]
    assert len(arrays) in (len(known), len(known) - len(absent)), kernel.symbol
    for (name, field), array in zip(known.items(), arrays, strict=False):
        if field.variants and not kernel.variant & set(field.variants):
            continue
        said = f"{name} of {kernel.symbol}: {array.dtype} {array.shape}"
        assert array.dtype == field.dtype(kernel.dtype), said
        if field.rows:  # one row of two axes may lie on one
            assert array.ndim >= max(field.ndim - 1, 1), said
        else:
            assert array.ndim == field.ndim, said
        assert array.flags.c_contiguous, said
        assert array.flags.aligned, said


def checked(call):
    """Wrap `TilePool.call`."""

    @functools.wraps(call)
    def look(pool, kernel, arrays, rest, count, threads):
        if isinstance(kernel, Kernel):  # and not one of a test
            control = np.zeros(CONTROL, np.int64)  # one like that of the call
            check(kernel, (*arrays, control, *rest))
        return call(pool, kernel, arrays, rest, count, threads)

    return look
