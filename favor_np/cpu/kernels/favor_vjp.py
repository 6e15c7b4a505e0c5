"""Gradients of FAVOR+ attention: the same fold and read, run over the cotangents.

With o_i = N_i / D_i and the cotangent g_i let y_i = (g_i, -g_i.o_i) / D_i and x_j = (v_j, 1). Then

    dphi_q(i) = S_i y_i     S_i = sum_j<=i phi_k(j) x_j^T      a fold of keys, read by queries
    dphi_k(j) = R_j x_j     R_j = sum_i>=j phi_q(i) y_i^T      a fold of queries, read by keys
    dv_j      = R_j^T phi_k(j)                                 backwards where that is causal

Both are one loop here: side A is folded with its vectors, side B reads with its own, and e = phi_B
* (state . vectors of B) goes back through the projection.  The divisor 1 / D_i is the height of a
query: so R has running maxima as S has, and nothing overflows whatever the norms are. Nothing is
rebuilt by subtraction, and no feature is kept.
"""

from __future__ import annotations

import math
from collections import namedtuple

import numpy as np

from favor_np.cpu.kernels.activate import factor, log_feature
from favor_np.cpu.kernels.chunk import fold_chunk, map_keys, own_values, piece
from favor_np.cpu.kernels.favor import clock_of, parameters
from favor_np.cpu.kernels.floats import IEEE, flush_beside, ordinary_sums, set_float_mode
from favor_np.cpu.kernels.gemm import gemm, gemm_t
from favor_np.cpu.kernels.jit import EXACT, jit
from favor_np.cpu.kernels.jobs import OVERFLOW, claim, enter, leave, report
from favor_np.cpu.kernels.pack import (
    CHUNK,
    across,
    cut,
    heights,
    pack,
    pack_keys,
    pack_queries,
    pack_values,
)
from favor_np.cpu.kernels.products import (
    carve_parts,
    load_tile_config,
    project_queries,
    release_tiles,
    turn_queries,
)
from favor_np.cpu.kernels.simd import (
    VECTOR_BYTES,
    exp2,
    fma,
    load,
    maximum,
    nearest,
    splat,
    store,
    sum_lanes,
)
from favor_np.cpu.kernels.state import PAD, begin, fold_tail
from favor_np.jobs import (
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

#: What the pullback works from; out, weights and tops are what the forward pass wrote.
Inputs = namedtuple("Inputs", "q k v mask grad out weights tops")
#: What it writes: rows or, if these are not empty, for each job sums over its rows, in float64.
Gradients = namedtuple("Gradients", "q k v projection bias")
#: The weights row by row, the matrix of the quadratic part of a key's height, and its linear part.
#: If the map's weights are split into parts, those of queries as right factor, those of keys as
#: left one, and TILE_CONFIG.
Natural = namedtuple("Natural", "query key hessian linear query_parts key_parts config")
#: The tiles a thread works on.
Tiles = namedtuple(
    "Tiles",
    "rows columns raws phi slope back error values other turned num spare scores products keys grad "
    "height share extra factor total sums scale square stretched top excess pairs parts",
)


@jit()
def carve(floats, ints, signs, split_weight, d, vcols, width, blocks):
    """Cut the tiles from one thread's workspace."""
    lanes = VECTOR_BYTES // floats.itemsize
    dcols = -(-d // lanes) * lanes
    tiles = blocks * signs
    rows, at = cut(floats, 0, CHUNK, dcols)
    columns, at = cut(floats, at, dcols, CHUNK)
    raws, at = cut(floats, at, blocks * width, CHUNK)
    phi, at = cut(floats, at, width, CHUNK)
    slope, at = cut(floats, at, width, CHUNK)
    back, at = cut(floats, at, width, CHUNK)
    error, at = cut(floats, at, width, CHUNK)
    values, at = cut(floats, at, CHUNK, vcols)
    other, at = cut(floats, at, CHUNK, vcols)
    turned, at = cut(floats, at, vcols, CHUNK)
    num, at = cut(floats, at, CHUNK, vcols)
    spare, at = cut(floats, at, CHUNK, vcols)
    scores, at = cut(floats, at, CHUNK, CHUNK)
    products, at = cut(floats, at, CHUNK, CHUNK)
    flat, at = cut(floats, at, tiles * CHUNK, width)
    grad, at = cut(floats, at, CHUNK, dcols)
    height, at = cut(floats, at, 1, CHUNK)
    share, at = cut(floats, at, 1, CHUNK)
    extra, at = cut(floats, at, 1, CHUNK)
    by, at = cut(floats, at, 1, CHUNK)
    total, at = cut(floats, at, 1, CHUNK)
    sums, at = cut(floats, at, 1, tiles * width)
    scale, at = cut(floats, at, 1, tiles * width)
    square, at = cut(floats, at, 1, CHUNK * 8 // floats.itemsize)
    stretched, at = cut(floats, at, CHUNK, dcols)
    parts = carve_parts(split_weight, floats, at, d)
    top, mark = cut(ints, 0, 1, CHUNK)
    excess, mark = cut(ints, mark, CHUNK, lanes)
    keys = flat.reshape(tiles, CHUNK, width)
    return Tiles(rows, columns, raws, phi, slope, back, error, values, other, turned, num, spare,
                 scores, products, keys, grad, height[0], share[0], extra, by, total, sums, scale,
                 square[0].view(np.float64), stretched, top, excess, None, parts)  # fmt: skip


@jit()
def dot(a, i, b, j, width):
    """Return a[i] . b[j]."""
    total = a.dtype.type(0)
    for y in range(width):
        total += a[i, y] * b[j, y]
    return total


@jit()
def map_keys_side(par, x, job, at, count, clock, rate, fm, c, s, z, slot, t):
    """Keys from position at on as side A; how many were taken, and if all are finite."""
    k_row, v_row, mask_row = job[K_ROW], job[V_ROW], job[MASK_ROW]
    m_row = mask_row + at if mask_row >= 0 else -1
    lift = pack_keys(
        par, x.k, k_row + at, count, x.mask, m_row, fm, job[BLOCK], clock + at * rate, rate, t
    )
    clean = pack_values(x.v, v_row + at, 1, count, t.values, x.mask, m_row)
    for i in range(count):
        if t.square[i] == math.inf and (m_row < 0 or x.mask[m_row + i]):
            # With a feature of zero NaN reaches nobody who must not see it.
            t.values[i], t.share[i], clean = math.nan, math.nan, False
    taken = map_keys(par, count, x.k.shape[1], lift, fm.key, fm.key_parts, fm.bias, job[BLOCK], c, s, z,
                     slot, t.keys, t)  # fmt: skip
    return taken, clean


@jit()
def map_queries_side(par, x, job, at, step, count, fm, none, natural, c, s, z, slot, t):
    """Queries at positions at, at + step, ... as side A, with their cotangents over D."""
    q_row, out_row, width = job[Q_ROW] + at, job[OUT_ROW] + at, x.grad.shape[1]
    pack_queries(par, x.q, q_row, step, count, fm, job[BLOCK], t)
    clean = pack_values(x.grad, out_row, step, count, t.values, x.mask, -1)
    for i in range(CHUNK):
        t.height[i], t.share[i] = math.inf, 0
    lift = 0
    for i in range(count):
        if x.weights[out_row + i * step] > 0:
            lift = x.tops[out_row + i * step]
            break
    for i in range(count):
        row = out_row + i * step
        weight_of = x.weights[row]
        if weight_of == 0:  # it sees no key
            t.values[i] = 0
        elif t.square[i] < math.inf and weight_of > 0:
            t.height[i] = x.tops[row] - lift
            inverse = 1 / weight_of
            t.share[i] = -dot(t.values, i, x.out, row, width) * inverse
            for y in range(width):
                t.values[i, y] *= inverse
        else:
            t.values[i], t.share[i] = math.nan, math.nan
        clean = clean and math.isfinite(t.share[i])
    taken = map_keys(par, count, x.q.shape[1], -lift, fm.query, natural.query_parts, none, job[BLOCK], c,
                     s, z, slot, t.keys, t)  # fmt: skip
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
    """``error (-)= slope * (back + z extra) * factor``, and its sums."""
    lanes = VECTOR_BYTES // t.back.itemsize
    slope = t.phi if par.kind == POSITIVE else t.slope
    for i in range(0, cols, lanes):
        extra, by, total = load(t.extra, 0, i), load(t.factor, 0, i), load(t.total, 0, i)
        for r in range(features):
            back = fma(splat(t.extra, z[slot, r0 + r]), extra, load(t.back, r, i))
            e = load(slope, r, i) * back * by
            total = total + e
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
def pack_readers(par, x, job, of_keys, at, step, count, fm, t):
    """Pack the reading side B: its rows, their values or cotangents, and what goes with z."""
    if of_keys:
        mask_row = job[MASK_ROW] + at if job[MASK_ROW] >= 0 else -1
        pack(x.k, job[K_ROW] + at, step, count, t.rows, par.limit, t.square)
        heights(par, fm, job[BLOCK], count, x.k.shape[1], t)
        pack_values(x.v, job[V_ROW] + at, step, count, t.other, x.mask, mask_row)
        t.extra[:] = 1
    else:
        pack_queries(par, x.q, job[Q_ROW] + at, step, count, fm, job[BLOCK], t)
        pack_values(x.grad, job[OUT_ROW] + at, step, count, t.other, x.mask, -1)
        t.extra[:] = 0
        for i in range(count):
            row = job[OUT_ROW] + at + i * step
            if x.weights[row] == 0:  # it sees no key, whatever its cotangent is
                t.other[i] = 0
            t.extra[0, i] = -dot(t.other, i, x.out, row, x.grad.shape[1])
    turn_queries(t.parts, t)
    across(t.other, t.turned)
    t.total[:] = 0


@jit()
def reader_scales(par, x, job, of_keys, at, step, count, clock, rate, t):
    """``2**(top - height)`` of each row of side B, by which its results are multiplied."""
    t.factor[:] = 0
    for i in range(count):
        by = 0.0
        if of_keys:
            position = at + i * step
            if job[MASK_ROW] < 0 or x.mask[job[MASK_ROW] + position]:
                height = t.square[i] - clock - rate * position
                by = 2.0 ** (t.top[0, i] - height)
        else:
            row = job[OUT_ROW] + at + i * step
            if x.weights[row] != 0:
                by = 2.0 ** float(t.top[0, i] - x.tops[row]) / x.weights[row]
        if t.square[i] == math.inf and by != 0:
            by = math.nan
        t.factor[0, i] = by


@jit()
def pair_products(count, cols, rows, d, t):
    """``products[j, i] = vector of A j . vector of B i`` for j <= i, else zero."""
    lanes = VECTOR_BYTES // t.products.itemsize
    for i in range(0, cols, 2 * lanes):
        end = min(i + 2 * lanes, cols)
        gemm(t.values, t.turned, t.products, 0, min(-(-end // 8) * 8, rows), i, end, 0, d, False)
    for j in range(rows):
        for i in range(min(j, cols)):
            t.products[j, i] = 0
        for i in range(j, cols):
            t.products[j, i] += t.share[j] * t.extra[0, i]


@jit()
def pull_chunk(
    par, x, job, of_keys, at, step, count, clock, rate, clean, fm, bias, natural, c, s, z, slot, to, ctl, t,
):  # fmt: skip
    """Gradients of the rows of side B: of queries, or of keys and values."""
    lanes = VECTOR_BYTES // t.rows.itemsize
    cols = -(-count // lanes) * lanes
    rows = -(-count // 8) * 8
    d, dv, vcols, dcols = x.q.shape[1], x.v.shape[1], t.num.shape[1], t.grad.shape[1]
    w, features_count = job[BLOCK], job[ROWS]
    blocks, width = t.keys.shape[0] // par.signs, t.keys.shape[2]
    half = blocks * width
    set_float_mode(IEEE)
    pack_readers(par, x, job, of_keys, at, step, count, fm, t)
    flush_beside(t.other, count, c, ordinary_sums(s, slot, c.shape[1] - PAD))
    weight = fm.key if of_keys else fm.query
    split_weight = natural.key_parts if of_keys else fm.query_parts
    rows_of_weight = natural.key if of_keys else natural.query
    for b in range(blocks):
        project_queries(t.parts, t, weight, split_weight, w + b,
                        t.raws[b * width : (b + 1) * width], cols, d)  # fmt: skip
    measure_rows(par, cols, t.raws, features_count, bias, w, width, c, slot, t.top)
    reader_scales(par, x, job, of_keys, at, step, count, clock, rate, t)
    if par.causal:
        pair_products(count, cols, rows, dv, t)
    for b in range(blocks):
        features = min(width, features_count - b * width)
        for side in range(par.signs):
            r0, tile = side * half + b * width, t.keys[b * par.signs + side]
            sums = s[slot, r0 : r0 + width]
            activate_rows(par, 1 - 2 * side, cols, t.raws, b * width, features, bias, w + b, c, slot,
                          r0, t)  # fmt: skip
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
                par, side, cols, features, z, slot, r0, to.bias, job[NUMBER], b * width, t
            )
        if to.projection.size > 0:
            gemm(t.error, t.rows, t.stretched, 0, width, 0, dcols, 0, count, False)
            for r in range(width):
                for y in range(dcols):
                    to.projection[job[NUMBER], b * width + r, y] += t.stretched[r, y]
        else:
            gemm_t(t.error, rows_of_weight[w + b], t.grad, 0, rows, 0, dcols, 0, width, b > 0)
    if to.projection.size > 0:
        return
    if of_keys and par.causal:
        for j in range(rows):
            t.scores[j, : min(j, cols)] = 0
        own_values(t.scores, t.values, clean, count, t.num, t.spare)
    norm, spoiled = 2 * par.key_norm / LOG2E, 0
    if par.factored and of_keys:  # the gradient of the heights
        gemm(t.rows, natural.hessian[w], t.stretched, 0, rows, 0, dcols, 0, d, False)
    for i in range(count):  # a factor of zero is no reason to write zero: it may be 0 * NaN
        position = at + i * step
        by = t.factor[0, i]
        if of_keys:
            row = job[GRAD_ROW] + position
            seen = job[MASK_ROW] < 0 or x.mask[job[MASK_ROW] + position]
            for y in range(d):
                slope = t.stretched[i, y] if par.factored else norm * t.rows[i, y]
                if par.affine:
                    slope -= natural.linear[w, y]
                value = to.k.dtype.type(t.grad[i, y] - t.total[0, i] * slope)
                to.k[row, y] = value if seen else 0
                spoiled += not abs(value) < math.inf
            for y in range(dv):
                value = to.v.dtype.type(t.num[i, y] * by)
                to.v[row, y] = value if seen else 0
                spoiled += not abs(value) < math.inf
        else:
            row = job[OUT_ROW] + position
            for y in range(d):
                to.q[row, y] = t.grad[i, y] if x.weights[row] != 0 else 0
                spoiled += not abs(t.grad[i, y]) < math.inf
    if spoiled > 0:
        report(ctl, OVERFLOW)


@jit()
def pull_one(par, x, job, clock, rate, fm, none, natural, c, s, z, slot, to, ctl, t):
    """One side of one problem: the gradient of its queries, or that of its keys and values."""
    of_keys = job[SIDE] == 1
    a_count, b_count = (job[QUERIES], job[KEYS]) if of_keys else (job[KEYS], job[QUERIES])
    step = -1 if of_keys and par.causal else 1
    first = a_count - 1 if step < 0 else 0
    mine = fm.bias if of_keys else none
    done, split = 0, False
    while done < a_count:
        set_float_mode(IEEE)
        count = piece(done, a_count, split)
        at = first + step * done
        if of_keys:
            taken, clean = map_queries_side(par, x, job, at, step, count, fm, none, natural, c, s, z,
                                      slot, t)  # fmt: skip
        else:
            taken, clean = map_keys_side(par, x, job, at, count, clock, rate, fm, c, s, z, slot,
                                   t)  # fmt: skip
        if par.causal:
            pull_chunk(par, x, job, of_keys, at, step, taken, clock, rate, clean, fm, mine,
                       natural, c, s, z, slot, to, ctl, t)  # fmt: skip
        flush_beside(t.values, taken, c, True)
        fold_chunk(par, t.pairs, t.keys, t.values, taken, s, z, slot, t.sums, True, None, t.spare)
        done, split = done + taken, taken < count
    for at in range(0, 0 if par.causal else b_count, CHUNK):
        pull_chunk(par, x, job, of_keys, at, 1, min(CHUNK, b_count - at), clock, rate, True, fm, mine,
                   natural, c, s, z, slot, to, ctl, t)  # fmt: skip


@jit(cache=True)
def pull(constants, x, fm, none, natural, jobs, clocks, to, c, s, z, floats, ints, ctl, n):
    """Take jobs until none is left; how many are finished by now."""
    par = parameters(constants)
    me, mode = enter(ctl)
    t = carve(floats[me], ints[me], par.signs, fm.key_parts, x.q.shape[1], s.shape[2],
              fm.key.shape[2], (c.shape[1] - PAD) // (fm.key.shape[2] * par.signs))  # fmt: skip
    load_tile_config(natural.config)
    finished = 0
    while True:
        job = claim(ctl)
        if job >= n:
            break
        slot = begin(par, jobs[job], me, c, s, z, fm.key.shape[2])
        fold_tail(c, s, z, slot)
        clock, rate = clock_of(clocks, job)
        pull_one(par, x, jobs[job], clock, rate, fm, none, natural, c, s, z, slot, to, ctl, t)
        finished += 1
    release_tiles(natural.config)
    return leave(ctl, finished, mode)
