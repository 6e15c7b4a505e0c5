"""Between the caller's arrays and the padded tiles that kernels work on."""

from __future__ import annotations

import math

import numpy as np

from favor_np.cpu.kernels.bfloat16 import round_rows
from favor_np.cpu.kernels.counters import report
from favor_np.cpu.kernels.gemm import project_t
from favor_np.cpu.kernels.jit import EXACT, jit
from favor_np.cpu.kernels.simd import transpose
from favor_np.cpu.processor import VECTOR_BYTES
from favor_np.cpu.records import OVERFLOW
from favor_np.cpu.tiles import CHUNK

#: What sums of values may overflow from, in float32 and in float64.
SINGLE, DOUBLE = 2.0**32, 2.0**256
#: The largest finite numbers.
MOST_SINGLE, MOST_DOUBLE = float(np.finfo(np.float32).max), float(np.finfo(np.float64).max)

#: The rows of ``call.affine`` of a block of a calibrated map (par.affine): the centres of queries
#: and of keys, what is linear in the log-norm of a key and, if par.factored, the columns of its
#: quadratic part.
QUERY_CENTER, KEY_CENTER, LINEAR, FACTOR = range(4)


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
def pack_queries(par, call, row, step, first, count, w, t):
    """Pack queries from the first on, centred if the map is; rows before it are any."""
    rows, squares = t.rows[first:], t.square[first:]
    pack(call.q, row + step * first, step, count - first, rows, par.limit, squares)
    if par.affine:
        center(t.rows, count, call.affine[w, QUERY_CENTER], t.square)


@jit()
def pack_keys(par, call, row, step, count, mask_row, bias_row, w, t):
    """Pack keys and set their log-norms and the integers of their biases.

    Masked keys, and those that are not finite, are infinitely high: they have no feature.
    """
    mask, log_norm, bias_exponent, share = call.mask, t.log_norm, t.bias_exponent, t.share
    pack(call.k, row, step, count, t.rows, par.limit, t.square)
    log_norms(par, call, w, count, t)
    for i in range(CHUNK):
        log_norm[i], bias_exponent[i], share[i] = math.inf, 0, 1
    for i in range(count):
        if t.square[i] < math.inf and (mask_row < 0 or mask[mask_row + i * step]):
            raised = call.log2_bias[bias_row + i * step] if bias_row >= 0 else 0.0
            log_norm[i], bias_exponent[i] = biased(t.square[i], raised)


@jit(fastmath=EXACT)
def biased(log_norm, bias):
    """The log-norm of a key less the fraction of its bias, and the integer of that."""
    whole = math.floor(bias)
    return log_norm - (bias - whole), whole


@jit()
def log_norms(par, call, w, count, t):
    """What is subtracted from all log2-features of each packed key, in place of its square.

    Infinite for a key that is not finite; the keys of a calibrated map are centred.
    """
    affine, d = call.affine, call.k.shape[1]
    if par.affine:
        center(t.rows, count, affine[w, KEY_CENTER], t.square)
    round_rows(t.pairs, t.rows, count, t.square)
    if par.factored:
        across(t.rows, t.columns)
        rows, cols = -(-count // 8) * 8, t.stretched.shape[1]
        project_t(t.columns, affine[w, FACTOR:], t.stretched, rows, cols, d)
    for i in range(count):
        if t.square[i] < math.inf:
            log_norm = par.key_norm * t.square[i]
            if par.factored:
                log_norm = 0.0
                for x in range(t.stretched.shape[1]):
                    log_norm += float(t.stretched[i, x]) ** 2
            if par.affine:
                for x in range(d):
                    log_norm -= float(affine[w, LINEAR, x]) * t.rows[i, x]
            t.square[i] = max(min(log_norm, par.far), -par.far)


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
def write_rows(num, den, top, square, count, call, row):
    """Rows num / den of the result: zeros without a key, NaN for a query that is not finite."""
    rows, weights, tops = call.out, call.weights, call.tops
    one, total = rows.dtype.type(1), rows.dtype.type(0)
    for i in range(count if tops.size > 0 else 0):
        weights[row + i], tops[row + i] = den[i], top[i]
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
        mend_rows(num, count, call, row)


@jit()
def join_rows(num, den, top, square, step, first, count, call, row):
    """Join rows num / den, from the first on, with those of other keys that are there."""
    rows, weights, tops, one = call.out, call.weights, call.tops, call.out.dtype.type(1)
    total = rows.dtype.type(0)
    for i in range(first, count):
        at = row + step * i
        highest = max(tops[at], top[i])
        old = weights[at] * rows.dtype.type(2.0 ** max(float(tops[at] - highest), -1000.0))
        scale = rows.dtype.type(2.0 ** max(float(top[i] - highest), -1000.0))
        weights[at], tops[at] = old + den[i] * scale, highest
        if weights[at] == 0:  # there is no key at all
            continue
        inverse = one / weights[at]
        if square[i] == math.inf:
            inverse *= math.nan
        for x in range(rows.shape[1]):
            value = rows[at, x] * (old * inverse) + num[i, x] * (scale * inverse)
            rows[at, x] = value
            total += abs(value)
    if not total < math.inf:
        report(call.control, OVERFLOW)


@jit(fastmath=EXACT)
def mend_rows(num, count, call, row):
    """Report rows that are not finite, but for means that only rounding has made infinite."""
    rows, spoiled = call.out, False
    for i in range(count):
        for x in range(rows.shape[1]):
            if math.isinf(rows[row + i, x]) and math.isfinite(num[i, x]):
                rows[row + i, x] = math.copysign(largest_of(rows), num[i, x])
            elif not math.isfinite(rows[row + i, x]):
                spoiled = True
    if spoiled:
        report(call.control, OVERFLOW)


@jit()
def largest_of(rows):
    """The largest finite number of an array's dtype."""
    return MOST_SINGLE if rows.itemsize == 4 else MOST_DOUBLE


@jit()
def count_large(rows, first, last):
    """How many finite numbers there are, in rows first:last, whose sums may overflow."""
    limit, count = SINGLE if rows.itemsize == 4 else DOUBLE, 0
    for i in range(first, last):
        for x in range(rows.shape[1]):
            size = abs(rows[i, x])
            count += limit <= size < math.inf
    return count


@jit()
def holds_large(call):
    """Whether there is one in the rows of `records.Numbers`."""
    return 1 if count_large(call.rows, 0, call.rows.shape[0]) > 0 else 0
