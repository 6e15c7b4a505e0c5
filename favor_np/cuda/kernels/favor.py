"""The FAVOR+ kernels: fold keys and values into states, scan the states, read them with queries.

A state is ``(c, S, z)`` as on the CPU, features in slices of 64; with antithetic pairs a slice is 32 rows of
W and the same with their signs turned, so that one product serves both.  A causal sequence is folded
chunk by chunk into states of their own, and these are scanned: so a chunk of queries depends on nobody but
its own keys and one state, and every chunk of every head is a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda, float32, int32

from favor_np.cuda.kernels.tiles import (
    LOWEST,
    MASKED,
    NOTHING,
    PADDED,
    PLAIN,
    STAGED,
    STRIDE,
    TILE,
    WARPS,
    clear,
    device,
    exponent,
    feature,
    highest_across,
    lane,
    log_features,
    multiply,
    multiply_rows,
    multiply_seen,
    multiply_turned,
    power,
    product,
    signed,
    total_across,
)

#: log2-features of the keys of one chunk may pass its first key by this much, as on the CPU.
SPAN = 40
#: Columns of the tables: who is folded, what is scanned, who reads.
FOLD = ("row", "step", "count", "mask_row", "v_row", "head", "slot")
SCAN = ("slot", "first", "count", "fresh")
READ = (
    "q_row",
    "step",
    "count",
    "q_mask_row",
    "out_row",
    "row",
    "v_row",
    "mask_row",
    "head",
    "slot",
    "q_vector",
)


@device
def height_of(height, row, mask, mask_row, p, count):
    """The height of key p of a tile: MASKED if it takes no part, NaN if it is not finite."""
    if p >= count or (mask.size > 0 and mask[mask_row] == 0):
        return float32(MASKED)
    return height[row]


@device
def put_values(v, row, step, count, mask, mask_row, start, rows, column, plain):
    """Values start, start + 1, ... of a tile to the plain tile, masked ones as zeros; whether all are finite."""
    tid, _, _ = lane()
    x = tid & 63
    clean = True
    for i in range(tid >> 6, rows, 4):
        p = start + i
        value = float32(0)
        if p < count and column + x < v.shape[1]:
            if mask.size == 0 or mask[mask_row + step * p] != 0:
                value = float32(v[row + step * p, column + x])
        clean = clean and value * float32(0) == float32(0)
        plain[i * TILE + x] = value
    return clean


@device
def highest_of_rows(top, tops, base):
    """The maximum over all rows of a tile of what each thread has of its four columns, and base."""
    tid, ty, tx = lane()
    for j in range(4):
        high = max(top[j], cuda.shfl_xor_sync(0xFFFFFFFF, top[j], 16))
        if ty & 1 == 0:
            tops[(tid >> 5) * TILE + tx + 16 * j] = high
    cuda.syncthreads()
    for j in range(4):
        high = base[j]
        for w in range(8):
            high = max(high, tops[w * TILE + tx + 16 * j])
        top[j] = high


@device
def part_of_keys(y, start, count, before, level, base, cut, tops):
    """Where the keys from start on pass the first of them, and before, by more than SPAN; else count.

    Raises level from before to the largest of these keys.  Rows before a tall key would lose theirs to underflow.  Which key is tall depends on those before it
    alone, so cutting there keeps causality exact.
    """
    tid, ty, tx = lane()
    for i in range(4):
        if ty + 16 * i == start:
            for j in range(4):
                base[tx + 16 * j] = max(exponent(y[i, j]), before[j])
    if tid == 0:
        cut[0] = count
    cuda.syncthreads()
    for j in range(4):
        limit = base[tx + 16 * j] + SPAN
        for i in range(4):
            if ty + 16 * i > start and exponent(y[i, j]) > limit:
                cuda.atomic.min(cut, 0, ty + 16 * i)
    cuda.syncthreads()
    stop = cut[0]
    for j in range(4):
        level[j] = int32(LOWEST)
        for i in range(4):
            if start <= ty + 16 * i < stop:
                level[j] = max(level[j], exponent(y[i, j]))
    highest_of_rows(level, tops, before)
    return stop


def make_fold(kind: int, signs: int) -> Callable[..., Any]:
    """Return the kernel that folds stretches of keys, each into a state of its own."""
    rows_of_w, per_sign = TILE // signs, 4 // signs

    def fold(k, height, share, v, mask, weight, bias, epsilon, table, c, s, z):
        keys = cuda.shared.array(PADDED, float32, alignment=16)
        plain = cuda.shared.array(PLAIN, float32, alignment=16)
        tops = cuda.shared.array(WARPS, int32)
        sums = cuda.shared.array(WARPS, float32)
        scale = cuda.shared.array(TILE, float32, alignment=16)
        tid, ty, tx = lane()
        tile, part, column = cuda.blockIdx.x, cuda.blockIdx.y, cuda.blockIdx.z * TILE
        row, step, count, mask_row = table[tile, 0], table[tile, 1], table[tile, 2], table[tile, 3]
        v_row, head, slot = table[tile, 4], table[tile, 5], table[tile, 6]
        slices = c.shape[1] // TILE
        total = cuda.local.array((4, 4), float32)
        raw = cuda.local.array((4, per_sign), float32)
        y = cuda.local.array((4, 4), float32)
        high = cuda.local.array(4, float32)
        level = cuda.local.array(4, int32)
        new = cuda.local.array(4, int32)
        folded = cuda.local.array(4, float32)
        clear(total)
        for j in range(4):
            level[j], folded[j] = int32(NOTHING), float32(0)
        for start in range(0, count, TILE):
            first, size = row + step * start, min(TILE, count - start)
            clear(raw)
            product(k, first, step, size, weight, (head * slices + part) * rows_of_w, 1, rows_of_w,
                    k.shape[1], plain, raw)  # fmt: skip
            for i in range(4):
                p = ty + 16 * i
                high[i] = height_of(
                    height, first + step * p, mask, mask_row + step * (start + p), p, size
                )
            log_features(kind, raw, bias, head, part * TILE + tx, high, y)
            for j in range(4):
                new[j] = int32(LOWEST)
                for i in range(4):
                    new[j] = max(new[j], exponent(y[i, j]))
            highest_of_rows(new, tops, level)
            for j in range(4):
                f, by = tx + 16 * j, power(level[j] - new[j])
                level[j] = new[j]
                folded[j] *= by
                if ty == 0:
                    scale[f] = by
                for i in range(4):
                    p = ty + 16 * i
                    value = feature(kind, epsilon, signed(raw, i, j), y[i, j], level[j])
                    keys[p * STRIDE + f] = value
                    if share.size > 0 and p < size:
                        value *= share[first + step * p]
                    folded[j] += value
            put_values(
                v,
                v_row + step * start,
                step,
                size,
                mask,
                mask_row + step * start,
                0,
                TILE,
                column,
                plain,
            )
            cuda.syncthreads()
            for i in range(4):
                for j in range(4):
                    total[i, j] *= scale[4 * ty + i]
            multiply_turned(keys, plain, TILE, total)
            cuda.syncthreads()
        for j in range(4):
            value = folded[j] + cuda.shfl_xor_sync(0xFFFFFFFF, folded[j], 16)
            if ty & 1 == 0:
                sums[(tid >> 5) * TILE + tx + 16 * j] = value
        cuda.syncthreads()
        if ty == 0 and column == 0:
            for j in range(4):
                f = tx + 16 * j
                value = float32(0)
                for w in range(8):
                    value += sums[w * TILE + f]
                c[slot, part * TILE + f], z[slot, part * TILE + f] = level[j], value
        for i in range(4):
            for j in range(4):
                s[slot, part * TILE + 4 * ty + i, column + 4 * tx + j] = total[i, j]

    return fold


def scan(table, own_c, c, s, z, total_c, total_s, total_z):
    """Replace states by the sum of all before them; the sum of all to the totals, which came first.

    ``own_c`` are the exponents of the states s, z, and c receives those of the sums.
    """
    tid = cuda.threadIdx.x & 255
    job, f, x = cuda.blockIdx.x, cuda.blockIdx.y * 4 + (tid >> 6), tid & 63
    slot, first, count, fresh = table[job, 0], table[job, 1], table[job, 2], table[job, 3]
    before = int32(NOTHING) if fresh else total_c[slot, f]
    after = before
    for column in range(x, s.shape[2], TILE):
        level, total, weight = before, float32(0), float32(0)
        if not fresh:
            total = total_s[slot, f, column]
            if column == 0:
                weight = total_z[slot, f]
        for n in range(first, first + count):
            own = own_c[n, f]
            high = max(level, own)
            keep, add = power(level - high), power(own - high)
            value = s[n, f, column]
            s[n, f, column] = total
            total = total * keep + value * add
            if column == 0:
                value = z[n, f]
                c[n, f], z[n, f] = level, weight
                weight = weight * keep + value * add
            level = high
        total_s[slot, f, column] = total
        if column == 0:
            total_z[slot, f] = weight
        after = level
    cuda.syncthreads()
    if x == 0:
        total_c[slot, f] = after


def make_read(kind: int, signs: int, causal: bool, divide: bool) -> Callable[..., Any]:
    """Return the kernel that reads states, and the keys of the same chunk where it is causal.

    It divides by the denominator; or else, for the gradient of values, takes the heights of the rows.
    """
    rows_of_w, per_sign = TILE // signs, 4 // signs

    def read(q, q_height, q_mask, k, height, v, mask, weight, q_bias, bias, epsilon, table, c, s, z, out, dens, tops_out):  # fmt: skip
        queries = cuda.shared.array(PADDED, float32, alignment=16)
        keys = cuda.shared.array(PADDED, float32, alignment=16)
        plain = cuda.shared.array(STAGED, float32, alignment=16)
        tops = cuda.shared.array(WARPS, int32)
        base = cuda.shared.array(TILE, int32)
        scale = cuda.shared.array(TILE, float32)
        cut = cuda.shared.array(1, int32)
        tid, ty, tx = lane()
        tile, column = cuda.blockIdx.x, cuda.blockIdx.y * TILE
        q_row, step, count, q_mask_row = (
            table[tile, 0],
            table[tile, 1],
            table[tile, 2],
            table[tile, 3],
        )
        out_row, row, v_row, mask_row = (
            table[tile, 4],
            table[tile, 5],
            table[tile, 6],
            table[tile, 7],
        )
        head, slot = table[tile, 8], table[tile, 9]
        slices = c.shape[1] // TILE
        num = cuda.local.array((4, 4), float32)
        scores = cuda.local.array((4, 4), float32)
        raw = cuda.local.array((4, per_sign), float32)
        y = cuda.local.array((4, 4), float32)
        high_q = cuda.local.array(4, float32)
        high = cuda.local.array(4, float32)
        level = cuda.local.array(4, int32)
        before = cuda.local.array(4, int32)
        top = cuda.local.array(4, int32)
        den = cuda.local.array(4, float32)
        clear(num)
        clear(scores)
        for i in range(4):
            p = ty + 16 * i
            top[i], den[i], high[i] = int32(-(2**30) if divide else 0), float32(0), float32(MASKED)
            high_q[i] = height_of(
                q_height, q_row + step * p, q_mask, q_mask_row + step * p, p, count
            )
            if causal:
                high[i] = height_of(height, row + step * p, mask, mask_row + step * p, p, count)
        for part in range(slices):
            w, at = (head * slices + part) * rows_of_w, part * TILE + tx
            for j in range(4):
                before[j] = c[slot, at + 16 * j]
            start, stop = 0, count
            while start < count:  # once, but for keys that pass what came before too far
                for j in range(4):
                    level[j] = before[j]
                if causal:
                    clear(raw)
                    product(k, row, step, count, weight, w, 1, rows_of_w, k.shape[1], plain, raw)
                    log_features(kind, raw, bias, head, at, high, y)
                    stop = part_of_keys(y, start, count, before, level, base, cut, tops)
                    for i in range(4):
                        p = ty + 16 * i
                        for j in range(4):
                            value = feature(kind, epsilon, signed(raw, i, j), y[i, j], level[j])
                            keys[p * STRIDE + tx + 16 * j] = (
                                value if start <= p < stop else float32(0)
                            )
                clear(raw)
                product(q, q_row, step, count, weight, w, 1, rows_of_w, q.shape[1], plain, raw)
                log_features(kind, raw, q_bias, head, at, high_q, y)
                if ty == 0:
                    for j in range(4):
                        scale[tx + 16 * j] = power(before[j] - level[j])
                for i in range(4):
                    peak = int32(-(2**30))
                    seen = not causal or ty + 16 * i >= start  # rows before see none of these keys
                    for j in range(4):
                        peak = max(peak, int32(exponent(y[i, j]) + level[j]))
                    peak = highest_across(peak)  # by all lanes: never in a branch
                    peak = max(top[i], peak) if seen and divide else top[i]
                    by = power(top[i] - peak)
                    top[i] = peak
                    den[i] *= by
                    for j in range(4):
                        num[i, j] *= by
                        scores[i, j] *= by
                        value = feature(kind, epsilon, signed(raw, i, j), y[i, j], peak - level[j])
                        queries[(ty + 16 * i) * STRIDE + tx + 16 * j] = (
                            value if seen else float32(0)
                        )
                        if start == 0:
                            den[i] += value * z[slot, at + 16 * j] * power(before[j] - level[j])
                cuda.syncthreads()
                if causal:
                    multiply_rows(queries, 0, STRIDE, keys, 0, STRIDE, TILE, scores)
                for half in range(0, TILE if start == 0 else 0, 32):
                    for r in range(tid >> 6, 32, 4):
                        plain[r * TILE + (tid & 63)] = (
                            s[slot, part * TILE + half + r, column + (tid & 63)] * scale[half + r]
                        )
                    cuda.syncthreads()
                    multiply(queries, half, plain, 32, num)
                    cuda.syncthreads()
                cuda.syncthreads()
                for j in range(4):
                    before[j] = int32(NOTHING)
                start = stop
        if causal:
            for i in range(4):
                for j in range(4):
                    p, n = ty + 16 * i, tx + 16 * j
                    value = scores[i, j] if n <= p else float32(0)
                    den[i] += value
                    queries[p * STRIDE + n] = value
            for half in range(0, TILE, 32):
                if not put_values(v, v_row, step, count, mask, mask_row, half, 32, column, plain):
                    cuda.atomic.min(cut, 0, -1)
                cuda.syncthreads()
                if cut[0] >= 0:
                    multiply(queries, half, plain, 32, num)
                else:  # zero times infinity must not reach the rows before it
                    multiply_seen(queries, half, plain, 32, num)
                cuda.syncthreads()
        for i in range(4):
            p = ty + 16 * i
            by = total_across(den[i])
            if divide:
                if dens.size > 0 and tx == 0 and column == 0 and p < count:
                    dens[out_row + step * p], tops_out[out_row + step * p] = by, top[i]
                if by != float32(0):  # it vanishes only where there is no key at all
                    by = float32(1) / by
            else:
                by = float32(1)
            for j in range(4):
                value = num[i, j] * by
                queries[p * STRIDE + 4 * tx + j] = (
                    value if high_q[i] != float32(MASKED) else float32(0)
                )
        cuda.syncthreads()
        x = tid & 63
        for i in range(tid >> 6, count, 4):
            if column + x < out.shape[1]:
                out[out_row + step * i, column + x] = queries[i * STRIDE + x]

    return read
