"""Between the caller's arrays and the padded tiles that kernels work on."""

from __future__ import annotations

import math
from collections import namedtuple

from favor_np.kernels.jit import EXACT, jit
from favor_np.kernels.simd import VECTOR_BYTES, prefetch, transpose, view

#: Positions that kernels take at a time.
CHUNK = 64

#: What attention writes: rows (N, dv) and, unless these are empty, the denominators weights * 2**tops.
Result = namedtuple("Result", "rows weights tops")


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
def soon(source, row, count):
    """Fetch rows that the next chunk will read while this one is computed."""
    line = 64 // source.itemsize
    for i in range(row, row + count):
        for x in range(0, source.shape[1], line):
            prefetch(source, i, x)


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
    """Rows num / den of a Result: zeros where there is no key, NaN where the query is not finite."""
    rows, one = out.rows, out.rows.dtype.type(1)
    for i in range(count if out.tops.size > 0 else 0):
        out.weights[row + i], out.tops[row + i] = den[i], top[i]
    for i in range(count):
        inverse = den[i]
        if square[i] == math.inf:
            inverse *= math.nan
        elif inverse != 0:  # it vanishes only where there is no key at all
            inverse = one / inverse
        for x in range(rows.shape[1]):
            rows[row + i, x] = num[i, x] * inverse
