"""One token: one key and value more in the tail of a state, read with one query."""

from __future__ import annotations

import math

from favor_np.cpu.kernels.activate import RAISE_KEYS, factor, log_feature
from favor_np.cpu.kernels.floats import flush_beside
from favor_np.cpu.kernels.gemm import project_two
from favor_np.cpu.kernels.jit import EXACT, jit
from favor_np.cpu.kernels.pack import (
    QUERY_CENTER,
    biased,
    center,
    log_norms,
    pack,
    pack_values,
    write_rows,
)
from favor_np.cpu.kernels.simd import (
    exp2,
    fma,
    highest,
    load,
    maximum,
    nearest,
    splat,
    store,
    sum_lanes,
)
from favor_np.cpu.kernels.state import add_pair, begin, fold_tail, scale_row, tail
from favor_np.cpu.processor import VECTOR_BYTES
from favor_np.cpu.tiles import TAIL
from favor_np.jobs import BIAS_ROW, BLOCK, K_ROW, MASK_ROW, ROWS, V_ROW


@jit(fastmath=EXACT)
def step_token(par, call, job, me, t):
    """Add the key and value of a job to the tail of a state, then read with its query."""
    row, c, s, z, sums = call.jobs[job], call.c, call.s, call.z, t.sums
    slot = begin(par, row, me, c, s, z, call.key.shape[2])
    w, features, d = row[BLOCK], row[ROWS], call.q.shape[1]
    key, query, beta, affine = call.key, call.query, call.bias, call.affine
    rows, square, raw, scale, token = t.rows, t.square, t.raw, t.scale, t.token
    q, lanes, width, every = call.q, VECTOR_BYTES // c.itemsize, key.shape[2], sums.shape[1]
    half = every // par.signs
    if c[slot, every] == TAIL:
        fold_tail(c, s, z, slot)
    count, state = c[slot, every], s[slot]
    keys, values = tail(s, z, slot, every)
    pack(q, call.q_rows[job, 0], 1, 1, rows[1:2], par.limit, square[1:2])
    pack(call.k, row[K_ROW], 1, 1, rows[0:1], par.limit, square[0:1])
    pack_values(call.v, row[V_ROW], 1, 1, values[count : count + 1], call.mask, row[MASK_ROW])
    flush_beside(values[count : count + 1], 1, c, True)
    if par.affine:
        center(rows[1:2], 1, affine[w, QUERY_CENTER], square[1:2])
    log_norms(par, call, w, 1, t)
    raised = call.log2_bias[row[BIAS_ROW]] if row[BIAS_ROW] >= 0 else 0.0
    log_norm, whole, spoiled = math.inf, 0, 0.0
    if row[MASK_ROW] < 0 or call.mask[row[MASK_ROW]]:
        log_norm, whole = biased(min(square[0], par.far), raised)
        spoiled = math.nan if square[0] == math.inf else 0.0
    log_norm, bias_exponent, spoiled, raised = (
        splat(q, log_norm),
        splat(c, whole),
        splat(q, spoiled),
        False,
    )
    for b in range(half // width):
        project_two(rows, key[w + b], raw, width, d)
        queries = raw
        if par.affine:
            project_two(rows, query[w + b], t.phi, width, d)
            queries = t.phi
        for side in range(par.signs):
            turn = splat(q, 1 - 2 * side)
            for f in range(0, width, lanes):
                r = side * half + b * width + f
                x = load(raw, 0, f)
                y = log_feature(par, fma(turn, x, load(beta, w + b, f))) - log_norm
                old = load(c, slot, r) - bias_exponent
                top, by = old, splat(q, 1)
                if highest(nearest(y) - old) > RAISE_KEYS:
                    top, raised = maximum(old, nearest(y)), True
                    by = exp2(splat(q, 0), old - top)
                value = exp2(y, nearest(y) - top) * factor(par, x) + spoiled
                store(c, slot, r, top + bias_exponent)
                store(z, slot, r, load(z, slot, r) * by)
                store(z, slot, every + r, load(z, slot, every + r) * by)
                add_pair(z, slot, r, slot, every + r, value)
                store(keys, count, r, value)
                store(scale, 0, r, by)
                store(token, 0, r, turn * load(queries, 1, f))
    if raised:
        for r in range(every):
            if scale[0, r] != 1:
                scale_row(state, r, scale[0, r])
                scale_row(state, every + r, scale[0, r])
                for j in range(count):
                    keys[j, r] *= scale[0, r]
    c[slot, every] = count + 1
    level = splat(c, -(2**31))
    for side in range(par.signs):
        for r in range(side * half + features, (side + 1) * half):
            token[0, r] = -math.inf  # padding, no feature
    for r in range(0, every, lanes):
        y = log_feature(par, load(token, 0, r))
        level = maximum(level, nearest(y) + load(c, slot, r))
    shift = splat(c, highest(level))
    for r in range(0, every, lanes):
        x = load(token, 0, r)
        y = log_feature(par, x)
        value = exp2(y, nearest(y) + (load(c, slot, r) - shift))
        store(token, 0, r, value * factor(par, x))
    for side in range(par.signs):
        for r in range(side * half + features, (side + 1) * half):
            token[0, r] = 0
    den = splat(q, 0)
    for r in range(0, every, lanes):
        den = fma(load(token, 0, r), load(z, slot, r), den)
    t.den[0, 0] = sum_lanes(den)
    t.top[0, 0] = highest(level)
    score_tail(keys, count + 1, token, t.scores)
    read_state(state, every, token, count + 1, t.scores, t.num)
    write_rows(t.num, t.den[0], t.top[0], square[1:2], 1, call, call.out_rows[job, 0])


@jit(fastmath=EXACT)
def score_tail(keys, count, phi, scores):
    """``scores = phi . keys`` for the tokens of the tail, four at a time."""
    for j in range(0, count, 4):
        j1, j2, j3 = min(j + 1, count - 1), min(j + 2, count - 1), min(j + 3, count - 1)
        a0 = a1 = a2 = a3 = splat(keys, 0)
        for r in range(0, keys.shape[1], VECTOR_BYTES // keys.itemsize):
            x = load(phi, 0, r)
            a0, a1 = fma(x, load(keys, j, r), a0), fma(x, load(keys, j1, r), a1)
            a2, a3 = fma(x, load(keys, j2, r), a2), fma(x, load(keys, j3, r), a3)
        scores[0, j], scores[0, j + 1] = sum_lanes(a0), sum_lanes(a1)
        scores[0, j + 2], scores[0, j + 3] = sum_lanes(a2), sum_lanes(a3)


@jit(fastmath=EXACT)
def read_state(state, features, phi, count, scores, num):
    """``num = phi . S + scores . values`` of the tail, in one pass over a state."""
    lanes = VECTOR_BYTES // state.itemsize
    x = 0
    while x + 4 * lanes <= state.shape[1]:
        n0 = n1 = n2 = n3 = splat(state, 0)
        for part in range(2):
            weights, first = (phi, 0) if part == 0 else (scores, 2 * features)
            for r in range(features if part == 0 else count):
                b, at = splat(state, weights[0, r]), first + r
                n0 = fma(load(state, at, x), b, n0)
                n1 = fma(load(state, at, x + lanes), b, n1)
                n2 = fma(load(state, at, x + 2 * lanes), b, n2)
                n3 = fma(load(state, at, x + 3 * lanes), b, n3)
        store(num, 0, x, n0)
        store(num, 0, x + lanes, n1)
        store(num, 0, x + 2 * lanes, n2)
        store(num, 0, x + 3 * lanes, n3)
        x += 4 * lanes
    while x < state.shape[1]:
        n0 = splat(state, 0)
        for r in range(features):
            n0 = fma(load(state, r, x), splat(state, phi[0, r]), n0)
        for j in range(count):
            n0 = fma(load(state, 2 * features + j, x), splat(state, scores[0, j]), n0)
        store(num, 0, x, n0)
        x += lanes
