"""What the kernels share: a block of 256 threads on tiles of 64 x 64.

Thread (ty, tx) owns 16 entries of a tile: rows ``ty + 16 i`` (``4 ty + i`` where the left factor is
turned), and columns ``tx + 16 j`` where the product runs along the rows of both factors, else ``4
tx + j``.  In shared memory rows are padded so that either way 128 bits are loaded at a time,
without bank conflicts. Indices are non-negative to the compiler's knowledge (`&`, `>>`): only then
it joins the loads.
"""

from __future__ import annotations

from numba import cuda, float32, int32, uint32
from numba.cuda.libdevice import float_as_int, int_as_float

from favor_np import numerics
from favor_np.cuda.kernels.storage import four, number
from favor_np.numerics import ELU, LOG2E, POSITIVE

#: Positions, features and values of a tile; threads of a block.
TILE, THREADS = 64, 256
#: Length of a padded row of features; columns of a factor that are staged at a time, padded to.
STRIDE, DEPTH, STAGE = 68, 16, 20
#: Sizes of shared arrays: a padded tile, a plain one, the stage of a product or half a tile, a row
#: for each warp, a number for each row.  None is a power of two: for these the compiler writes the
#: check for negative indices in a way that it cannot see through later.
PADDED, PLAIN = TILE * STRIDE, TILE * TILE + 4
STAGED, WARPS, ROWS = 2 * TILE * STAGE, 8 * TILE + 4, TILE + 4
#: The longest row of a table.
JOB = 16
#: Masks an index that is a multiple of four, and so proves to the compiler that it is one.
EVEN = 8188
#: Largest |log2-feature|; below -3 FAR there is none.  The log-norm of a masked key; the exponent
#: of a feature which no key has reached; and that of a masked key, which leaves nothing beside it.
FAR = numerics.FAR[4]
MASKED, NOTHING = numerics.MASKED * FAR, numerics.NOTHING[4]
LOWEST = NOTHING - 1024
#: Adding it rounds to an integer; and its bits.
_MAGIC, _MAGIC_BITS = numerics.ROUNDER[4][0], 0x4B400000
_E0, _E1, _E2, _E3, _E4, _E5, _E6 = numerics.EXP2[4]

device = cuda.jit(device=True, forceinline=True)


@device
def nearest(y):
    """The integer nearest to y, for |y| < 2**22."""
    return int32(float_as_int(float32(y + float32(_MAGIC))) - int32(_MAGIC_BITS))


@device
def exponent(y):
    """nearest(y), or LOWEST where there is no feature: masked, padded or NaN."""
    return nearest(y) if y > float32(-3 * FAR) else int32(LOWEST)


@device
def raised(biased, y, rise, p):
    """The exponent of a log2-feature y of row p; the rise of a biased row is no part of its y."""
    n = exponent(y)
    if biased:
        return int32(n + rise[p]) if n > LOWEST else int32(LOWEST)
    return n


@device
def power(n):
    """2**n for n <= 127, and zero below the normal numbers."""
    n = int32(n)  # a difference has 64 bits
    return int_as_float(int32((n + int32(127)) << int32(23))) if n > -127 else float32(0)


@device
def exp2(y, n):
    """``2**(y - nearest(y) + n)``: the integer only moves the exponent, so it never rounds."""
    n = int32(n)
    f = y - (float32(y + float32(_MAGIC)) - float32(_MAGIC))
    p = float32(_E6)
    p = p * f + float32(_E5)
    p = p * f + float32(_E4)
    p = p * f + float32(_E3)
    p = p * f + float32(_E2)
    p = p * f + float32(_E1)
    p = p * f + float32(_E0)
    moved = int_as_float(int32(float_as_int(p) + int32(n << int32(23))))
    return moved if n >= -125 else float32(0)


@device
def log_feature(kind, y):
    """log2 of the exponential part of a feature map at the projection y."""
    if kind == POSITIVE:
        return y
    if kind == ELU:
        return max(min(y, float32(0)) * float32(LOG2E), float32(-FAR))
    return float32(0)


@device
def factor(kind, epsilon, y):
    """What a feature map multiplies its exponential part with."""
    if kind == POSITIVE:
        return float32(1)
    if kind == ELU:
        return float32(1) + max(y, float32(0))
    return epsilon + max(y, float32(0))


@device
def log_features(kind, raw, bias, head, column, high, y):
    """y = the log2-features of a tile, less the log-norms of its rows, from the projections raw.

    Its columns begin at `column`; where raw has fewer, the others are the same with their sign
    turned.
    """
    _, ty, tx = lane()
    for j in range(4):
        cuda.syncwarp()
        beta = bias[uint32(head), uint32(column + tx + 16 * j)]
        for i in range(4):
            y[i, j] = log_feature(kind, signed(raw, i, j)) + beta - high[ty + 16 * i]


@device
def signed(raw, i, j):
    """The projection of column j."""
    own = raw.shape[1]
    return raw[i, j] if j < own else -raw[i, j - own]


@device
def feature(kind, epsilon, x, y, n):
    """The feature with the projection x, the log2 y and the exponent n; NaN if y is."""
    value = exp2(y, n) * factor(kind, epsilon, x)
    return value if y == y else y


@device
def features(kind, biased, epsilon, raw, y, level, rise):
    """y = the features with the log2 y and the rise of their rows, over 2**level of their columns.

    In two loops, which unroll.
    """
    _, ty, _ = lane()
    for i in range(4):
        for j in range(4):
            value = exp2(y[i, j], raised(biased, y[i, j], rise, ty + 16 * i) - level[j])
            y[i, j] = value if y[i, j] == y[i, j] else y[i, j]
        cuda.syncwarp()
    if kind != POSITIVE:
        for i in range(4):
            for j in range(4):
                y[i, j] *= factor(kind, epsilon, signed(raw, i, j))


@device
def lane():
    """(tid, ty, tx) of this thread."""
    tid = cuda.threadIdx.x & 255
    return tid, tid >> 4, tid & 15


@device
def take(table, job):
    """Copy the block's row of a table to shared memory.

    From there it is read when it is needed: in registers its numbers, and the addresses that follow
    from them, would live through the whole kernel.
    """
    tid, _, _ = lane()
    if tid < table.shape[1]:
        job[tid] = table[cuda.blockIdx.x, tid]
    cuda.syncthreads()


@device
def clear(tile):
    """Zero the entries of a thread."""
    for i in range(4):
        for j in range(tile.shape[1]):
            tile[i, j] = float32(0)


@device
def highest_across(x):
    """The maximum of x over the 16 threads with the same rows."""
    for step in (1, 2, 4, 8):
        x = max(x, cuda.shfl_xor_sync(0xFFFFFFFF, x, step))
    return x


@device
def total_across(x):
    """The sum of x over the 16 threads with the same rows."""
    for step in (1, 2, 4, 8):
        x += cuda.shfl_xor_sync(0xFFFFFFFF, x, step)
    return x


@device
def stage_rows(source, row, step, count, column, stage, at):
    """Copy 64 rows of DEPTH columns to the stage, zeros where there are none."""
    tid, _, _ = lane()
    x = tid & 15
    place = uint32(column + x)  # unsigned, or every index is asked whether it counts from behind
    inside = place < uint32(source.shape[1])
    for n in range(4):
        i = (tid >> 4) + 16 * n
        stage[(at + i) * STAGE + x] = (
            number(source[uint32(row + step * i), place]) if i < count and inside else float32(0)
        )


@device
def stage_padded(source, row, step, count, column, stage, at):
    """The same of padded rows, whose columns are there: four at a time."""
    tid, _, _ = lane()
    i, x = tid >> 2, (tid & 3) << 2
    to = uint32(((at + i) * STAGE + x) & EVEN)
    if i < count:
        numbers = four(source, row + step * i, column + x)
        for u in range(4):
            stage[to + u] = numbers[u]
    else:
        for u in range(4):
            stage[to + u] = float32(0)


@device
def product(a, a_row, a_step, a_count, b, b_row, b_step, b_count, depth, stage, total):
    """``total[i, j] = a[a_row + a_step i] . b[b_row + b_step j]``."""
    clear(total)
    column = uint32(0)
    while column < depth:
        stage_rows(a, a_row, a_step, a_count, column, stage, 0)
        stage_rows(b, b_row, b_step, b_count, column, stage, TILE)
        cuda.syncthreads()
        multiply_stage(stage, total)
        column = uint32(column + DEPTH)


@device
def product_padded(both, a, a_row, a_step, a_count, b, b_row, b_count, stage, total):
    """The same of the whole of rows of a, and those of b, or of both, are padded."""
    clear(total)
    column = uint32(0)
    while column < a.shape[1]:
        if both:
            stage_padded(a, a_row, a_step, a_count, column, stage, 0)
        else:
            stage_rows(a, a_row, a_step, a_count, column, stage, 0)
        stage_padded(b, b_row, 1, b_count, column, stage, TILE)
        cuda.syncthreads()
        multiply_stage(stage, total)
        column = uint32(column + DEPTH)


@device
def multiply_stage(stage, total):
    """Multiply what is staged, and wait for all to have done so."""
    multiply_add_rows(stage, 0, STAGE, stage, TILE * STAGE, STAGE, DEPTH, total)
    cuda.syncthreads()


@device
def project(kind, rows, row, step, count, weight, bias, head, part, high, stage, raw, y):
    """raw = the projections of a tile of rows on a slice of weights, y = their log2-features."""
    slices, width = bias.shape[1] >> 6, 16 * raw.shape[1]
    product_padded(
        True, rows, row, step, count, weight, (head * slices + part) * width, width, stage, raw
    )
    log_features(kind, raw, bias, head, part * TILE, high, y)


@device
def multiply_rows(a, b, total):
    """``total[i, j] += a[i] . b[j]``: the rows of padded tiles."""
    multiply_add_rows(a, 0, STRIDE, b, 0, STRIDE, TILE, total)


@device
def multiply_add_rows(a, a_at, a_stride, b, b_at, b_stride, depth, total):
    """``total[i, j] += a[i] . b[j]``: rows times rows."""
    _, ty, tx = lane()
    left = cuda.local.array((4, 4), float32)
    right = cuda.local.array((4, 4), float32)
    x = uint32(0)  # unsigned: a range of Numba counts in two registers
    while x < depth:
        cuda.syncwarp()
        for i in range(4):
            at = uint32((a_at + (ty + 16 * i) * a_stride) & EVEN) + x
            for u in range(4):
                left[i, u] = a[at + u]
        for j in range(total.shape[1]):
            at = uint32((b_at + (tx + 16 * j) * b_stride) & EVEN) + x
            for u in range(4):
                right[j, u] = b[at + u]
        for u in range(4):
            for i in range(4):
                for j in range(total.shape[1]):
                    total[i, j] += left[i, u] * right[j, u]
        x = uint32(x + 4)


@device
def multiply(a, a_column, b, depth, total):
    """``total[i, j] += sum_r a[i, a_column + r] b[r, 4 tx + j]``.

    A padded tile times one of values.
    """
    _, ty, tx = lane()
    left = cuda.local.array((4, 4), float32)
    right = cuda.local.array((4, 4), float32)
    r = uint32(0)
    while r < depth:
        cuda.syncwarp()
        for i in range(4):
            at = uint32(((ty + 16 * i) * STRIDE + a_column) & EVEN) + r
            for u in range(4):
                left[i, u] = a[at + u]
        for u in range(4):
            at = uint32((r + u) * TILE + 4 * tx)
            for j in range(4):
                right[u, j] = b[at + j]
        for u in range(4):
            for i in range(4):
                for j in range(4):
                    total[i, j] += left[i, u] * right[u, j]
        r = uint32(r + 4)


@device
def multiply_turned(a, a_row, b, depth, total):
    """``total[i, j] += sum_p a[a_row + p, 4 ty + i] b[p, 4 tx + j]``.

    A padded tile, turned, times one of values.
    """
    _, ty, tx = lane()
    left = cuda.local.array(4, float32)
    right = cuda.local.array(4, float32)
    p, at, to = uint32(0), uint32((a_row * STRIDE + 4 * ty) & EVEN), uint32(4 * tx)
    while p < depth:
        for i in range(4):
            left[i] = a[at + i]
        for j in range(4):
            right[j] = b[to + j]
        for i in range(4):
            for j in range(4):
                total[i, j] += left[i] * right[j]
        p, at, to = uint32(p + 1), uint32(at + STRIDE), uint32(to + TILE)


@device
def multiply_seen(a, a_column, b, depth, total):
    """As `multiply`, but row i leaves out the rows of b after ``i - a_column``.

    Whatever they hold.
    """
    _, ty, tx = lane()
    for r in range(depth):
        for i in range(4):
            p = ty + 16 * i
            if a_column + r <= p:
                for j in range(4):
                    total[i, j] += a[p * STRIDE + a_column + r] * b[r * TILE + 4 * tx + j]
