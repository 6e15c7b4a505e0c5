"""Gradients: the same fold, read by the other side, as `favor_np.cpu.kernels.favor_vjp` explains.

Here the log-norms of queries are the exponents of their denominators, and what these leave divides
their vectors: so both sides have log-norms, and no row needs a maximum of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda, float32, int32, int64, uint32

from favor_np.cuda.kernels.favor import (
    COUNT,
    HEAD,
    LOG2_BIAS,
    MASK,
    OUT_ROW,
    Q_LOG2_BIAS,
    Q_MASK,
    Q_ROW,
    Q_VECTOR,
    ROW,
    SLOT,
    STEP,
    V_ROW,
    part_of_keys,
    put_log_norms,
    raise_log_norms,
)
from favor_np.cuda.kernels.pack import total_of_warp
from favor_np.cuda.kernels.storage import four, number, put_four, rounded
from favor_np.cuda.kernels.tiles import (
    EVEN,
    JOB,
    MASKED,
    NOTHING,
    PADDED,
    ROWS,
    STAGED,
    STRIDE,
    TILE,
    WARPS,
    clear,
    device,
    exp2,
    feature,
    lane,
    multiply,
    multiply_rows,
    multiply_turned,
    power,
    product,
    product_padded,
    project,
    raised,
    signed,
    take,
    total_across,
)
from favor_np.numerics import POSITIVE, RELU


def cotangents(grad, out, dens, tops, vectors, shares, log_norms, log2_bias):
    """Divide the rows of grad by the denominators.

    Sets their shares -grad . out / den, and their log-norms; or, if there are log2_bias, these.
    """
    thread = cuda.threadIdx.x & 31
    row = cuda.blockIdx.x * 8 + ((cuda.threadIdx.x & 255) >> 5)
    if row < grad.shape[0]:
        den, total = dens[row], float32(0)
        inverse = float32(1) / den if den != float32(0) else float32(0)
        for x in range(thread, grad.shape[1], 32):
            value = number(grad[row, x]) * inverse if den != float32(0) else float32(0)
            vectors[row, x] = value
            total -= value * out[row, x]
        total = total_of_warp(total)
        if thread == 0:
            shares[row] = total if den != float32(0) else float32(0)
            log_norm = float32(tops[row])
            if log2_bias.size > 0:  # which may be larger than float32 holds exactly
                log2_bias[row] = -int64(tops[row]) << 32
                log_norm = float32(0)
            # A row that is not finite has a denominator that is not.
            log_norms[row] = log_norm + den * float32(0) if den != float32(0) else float32(MASKED)


def gather(source, first, parts, target):
    """target[i] = the sum of the blocks ``parts[first[i]:first[i + 1]]`` of source."""
    block, x = cuda.blockIdx.x, cuda.blockIdx.y * 256 + (cuda.threadIdx.x & 255)
    if x < target.shape[1]:
        total = float32(0)
        for n in range(first[block], first[block + 1]):
            total += source[parts[n], x]
        target[block, x] = rounded(total, target)


@device
def share_of(share, row, there):
    """The share of a row, if it is there: 1 where there are none."""
    if there:
        return share[row] if share.size > 0 else float32(1)
    return float32(0)


@device
def slope(kind, x, y, n):
    """What the derivative of a feature has instead of it: see `feature`."""
    value = exp2(y, n)
    if kind == RELU and x <= float32(0):
        value = float32(0)
    return value if y == y else y


@device
def put_rows(rows, row, step, count, column, plain):
    """Up to 32 padded rows to half a plain tile, zeros where there are none."""
    _, ty, tx = lane()
    x = uint32(column + 4 * tx)
    for n in range(2):
        r = ty + 16 * n
        to = uint32((r * TILE + 4 * tx) & EVEN)
        if r < count and x < rows.shape[1]:
            numbers = four(rows, row + step * r, x)
            for u in range(4):
                plain[to + u] = numbers[u]
        else:
            for u in range(4):
                plain[to + u] = float32(0)


@device
def put_sums(sums, warps, out, first, count):
    """Write the sums of columns of a tile, of which each thread has a part, to numbers of out."""
    tid, ty, tx = lane()
    for j in range(sums.shape[0]):
        value = sums[j] + cuda.shfl_xor_sync(0xFFFFFFFF, sums[j], 16)
        if ty & 1 == 0:
            warps[(tid >> 5) * TILE + tx + 16 * j] = value
    cuda.syncthreads()
    if tid < count:
        total = float32(0)
        for w in range(8):
            total += warps[w * TILE + tid]
        out[uint32(first + tid)] = total


def make_pull(
    kind: int, signs: int, causal: bool, biased: bool, of_map: bool
) -> Callable[..., Any]:
    """Return the kernel of the gradient of one side: q, whose vectors are g.

    The other side is folded.  If they are `biased`, there is a gradient of the log2_bias of q, too,
    by their natural logarithms; none is wanted where its array is of size 0.

    Or the gradient `of_map`: what each block adds to that of the weights, which are multiplied by
    `rows`, the packed rows of the side, and to that of their biases.
    """
    rows_of_w, per_sign = TILE // signs, 4 // signs

    def pull(
        q,
        q_log_norm,
        q_log2_bias,
        g,
        q_share,
        q_mask,
        k,
        log_norm,
        log2_bias,
        v,
        share,
        mask,
        weight,
        q_bias,
        bias,
        epsilon,
        table,
        c,
        s,
        z,
        unit,
        key_norm,
        linear,
        rows,
        out,
        of_bias,
    ):
        keys = cuda.shared.array(PADDED, float32, alignment=16)
        pairs = cuda.shared.array(PADDED, float32, alignment=16)
        plain = cuda.shared.array(STAGED, float32, alignment=16)
        tops = cuda.shared.array(WARPS, int32)
        base = cuda.shared.array(ROWS, int32)
        cut = cuda.shared.array(1, int32)
        tid, ty, tx = lane()
        job = cuda.shared.array(JOB, int32)
        high = cuda.shared.array(ROWS, float32)
        high_q = cuda.shared.array(ROWS, float32)
        rise = cuda.shared.array(ROWS, int32)
        rise_q = cuda.shared.array(ROWS, int32)
        extra = cuda.shared.array(ROWS, float32)
        total = cuda.shared.array(ROWS, float32)
        take(table, job)
        slices = int32(c.shape[1] >> 6)
        num = cuda.local.array((4, 4), float32)
        back = cuda.local.array((4, 4), float32)
        raw = cuda.local.array((4, per_sign), float32)
        y = cuda.local.array((4, 4), float32)
        level = cuda.local.array(4, int32)
        before = cuda.local.array(4, int32)
        sums = cuda.local.array(per_sign, float32)
        clear(num)
        if tid < TILE:
            total[tid] = float32(0)
        put_log_norms(q_log_norm, job[Q_ROW], q_mask, job[Q_MASK], job[STEP], job[COUNT], high_q)
        if biased:
            raise_log_norms(q_log2_bias, job[Q_LOG2_BIAS], job[STEP], job[COUNT], high_q, rise_q)
        if tid < TILE:
            extra[tid] = share_of(q_share, job[Q_VECTOR] + job[STEP] * tid, tid < job[COUNT])
        if causal:
            put_log_norms(log_norm, job[ROW], mask, job[MASK], job[STEP], job[COUNT], high)
            if biased:
                raise_log_norms(log2_bias, job[LOG2_BIAS], job[STEP], job[COUNT], high, rise)
        cuda.syncthreads()
        if causal:
            product(
                g,
                job[Q_VECTOR],
                job[STEP],
                job[COUNT],
                v,
                job[V_ROW],
                job[STEP],
                job[COUNT],
                g.shape[1],
                plain,
                back,
            )
            for j in range(4):
                n = tx + 16 * j
                own = high[n]
                by = share_of(share, job[V_ROW] + job[STEP] * n, n < job[COUNT])
                for i in range(4):
                    p, value = ty + 16 * i, float32(0)
                    if n <= p and own != float32(MASKED):
                        value = back[i, j] + extra[p] * by
                        if own != own:
                            value = own
                    pairs[p * STRIDE + n] = value
        part = int32(0)
        while part < slices:
            for j in range(4):
                before[j] = c[uint32(job[SLOT]), uint32(part * TILE + tx + 16 * j)]
            start, stop = int32(0), job[COUNT]
            if of_map:
                clear(num)
                for j in range(per_sign):
                    sums[j] = float32(0)
            while start < job[COUNT]:
                for j in range(4):
                    level[j] = before[j]
                if causal:
                    project(
                        kind,
                        k,
                        job[ROW],
                        job[STEP],
                        job[COUNT],
                        weight,
                        bias,
                        job[HEAD],
                        part,
                        high,
                        plain,
                        raw,
                        y,
                    )
                    stop = part_of_keys(
                        biased, y, rise, start, job[COUNT], before, level, base, cut, tops
                    )
                    for i in range(4):
                        p = ty + 16 * i
                        for j in range(4):
                            n = raised(biased, y[i, j], rise, p) - level[j]
                            value = feature(kind, epsilon, signed(raw, i, j), y[i, j], n)
                            if p < start or p >= stop or value != value:
                                value = float32(0)
                            keys[(tx + 16 * j) * STRIDE + p] = value
                clear(back)
                if start == 0:
                    product_padded(
                        False,
                        g,
                        job[Q_VECTOR],
                        job[STEP],
                        job[COUNT],
                        s,
                        job[SLOT] * s.shape[1] + part * TILE,
                        TILE,
                        plain,
                        back,
                    )
                    for j in range(4):
                        by = power(before[j] - level[j])
                        weight_of = z[uint32(job[SLOT]), uint32(part * TILE + tx + 16 * j)]
                        for i in range(4):
                            back[i, j] = (back[i, j] + weight_of * extra[ty + 16 * i]) * by
                project(
                    kind,
                    q,
                    job[Q_ROW],
                    job[STEP],
                    job[COUNT],
                    weight,
                    q_bias,
                    job[HEAD],
                    part,
                    high_q,
                    plain,
                    raw,
                    y,
                )
                if causal:
                    multiply_rows(pairs, keys, back)
                cuda.syncthreads()
                for i in range(4):
                    p, part_of_row = ty + 16 * i, float32(0)
                    cuda.syncwarp()  # rows in turn need fewer registers
                    for j in range(4):
                        x, n = signed(raw, i, j), raised(biased, y[i, j], rise_q, p) + level[j]
                        value = back[i, j]
                        back[i, j] = float32(0)
                        if not causal or p >= start:
                            back[i, j] = value * slope(kind, x, y[i, j], n)
                            if of_map and high_q[p] == float32(MASKED):
                                back[i, j] = float32(0)
                            if biased and kind != POSITIVE:
                                part_of_row += value * feature(kind, epsilon, x, y[i, j], n)
                        if not biased or kind == POSITIVE:
                            part_of_row += back[i, j]
                    for j in range(per_sign):
                        value = back[i, j]
                        if of_map:
                            sums[j] += value
                        if signs == 2:
                            value -= back[i, j + per_sign]
                            if of_map:
                                sums[j] += back[i, j + per_sign]
                        keys[p * STRIDE + tx + 16 * j] = value
                    if not of_map:
                        part_of_row = total_across(part_of_row)
                        if tx == 0:
                            total[p] += part_of_row
                column = int32(cuda.blockIdx.y * TILE)
                if of_map:
                    for half in range(int32(0), int32(TILE), int32(32)):
                        row = job[Q_ROW] + job[STEP] * half
                        put_rows(rows, row, job[STEP], job[COUNT] - half, column, plain)
                        cuda.syncthreads()
                        if 4 * ty < rows_of_w:
                            multiply_turned(keys, half, plain, 32, num)
                        cuda.syncthreads()
                else:
                    half = uint32(0)
                    while half < rows_of_w:
                        cuda.syncthreads()
                        row = (job[HEAD] * slices + part) * rows_of_w + half
                        put_rows(weight, row, 1, 32, column, plain)
                        cuda.syncthreads()
                        multiply(keys, half, plain, 32, num)
                        half = uint32(half + 32)
                    cuda.syncthreads()
                for j in range(4):
                    before[j] = int32(NOTHING)
                start = stop
            if of_map:
                line = uint32((cuda.blockIdx.x * slices + part) * rows_of_w)
                put_sums(sums, plain, of_bias, line, rows_of_w if cuda.blockIdx.y == 0 else 0)
                x = uint32(cuda.blockIdx.y * TILE + 4 * tx)
                if 4 * ty < rows_of_w and x < out.shape[1]:
                    for i in range(4):
                        put_four(
                            out,
                            line + 4 * ty + i,
                            x,
                            num[i, 0],
                            num[i, 1],
                            num[i, 2],
                            num[i, 3],
                        )
                cuda.syncthreads()
            part = int32(part + 1)
        if of_map:
            return
        for i in range(4):
            p = ty + 16 * i
            row_sum, own = total[p], high_q[p]
            if biased and of_bias.size > 0 and tx == 0 and cuda.blockIdx.y == 0 and p < job[COUNT]:
                value = row_sum if own != float32(MASKED) else float32(0)
                of_bias[job[OUT_ROW] + job[STEP] * p] = value if own == own else own
            for j in range(4):
                x = cuda.blockIdx.y * TILE + 4 * tx + j
                value = float32(0)
                if p < job[COUNT] and x < out.shape[1] and own != float32(MASKED):
                    row = uint32(job[Q_ROW] + job[STEP] * p)
                    value = num[i, j] * unit - row_sum * key_norm * q[row, uint32(x)]
                    if linear.size > 0:
                        value += row_sum * linear[uint32(job[HEAD]), uint32(x)]
                    if own != own:
                        value = own
                keys[p * STRIDE + 4 * tx + j] = value
        cuda.syncthreads()
        i, x = uint32(tid >> 6), uint32(cuda.blockIdx.y * TILE + (tid & 63))
        while x < out.shape[1] and i < job[COUNT]:
            row = uint32(job[OUT_ROW] + job[STEP] * i)
            out[row, x] = rounded(keys[uint32(i * STRIDE + (tid & 63))], out)
            i = uint32(i + 4)

    if of_map or (causal and kind != POSITIVE):
        pull.resident = 1  # type: ignore[attr-defined]  # for code.bounds
    return pull
