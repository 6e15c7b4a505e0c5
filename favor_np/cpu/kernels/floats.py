"""The floating-point mode of a thread while it works in a kernel.

Where weights are far apart products fall below the smallest normal number, and a processor may take
a hundred times as long for those.  They are flushed to zero as a rule: beside ordinary values they
are nothing.  Where values themselves are tiny (or all zero, for then those before may be)
arithmetic is IEEE 754's.  Either way the mode does not depend on what the caller's thread, or
another library, has set, and is put back at the end.

Flushed are results, not inputs: a tiny number of the user's counts.
"""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from favor_np.cpu.kernels.jit import jit
from favor_np.cpu.kernels.simd import highest, load, maximum, splat
from favor_np.cpu.processor import VECTOR_BYTES

_MACHINE = platform.machine().lower()
X86, ARM = _MACHINE in ("x86_64", "amd64", "i686"), _MACHINE in ("aarch64", "arm64")
#: Round to nearest, no traps; and the bit that flushes results.
IEEE, FLUSH = (0x1F80, 1 << 15) if X86 else (0, 1 << 24)
#: Values from here up are ordinary: beside them what is flushed is far out of their precision.
ORDINARY = 2.0**-60


def _mode_register(builder: Any, value: Any) -> Any:
    """Set the mode of this thread to an i64, or return it where that is None."""
    i64, i32, byte = ir.IntType(64), ir.IntType(32), ir.IntType(8).as_pointer()
    module, none = builder.module, ir.VoidType()
    if ARM and value is None:
        get = cgutils.get_or_insert_function(
            module, ir.FunctionType(i64, []), "llvm.aarch64.get.fpcr"
        )
        return builder.call(get, [])
    if ARM:
        put = cgutils.get_or_insert_function(
            module, ir.FunctionType(none, [i64]), "llvm.aarch64.set.fpcr"
        )
        return builder.call(put, [value])
    name = "llvm.x86.sse.stmxcsr" if value is None else "llvm.x86.sse.ldmxcsr"
    function = cgutils.get_or_insert_function(module, ir.FunctionType(none, [byte]), name)
    place = cgutils.alloca_once(builder, i32)
    if value is not None:
        builder.store(builder.trunc(value, i32), place)
    builder.call(function, [builder.bitcast(place, byte)])
    return builder.zext(builder.load(place), i64) if value is None else None


@intrinsic
def float_mode(typingctx):
    """The floating-point mode of this thread, as its processor has it; 0 where it is not known."""

    def codegen(context, builder, signature, args):
        return _mode_register(builder, None) if X86 or ARM else context.get_constant(types.int64, 0)

    return types.int64(), codegen


@intrinsic
def set_float_mode(typingctx, mode):
    """Set the floating-point mode of this thread."""

    def codegen(context, builder, signature, args):
        if X86 or ARM:
            _mode_register(builder, args[0])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def smallness(typingctx, a):
    """An integer a lane: the smaller a number the larger, and least for zero."""

    def codegen(context, builder, signature, args):
        magnitude = builder.and_(
            builder.bitcast(args[0], a.integer.ir),
            a.integer.constant((1 << (a.dtype.bitwidth - 1)) - 1),
        )
        return builder.sub(a.integer.constant(-(1 << (a.dtype.bitwidth - 1))), magnitude)

    return a.integer(a), codegen


@jit()
def flush_beside(values, rows, ints, rest):
    """Flush results beside rows of values if these are ordinary, and so is the rest."""
    lanes = VECTOR_BYTES // values.itemsize
    tiniest = splat(ints, -(2**31) if values.itemsize == 4 else -(2**63))
    for i in range(rows):
        for x in range(0, values.shape[1], lanes):
            tiniest = maximum(tiniest, smallness(load(values, i, x)))
    limit = 2**31 - ((127 - 60) << 23) if values.itemsize == 4 else 2**63 - ((1023 - 60) << 52)
    set_float_mode(IEEE | FLUSH if rest and 0 <= highest(tiniest) <= limit else IEEE)


@jit()
def ordinary_sums(s, slot, features):
    """Whether the sums of a state are not all tiny."""
    state = s[slot]
    for r in range(features):
        for x in range(state.shape[1]):
            if abs(state[r, x]) >= ORDINARY:
                return True
    return False
