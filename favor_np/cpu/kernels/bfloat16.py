"""Matrix products of bfloat16 numbers with sums in float32.

On the matrix unit (AMX) where there is one, or by instructions that multiply vectors of pairs
(AVX512_BF16), twice as fast as those for float32; elsewhere slowly.

Matrices of bfloat16 are held in pairs (VNNI format): two numbers that follow each other along the
axis that is summed over share the 32 bits of one float32, whose own value means nothing.  So a left
factor is (rows, pairs), a right one (pairs, columns), and the transpose of the one is the other.

A float32 is rounded to one such number, or it is split into three parts (bf16x3): the first 8 of
its 24 bits, the next 8 and the last, whose sum it is.  The pairs of each part stand behind those of
the part before, along the axis that is summed over, and the six largest of the nine products of two
parts are a product of float32: on the matrix unit twice as fast as one of vectors, where the
factors are pairs already.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from favor_np.cpu.kernels.gemm import tiled_gemm
from favor_np.cpu.kernels.jit import jit
from favor_np.cpu.kernels.simd import (
    address,
    fma,
    load,
    splat,
    store,
    transpose,
)
from favor_np.cpu.processor import TARGET, VECTOR_BYTES
from favor_np.cpu.tiles import PARTS, STEP

_BYTE, _I64 = ir.IntType(8), ir.IntType(64)
#: Which way pairs are multiplied, if either.
AMX, DOTS = TARGET.amx, TARGET.dots


def _amx(builder: Any, name: str, *args: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [a.type for a in args])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}")
    builder.call(function, args)


@intrinsic
def configure(typingctx, config):
    """Make the tiles of this thread ready."""

    def codegen(context, builder, signature, args):
        data = make_array(config)(context, builder, args[0]).data
        _amx(builder, "ldtilecfg", builder.bitcast(data, _BYTE.as_pointer()))
        return context.get_dummy_value()

    return types.void(config), codegen


@intrinsic
def release(typingctx):
    """Give the tiles back: a thread that holds some costs more to switch to."""

    def codegen(context, builder, signature, args):
        _amx(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), codegen


#: Which parts of the left and of the right factor are multiplied, one product after the other, in
#: rounds over all pairs: what is small is summed before what is large, so that most sums round
#: little.
_ROUNDS = {1: (((0, 0),),), PARTS: (((2, 0), (1, 0), (1, 1), (0, 1), (0, 2)), ((0, 0),))}


def _block(rows: int, cols: int, parts: int) -> Callable[..., Any]:
    """Make ``c[i:, j:] (+)= a[i:, :pairs] @ b[:pairs, j:]`` for rows x cols tiles of 16 x 16.

    So many pairs each of the parts has.
    """

    @intrinsic
    def block(typingctx, a, i, b, j, c, pairs, add):
        signature = types.void(a, types.intp, b, types.intp, c, types.intp, types.boolean)

        def codegen(context, builder, signature, args):
            a_value, i0, b_value, j0, c_value, last, accumulate = args

            def after(start: Any, tiles: int) -> Any:
                return builder.add(start, ir.Constant(_I64, 16 * tiles))

            def part(kind: Any, value: Any, axis: int, number: int) -> Any:
                """Where part number `number` begins."""
                length = builder.extract_value(
                    make_array(kind)(context, builder, value).shape, axis
                )
                pitch = builder.udiv(length, ir.Constant(_I64, parts))
                return builder.mul(pitch, ir.Constant(_I64, number))

            def move(name: str, tile: int, kind: Any, value: Any, y: Any, x: Any) -> None:
                pointer = address(context, builder, kind, value, y, x)
                array = make_array(kind)(context, builder, value)
                stride = builder.extract_value(array.strides, 0)
                pointer = builder.bitcast(pointer, _BYTE.as_pointer())
                _amx(builder, name, ir.Constant(_BYTE, tile), pointer, stride)

            sums = [
                (y * cols + x, after(i0, y), after(j0, x)) for y in range(rows) for x in range(cols)
            ]
            with builder.if_else(accumulate) as (then, otherwise):
                with then:
                    for tile, y, x in sums:
                        move("tileloadd64", tile, c, c_value, y, x)
                with otherwise:
                    for tile, _, _ in sums:
                        _amx(builder, "tilezero", ir.Constant(_BYTE, tile))
            for products in _ROUNDS[parts]:
                steps = cgutils.for_range_slice(
                    builder, ir.Constant(_I64, 0), last, ir.Constant(_I64, STEP), _I64
                )
                with steps as (k, _):
                    before = (-1, -1)
                    for left, right in products:
                        if left != before[0]:
                            here = builder.add(k, part(a, a_value, 1, left))
                            for y in range(rows):
                                move("tileloadd64", 4 + y, a, a_value, after(i0, y), here)
                        if right != before[1]:
                            here = builder.add(k, part(b, b_value, 0, right))
                            for x in range(cols):
                                move("tileloadd64", 6 + x, b, b_value, here, after(j0, x))
                        for tile, _, _ in sums:
                            factors = (tile, 4 + tile // cols, 6 + tile % cols)
                            _amx(builder, "tdpbf16ps", *(ir.Constant(_BYTE, t) for t in factors))
                        before = (left, right)
            for tile, y, x in sums:
                move("tilestored64", tile, c, c_value, y, x)
            return context.get_dummy_value()

        return signature, codegen

    return block  # type: ignore[no-any-return]  # intrinsic has no types


def _on_unit(parts: int) -> Callable[..., Any]:
    """Make ``c (+)= a @ b`` of split factors; rows and cols in sixteens, pairs in steps."""
    shapes = ((2, 2), (1, 2), (2, 1), (1, 1))
    four, across, down, one = (_block(rows, cols, parts) for rows, cols in shapes)

    @jit()
    def cover(a, b, c, rows, cols, pairs, add):
        for j in range(0, cols - 16, 32):
            for i in range(0, rows - 16, 32):
                four(a, i, b, j, c, pairs, add)
            if rows % 32 > 0:
                across(a, rows - 16, b, j, c, pairs, add)
        if cols % 32 > 0:
            for i in range(0, rows - 16, 32):
                down(a, i, b, cols - 16, c, pairs, add)
            if rows % 32 > 0:
                one(a, rows - 16, b, cols - 16, c, pairs, add)

    return cover  # type: ignore[no-any-return]  # jit has no types


_of_pairs, _of_parts = _on_unit(1), _on_unit(PARTS)


def _bits(operation: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function of vectors of float32 that works on their bits."""

    def codegen(context, builder, signature, args):
        vector = signature.args[0]
        bits = [builder.bitcast(x, vector.integer.ir) for x in args]
        return builder.bitcast(operation(builder, vector.integer, *bits), vector.ir)

    return codegen


def _nearest(builder: Any, integer: Any, x: Any) -> Any:
    """The bits with those of the nearest bfloat16, ties away from zero, in the upper half."""
    return builder.add(x, integer.constant(0x8000))


def _upper_bits(builder: Any, integer: Any, x: Any) -> Any:
    return builder.and_(x, integer.constant(-0x10000))


@intrinsic
def rounded(typingctx, a):
    """Each lane rounded to bfloat16."""
    operation = _bits(
        lambda builder, integer, x: _upper_bits(builder, integer, _nearest(builder, integer, x))
    )
    return a(a), operation


def _joined(builder: Any, integer: Any, first: Any, second: Any) -> Any:
    low = builder.lshr(first, integer.constant(16))
    return builder.or_(low, _upper_bits(builder, integer, second))


@intrinsic
def pair(typingctx, a, b):
    """The pairs of two vectors, rounded to bfloat16; a comes first."""

    def operation(builder: Any, integer: Any, *numbers: Any) -> Any:
        return _joined(builder, integer, *(_nearest(builder, integer, x) for x in numbers))

    return a(a, a), _bits(operation)


@intrinsic
def _join(typingctx, a, b):
    """The pairs of the upper halves of two vectors; a comes first."""
    return a(a, a), _bits(_joined)


@intrinsic
def bitwise_and(typingctx, a, b):
    """The bits that a and b have in common."""
    return a(a, b), _bits(lambda builder, _, x, y: builder.and_(x, y))


@intrinsic
def first_of(typingctx, pairs):
    """The first number of each pair."""
    return pairs(pairs), _bits(lambda builder, integer, x: builder.shl(x, integer.constant(16)))


@intrinsic
def upper(typingctx, a):
    """The upper half of each lane: of a pair its second number."""
    return a(a), _bits(_upper_bits)


def _every_other(start: int) -> Callable[..., Any]:
    @intrinsic
    def every_other(typingctx, a, b):
        def codegen(context, builder, signature, args):
            lanes = range(start, 2 * a.lanes, 2)
            mask = ir.Constant(ir.VectorType(ir.IntType(32), a.lanes), list(lanes))
            return builder.shuffle_vector(*args, mask)

        return a(a, a), codegen

    return every_other  # type: ignore[no-any-return]  # intrinsic has no types


_even, _odd = _every_other(0), _every_other(1)


class _Bfloat16(ir.Type):  # type: ignore[misc]  # llvmlite has no types, and not this one
    """LLVM's bfloat."""

    def _to_string(self) -> str:
        return "bfloat"


_BFLOAT = _Bfloat16()


@intrinsic
def _convert(typingctx, a, b):
    """One instruction of AVX512_BF16: see `pair_along`."""

    def codegen(context, builder, signature, args):
        half = ir.VectorType(_BFLOAT, 2 * a.lanes)
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(half, [a.ir, a.ir]),
            "llvm.x86.avx512bf16.cvtne2ps2bf16.512",
        )
        return builder.bitcast(builder.call(function, args[::-1]), a.ir)

    return a(a, b), codegen


@jit()
def pair_along(a, b):
    """The pairs of the numbers of a, and then of b, in their order."""
    if AMX or DOTS:
        return _convert(a, b)
    return pair(_even(a, b), _odd(a, b))


@jit()
def numbers_of(pairs, cols, target):
    """target = the first numbers of the pairs of a left factor, and behind them the second ones."""
    lanes = VECTOR_BYTES // pairs.itemsize
    for i in range(pairs.shape[0]):
        for x in range(0, cols, lanes):
            store(target, i, x, first_of(load(pairs, i, x)))
            store(target, i, cols + x, upper(load(pairs, i, x)))


@jit()
def pairs_down(source, rows, cols, target):
    """target[k, x] = the pair of source[2 k, x] and source[2 k + 1, x]."""
    lanes = VECTOR_BYTES // source.itemsize
    for k in range(rows // 2):
        for x in range(0, cols, lanes):
            store(target, k, x, pair(load(source, 2 * k, x), load(source, 2 * k + 1, x)))


@jit()
def pairs_along(source, rows, cols, target):
    """target[i, k] = the pair of source[i, 2 k] and source[i, 2 k + 1]; cols in whole vectors."""
    lanes = VECTOR_BYTES // source.itemsize
    for i in range(rows):
        for x in range(0, cols, 2 * lanes):
            a, b = load(source, i, x), splat(source, 0)
            if x + lanes < cols:
                b = load(source, i, x + lanes)
            store(target, i, x // 2, pair_along(a, b))


@jit()
def transpose_pairs(source, rows, cols, target):
    """target[j, i] = source[i, j]: a left factor from a right one, or the other way."""
    lanes = VECTOR_BYTES // source.itemsize
    for i in range(0, rows, lanes):
        for j in range(0, cols, lanes):
            transpose(source, i, j, target)


def _dot(builder: Any, a: Any, b: Any, total: Any) -> Any:
    """Add both products of each pair to a total, lane by lane: one instruction of AVX512_BF16."""
    halves = ir.VectorType(_BFLOAT, 2 * total.type.count)
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(total.type, [total.type, halves, halves]),
        "llvm.x86.avx512bf16.dpbf16ps.512",
    )
    return builder.call(function, [total, builder.bitcast(a, halves), builder.bitcast(b, halves)])


_dpbf16 = tiled_gemm(transposed=False, product=_dot)


@jit()
def _reference(parts, a, b, c, rows, cols, pairs, add):
    """The product without instructions for it: right, and slower than one of float32."""
    lanes = VECTOR_BYTES // c.itemsize
    beside, below = a.shape[1] // parts, b.shape[0] // parts
    for i in range(rows):
        for j in range(0, cols, lanes):
            total = load(c, i, j) if add else splat(c, 0)
            for p in range(parts - 1, -1, -1):
                for r in range(parts - 1 - p, -1, -1):
                    for k in range(pairs):
                        left = splat(c, a[i, p * beside + k])
                        right = load(b, r * below + k, j)
                        total = fma(first_of(left), first_of(right), total)
                        total = fma(upper(left), upper(right), total)
            store(c, i, j, total)


@jit()
def gemm_pairs(a, b, c, rows, cols, pairs, add):
    """``c (+)= a @ b``; rows and cols in sixteens for the matrix unit, pairs in its steps."""
    if AMX:
        _of_pairs(a, b, c, rows, cols, pairs, add)
    elif DOTS:
        _dpbf16(a, b, c, 0, rows, 0, cols, 0, pairs, add, None, 0)
    else:
        _reference(1, a, b, c, rows, cols, pairs, add)


@jit()
def gemm_bf16x3(a, b, c, rows, cols, pairs, add):
    """The same of matrices of float32 that have been split, of so many pairs a part."""
    if AMX:
        _of_parts(a, b, c, rows, cols, pairs, add)
    else:
        _reference(PARTS, a, b, c, rows, cols, pairs, add)


@intrinsic
def _upper_along(typingctx, a, b):
    """The pairs of the upper halves of the lanes of a, and then of b, in their order."""

    def codegen(context, builder, signature, args):
        halves = ir.VectorType(ir.IntType(16), 2 * a.lanes)
        odd = ir.Constant(
            ir.VectorType(ir.IntType(32), 2 * a.lanes), list(range(1, 4 * a.lanes, 2))
        )
        first, second = (builder.bitcast(x, halves) for x in args)
        return builder.bitcast(builder.shuffle_vector(first, second, odd), a.ir)

    return a(a, a), codegen


@jit()
def split_along(source, rows, cols, target):
    """The parts of source[:rows, :cols] as left factor, padded with zeros to whole vectors."""
    lanes = VECTOR_BYTES // source.itemsize
    pitch = target.shape[1] // PARTS
    for i in range(rows):
        for x in range(0, 2 * pitch, 2 * lanes):
            a, b = splat(source, 0), splat(source, 0)
            if x < cols:
                a = load(source, i, x)
            if x + lanes < cols:
                b = load(source, i, x + lanes)
            for part in range(PARTS):
                store(target, i, part * pitch + x // 2, _upper_along(a, b))
                a, b = a - upper(a), b - upper(b)


@jit()
def split_down(source, rows, cols, target):
    """The parts of source[:rows, :cols] as right factor; rows are even, zeros below them."""
    lanes = VECTOR_BYTES // source.itemsize
    pitch = target.shape[0] // PARTS
    for k in range(pitch):
        for x in range(0, cols, lanes):
            a, b = splat(source, 0), splat(source, 0)
            if 2 * k < rows:
                a, b = load(source, 2 * k, x), load(source, 2 * k + 1, x)
            for part in range(PARTS):
                store(target, part * pitch + k, x, _join(a, b))
                a, b = a - upper(a), b - upper(b)


@jit()
def finite_pairs(values, spare, target):
    """A tile of values as right factor, without what is not finite."""
    for j in range(values.shape[0]):
        for x in range(values.shape[1]):
            spare[j, x] = values[j, x] if math.isfinite(values[j, x]) else 0
    pairs_down(spare, values.shape[0], values.shape[1], target)


@jit()
def add_nonfinite(left, start, num, first, last, numbers, values):
    """Add what `finite_pairs` left out to a strip, to the rows that see it.

    The strip begins at position `start` of the tile, whose row i sees the keys from i + first up to
    i + last; `left` are the pairs of its weights.
    """
    rows, half = left.shape
    numbers_of(left, half, numbers)
    for j in range(2 * half):
        for x in range(num.shape[1]):
            if not math.isfinite(values[j, x]):
                for i in range(max(j - last + 1 - start, 0), min(j - first + 1 - start, rows)):
                    num[i, x] += numbers[i, j // 2 + j % 2 * half] * values[j, x]


@jit()
def turn_rows(rows, left, right):
    """The pairs of packed rows as left factor and, turned, as right factor."""
    pairs_along(rows, rows.shape[0], rows.shape[1], left)
    transpose_pairs(left, left.shape[0], left.shape[1], right)


@jit()
def round_rows(pairs, rows, count, squares):
    """Round packed rows as `pairs` will be, if there are any, and square them anew.

    So the log-norm of a key is that of the vector whose product with a query is estimated.
    """
    if pairs is None:
        return
    lanes = VECTOR_BYTES // rows.itemsize
    for i in range(count):
        if squares[i] < math.inf:
            total = 0.0
            for x in range(0, rows.shape[1], lanes):
                store(rows, i, x, rounded(load(rows, i, x)))
            for x in range(rows.shape[1]):
                total += float(rows[i, x]) * float(rows[i, x])
            squares[i] = total
