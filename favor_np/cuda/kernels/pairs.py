"""Matrix products of bfloat16 numbers, summed in float32 by tensor cores: sm_80 and newer.

A tile of pairs has 64 rows of 32 words: two numbers, rounded to bfloat16, in the bits of a float32.
A product runs along the rows of both of its factors, and in which order does not matter as long as
it is the same for both: numbers x and x + 16 are a pair, for a thread has them both.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import cuda, float32, int32, types, uint32
from numba.cuda.extending import intrinsic
from numba.cuda.libdevice import float_as_int, int_as_float

from favor_np.cuda.kernels.storage import four
from favor_np.cuda.kernels.tiles import TILE, clear, device, lane, log_features

#: Words of a row.
WORDS = TILE // 2
#: Words between rows, and between every sixteenth: either way eight rows lie in banks of their own.
PITCH, SIXTEEN = 36, 16 * 36 + 8

_WORD, _FLOAT = ir.IntType(32), ir.FloatType()


@intrinsic
def pair(typingctx: Any, first: Any, second: Any) -> Any:
    """Two numbers rounded to bfloat16, of two the even, in the bits of one float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_WORD, (_FLOAT, _FLOAT))
        # the upper half comes first
        rounding = ir.InlineAsm(kind, "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f")
        return builder.bitcast(builder.call(rounding, args[::-1]), _FLOAT)

    return types.float32(first, second), codegen


_PRODUCT = (
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
    "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
)


@intrinsic
def _multiply_add(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """``a b + c`` by a warp, of a thread's part of each: four words, two words, four sums."""
    result = types.UniTuple(types.float32, 4)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        words, sums = [], [builder.extract_value(args[2], i) for i in range(4)]
        for factor, count in zip(args[:2], (4, 2), strict=True):
            parts = (builder.extract_value(factor, i) for i in range(count))
            words += [builder.bitcast(part, _WORD) for part in parts]
        four_sums = ir.LiteralStructType([_FLOAT] * 4)
        kind = ir.FunctionType(four_sums, [_WORD] * 6 + [_FLOAT] * 4)
        product = ir.InlineAsm(kind, _PRODUCT, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", side_effect=True)
        found = builder.call(product, words + sums)
        return context.make_tuple(
            builder, result, [builder.extract_value(found, i) for i in range(4)]
        )

    return result(a, b, c), codegen


@device
def begin(row):
    """Where a row of a tile begins."""
    return uint32((row & 15) * PITCH + (row >> 4) * SIXTEEN)


@device
def put_rows(y, tile):
    """Put the entries of a thread to the rows that they stand in."""
    _, ty, tx = lane()
    for i in range(4):
        to = uint32(begin(ty + 16 * i) + 2 * tx)
        tile[to], tile[to + 1] = pair(y[i, 0], y[i, 1]), pair(y[i, 2], y[i, 3])


@device
def put_columns(y, tile):
    """Put them to rows that are their columns."""
    _, ty, tx = lane()
    for j in range(4):
        to = uint32(begin(tx + 16 * j) + 2 * ty)
        tile[to], tile[to + 1] = pair(y[0, j], y[1, j]), pair(y[2, j], y[3, j])


@device
def put_state(s, slot, first, column, scale, tile):
    """Columns of 64 rows of a state, times their scales, to the rows of a tile."""
    _, ty, tx = lane()
    numbers = cuda.local.array((4, 4), float32)
    for u in range(4):
        f = ty + 16 * u
        found, by = four(s, slot * s.shape[1] + first + f, column + 4 * tx), scale[f]
        for i in range(4):
            numbers[u, i] = found[i] * by
    for i in range(4):
        to = uint32(begin(4 * tx + i) + 2 * ty)
        tile[to] = pair(numbers[0, i], numbers[1, i])
        tile[to + 1] = pair(numbers[2, i], numbers[3, i])


@device
def stage(source, row, step, count, column, tile):
    """64 columns of padded rows, neighbours in pairs, zeros where there are no rows."""
    tid, _, _ = lane()
    i, x = tid >> 2, (tid & 3) << 2  # a thread stays in its row: it has one address
    at = uint32(begin(i) + (x >> 1))
    for n in range(4):
        to = uint32(at + 8 * n)
        if column + 16 * n < source.shape[1]:
            if i < count:
                numbers = four(source, row + step * i, column + 16 * n + x)
                tile[to], tile[to + 1] = pair(numbers[0], numbers[1]), pair(numbers[2], numbers[3])
            else:
                tile[to], tile[to + 1] = float32(0), float32(0)


@device
def project_pairs(
    kind, rows, row, step, count, weight, bias, head, part, high, left, right, raw, y
):
    """As `tiles.project`, with tiles for rows and for weights."""
    slices, width = bias.shape[1] >> 6, 16 * raw.shape[1]
    clear(raw)
    column = uint32(0)
    while column < rows.shape[1]:
        stage(rows, row, step, count, column, left)
        stage(weight, (head * slices + part) * width, 1, width, column, right)
        cuda.syncthreads()
        words = uint32(uint32(rows.shape[1] - column) >> 1)
        multiply_pairs(left, right, min(words, uint32(WORDS)), raw)
        cuda.syncthreads()
        column = uint32(column + TILE)
    log_features(kind, raw, bias, head, part * TILE, high, y)


@device
def multiply_pairs(a, b, words, total):
    """``total[i, j] += a[ty + 16 i] . b[tx + 16 j]``: so many words of the rows of two tiles."""
    _multiply_half(a, b, words, 0, total)  # half of them at a time, for all need more registers
    if total.shape[1] > 2:
        _multiply_half(a, b, words, 2, total)


@device
def _multiply_half(a, b, words, first, total):
    """The same of columns j of the total from `first` on, two of them.

    The eight rows of `a` whose entries a warp has are columns of its products, all rows of `b` are
    their rows.
    """
    tid, _, _ = lane()
    # of the instruction: threads in fours, each with a row or column, or two
    group, member = (tid >> 2) & 7, tid & 3
    at = uint32(begin((tid >> 5) * 2 + (group >> 2) + ((group & 3) << 4)) + member)
    to = uint32(begin(group) + member + SIXTEEN * first)
    sums = cuda.local.array((2, 4), float32)
    for j in range(2):
        for u in range(4):
            sums[j, u] = float32(0)
    x = uint32(0)
    while x < words:
        cuda.syncwarp()
        right = a[at + x], a[at + x + 4]
        for j in range(2):
            low = uint32(to + SIXTEEN * j + x)
            high = uint32(low + 8 * PITCH)
            left = b[low], b[high], b[low + 4], b[high + 4]
            found = _multiply_add(left, right, (sums[j, 0], sums[j, 1], sums[j, 2], sums[j, 3]))
            for u in range(4):
                sums[j, u] = found[u]
        x = uint32(x + 8)
    _add(sums, first, total)


@device
def _add(sums, first, total):
    """Add what `_multiply_half` has found to the entries, each by its own thread.

    Thread `tid` finds rows 2 (tid & 3) and the next of the eight, columns (tid >> 2) & 7 and 8 on
    of each sixteen; its entries are those of four rows, but of one column.  So it has them from two
    threads, of which each has something for two.
    """
    tid, _, _ = lane()
    half, even = (tid >> 3) & 1, tid & 1 == 0
    source = ((tid & 7) << 2) + ((tid & 16) >> 3)
    for j in range(2):
        for u in range(2):
            low, high = sums[j, u], sums[j, 2 + u]
            one = cuda.shfl_sync(0xFFFFFFFF, low if even else high, source + half)
            other = cuda.shfl_sync(0xFFFFFFFF, high if even else low, source + 1 - half)
            total[u, first + j] += other if half else one
            total[2 + u, first + j] += one if half else other


@device
def _number(tile, row, x):
    """Number x of a row."""
    bits = float_as_int(tile[uint32(begin(row) + 2 * (x & 15) + (x >> 5))])
    return int_as_float(int32(bits & int32(-65536)) if x & 16 else int32(bits << int32(16)))


@device
def multiply_pairs_seen(a, b, total):
    """As `multiply_pairs`, but row i of `a` leaves out what comes after its number i.

    Whatever it is multiplied with: where `b` is not finite it becomes zero, so that the sums of
    rows that do not see that have the bits that they would have, and the others get it themselves.
    """
    tid, ty, tx = lane()
    for x in range(TILE):
        for j in range(total.shape[1]):
            right = _number(b, tx + 16 * j, x)
            if not is_finite(right):
                for i in range(4):
                    if x <= ty + 16 * i:
                        total[i, j] += _number(a, ty + 16 * i, x) * right
    cuda.syncthreads()
    for n in range(8):
        at = uint32(begin(tid >> 2) + (tid & 3) + 4 * n)
        bits = float_as_int(b[at])
        low, high = int32(bits & int32(0xFFFF)), int32(bits & int32(-65536))
        if not is_finite(int_as_float(int32(low << int32(16)))):
            low = int32(0)
        if not is_finite(int_as_float(high)):
            high = int32(0)
        b[at] = int_as_float(int32(high | low))
    cuda.syncthreads()
    multiply_pairs(a, b, uint32(WORDS), total)


@device
def is_finite(x):
    """Whether it is neither infinite nor NaN."""
    return x * float32(0) == float32(0)
