"""The FAVOR+ kernels: fold keys and values into states, scan the states, read them with queries.

A state is ``(c, S, z)`` as on the CPU, features in slices of 64; with antithetic pairs a slice is
32 rows of W and the same with their signs turned, so that one product serves both.  A causal
sequence is folded chunk by chunk into states of their own, and these are scanned: so a chunk of
queries depends on nobody but its own keys and one state, and every chunk of every head is a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda, float32, int32, uint32, uint64

from favor_np import numerics
from favor_np.cuda.kernels.pairs import (
    WORDS,
    begin,
    is_finite,
    multiply_pairs,
    multiply_pairs_seen,
    pair,
    project_pairs,
    put_columns,
    put_rows,
    put_state,
)
from favor_np.cuda.kernels.storage import four, number, put_four, rounded
from favor_np.cuda.kernels.tiles import (
    EVEN,
    JOB,
    LOWEST,
    MASKED,
    NOTHING,
    PADDED,
    PLAIN,
    ROWS,
    STAGED,
    STRIDE,
    TILE,
    WARPS,
    clear,
    device,
    exp2,
    exponent,
    factor,
    features,
    highest_across,
    lane,
    multiply,
    multiply_rows,
    multiply_seen,
    multiply_turned,
    power,
    project,
    raised,
    signed,
    take,
    total_across,
)
from favor_np.numerics import POSITIVE

#: log2-features of the keys of one chunk may pass its first key by this much.
MAX_RISE = numerics.MAX_RISE[4]
#: Columns of the table of folds and reads: rows of side b (queries, as a rule) and of side a, which
#: is folded; a row of -1 steps goes backwards.
Q_ROW, STEP, COUNT, Q_MASK, OUT_ROW, ROW, V_ROW, MASK, HEAD, SLOT, Q_VECTOR = range(11)
#: And the first rows of log2_bias, of both sides.
LOG2_BIAS, Q_LOG2_BIAS = range(11, 13)
#: The unit of bias exponents: they are in fixed point, with an integer part of 32 bits of 64.
FRACTION = 2.0**-32
#: Columns of that of the scan.
SCAN = ("slot", "first", "count", "fresh")
#: States that a thread of the scan loads while it adds those before.
AHEAD = 8


@device
def log_norm_of(log_norm, row, mask, mask_row, p, count):
    """The log-norm of key p of a tile: MASKED if it takes no part, NaN if it is not finite."""
    if p >= count or (mask.size > 0 and mask[mask_row] == 0):
        return float32(MASKED)
    return log_norm[row]


@device
def put_log_norms(log_norm, row, mask, mask_row, step, count, high):
    """The log-norms of a tile."""
    tid, _, _ = lane()
    if tid < TILE:
        high[tid] = log_norm_of(log_norm, row + step * tid, mask, mask_row + step * tid, tid, count)


@device
def raise_log_norms(log2_bias, row, step, count, high, rise):
    """Lower the log-norms of a tile by the fractions of its log2_bias, whose integers are the rise.

    Each thread has set the log-norm that it changes.
    """
    tid, _, _ = lane()
    if tid < TILE:
        whole = int32(0)
        if tid < count and high[tid] < float32(MASKED):  # no NaN either
            bias_exponent = log2_bias[row + step * tid]
            whole = int32(bias_exponent >> 32)
            high[tid] -= float32(uint32(bias_exponent & 0xFFFFFFFF)) * float32(FRACTION)
        rise[tid] = whole


@device
def put_values(v, row, step, count, mask, mask_row, start, rows, column, plain):
    """Values start, start + 1, ... of a tile to the plain tile, masked ones as zeros.

    Returns whether all are finite.
    """
    tid, _, _ = lane()
    x = tid & 63
    place = uint32(column + x)
    clean, inside = True, place < uint32(v.shape[1])
    i = uint32(tid >> 6)
    while i < rows:
        for _ in range(4):
            p = int32(start + i)
            value = float32(0)
            if p < count and inside:
                if mask.size == 0 or mask[uint32(mask_row + step * p)] != 0:
                    value = number(v[uint32(row + step * p), place])
            clean = clean & (value * float32(0) == float32(0))
            plain[uint32(i * TILE + x)] = value
            i = uint32(i + 4)
    return clean


@device
def put_value_pairs(v, row, step, count, mask, mask_row, column, tile):
    """The same of all 64 values, to the rows of a tile of pairs."""
    tid, _, _ = lane()
    x = tid & 63
    place, at, clean = uint32(column + x), begin(x), True
    numbers = cuda.local.array(4, float32)
    for n in range(4):
        first = (tid >> 6) + 4 * n
        for u in range(4):
            p, value = first + 16 * u, float32(0)
            if p < count and place < uint32(v.shape[1]):
                if mask.size == 0 or mask[uint32(mask_row + step * p)] != 0:
                    value = number(v[uint32(row + step * p), place])
            clean = clean & is_finite(value * float32(1.0078125))  # as it may be rounded up
            numbers[u] = value
        to = uint32(at + 2 * first)
        tile[to], tile[to + 1] = pair(numbers[0], numbers[1]), pair(numbers[2], numbers[3])
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
def part_of_keys(biased, y, rise, start, count, before, level, base, cut, tops):
    """Where the keys from start on pass the first of them, and before, by more than MAX_RISE.

    Returns count if none does.  Raises level from before to the largest of these keys.  Rows before
    a tall key would lose theirs to underflow.  Which key is tall depends on those before it alone,
    so cutting there keeps causality exact.
    """
    tid, ty, tx = lane()
    for i in range(4):
        if ty + 16 * i == start:
            for j in range(4):
                base[tx + 16 * j] = max(raised(biased, y[i, j], rise, start), before[j])
    if tid == 0:
        cut[0] = count
    cuda.syncthreads()
    tall = int32(count)
    for j in range(4):
        limit = base[tx + 16 * j] + MAX_RISE
        for i in range(4):
            p = ty + 16 * i
            above = raised(biased, y[i, j], rise, p) > limit
            tall = min(tall, int32(p if (p > start) & above else count))
    if tall < count:
        cuda.atomic.min(cut, 0, tall)
    cuda.syncthreads()
    stop = cut[0]
    for j in range(4):
        level[j] = int32(LOWEST)
        for i in range(4):
            if start <= ty + 16 * i < stop:
                level[j] = max(level[j], raised(biased, y[i, j], rise, ty + 16 * i))
    highest_of_rows(level, tops, before)
    return stop


def make_fold(kind: int, signs: int, biased: bool, bfloat16: bool = False) -> Callable[..., Any]:
    """Return the kernel that folds stretches of keys, each into a state of its own.

    Keys that are `biased` weigh 2**bias_exponent times as much.  With `bfloat16` what is multiplied
    is rounded, see `kernels.pairs`, and a thread's part of the product is rows ``ty + 16 i``,
    columns ``tx + 16 j``.
    """
    per_sign = 4 // signs

    def fold(k, log_norm, log2_bias, share, v, mask, weight, bias, epsilon, table, c, s, z):
        keys = cuda.shared.array(PADDED, float32, alignment=16)
        plain = cuda.shared.array(PLAIN, float32, alignment=16)
        tops = cuda.shared.array(WARPS, int32)
        sums = cuda.shared.array(WARPS, float32)
        scale = cuda.shared.array(ROWS, float32, alignment=16)
        levels = cuda.shared.array(ROWS, int32)
        tid, ty, tx = lane()
        job = cuda.shared.array(JOB, int32)
        high = cuda.shared.array(ROWS, float32)
        rise = cuda.shared.array(ROWS, int32)
        take(table, job)
        part, column = cuda.blockIdx.y, int32(cuda.blockIdx.z * TILE)
        total = cuda.local.array((4, 4), float32)
        raw = cuda.local.array((4, per_sign), float32)
        y = cuda.local.array((4, 4), float32)
        level = cuda.local.array(4, int32)
        new = cuda.local.array(4, int32)
        folded = cuda.local.array(4, float32)
        clear(total)
        for j in range(4):
            folded[j] = float32(0)
            if ty == 0:
                levels[tx + 16 * j] = int32(NOTHING)
        for start in range(0, job[COUNT], TILE):
            first, step = job[ROW] + job[STEP] * start, job[STEP]
            size = min(TILE, job[COUNT] - start)
            put_log_norms(log_norm, first, mask, job[MASK] + step * start, step, size, high)
            if biased:
                raise_log_norms(log2_bias, job[LOG2_BIAS] + step * start, step, size, high, rise)
            if bfloat16:
                project_pairs(
                    kind,
                    k,
                    first,
                    step,
                    size,
                    weight,
                    bias,
                    job[HEAD],
                    part,
                    high,
                    keys,
                    plain,
                    raw,
                    y,
                )
            else:
                project(
                    kind, k, first, step, size, weight, bias, job[HEAD], part, high, plain, raw, y
                )
            for j in range(4):
                level[j], new[j] = levels[tx + 16 * j], int32(LOWEST)
                for i in range(4):
                    new[j] = max(new[j], raised(biased, y[i, j], rise, ty + 16 * i))
            highest_of_rows(new, tops, level)
            features(kind, biased, epsilon, raw, y, new, rise)
            for j in range(4):
                f, by = tx + 16 * j, power(level[j] - new[j])
                folded[j] *= by
                if ty == 0:
                    scale[f], levels[f] = by, new[j]
            for i in range(4):
                p, weight_of = ty + 16 * i, float32(1)
                if share.size > 0:
                    weight_of = float32(0)
                    if p < size:
                        weight_of = share[job[ROW] + job[STEP] * (start + p)]
                for j in range(4):
                    if not bfloat16:
                        keys[p * STRIDE + tx + 16 * j] = y[i, j]
                    folded[j] += y[i, j] * weight_of
                cuda.syncwarp()
            at = job[STEP] * start
            if bfloat16:
                put_columns(y, keys)
                put_value_pairs(
                    v, job[V_ROW] + at, job[STEP], size, mask, job[MASK] + at, column, plain
                )
            else:
                put_values(
                    v, job[V_ROW] + at, job[STEP], size, mask, job[MASK] + at, 0, TILE, column,
                    plain,
                )  # fmt: skip
            cuda.syncthreads()
            for i in range(4):
                for j in range(4):
                    total[i, j] *= scale[ty + 16 * i if bfloat16 else 4 * ty + i]
            if bfloat16:
                multiply_pairs(keys, plain, uint32(WORDS), total)
            else:
                multiply_turned(keys, 0, plain, TILE, total)
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
                c[job[SLOT], part * TILE + f] = levels[f]
                z[job[SLOT], part * TILE + f] = value
        slot = uint32(job[SLOT])
        if bfloat16:
            for i in range(4):
                for j in range(4):
                    f, x = uint32(part * TILE + ty + 16 * i), uint32(column + tx + 16 * j)
                    s[slot, f, x] = total[i, j]
        else:
            for i in range(4):
                f = uint32(part * TILE + 4 * ty + i)
                put_four(
                    s,
                    slot * s.shape[1] + f,
                    column + 4 * tx,
                    total[i, 0],
                    total[i, 1],
                    total[i, 2],
                    total[i, 3],
                )

    return fold


@device
def load_ahead(own_c, s, z, start, end, features, f, columns, column, own, values, weights):
    """A column of the states from start on, the last one again where there are no more."""
    for i in range(AHEAD):
        at = uint32(min(uint32(start + i), uint32(end - 1)) * features + f)
        own[i], values[i] = own_c[at], s[uint64(at) * columns + column]
        weights[i] = z[at] if column == 0 else float32(0)


def scan(table, own_c, c, s, z, total_c, total_s, total_z):
    """Replace states by the sum of all before them; the sum of all to the totals, which came first.

    ``own_c`` are the exponents of the states s, z, and c receives those of the sums; their features
    lie one after the other, as do their numbers.
    """
    tid = cuda.threadIdx.x & 255
    job, f, x = cuda.blockIdx.x, uint32(cuda.blockIdx.y * 4 + (tid >> 6)), uint32(tid & 63)
    slot, first, count, fresh = table[job, 0], table[job, 1], table[job, 2], table[job, 3]
    features, columns = uint32(total_s.shape[1]), uint32(total_s.shape[2])
    # unsigned, or every index is asked whether it counts from behind
    begin, end = uint32(first), uint32(first + count)
    own = cuda.local.array(AHEAD, int32)
    values = cuda.local.array(AHEAD, float32)
    weights = cuda.local.array(AHEAD, float32)
    now_c = cuda.local.array(AHEAD, int32)
    now = cuda.local.array(AHEAD, float32)
    now_z = cuda.local.array(AHEAD, float32)
    before = int32(NOTHING) if fresh else total_c[slot, f]
    after = before
    for column in range(x, columns, uint32(TILE)):
        level, total, weight = before, float32(0), float32(0)
        if not fresh:
            total = total_s[slot, f, column]
            if column == 0:
                weight = total_z[slot, f]
        if count > 0:
            load_ahead(own_c, s, z, begin, end, features, f, columns, column, own, values, weights)
        start = begin
        while start < end:
            for i in range(AHEAD):
                now_c[i], now[i], now_z[i] = own[i], values[i], weights[i]
            load_ahead(
                own_c,
                s,
                z,
                uint32(start + AHEAD),
                end,
                features,
                f,
                columns,
                column,
                own,
                values,
                weights,
            )
            for i in range(AHEAD):
                high = max(level, now_c[i])
                keep, add = power(level - high), power(now_c[i] - high)
                if start + i < end:
                    at = uint32(uint32(start + i) * features + f)
                    s[uint64(at) * columns + column] = total
                    if column == 0:
                        c[at], z[at] = level, weight
                    total = total * keep + now[i] * add
                    weight = weight * keep + now_z[i] * add
                    level = high
            start = uint32(start + AHEAD)
        total_s[slot, f, column] = total
        if column == 0:
            total_z[slot, f] = weight
        after = level
    cuda.syncthreads()
    if x == 0:
        total_c[slot, f] = after


def make_read(
    kind: int, signs: int, causal: bool, divide: bool, biased: bool, bfloat16: bool = False
) -> Callable[..., Any]:
    """Return the kernel that reads states, and the keys of the same chunk where it is causal.

    It divides by the denominator; or else, for the gradient of values, takes the log-norms of the
    rows, and their log2_bias if they are `biased`.  With `bfloat16` what is multiplied is rounded,
    as by `make_fold`.
    """
    per_sign = 4 // signs
    moved = biased and not divide

    def read(
        q,
        q_log_norm,
        q_log2_bias,
        q_mask,
        k,
        log_norm,
        log2_bias,
        v,
        mask,
        weight,
        q_bias,
        bias,
        epsilon,
        table,
        c,
        s,
        z,
        out,
        dens,
        tops_out,
    ):
        queries = cuda.shared.array(PADDED, float32, alignment=16)
        keys = cuda.shared.array(PADDED, float32, alignment=16)
        plain = cuda.shared.array(STAGED, float32, alignment=16)
        tops = cuda.shared.array(WARPS, int32)
        base = cuda.shared.array(ROWS, int32)
        scale = cuda.shared.array(ROWS, float32)
        cut = cuda.shared.array(1, int32)
        tid, ty, tx = lane()
        job = cuda.shared.array(JOB, int32)
        high = cuda.shared.array(ROWS, float32)
        high_q = cuda.shared.array(ROWS, float32)
        rise = cuda.shared.array(ROWS, int32)
        top = cuda.shared.array(ROWS, int32)  # or the rise of the rows that are moved
        den = cuda.shared.array(ROWS, float32)
        take(table, job)
        column = int32(cuda.blockIdx.y * TILE)
        slices = c.shape[1] >> 6
        num = cuda.local.array((4, 4), float32)
        scores = cuda.local.array((4, 4), float32)
        raw = cuda.local.array((4, per_sign), float32)
        y = cuda.local.array((4, 4), float32)
        level = cuda.local.array(4, int32)
        before = cuda.local.array(4, int32)
        clear(num)
        clear(scores)
        for i in range(4):
            if tx == 0:
                den[ty + 16 * i] = float32(0)
                if not moved:
                    top[ty + 16 * i] = int32(-(2**30))
        put_log_norms(q_log_norm, job[Q_ROW], q_mask, job[Q_MASK], job[STEP], job[COUNT], high_q)
        if moved:
            raise_log_norms(q_log2_bias, job[Q_LOG2_BIAS], job[STEP], job[COUNT], high_q, top)
        if causal:
            put_log_norms(log_norm, job[ROW], mask, job[MASK], job[STEP], job[COUNT], high)
            if biased:
                raise_log_norms(log2_bias, job[LOG2_BIAS], job[STEP], job[COUNT], high, rise)
        cuda.syncthreads()
        part = int32(0)
        while part < slices:
            for j in range(4):
                before[j] = c[uint32(job[SLOT]), uint32(part * TILE + tx + 16 * j)]
            start = int32(0)
            while start < job[COUNT]:  # once, but for keys that pass what came before too far
                for j in range(4):
                    level[j] = before[j]
                if causal:
                    if bfloat16:
                        project_pairs(
                            kind, k, job[ROW], job[STEP], job[COUNT], weight, bias, job[HEAD], part,
                            high, queries, plain, raw, y,
                        )  # fmt: skip
                    else:
                        project(
                            kind, k, job[ROW], job[STEP], job[COUNT], weight, bias, job[HEAD], part,
                            high, plain, raw, y,
                        )  # fmt: skip
                    stop = part_of_keys(
                        biased, y, rise, start, job[COUNT], before, level, base, cut, tops
                    )
                    features(kind, biased, epsilon, raw, y, level, rise)
                    for i in range(4):
                        p = ty + 16 * i
                        for j in range(4):
                            value = y[i, j] if start <= p < stop else float32(0)
                            if bfloat16:
                                y[i, j] = value
                            else:
                                keys[p * STRIDE + tx + 16 * j] = value
                    if bfloat16:
                        put_rows(y, keys)
                if ty == 0:
                    for j in range(4):
                        f = tx + 16 * j
                        base[f], scale[f] = level[j], power(before[j] - level[j])
                if bfloat16:
                    project_pairs(
                        kind, q, job[Q_ROW], job[STEP], job[COUNT], weight, q_bias, job[HEAD], part,
                        high_q, queries, plain, raw, y,
                    )  # fmt: skip
                else:
                    project(
                        kind, q, job[Q_ROW], job[STEP], job[COUNT], weight, q_bias, job[HEAD], part,
                        high_q, plain, raw, y,
                    )  # fmt: skip
                for j in range(4):
                    level[j] = base[tx + 16 * j]
                for i in range(4):
                    p = ty + 16 * i
                    peak, by = int32(0), float32(1)
                    if divide:
                        for j in range(4):
                            own = int32(exponent(y[i, j]) + level[j])
                            peak = own if j == 0 else max(peak, own)
                        peak = max(top[p], highest_across(peak))
                        if causal and p < start:  # it sees none of these keys
                            peak = top[p]
                        by = power(top[p] - peak)
                    for j in range(4):
                        num[i, j] *= by
                        scores[i, j] *= by
                        n = raised(moved, y[i, j], top, p) + level[j] - peak
                        value = exp2(y[i, j], n)
                        y[i, j] = value if y[i, j] == y[i, j] else y[i, j]
                    cuda.syncwarp()  # all have read top; and rows in turn need fewer registers
                    if divide and tx == 0:
                        top[p], den[p] = peak, den[p] * by
                if kind != POSITIVE:
                    for i in range(4):
                        for j in range(4):
                            y[i, j] *= factor(kind, epsilon, signed(raw, i, j))
                for i in range(4):
                    p, part_of_row = ty + 16 * i, float32(0)
                    if kind != POSITIVE:
                        cuda.syncwarp()  # and here, where factors need some
                    for j in range(4):
                        f = tx + 16 * j
                        if causal and p < start:
                            y[i, j] = float32(0)
                        if not bfloat16:
                            queries[p * STRIDE + f] = y[i, j]
                        if divide and start == 0:
                            part_of_row += (
                                y[i, j] * z[uint32(job[SLOT]), uint32(part * TILE + f)] * scale[f]
                            )
                    if divide:
                        part_of_row = total_across(part_of_row)
                        if tx == 0:
                            den[p] += part_of_row
                if bfloat16:
                    put_rows(y, queries)
                cuda.syncthreads()
                if causal:
                    if bfloat16:
                        multiply_pairs(queries, keys, uint32(WORDS), scores)
                    else:
                        multiply_rows(queries, keys, scores)
                # counters of 64 bits would take two registers each
                for half in range(
                    int32(0), int32(TILE if start == 0 else 0), int32(TILE if bfloat16 else 32)
                ):
                    if bfloat16:
                        put_state(s, job[SLOT], part * TILE, column, scale, plain)
                    else:
                        for n in range(2):
                            r, x = (tid >> 4) + 16 * n, 4 * tx
                            by, to = scale[half + r], uint32((r * TILE + x) & EVEN)
                            f = part * TILE + half + r
                            row = four(s, job[SLOT] * s.shape[1] + f, column + x)
                            for u in range(4):
                                plain[to + u] = row[u] * by
                    cuda.syncthreads()
                    if bfloat16:
                        multiply_pairs(queries, plain, uint32(WORDS), num)
                    else:
                        multiply(queries, half, plain, 32, num)
                    cuda.syncthreads()
                for j in range(4):
                    before[j] = int32(NOTHING)
                start = cut[0] if causal else job[COUNT]
                cuda.syncthreads()
            part = int32(part + 1)
        if causal:
            for i in range(4):
                p, part_of_row = ty + 16 * i, float32(0)
                for j in range(4):
                    value = scores[i, j] if tx + 16 * j <= p else float32(0)
                    part_of_row += value
                    if bfloat16:
                        scores[i, j] = value
                    else:
                        queries[p * STRIDE + tx + 16 * j] = value
                if divide:
                    part_of_row = total_across(part_of_row)
                    if tx == 0:
                        den[p] += part_of_row
            if bfloat16:
                put_rows(scores, queries)
            for half in range(0, TILE, TILE if bfloat16 else 32):
                if bfloat16:
                    clean = put_value_pairs(
                        v, job[V_ROW], job[STEP], job[COUNT], mask, job[MASK], column, plain
                    )
                else:
                    clean = put_values(
                        v,
                        job[V_ROW],
                        job[STEP],
                        job[COUNT],
                        mask,
                        job[MASK],
                        half,
                        32,
                        column,
                        plain,
                    )
                if not clean:
                    cuda.atomic.min(cut, 0, -1)
                cuda.syncthreads()
                # zero times infinity must not reach the rows before it
                if cut[0] >= 0:
                    if bfloat16:
                        multiply_pairs(queries, plain, uint32(WORDS), num)
                    else:
                        multiply(queries, half, plain, 32, num)
                elif bfloat16:
                    multiply_pairs_seen(queries, plain, num)
                else:
                    multiply_seen(queries, half, plain, 32, num)
                cuda.syncthreads()
        for i in range(4):
            p = ty + 16 * i
            by = float32(1)
            if divide:
                by = den[p]
                if dens.size > 0 and tx == 0 and column == 0 and p < job[COUNT]:
                    row = job[OUT_ROW] + job[STEP] * p
                    dens[row], tops_out[row] = by, top[p]
                if by != float32(0):  # it vanishes only where there is no key at all
                    by = float32(1) / by
            for j in range(4):
                value = num[i, j] * by
                x = tx + 16 * j if bfloat16 else 4 * tx + j
                queries[p * STRIDE + x] = value if high_q[p] != float32(MASKED) else float32(0)
        cuda.syncthreads()
        i, x = uint32(tid >> 6), uint32(column + (tid & 63))
        while x < out.shape[1] and i < job[COUNT]:
            row = uint32(job[OUT_ROW] + job[STEP] * i)
            out[row, x] = rounded(queries[uint32(i * STRIDE + (tid & 63))], out)
            i = uint32(i + 4)

    if causal and kind != POSITIVE:  # with the factors of their features they need more registers
        read.resident = 1  # type: ignore[attr-defined]  # for code.bounds
    return read
