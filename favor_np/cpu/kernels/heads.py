"""Rows of a layer of attention, cut into heads: put on spheres, rotated by position, and back.

Rows (batch * L, all heads * d) become heads (batch * heads * L, d) of queries, keys and values.  A
job is a block of rows.
"""

from __future__ import annotations

import math

from llvmlite import ir
from numba.extending import intrinsic

from favor_np.cpu.kernels.counters import each_job
from favor_np.cpu.kernels.jit import jit
from favor_np.cpu.kernels.layers import block_of
from favor_np.cpu.kernels.simd import fma, load, splat, store, sum_lanes
from favor_np.cpu.processor import VECTOR_BYTES

#: Squares that count as this much at least, so that nothing is divided by zero.
TINY = 1.1754943508222875e-38


@intrinsic
def swap_pairs(typingctx, a):
    """The lanes of a vector, each two neighbours exchanged."""

    def codegen(context, builder, signature, args):
        kind = ir.VectorType(ir.IntType(32), a.lanes)
        mask = ir.Constant(kind, [lane ^ 1 for lane in range(a.lanes)])
        return builder.shuffle_vector(args[0], args[0], mask)

    return a(a), codegen


@jit()
def fits(call, array, dim):
    """Whether a head's numbers, and their partners, are whole vectors."""
    lanes, apart = VECTOR_BYTES // array.itemsize, call.constants[4]
    return dim % lanes == 0 and (apart == 1 or apart % lanes == 0)


@jit()
def partner(j, dim, apart):
    """The column of the other number of a pair."""
    if apart == 1:
        return j ^ 1
    return j + apart if j < apart else j - apart


@jit()
def partners(array, i, start, j, x, dim, apart):
    """The partners of the vector x, which is that of column j."""
    return swap_pairs(x) if apart == 1 else load(array, i, start + partner(j, dim, apart))


@jit()
def inverse_size(rows, i, start, dim, whole):
    """One over the length of a head's part of a row; zeros stay zeros."""
    square = rows.dtype.type(0)
    if whole:
        total = splat(rows, 0)
        for j in range(0, dim, VECTOR_BYTES // rows.itemsize):
            x = load(rows, i, start + j)
            total = fma(x, x, total)
        square = sum_lanes(total)
    else:
        for j in range(dim):
            square += rows[i, start + j] * rows[i, start + j]
    return rows.dtype.type(1 / math.sqrt(max(square, TINY)))


@jit()
def copy_head(source, i, col, to, at, start, dim, whole):
    """Copy a head's numbers."""
    if whole:
        for j in range(0, dim, VECTOR_BYTES // to.itemsize):
            store(to, at, start + j, load(source, i, col + j))
    else:
        for j in range(dim):
            to[at, start + j] = source[i, col + j]


@jit()
def split_head(call, i, start, to, at, t, scale, whole):
    """Write a head's part of a row to its own row, scaled and rotated."""
    rows, cos, sin, apart, dim = call.rows, call.cos, call.sin, call.constants[4], to.shape[1]
    if whole:
        factor = splat(rows, scale)
        for j in range(0, dim, VECTOR_BYTES // to.itemsize):
            x = load(rows, i, start + j)
            if cos.size > 0:
                other = partners(rows, i, start, j, x, dim, apart)
                x = fma(x, load(cos, t, j), other * load(sin, t, j))
            store(to, at, j, x * factor)
    else:
        for j in range(dim):
            x = rows[i, start + j]
            if cos.size > 0:
                x = x * cos[t, j] + rows[i, start + partner(j, dim, apart)] * sin[t, j]
            to[at, j] = x * scale


@jit()
def split_side(call, i, first, heads, to, turned):
    """The heads of one row that are queries, keys or values, from column `first`."""
    rows, lengths = call.rows, call.lengths
    dim, length = to.shape[1], call.constants[0]
    batch, t = divmod(i, length)
    whole = fits(call, rows, dim)
    for h in range(heads):
        start, at = (first + h) * dim, (batch * heads + h) * length + t
        if turned:
            scale = rows.dtype.type(1)
            if lengths.size > 0:
                scale = lengths[first + h] * inverse_size(rows, i, start, dim, whole)
            split_head(call, i, start, to, at, t, scale, whole)
        else:
            copy_head(rows, i, start, to, at, 0, dim, whole)


@each_job
def split_heads(call, job):
    """Cut rows into heads: a job of `records.Heads`."""
    of_q, of_k, of_v = call.constants[1], call.constants[2], call.constants[3]
    first, last = block_of(job, call.rows.shape[0])
    for i in range(first, last):
        split_side(call, i, 0, of_q, call.q, True)
        split_side(call, i, of_q, of_k, call.k, True)
        split_side(call, i, of_q + of_k, of_v, call.v, False)


@jit()
def merge_head(call, source, at, t, i, start, whole):
    """Write what a head has for a row to its columns there, rotated back."""
    out, cos, sin, apart, dim = call.out, call.cos, call.sin, call.constants[4], source.shape[1]
    if whole:
        for j in range(0, dim, VECTOR_BYTES // out.itemsize):
            x = load(source, at, j)
            if cos.size > 0:
                other = partners(source, at, 0, j, x, dim, apart)
                x = x * load(cos, t, j) - other * load(sin, t, j)
            store(out, i, start + j, x)
    else:
        for j in range(dim):
            x = source[at, j]
            if cos.size > 0:
                x = x * cos[t, j] - source[at, partner(j, dim, apart)] * sin[t, j]
            out[i, start + j] = x


@jit()
def leave_sphere(call, i, start, dim, length, whole):
    """Pull the cotangent in a head's columns back from its sphere; what it says of the length."""
    rows, out = call.rows, call.out
    inverse = inverse_size(rows, i, start, dim, whole)
    along, lanes = rows.dtype.type(0), VECTOR_BYTES // out.itemsize
    if whole:
        total = splat(rows, 0)
        for j in range(0, dim, lanes):
            total = fma(load(out, i, start + j), load(rows, i, start + j), total)
        along = sum_lanes(total) * inverse
        unit, factor = splat(rows, -along * inverse), splat(rows, length * inverse)
        for j in range(0, dim, lanes):
            g = fma(unit, load(rows, i, start + j), load(out, i, start + j))
            store(out, i, start + j, g * factor)
    else:
        for j in range(dim):
            along += out[i, start + j] * rows[i, start + j]
        along *= inverse
        for j in range(dim):
            unit = rows[i, start + j] * inverse
            out[i, start + j] = (out[i, start + j] - along * unit) * (length * inverse)
    return along


@jit()
def merge_side(call, job, i, first, heads, source, turned):
    """The heads of one row that are queries, keys or values."""
    dim, length = source.shape[1], call.constants[0]
    batch, t = divmod(i, length)
    whole = fits(call, call.out, dim)
    for h in range(heads):
        start, at = (first + h) * dim, (batch * heads + h) * length + t
        if turned:
            merge_head(call, source, at, t, i, start, whole)
            if call.lengths.size > 0:
                size = call.lengths[first + h]
                call.sums[job, first + h] += leave_sphere(call, i, start, dim, size, whole)
        else:
            copy_head(source, at, 0, call.out, i, start, dim, whole)


@each_job
def merge_heads(call, job):
    """Pull the cotangents of heads back to rows: a job of `records.Heads`."""
    of_q, of_k, of_v = call.constants[1], call.constants[2], call.constants[3]
    first, last = block_of(job, call.out.shape[0])
    for i in range(first, last):
        merge_side(call, job, i, 0, of_q, call.q, True)
        merge_side(call, job, i, of_q, of_k, call.k, True)
        merge_side(call, job, i, of_q + of_k, of_v, call.v, False)
