"""Functions of one number, for loops that LLVM vectorises: exp, and those of feed-forward layers.

Each function of a layer returns its value and its slope.  Of float32 all is arithmetic; of float64
erf is the C library's.
"""

from __future__ import annotations

import math

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from favor_np.cpu.kernels.jit import jit
from favor_np.numerics import EXP2, ROUNDER

#: log2(e) in two parts, of which the first times an integer of few bits is exact.
LOG2E = 1.4426950408889634
#: The same for float32: the nearest number, and what is missing.
LOG2E_SINGLE = 1.44269502162933349609375, 1.9259629911266175e-8
#: erf as a quotient of polynomials in x**2, the highest power first, for |x| < 4; that of Eigen.
ERF_ABOVE = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
ERF_BELOW = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)


@intrinsic
def like(typingctx, x, value):
    """A constant in the precision of x."""

    def codegen(context, builder, signature, args):
        return context.cast(builder, args[1], value, x)

    return x(x, value), codegen


@intrinsic
def exp(typingctx, x):
    """e**x: zero below the smallest normal number, infinity above the largest."""
    size = x.bitwidth // 8
    magic, mantissa = ROUNDER[size]
    coefficients, lowest, highest = EXP2[size], *((-126, 128) if size == 4 else (-1022, 1024))
    first, second = LOG2E_SINGLE if size == 4 else (LOG2E, 2.0355273740931033e-17)

    def codegen(context, builder, signature, args):
        real, whole = (
            (ir.FloatType(), ir.IntType(32)) if size == 4 else (ir.DoubleType(), ir.IntType(64))
        )
        fused = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(real, [real] * 3), f"llvm.fmuladd.f{8 * size}"
        )

        def number(value):
            return ir.Constant(real, value)

        (value,) = args
        y = builder.fmul(value, number(first))
        small = builder.fcmp_ordered("<", y, number(lowest))
        large = builder.fcmp_ordered(">=", y, number(highest))
        y = builder.select(builder.or_(small, large), number(0), y)
        shifted = builder.fadd(y, number(magic))
        n = builder.sub(builder.bitcast(shifted, whole), builder.bitcast(number(magic), whole))
        back = builder.fsub(number(magic), shifted)
        f = builder.call(fused, [value, number(first), back])
        f = builder.call(fused, [value, number(second), f])
        p = number(coefficients[-1])
        for coefficient in coefficients[-2::-1]:
            p = builder.call(fused, [p, f, number(coefficient)])
        n = builder.shl(n, ir.Constant(whole, mantissa))
        result = builder.bitcast(builder.add(builder.bitcast(p, whole), n), real)
        result = builder.select(small, number(0), result)
        result = builder.select(large, number(math.inf), result)
        wrong = builder.fcmp_unordered("uno", value, value)
        return builder.select(wrong, value, result)

    return x(x), codegen


@intrinsic
def erf(typingctx, x):
    """The error function."""

    def codegen(context, builder, signature, args):
        (value,) = args
        real = ir.FloatType() if x == types.float32 else ir.DoubleType()
        if x == types.float64:
            function = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(real, [real]), "erf"
            )
            return builder.call(function, args)
        fused = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(real, [real] * 3), "llvm.fmuladd.f32"
        )

        def number(value):
            return ir.Constant(real, value)

        def polynomial(coefficients, x):
            total = number(coefficients[0])
            for coefficient in coefficients[1:]:
                total = builder.call(fused, [total, x, number(coefficient)])
            return total

        y = builder.select(builder.fcmp_unordered("<", value, number(4)), value, number(4))
        y = builder.select(builder.fcmp_unordered(">", y, number(-4)), y, number(-4))
        square = builder.fmul(y, y)
        above = builder.fmul(y, polynomial(ERF_ABOVE, square))
        return builder.fdiv(above, polynomial(ERF_BELOW, square))

    return x(x), codegen


@jit()
def gelu(x):
    """x times the chance that a normal number is below it."""
    half = like(x, 0.5)
    below = half * erf(x * like(x, 0.7071067811865476)) + half
    density = like(x, 0.3989422804014327) * exp(-half * x * x)
    return x * below, below + x * density


@jit()
def gelu_tanh(x):
    """Its usual approximation: tanh(u) = 2 sigmoid(2u) - 1."""
    one, far = like(x, 1), like(x, 30)
    scale, cubic = like(x, 1.5957691216057308), like(x, 0.044715)
    near = x  # but not so far that a product overflows
    if x > far:
        near = far
    if x < -far:
        near = -far
    square = near * near
    s = one / (one + exp(-scale * near * (one + cubic * square)))
    return x * s, s + near * s * (one - s) * scale * (one + like(x, 3) * cubic * square)


@jit()
def relu(x):
    """The positive part."""
    return max(x, like(x, 0)), like(x, x > like(x, 0))


@jit()
def relu2(x):
    """Its square."""
    y = max(x, like(x, 0))
    return y * y, y + y


@jit()
def silu(x):
    """x times its sigmoid."""
    one = like(x, 1)
    s = one / (one + exp(-x))
    return x * s, s * (one + x * (one - s))
