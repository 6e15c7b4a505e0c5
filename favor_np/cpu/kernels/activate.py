"""Features from projections, relative to running maxima that are integer powers of two.

Projections of keys lie token-major (C, F), those of queries feature-major (F, C): either way the
maximum runs along vectors.  ``exp2`` adds the maximum to the exponent, so moving it is exact.
"""

from __future__ import annotations

from favor_np.cpu.kernels.bfloat16 import pair_along
from favor_np.cpu.kernels.jit import EXACT, jit
from favor_np.cpu.kernels.simd import (
    exp2,
    exp2_short,
    fma,
    highest,
    load,
    maximum,
    nearest,
    splat,
    store,
)
from favor_np.cpu.kernels.state import raise_state
from favor_np.cpu.processor import VECTOR_BYTES
from favor_np.numerics import ELU, LOG2E, POSITIVE

#: log2 head-room over the running maxima before they are moved.
RAISE_KEYS, RAISE_QUERIES = 16, 40


@jit(fastmath=EXACT)
def log_feature(par, y):
    """log2 of the exponential part of a feature map at the projection y."""
    zero = splat(y, 0)
    if par.kind == POSITIVE:
        return y
    if par.kind == ELU:
        return maximum((y - maximum(y, zero)) * splat(y, LOG2E), splat(y, -par.far))
    return zero


@jit(fastmath=EXACT)
def factor(par, y):
    """The factor beside a map's exponential: elu(y) + 1 = e**min(y, 0) (1 + y+)."""
    if par.kind == POSITIVE:
        return splat(y, 1)
    if par.kind == ELU:
        return splat(y, 1) + maximum(y, splat(y, 0))
    return splat(y, par.kernel_epsilon) + maximum(y, splat(y, 0))


@jit(fastmath=EXACT)
def activate_keys(
    par, sign, rows, raw, log_norm, bias_exponent, bias, b, c, slot, r0, target, share, sums
):
    """Projections raw (C, F) to key features (C, F) and their sums; the largest log2-feature.

    Relative to c; the log2-features of each key are raised by an integer, its bias exponent, and it
    has its share in the sums, 1 as a rule.
    """
    lanes = VECTOR_BYTES // raw.itemsize
    worst = splat(c, 0)
    turn = splat(raw, sign)
    for f in range(0, raw.shape[1], lanes):
        shift = load(c, slot, r0 + f)
        beta, total = load(bias, b, f), splat(raw, 0)
        if par.kind == POSITIVE:
            for i in range(rows):
                y = fma(turn, load(raw, i, f), beta) - splat(raw, log_norm[i])
                n = nearest(y) + splat(c, bias_exponent[i]) - shift
                worst = maximum(worst, n)
                value = exp2(y, n)
                store(target, i, f, value)
                total = fma(value, splat(raw, share[i]), total)
        else:
            for i in range(rows):
                x = load(raw, i, f)
                y = log_feature(par, x) - splat(raw, log_norm[i])
                n = nearest(y) + splat(c, bias_exponent[i]) - shift
                worst = maximum(worst, n)
                value = exp2(y, n) * factor(par, x)
                store(target, i, f, value)
                total = fma(value, splat(raw, share[i]), total)
        store(sums, 0, r0 + f, total)
    return highest(worst)


@jit(fastmath=EXACT)
def raise_keys(
    par,
    rows,
    count,
    keys,
    first,
    last,
    log_norm,
    bias_exponent,
    bias,
    w,
    c,
    s,
    z,
    slot,
    excess,
    scale,
):
    """Raise c of some blocks to the largest log2-feature of the coming keys, rescaling the state.

    Returns how many keys come.  They stay together while they pass the state and the first key
    among them by at most par.max_rise: beyond it the rows before the tall key would lose theirs to
    underflow.  Which key is tall depends on the keys before it alone, so cutting there keeps
    causality exact.  The cut has to be that of all blocks: if these are only some, and there is
    one, nothing is raised.
    """
    lanes = VECTOR_BYTES // z.itemsize
    width = keys.shape[2]
    blocks = keys.shape[0] // par.signs
    for i in range(rows):
        store(excess, i, 0, splat(c, 0))
    for side in range(par.signs):
        turn = splat(z, 1 - 2 * side)
        for b in range(first, last):
            raw = keys[b * par.signs]
            for f in range(0, width, lanes):
                r = (side * blocks + b) * width + f
                beta = load(bias, w + b, f)
                y = fma(turn, load(raw, 0, f), beta)
                y = log_feature(par, y) - splat(z, log_norm[0])
                base = maximum(load(c, slot, r), nearest(y) + splat(c, bias_exponent[0]))
                for i in range(rows):
                    y = fma(turn, load(raw, i, f), beta)
                    y = log_feature(par, y) - splat(z, log_norm[i])
                    more = nearest(y) + splat(c, bias_exponent[i]) - base
                    store(excess, i, 0, maximum(load(excess, i, 0), more))
    accepted = count
    for i in range(1, count):
        if highest(load(excess, i, 0)) > par.max_rise:
            accepted = i
            break
    if accepted < count and last - first < blocks:
        return accepted
    for side in range(par.signs):
        turn = splat(z, 1 - 2 * side)
        for b in range(first, last):
            raw = keys[b * par.signs]
            for f in range(0, width, lanes):
                r = (side * blocks + b) * width + f
                beta = load(bias, w + b, f)
                old = load(c, slot, r)
                top = old
                for i in range(accepted):
                    y = fma(turn, load(raw, i, f), beta)
                    y = log_feature(par, y) - splat(z, log_norm[i])
                    top = maximum(top, nearest(y) + splat(c, bias_exponent[i]))
                raise_state(old, top, s, z, slot, keys.shape[0] * width, r, scale)
                store(c, slot, r, top)
    return accepted


@jit()
def activate_block(par, rows, keys, b, t, bias, w, c, slot):
    """Features of a block of keys, of both signs, in place; the largest log2-feature."""
    width, over = keys.shape[2], 0
    for side in range(par.signs - 1, -1, -1):
        r0 = (side * (keys.shape[0] // par.signs) + b) * width
        reach = activate_keys(
            par,
            1 - 2 * side,
            rows,
            keys[b * par.signs],
            t.log_norm,
            t.bias_exponent,
            bias,
            w + b,
            c,
            slot,
            r0,
            keys[b * par.signs + side],
            t.share,
            t.sums,
        )
        over = max(over, reach)
    return over


@jit(fastmath=EXACT)
def activate_queries(par, sign, cols, raw, features, c, z, slot, r0, top, target, part):
    """Projections raw (F, C) to query features relative to 2**(top - c), and part = z . phi_q.

    Returns how far the largest log2-feature passes top.
    """
    lanes = VECTOR_BYTES // raw.itemsize
    turn = splat(raw, sign)
    worst = splat(c, 0)
    for i in range(0, cols, lanes):
        level, total = load(top, 0, i), splat(raw, 0)
        if par.kind == POSITIVE:
            for r in range(features):
                y = turn * load(raw, r, i)
                n = nearest(y) + (splat(c, c[slot, r0 + r]) - level)
                worst = maximum(worst, n)
                value = exp2(y, n)
                store(target, r, i, value)
                total = fma(value, splat(raw, z[slot, r0 + r]), total)
        else:
            for r in range(features):
                x = load(raw, r, i)
                y = log_feature(par, x)
                n = nearest(y) + (splat(c, c[slot, r0 + r]) - level)
                worst = maximum(worst, n)
                value = exp2(y, n) * factor(par, x)
                store(target, r, i, value)
                total = fma(value, splat(raw, z[slot, r0 + r]), total)
        store(part, 0, i, total)
    for r in range(features, target.shape[0]):
        target[r] = 0
    return highest(worst)


@jit(fastmath=EXACT)
def measure_queries(par, sign, cols, raw, features, c, slot, r0, top):
    """top = the largest log2-feature of each query in this tile."""
    lanes = VECTOR_BYTES // raw.itemsize
    turn = splat(raw, sign)
    for i in range(0, cols, lanes):
        level = splat(c, c[slot, r0]) + nearest(log_feature(par, turn * load(raw, 0, i)))
        for r in range(1, features):
            y = log_feature(par, turn * load(raw, r, i))
            level = maximum(level, nearest(y) + splat(c, c[slot, r0 + r]))
        store(top, 0, i, level)


@jit()
def rescale_queries(new, top, cols, rows, den, num, scores):
    """Raise top to new where that is higher, rescaling what was summed under the old one."""
    for i in range(cols):
        if new[0, i] > top[0, i]:
            by = 2.0 ** max(float(top[0, i] - new[0, i]), -1000.0)
            top[0, i] = new[0, i]
            den[0, i] *= by
            for x in range(num.shape[1]):
                num[i, x] *= by
            for j in range(rows):
                scores[j, i] *= by


@jit(fastmath=EXACT)
def turned(sign, raw, i, f):
    """A vector of projections, or with a negative sign of their opposites."""
    if sign > 0:  # the compiler makes a loop of its own for each
        return load(raw, i, f)
    return splat(raw, 0) - load(raw, i, f)


@jit(fastmath=EXACT)
def activate_pairs(par, sign, raw, cols, c, z, top, target, part):
    """Projections raw (C, F) of queries to pairs of their features, and z . phi_q by lanes.

    As `activate_queries`, but in bfloat16 queries lie like keys: so their features are left factors
    as they come, where a transposition would take as long as they do.
    """
    lanes = VECTOR_BYTES // raw.itemsize
    worst = splat(c, 0)
    for i in range(raw.shape[0]):
        level, total = splat(c, top[i]), splat(raw, 0)
        for f in range(0, cols, 2 * lanes):
            x, x2 = turned(sign, raw, i, f), turned(sign, raw, i, f + lanes)
            y, y2 = log_feature(par, x), log_feature(par, x2)
            n = nearest(y) + (load(c, 0, f) - level)
            n2 = nearest(y2) + (load(c, 0, f + lanes) - level)
            worst = maximum(worst, maximum(n, n2))
            value = exp2_short(y, n) * factor(par, x)
            value2 = exp2_short(y2, n2) * factor(par, x2)
            total = fma(value, load(z, 0, f), fma(value2, load(z, 0, f + lanes), total))
            store(target, i, f // 2, pair_along(value, value2))
        store(part, i, 0, total)
    return highest(worst)


@jit(fastmath=EXACT)
def measure_pairs(par, sign, raw, cols, c, top):
    """top = the largest log2-feature of each query in this tile."""
    lanes = VECTOR_BYTES // raw.itemsize
    for i in range(raw.shape[0]):
        level = splat(c, -(2**29))
        for f in range(0, cols, lanes):
            y = log_feature(par, turned(sign, raw, i, f))
            level = maximum(level, nearest(y) + load(c, 0, f))
        top[i] = highest(level)


@jit()
def rescale_rows(new, top, rows):
    """Rescale what was summed under top where new is higher."""
    for i in range(top.size):
        if new[i] > top[i]:
            by = 2.0 ** max(float(top[i] - new[i]), -1000.0)
            for x in range(rows.shape[1]):
                rows[i, x] *= by


@jit()
def strip_features(par, sign, raw, cols, c, z, first, top, higher, sums, num, scores, target, part):
    """Features of a strip of queries, in pairs; raises top, and the sums under it, as needed."""
    if first:
        measure_pairs(par, sign, raw, cols, c, top)
    if activate_pairs(par, sign, raw, cols, c, z, top, target, part) > RAISE_QUERIES:
        measure_pairs(par, sign, raw, cols, c, higher)
        rescale_rows(higher, top, sums)
        rescale_rows(higher, top, num)
        rescale_rows(higher, top, scores)
        for i in range(top.size):
            top[i] = max(top[i], higher[i])
        activate_pairs(par, sign, raw, cols, c, z, top, target, part)
    for i in range(top.size):
        store(sums, i, 0, load(sums, i, 0) + load(part, i, 0))
