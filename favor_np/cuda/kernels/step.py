"""One token a state: fold its key and value, and read with its queries, in one launch.

A block has a state to itself.  Every feature of it depends on its own exponent and the key alone,
so a single pass over the weights folds the key; the queries that share the state follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from numba import cuda, float32, int32, uint32

from favor_np.cuda.kernels.favor import FRACTION
from favor_np.cuda.kernels.pack import total_of_eight, total_of_warp
from favor_np.cuda.kernels.storage import number, rounded
from favor_np.cuda.kernels.tiles import (
    FAR,
    LOWEST,
    MASKED,
    NOTHING,
    TILE,
    device,
    exp2,
    exponent,
    factor,
    feature,
    log_feature,
    power,
)
from favor_np.numerics import POSITIVE

#: Columns of the table: where a token's arrays begin, its head, and its state.
K_ROW, V_ROW, MASK_ROW, BIAS_ROW, HEAD, SLOT = range(6)
#: Features and columns of a row at most, as shared memory has room for.
FEATURES, COLUMNS = 2048, 512


@device
def total_of_block(x, warps):
    """The sum of x over the block; `warps` has room for a number of each warp."""
    tid = cuda.threadIdx.x & 255
    x = total_of_warp(x)
    cuda.syncthreads()
    if tid & 31 == 0:
        warps[tid >> 5] = x
    cuda.syncthreads()
    total = float32(0)
    for w in range(8):
        total += warps[w]
    return total


@device
def highest_of_block(x, warps):
    """The maximum of x over the block."""
    tid = cuda.threadIdx.x & 255
    for step in (1, 2, 4, 8, 16):
        x = max(x, cuda.shfl_xor_sync(0xFFFFFFFF, x, step))
    cuda.syncthreads()
    if tid & 31 == 0:
        warps[tid >> 5] = x
    cuda.syncthreads()
    high = warps[0]
    for w in range(1, 8):
        high = max(high, warps[w])
    return high


@device
def pack_row(source, line, limit, key_norm, center, linear, head, columns, row, warps):
    """Copy a row to shared memory as `pack` does, and return its log-norm."""
    tid = cuda.threadIdx.x & 255
    width = uint32(source.shape[1])
    square, gain, spoiled = float32(0), float32(1), float32(0)
    for x in range(uint32(tid), width, uint32(256)):
        value = number(source[line, x])
        square += value * value
    square = total_of_block(square, warps)
    if not square <= limit * limit:  # or not finite
        largest, rest = float32(0), float32(0)
        for x in range(uint32(tid), width, uint32(256)):
            value = number(source[line, x])
            largest = max(largest, abs(value))
            rest += value * float32(0)
        largest, spoiled = highest_of_block(largest, warps), total_of_block(rest, warps)
        square = float32(0)
        for x in range(uint32(tid), width, uint32(256)):
            value = number(source[line, x]) / largest
            square += value * value
        norm = math.sqrt(total_of_block(square, warps))
        if spoiled == float32(0):
            gain = limit / largest / norm
    total = float32(0)
    for x in range(uint32(tid), columns, uint32(256)):
        value = float32(0)
        if x < width and spoiled == float32(0):
            value = number(source[line, x]) * gain
            if center.size > 0:
                value -= center[head, x]
            if linear.size > 0:
                total -= linear[head, x] * value
            total += key_norm * value * value
        row[x] = value
    total = total_of_block(total, warps)
    return max(min(total, float32(FAR)), float32(-FAR)) + spoiled


@device
def project_row(row, weight, line, columns):
    """The projection of a row on one of the weights, by the eight threads that ask for it."""
    total = float32(0)
    for x in range(uint32(cuda.threadIdx.x & 7), columns, uint32(8)):
        total += row[x] * weight[line, x]
    return total_of_eight(total)


@device
def feature_of(line, sign, signs):
    """The feature of a line of the weights: with signs, slices have half of them, twice."""
    i = int32(line)  # signed and unsigned integers together would make a float64
    return uint32(i if signs == 1 else (i >> 5) * TILE + sign * 32 + (i & 31))


def make_step(kind: int, signs: int) -> Callable[..., Any]:
    """Return the kernel of a token."""

    def step(
        q,
        k,
        v,
        mask,
        log2_bias,
        weight,
        q_bias,
        bias,
        epsilon,
        limit,
        key_norm,
        q_center,
        k_center,
        linear,
        no_linear,
        table,
        q_rows,
        out_rows,
        c,
        s,
        z,
        out,
    ):
        row = cuda.shared.array(COLUMNS, float32)
        phi = cuda.shared.array(FEATURES, float32)
        keep = cuda.shared.array(FEATURES, float32)
        read = cuda.shared.array(FEATURES, float32)
        gains = cuda.shared.array(FEATURES, float32)
        parts = cuda.shared.array(256, float32)
        warps = cuda.shared.array(8, float32)
        tops = cuda.shared.array(8, int32)
        tid = cuda.threadIdx.x & 255
        job = cuda.blockIdx.x
        head, slot = table[job, HEAD], uint32(table[job, SLOT])
        columns, features = uint32(weight.shape[1]), uint32(c.shape[1])
        lines = uint32(features // signs)
        first = uint32(head * lines)
        log_norm = pack_row(
            k,
            uint32(table[job, K_ROW]),
            limit,
            key_norm,
            k_center,
            linear,
            head,
            columns,
            row,
            warps,
        )
        rise, seen = int32(0), True
        if mask.size > 0 and mask[table[job, MASK_ROW]] == 0:
            log_norm, seen = float32(MASKED), False
        if log2_bias.size > 0 and log_norm < float32(MASKED):
            bias_exponent = log2_bias[table[job, BIAS_ROW]]
            rise = int32(bias_exponent >> 32)
            log_norm -= float32(uint32(bias_exponent & 0xFFFFFFFF)) * float32(FRACTION)
        cuda.syncthreads()
        for i in range(uint32(tid >> 3), lines, uint32(32)):
            raw = project_row(row, weight, uint32(first + i), columns)
            if tid & 7 < signs:
                sign = tid & 7
                f = feature_of(i, sign, signs)
                x = -raw if sign == 1 else raw
                y = log_feature(kind, x) + bias[head, f] - log_norm
                n, before = exponent(y), c[slot, f]
                n = int32(n + rise) if n > LOWEST else int32(LOWEST)
                level = max(before, n)
                value, by = feature(kind, epsilon, x, y, n - level), power(before - level)
                phi[f], keep[f] = value, by
                c[slot, f] = level
                z[slot, f] = z[slot, f] * by + value
        cuda.syncthreads()
        part, at = uint32(tid >> 6), uint32(tid & 63)
        for x in range(at, uint32(s.shape[2]), uint32(TILE)):
            value = float32(0)
            if seen and x < uint32(v.shape[1]):
                value = number(v[uint32(table[job, V_ROW]), x])
            for f in range(part, features, uint32(4)):
                s[slot, f, x] = s[slot, f, x] * keep[f] + phi[f] * value
        for member in range(q_rows.shape[1]):
            log_norm = pack_row(
                q,
                uint32(q_rows[job, member]),
                limit,
                float32(0),
                q_center,
                no_linear,
                head,
                columns,
                row,
                warps,
            )
            cuda.syncthreads()
            top = int32(2 * NOTHING)
            for i in range(uint32(tid >> 3), lines, uint32(32)):
                raw = project_row(row, weight, uint32(first + i), columns)
                if tid & 7 < signs:
                    sign = tid & 7
                    f = feature_of(i, sign, signs)
                    x = -raw if sign == 1 else raw
                    y = log_feature(kind, x) + q_bias[head, f] - log_norm
                    read[f] = y
                    if kind != POSITIVE:
                        gains[f] = factor(kind, epsilon, x)
                    top = max(top, int32(exponent(y) + c[slot, f]))
            top = highest_of_block(top, tops)
            den = float32(0)
            for f in range(uint32(tid), features, uint32(256)):
                y = read[f]
                value = exp2(y, exponent(y) + c[slot, f] - top)
                if kind != POSITIVE:
                    value *= gains[f]
                value = value if y == y else y
                read[f] = value
                den += value * z[slot, f]
            den = total_of_block(den, warps)
            by = float32(1) / den if den != float32(0) else float32(1)
            for start in range(uint32(0), uint32(s.shape[2]), uint32(TILE)):
                x, num = uint32(start + at), float32(0)
                for f in range(part, features, uint32(4)):
                    num += read[f] * s[slot, f, x]
                parts[tid] = num
                cuda.syncthreads()
                if tid < TILE and x < uint32(out.shape[1]):
                    for n in range(1, 4):
                        num += parts[tid + n * TILE]
                    out[uint32(out_rows[job, member]), x] = rounded(num * by, out)
                cuda.syncthreads()

    step.resident = 1  # type: ignore[attr-defined]  # for code.bounds: it needs more registers
    return step
