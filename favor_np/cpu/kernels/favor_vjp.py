"""Gradients of FAVOR+ attention: the same fold and read, run over the cotangents.

With o_i = N_i / D_i and the cotangent g_i let y_i = (g_i, -g_i.o_i) / D_i and x_j = (v_j, 1). Then

    dphi_q(i) = S_i y_i     S_i = sum_j<=i phi_k(j) x_j^T      a fold of keys, read by queries
    dphi_k(j) = R_j x_j     R_j = sum_i>=j phi_q(i) y_i^T      a fold of queries, read by keys
    dv_j      = R_j^T phi_k(j)                                 backwards where that is causal

Both are one loop here: side A is folded with its vectors, side B reads with its own, and e = phi_B
* (state . vectors of B) goes back through the projection.  The divisor 1 / D_i is the log-norm of a
query: so R has running maxima as S has, and nothing overflows whatever the norms are. Nothing is
rebuilt by subtraction, and no feature is kept.
"""

from __future__ import annotations

import math

from favor_np.cpu.kernels.activate import factor, log_feature
from favor_np.cpu.kernels.block import room_of
from favor_np.cpu.kernels.chunk import fold_chunk, map_keys, own_values, piece
from favor_np.cpu.kernels.counters import claim, enter, leave, report
from favor_np.cpu.kernels.favor import parameters
from favor_np.cpu.kernels.floats import IEEE, flush_beside, ordinary_sums, set_float_mode
from favor_np.cpu.kernels.gemm import gemm, gemm_t
from favor_np.cpu.kernels.jit import EXACT, jit
from favor_np.cpu.kernels.pack import (
    across,
    log_norms,
    pack,
    pack_keys,
    pack_queries,
    pack_values,
)
from favor_np.cpu.kernels.products import (
    load_tile_config,
    project_queries,
    release_tiles,
    turn_queries,
)
from favor_np.cpu.kernels.simd import (
    exp2,
    fma,
    load,
    maximum,
    nearest,
    splat,
    store,
    sum_lanes,
)
from favor_np.cpu.kernels.state import begin, fold_tail
from favor_np.cpu.processor import VECTOR_BYTES
from favor_np.cpu.records import OVERFLOW
from favor_np.cpu.tiles import CHUNK, PAD
from favor_np.jobs import (
    BIAS_ROW,
    BLOCK,
    GRAD_ROW,
    K_ROW,
    KEYS,
    MASK_ROW,
    NUMBER,
    OUT_ROW,
    Q_ROW,
    QUERIES,
    ROWS,
    SIDE,
    V_ROW,
)
from favor_np.numerics import LOG2E, POSITIVE, RELU


@jit()
def dot(a, i, b, j, width):
    """Return a[i] . b[j]."""
    total = a.dtype.type(0)
    for y in range(width):
        total += a[i, y] * b[j, y]
    return total


@jit()
def map_keys_side(par, call, job, at, count, c, s, z, slot, t):
    """Keys from position at on as side A; how many were taken, and if all are finite."""
    mask, values, share, w = call.mask, t.values, t.share, job[BLOCK]
    m_row = job[MASK_ROW] + at if job[MASK_ROW] >= 0 else -1
    bias_row = job[BIAS_ROW] + at if job[BIAS_ROW] >= 0 else -1
    pack_keys(par, call, job[K_ROW] + at, 1, count, m_row, bias_row, w, t)
    clean = pack_values(call.v, job[V_ROW] + at, 1, count, values, mask, m_row)
    for i in range(count):
        if t.square[i] == math.inf and (m_row < 0 or mask[m_row + i]):
            # With a feature of zero NaN reaches nobody who must not see it.
            values[i], share[i], clean = math.nan, math.nan, False
    taken = map_keys(
        par,
        count,
        call.k.shape[1],
        call.key,
        call.key_parts,
        call.bias,
        w,
        c,
        s,
        z,
        slot,
        t.keys,
        t,
    )
    return taken, clean


@jit()
def map_queries_side(par, call, job, at, step, count, c, s, z, slot, t):
    """Queries at positions at, at + step, ... as side A, with their cotangents over D."""
    q_row, out_row, width = job[Q_ROW] + at, job[OUT_ROW] + at, call.grad.shape[1]
    weights, tops, values = call.weights, call.tops, t.values
    log_norm, bias_exponent, share = t.log_norm, t.bias_exponent, t.share
    pack_queries(par, call, q_row, step, 0, count, job[BLOCK], t)
    clean = pack_values(call.grad, out_row, step, count, values, call.mask, -1)
    for i in range(CHUNK):
        log_norm[i], bias_exponent[i], share[i] = math.inf, 0, 0
    for i in range(count):
        row = out_row + i * step
        weight_of = weights[row]
        if weight_of == 0:  # it sees no key
            values[i] = 0
        elif t.square[i] < math.inf and weight_of > 0:
            log_norm[i], bias_exponent[i] = 0, -tops[row]
            inverse = 1 / weight_of
            share[i] = -dot(values, i, call.out, row, width) * inverse
            for y in range(width):
                values[i, y] *= inverse
        else:
            values[i], share[i] = math.nan, math.nan
        clean = clean and math.isfinite(share[i])
    taken = map_keys(
        par,
        count,
        call.q.shape[1],
        call.query,
        call.query_rows_parts,
        call.none,
        job[BLOCK],
        c,
        s,
        z,
        slot,
        t.keys,
        t,
    )
    return taken, clean


@jit(fastmath=EXACT)
def measure_rows(par, cols, raws, features, bias, w, width, c, slot, top):
    """top = the largest log2-feature of each row of side B, over c."""
    lanes = VECTOR_BYTES // raws.itemsize
    half = raws.shape[0]
    for i in range(0, cols, lanes):
        level = splat(c, -(2**31))
        for side in range(par.signs):
            turn = splat(raws, 1 - 2 * side)
            for r in range(features):
                y = fma(turn, load(raws, r, i), splat(raws, bias[w + r // width, r % width]))
                y = log_feature(par, y)
                level = maximum(level, nearest(y) + splat(c, c[slot, side * half + r]))
        store(top, 0, i, level)


@jit(fastmath=EXACT)
def activate_rows(par, sign, cols, raws, first, features, bias, b, c, slot, r0, t):
    """Features of side B relative to 2**(top - c), and the factors of their derivatives."""
    lanes = VECTOR_BYTES // raws.itemsize
    turn, zero, one = splat(raws, sign), splat(raws, 0), splat(raws, 1)
    for i in range(0, cols, lanes):
        level = load(t.top, 0, i)
        for r in range(features):
            x = load(raws, first + r, i)
            y = log_feature(par, fma(turn, x, splat(raws, bias[b, r])))
            value = exp2(y, nearest(y) + (splat(c, c[slot, r0 + r]) - level))
            if par.kind == POSITIVE:
                store(t.phi, r, i, value)
            else:
                store(t.phi, r, i, value * factor(par, x))
                if par.kind == RELU:  # 1 where x > 0
                    value = value * (zero - maximum(zero - x * splat(raws, 1e30), zero - one))
                    value = maximum(value, zero)
                store(t.slope, r, i, value)
    for r in range(features, t.phi.shape[0]):
        t.phi[r] = 0


@jit(fastmath=EXACT)
def feature_cotangents(par, side, cols, features, z, slot, r0, bias, row, first, t):
    """``error (-)= slope * (back + z extra) * factor``, its sums and, in total, those of phi."""
    lanes = VECTOR_BYTES // t.back.itemsize
    slope = t.phi if par.kind == POSITIVE else t.slope
    for i in range(0, cols, lanes):
        extra, by, total = load(t.extra, 0, i), load(t.factor, 0, i), load(t.total, 0, i)
        for r in range(features):
            back = fma(splat(t.extra, z[slot, r0 + r]), extra, load(t.back, r, i))
            e = load(slope, r, i) * back * by
            total = total + (e if par.kind == POSITIVE else load(t.phi, r, i) * back * by)
            if bias.shape[0] > 0:
                bias[row, first + r] += sum_lanes(e)
            if side == 0:
                store(t.error, r, i, e)
            else:
                store(t.error, r, i, load(t.error, r, i) - e)
        store(t.total, 0, i, total)
    if side == 0:
        for r in range(features, t.error.shape[0]):
            t.error[r] = 0


@jit()
def pack_readers(par, call, job, of_keys, at, step, count, t):
    """Pack the reading side B: its rows, their values or cotangents, and what goes with z."""
    weights, other, extra, total = call.weights, t.other, t.extra, t.total
    if of_keys:
        mask_row = job[MASK_ROW] + at if job[MASK_ROW] >= 0 else -1
        pack(call.k, job[K_ROW] + at, step, count, t.rows, par.limit, t.square)
        log_norms(par, call, job[BLOCK], count, t)
        pack_values(call.v, job[V_ROW] + at, step, count, other, call.mask, mask_row)
        extra[:] = 1
    else:
        pack_queries(par, call, job[Q_ROW] + at, step, 0, count, job[BLOCK], t)
        pack_values(call.grad, job[OUT_ROW] + at, step, count, other, call.mask, -1)
        extra[:] = 0
        for i in range(count):
            row = job[OUT_ROW] + at + i * step
            if weights[row] == 0:  # it sees no key, whatever its cotangent is
                other[i] = 0
            extra[0, i] = -dot(other, i, call.out, row, call.grad.shape[1])
    turn_queries(t.parts, t)
    across(other, t.turned)
    total[:] = 0


@jit()
def reader_scales(par, call, job, of_keys, at, step, count, t):
    """``2**(top - log-norm)`` of each row of side B, by which its results are multiplied."""
    weights, tops, mask, factors = call.weights, call.tops, call.mask, t.factor
    factors[:] = 0
    for i in range(count):
        by = 0.0
        if of_keys:
            position = at + i * step
            if job[MASK_ROW] < 0 or mask[job[MASK_ROW] + position]:
                raised = call.log2_bias[job[BIAS_ROW] + position] if job[BIAS_ROW] >= 0 else 0.0
                by = 2.0 ** (t.top[0, i] - (t.square[i] - raised))
        else:
            row = job[OUT_ROW] + at + i * step
            if weights[row] != 0:
                by = 2.0 ** float(t.top[0, i] - tops[row]) / weights[row]
        if t.square[i] == math.inf and by != 0:
            by = math.nan
        factors[0, i] = by


@jit()
def pair_products(count, cols, rows, d, t):
    """``products[j, i] = vector of A j . vector of B i`` for j <= i, else zero."""
    products, share, extra = t.products, t.share, t.extra
    lanes = VECTOR_BYTES // products.itemsize
    for i in range(0, cols, 2 * lanes):
        end = min(i + 2 * lanes, cols)
        gemm(t.values, t.turned, products, 0, min(-(-end // 8) * 8, rows), i, end, 0, d, False)
    for j in range(rows):
        for i in range(min(j, cols)):
            products[j, i] = 0
        for i in range(j, cols):
            products[j, i] += share[j] * extra[0, i]


@jit()
def pull_chunk(par, call, job, of_keys, at, step, count, clean, c, s, z, slot, t):
    """Gradients of the rows of side B: of queries, or of keys and values."""
    lanes = VECTOR_BYTES // t.rows.itemsize
    cols = -(-count // lanes) * lanes
    rows = -(-count // 8) * 8
    d, dv, vcols, dcols = call.q.shape[1], call.v.shape[1], t.num.shape[1], t.grad.shape[1]
    w, features_count = job[BLOCK], job[ROWS]
    blocks, width = t.keys.shape[0] // par.signs, t.keys.shape[2]
    half = blocks * width
    set_float_mode(IEEE)
    pack_readers(par, call, job, of_keys, at, step, count, t)
    flush_beside(t.other, count, c, ordinary_sums(s, slot, c.shape[1] - PAD))
    weight, bias = (call.key, call.bias) if of_keys else (call.query, call.none)
    split_weight = call.key_rows_parts if of_keys else call.query_parts
    rows_of_weight = call.key_rows if of_keys else call.query_rows
    for b in range(blocks):
        raws = t.raws[b * width : (b + 1) * width]
        project_queries(t.parts, t, weight, split_weight, w + b, raws, cols, d)
    measure_rows(par, cols, t.raws, features_count, bias, w, width, c, slot, t.top)
    reader_scales(par, call, job, of_keys, at, step, count, t)
    if par.causal:
        pair_products(count, cols, rows, dv, t)
    for b in range(blocks):
        features = min(width, features_count - b * width)
        for side in range(par.signs):
            r0, tile = side * half + b * width, t.keys[b * par.signs + side]
            sums = s[slot, r0 : r0 + width]
            activate_rows(
                par, 1 - 2 * side, cols, t.raws, b * width, features, bias, w + b, c, slot, r0, t
            )
            gemm(sums, t.turned, t.back, 0, width, 0, cols, 0, dv, False)
            first = b + side == 0
            for i in range(0, cols if par.causal else 0, 2 * lanes):
                end = min(i + 2 * lanes, cols)
                last = min(-(-end // 8) * 8, rows)
                gemm_t(tile, t.products, t.back, 0, width, i, end, 0, last, True)
                if of_keys:
                    gemm(tile, t.phi, t.scores, 0, last, i, end, 0, width, not first)
            if of_keys:
                gemm_t(t.phi, sums, t.num, 0, rows, 0, vcols, 0, width, not first)
            feature_cotangents(
                par, side, cols, features, z, slot, r0, call.bias_sums, job[NUMBER], b * width, t
            )
        if call.projection.size > 0:
            add_projection(call.projection[job[NUMBER]], b * width, width, count, t)
        else:
            gemm_t(t.error, rows_of_weight[w + b], t.grad, 0, rows, 0, dcols, 0, width, b > 0)
    if call.projection.size > 0:
        return
    if of_keys:
        if par.causal:
            scores = t.scores
            for j in range(rows):
                scores[j, : min(j, cols)] = 0
            own_values(scores, t.values, clean, count, t.num, t.spare)
        if par.factored:  # the gradient of the log-norms
            gemm(t.rows, call.hessian[w], t.stretched, 0, rows, 0, dcols, 0, d, False)
        spoiled = write_keys(par, call, job, at, step, count, w, t)
    else:
        spoiled = write_queries(call, job[OUT_ROW] + at, step, count, t)
    if spoiled > 0:
        report(call.control, OVERFLOW)


@jit()
def add_projection(sums, first, width, count, t):
    """Add what a block of weights is moved by, from its row `first` on."""
    dcols = t.grad.shape[1]
    gemm(t.error, t.rows, t.stretched, 0, width, 0, dcols, 0, count, False)
    for r in range(width):
        for y in range(dcols):
            sums[first + r, y] += t.stretched[r, y]


@jit()
def write_keys(par, call, job, at, step, count, w, t):
    """Write the rows of dk, dv and dbias; how many numbers are not finite.

    A factor of zero is no reason to write zero: it may be 0 * NaN.
    """
    dk, dv, dbias, mask = call.dk, call.dv, call.dbias, call.mask
    linear, stretched = call.linear, t.stretched
    norm, spoiled = 2 * par.key_norm / LOG2E, 0
    for i in range(count):
        position = at + i * step
        by, row = t.factor[0, i], job[GRAD_ROW] + position
        seen = job[MASK_ROW] < 0 or mask[job[MASK_ROW] + position]
        for y in range(dk.shape[1]):
            slope = stretched[i, y] if par.factored else norm * t.rows[i, y]
            if par.affine:
                slope -= linear[w, y]
            value = dk.dtype.type(t.grad[i, y] - t.total[0, i] * slope)
            dk[row, y] = value if seen else 0
            spoiled += not abs(value) < math.inf
        for y in range(dv.shape[1]):
            value = dv.dtype.type(t.num[i, y] * by)
            dv[row, y] = value if seen else 0
            spoiled += not abs(value) < math.inf
        if dbias.size > 0:
            dbias[row] = t.total[0, i] if seen else 0
    return spoiled


@jit()
def write_queries(call, first, step, count, t):
    """Write the rows of dq; how many numbers are not finite."""
    dq, weights, spoiled = call.dq, call.weights, 0
    for i in range(count):
        row = first + i * step
        for y in range(dq.shape[1]):
            dq[row, y] = t.grad[i, y] if weights[row] != 0 else 0
            spoiled += not abs(t.grad[i, y]) < math.inf
    return spoiled


@jit()
def pull_one(par, call, job, c, s, z, slot, t):
    """One side of one problem: the gradient of its queries, or that of its keys and values."""
    of_keys = job[SIDE] == 1
    a_count, b_count = (job[QUERIES], job[KEYS]) if of_keys else (job[KEYS], job[QUERIES])
    step = -1 if of_keys and par.causal else 1
    first = a_count - 1 if step < 0 else 0
    done, split = 0, False
    while done < a_count:
        set_float_mode(IEEE)
        count = piece(done, a_count, split)
        at = first + step * done
        if of_keys:
            taken, clean = map_queries_side(par, call, job, at, step, count, c, s, z, slot, t)
        else:
            taken, clean = map_keys_side(par, call, job, at, count, c, s, z, slot, t)
        if par.causal:
            pull_chunk(par, call, job, of_keys, at, step, taken, clean, c, s, z, slot, t)
        flush_beside(t.values, taken, c, True)
        fold_chunk(par, t.pairs, t.keys, t.values, taken, s, z, slot, t.sums, True, None, t.spare)
        done, split = done + taken, taken < count
    for at in range(0, 0 if par.causal else b_count, CHUNK):
        count = min(CHUNK, b_count - at)
        pull_chunk(par, call, job, of_keys, at, 1, count, True, c, s, z, slot, t)


@jit()
def pull(call):
    """Take jobs of `records.Pull` until none is left; how many are finished by now."""
    me, mode = enter(call.control)
    par, t = parameters(call.constants), room_of(call, me)
    c, s, z = call.c, call.s, call.z
    load_tile_config(call.config)
    finished = 0
    while True:
        job = claim(call.control)
        if job < 0:
            break
        row = call.jobs[job]
        slot = begin(par, row, me, c, s, z, call.key.shape[2])
        fold_tail(c, s, z, slot)
        pull_one(par, call, row, c, s, z, slot, t)
        finished += 1
    release_tiles(call.config)
    return leave(call.control, finished, mode)
