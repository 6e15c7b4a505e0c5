"""Between the caller's arrays and the rows that kernels work on."""

from __future__ import annotations

import math

from numba import cuda, float32, int32, uint32

from favor_np.cuda.kernels.storage import number, rounded
from favor_np.cuda.kernels.tiles import (
    FAR,
    NOTHING,
    STAGED,
    TILE,
    device,
    lane,
    power,
    product,
    total_across,
)

#: Columns of the table: 64 rows or fewer, where they go, and their head.
PACK = ("row", "count", "target_row", "head")


@device
def total_of_warp(x):
    """The sum of x over the warp."""
    for step in (1, 2, 4, 8, 16):
        x += cuda.shfl_xor_sync(0xFFFFFFFF, x, step)
    return x


@device
def total_of_eight(x):
    """The sum of x over the eight threads of a row."""
    for step in (1, 2, 4):
        x += cuda.shfl_xor_sync(0xFFFFFFFF, x, step)
    return x


@device
def highest_of_eight(x):
    """The maximum of x over the eight threads of a row."""
    for step in (1, 2, 4):
        x = max(x, cuda.shfl_xor_sync(0xFFFFFFFF, x, step))
    return x


def pack(source, limit, key_norm, center, linear, table, target, log_norm):
    """Copy rows to zero-padded ones, centred if the map is, and set the log-norms of keys.

    A row longer than limit is shortened to it; one that is not finite becomes zeros, its log-norm
    NaN.
    """
    tid = cuda.threadIdx.x & 255
    # unsigned, or every index is asked whether it counts from behind
    thread, tile, width = uint32(tid & 7), cuda.blockIdx.x, uint32(source.shape[1])
    row, count, target_row, head = table[tile, 0], table[tile, 1], table[tile, 2], table[tile, 3]
    for first in range(0, count, 32):
        i = first + (tid >> 3)
        line, to = uint32(row + i), uint32(target_row + i)
        end = uint32(width if i < count else 0)  # all threads of a warp stay for what they exchange
        square, gain, spoiled = float32(0), float32(1), float32(0)
        for x in range(thread, end, uint32(8)):
            value = number(source[line, x])
            square += value * value
        square = total_of_eight(square)
        long = not square <= limit * limit  # or not finite
        if cuda.any_sync(0xFFFFFFFF, long):
            largest = float32(0)
            for x in range(thread, end, uint32(8)):
                value = number(source[line, x])
                largest = max(largest, abs(value))
                spoiled += value * float32(0)
            largest, spoiled = highest_of_eight(largest), total_of_eight(spoiled)
            square = float32(0)
            for x in range(thread, end, uint32(8)):
                value = number(source[line, x]) / largest
                square += value * value
            norm = math.sqrt(total_of_eight(square))
            if long and spoiled == float32(0):
                gain = limit / largest / norm
        total = float32(0)
        for x in range(thread, uint32(target.shape[1] if i < count else 0), uint32(8)):
            value = float32(0)
            if x < width and spoiled == float32(0):
                value = number(source[line, x]) * gain
                if center.size > 0:
                    value -= center[head, x]
                if linear.size > 0:
                    total -= linear[head, x] * value
                total += key_norm * value * value
            target[to, x] = value
        total = max(min(total_of_eight(total), float32(FAR)), float32(-FAR))
        if thread == 0 and i < count:
            log_norm[to] = total + spoiled


def convert(source, target):
    """Copy float32 numbers to an array of another type."""
    i = cuda.blockIdx.x * 256 + (cuda.threadIdx.x & 255)
    if i < target.shape[0]:
        target[i] = rounded(source[i], target)


def take(source, places, target):
    """Copy the rows at these places of every head, a warp a row."""
    thread, count = uint32(cuda.threadIdx.x & 31), uint32(places.size)
    row = uint32(cuda.blockIdx.x * 8 + ((cuda.threadIdx.x & 255) >> 5))
    if row < uint32(target.shape[0]):
        length = uint32(source.shape[0]) // (uint32(target.shape[0]) // count)
        line = uint32(row // count * length + uint32(places[row % count]))
        for x in range(thread, uint32(source.shape[1]), uint32(32)):
            target[row, x] = source[line, x]


def join(rows, dens, tops, others, other_dens, other_tops, joined, places, out):
    """Write weighted means of rows and of the others that they are joined with, a warp a row.

    Weights are den * 2**top.  Row i of a head goes to its row places[i].
    """
    thread, count = uint32(cuda.threadIdx.x & 31), uint32(joined.size)
    row = uint32(cuda.blockIdx.x * 8 + ((cuda.threadIdx.x & 255) >> 5))
    if row < uint32(rows.shape[0]):
        heads, head, i = uint32(rows.shape[0]) // count, row // count, row % count
        line = uint32(head * (uint32(out.shape[0]) // heads) + uint32(places[i]))
        other, share, more = uint32(0), float32(1), float32(0)
        if joined[i] >= 0:
            other = uint32(head * (uint32(others.shape[0]) // heads) + uint32(joined[i]))
            more = other_dens[other]
        if more != float32(0):
            share = dens[row]
            if share != float32(0):
                by = tops[row] - other_tops[other]
                share *= power(min(by, 0))
                more *= power(min(-by, 0))
            total = share + more
            share, more = share / total, more / total
        for x in range(thread, uint32(out.shape[1]), uint32(32)):
            value = rows[row, x]
            if more != float32(0):
                value = value * share + others[other, x] * more
            out[line, x] = rounded(value, out)


def find_bad(source, found):
    """Set found[0] to 1 if a number is NaN or infinite."""
    i = cuda.blockIdx.x * 256 + (cuda.threadIdx.x & 255)
    if i < source.shape[0]:
        value = number(source[i])
        if value * float32(0) != float32(0):
            cuda.atomic.max(found, 0, int32(1))


def lower(exponents, by):
    """Take by[i] off the exponents of state i, but leave none below NOTHING."""
    state, i = cuda.blockIdx.x, cuda.blockIdx.y * 256 + (cuda.threadIdx.x & 255)
    if i < exponents.shape[1]:
        exponents[state, i] = max(int32(exponents[state, i] - by[state]), int32(NOTHING))


def scale(sums, by):
    """Multiply the sums of state i by by[i]."""
    state, i = cuda.blockIdx.x, cuda.blockIdx.y * 256 + (cuda.threadIdx.x & 255)
    if i < sums.shape[1]:
        sums[state, i] *= by[state]


def change(rows, matrix, key_norm, table, target, log_norm):
    """Multiply packed rows by the matrix of their head.

    Adds their squares, times key_norm, to the log-norms.
    """
    stage = cuda.shared.array(STAGED, float32, alignment=16)
    _, ty, tx = lane()
    tile, width = cuda.blockIdx.x, target.shape[1]
    count, row, head = table[tile, 1], table[tile, 2], table[tile, 3]
    part = cuda.local.array((4, 4), float32)
    square = cuda.local.array(4, float32)
    for i in range(4):
        square[i] = float32(0)
    for column in range(0, width, TILE):
        size = min(TILE, width - column)
        product(
            rows,
            row,
            1,
            count,
            matrix,
            head * rows.shape[1] + column,
            1,
            size,
            rows.shape[1],
            stage,
            part,
        )
        for i in range(4):
            for j in range(4):
                x = column + tx + 16 * j
                square[i] += part[i, j] * part[i, j]
                if ty + 16 * i < count and x < width:
                    target[row + ty + 16 * i, x] = rounded(part[i, j], target)
    for i in range(4):
        total = key_norm * total_across(square[i])
        if tx == 0 and ty + 16 * i < count:
            total += log_norm[row + ty + 16 * i]
            if total == total:
                total = max(min(total, float32(FAR)), float32(-FAR))
            log_norm[row + ty + 16 * i] = total
