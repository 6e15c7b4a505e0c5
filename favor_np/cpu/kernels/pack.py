"""Between the caller's arrays and the padded tiles that kernels work on."""

from __future__ import annotations

import math
from collections import namedtuple

import numpy as np

from favor_np.cpu.kernels.bfloat16 import round_rows
from favor_np.cpu.kernels.gemm import project_t
from favor_np.cpu.kernels.jit import EXACT, jit
from favor_np.cpu.kernels.jobs import OVERFLOW, report
from favor_np.cpu.kernels.simd import VECTOR_BYTES, transpose, view

#: Positions that kernels take at a time.
CHUNK = 64
#: What sums of values may overflow from, in float32 and in float64.
SINGLE, DOUBLE = 2.0**32, 2.0**256
#: The largest finite numbers.
MOST_SINGLE, MOST_DOUBLE = float(np.finfo(np.float32).max), float(np.finfo(np.float64).max)

#: A feature map, block by block of its weights.  For calibrated ones (par.affine) the rows of
#: `affine` are the centres of queries and of keys, what is linear in the height of a key and, if
#: par.factored, the columns of its quadratic part.  (One array: each costs a call a tenth of a
#: microsecond.) The weights may be there once more, split into parts for the matrix unit.
Map = namedtuple("Map", "query key bias affine query_parts key_parts", defaults=(None, None))
QUERY_CENTER, KEY_CENTER, LINEAR, FACTOR = range(4)
#: What attention writes: rows (N, dv) and, unless these are empty, the denominators weights *
#: 2**tops. The control words are told of rows that are not finite.
Result = namedtuple("Result", "rows weights tops ctl")


@jit()
def cut(floats, start, rows, cols):
    """The next matrix of a workspace, and where the one after it starts."""
    end = start + rows * cols
    return view(floats, start, rows, cols), end


@jit(fastmath=EXACT)
def shorten(source, row, target, i, limit):
    """Copy one row to target[i], shortened to limit or, if it is not finite, as zeros; its square.

    Scaled by its largest entry first: the square of a finite row may be infinite.
    """
    largest, square = 0.0, 0.0
    for x in range(source.shape[1]):
        largest = max(largest, abs(float(source[row, x])))
        if not math.isfinite(source[row, x]):
            square = math.inf
    if square == math.inf:
        for x in range(source.shape[1]):
            target[i, x] = 0
        return square
    for x in range(source.shape[1]):
        square += (float(source[row, x]) / largest) ** 2
    norm = math.sqrt(square)
    for x in range(source.shape[1]):
        target[i, x] = float(source[row, x]) / largest * (limit / norm)
    return min(largest * norm, 1e150) ** 2


@jit()
def pack(source, row, step, count, target, limit, squares):
    """Copy rows row, row + step, ... of source to the zero-padded tile; their squares to squares.

    A finite row longer than limit is shortened to it; a row with NaN or infinity is zeroed and its
    square is infinite.
    """
    width = source.shape[1]
    for i in range(count):
        total = 0.0
        for x in range(width):
            value = source[row + i * step, x]
            target[i, x] = value
            total += float(value) * float(value)
        if not total <= limit * limit:
            total = shorten(source, row + i * step, target, i, limit)
        squares[i] = total
        for x in range(width, target.shape[1]):
            target[i, x] = 0
    for i in range(count, target.shape[0]):
        for x in range(target.shape[1]):
            target[i, x] = 0


@jit()
def center(rows, count, middle, squares):
    """Subtract middle from the packed rows that are finite, and square them anew."""
    for i in range(count):
        if squares[i] < math.inf:
            total = 0.0
            for x in range(middle.size):
                rows[i, x] -= middle[x]
                total += float(rows[i, x]) * float(rows[i, x])
            squares[i] = total


@jit()
def pack_queries(par, q, row, step, count, fm, w, t):
    """Pack queries, centred if the map is."""
    pack(q, row, step, count, t.rows, par.limit, t.square)
    if par.affine:
        center(t.rows, count, fm.affine[w, QUERY_CENTER], t.square)


@jit()
def pack_keys(par, k, row, count, mask, mask_row, fm, w, clock, rate, t):
    """Pack keys and set their heights, less the integer by which clock raises all: its value.

    Masked keys, and those that are not finite, are infinitely high: they have no feature.
    """
    pack(k, row, 1, count, t.rows, par.limit, t.square)
    heights(par, fm, w, count, k.shape[1], t)
    lift = math.floor(clock)
    for i in range(CHUNK):
        t.height[i], t.share[i] = math.inf, 1
    for i in range(count):
        if t.square[i] < math.inf and (mask_row < 0 or mask[mask_row + i]):
            ahead = clock - lift + i * rate
            t.height[i] = t.square[i] - ahead
    return lift


@jit()
def heights(par, fm, w, count, d, t):
    """What is subtracted from all log2-features of each packed key, in place of its square.

    Infinite for a key that is not finite; the keys of a calibrated map are centred.
    """
    if par.affine:
        center(t.rows, count, fm.affine[w, KEY_CENTER], t.square)
    round_rows(t.pairs, t.rows, count, t.square)
    if par.factored:
        across(t.rows, t.columns)
        rows, cols = -(-count // 8) * 8, t.stretched.shape[1]
        project_t(t.columns, fm.affine[w, FACTOR:], t.stretched, rows, cols, d)
    for i in range(count):
        if t.square[i] < math.inf:
            height = par.key_norm * t.square[i]
            if par.factored:
                height = 0.0
                for x in range(t.stretched.shape[1]):
                    height += float(t.stretched[i, x]) ** 2
            if par.affine:
                for x in range(d):
                    height -= float(fm.affine[w, LINEAR, x]) * t.rows[i, x]
            t.square[i] = max(min(height, par.far), -par.far)


@jit()
def pack_values(source, row, step, count, target, mask, mask_row):
    """Copy value rows to the zero-padded tile, masked ones as zeros; False if one is not finite."""
    width = source.shape[1]
    check = target.dtype.type(0)
    for i in range(count):
        if mask_row >= 0 and not mask[mask_row + i * step]:
            target[i] = 0
            continue
        for x in range(width):
            value = source[row + i * step, x]
            target[i, x] = value
            check += value * 0
    target[:count, width:] = 0
    target[count:] = 0
    return check == 0


@jit()
def across(rows, columns):
    """Transpose packed rows: products read a column of their left matrix at a time."""
    lanes = VECTOR_BYTES // rows.itemsize
    for i in range(0, CHUNK, lanes):
        for x in range(0, rows.shape[1], lanes):
            transpose(rows, i, x, columns)


@jit()
def write_rows(num, den, top, square, count, out, row):
    """Rows num / den of a Result: zeros without a key, NaN for a query that is not finite."""
    rows, one = out.rows, out.rows.dtype.type(1)
    total = rows.dtype.type(0)
    for i in range(count if out.tops.size > 0 else 0):
        out.weights[row + i], out.tops[row + i] = den[i], top[i]
    for i in range(count):
        inverse = den[i]
        if square[i] == math.inf:
            inverse *= math.nan
        elif inverse != 0:  # it vanishes only where there is no key at all
            inverse = one / inverse
        for x in range(rows.shape[1]):
            value = rows.dtype.type(num[i, x] * inverse)
            rows[row + i, x] = value
            total += abs(value)
    if not total < math.inf:
        mend_rows(num, count, out, row)


@jit(fastmath=EXACT)
def mend_rows(num, count, out, row):
    """Report rows that are not finite, but for means that only rounding has made infinite."""
    rows, spoiled = out.rows, False
    for i in range(count):
        for x in range(rows.shape[1]):
            if math.isinf(rows[row + i, x]) and math.isfinite(num[i, x]):
                rows[row + i, x] = math.copysign(largest_of(rows), num[i, x])
            elif not math.isfinite(rows[row + i, x]):
                spoiled = True
    if spoiled:
        report(out.ctl, OVERFLOW)


@jit()
def largest_of(rows):
    """The largest finite number of an array's dtype."""
    return MOST_SINGLE if rows.itemsize == 4 else MOST_DOUBLE


@jit()
def count_large(rows):
    """How many finite numbers there are whose sums may overflow."""
    limit, count = SINGLE if rows.itemsize == 4 else DOUBLE, 0
    for i in range(rows.shape[0]):
        for x in range(rows.shape[1]):
            size = abs(rows[i, x])
            count += limit <= size < math.inf
    return count


@jit(cache=True)
def holds_large(rows):
    """Whether there is one."""
    return count_large(rows) > 0
