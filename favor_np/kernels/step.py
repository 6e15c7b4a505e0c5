"""One token: fold one key and value, read with one query."""

from __future__ import annotations

import math

from favor_np.kernels.activate import RAISE_KEYS, factor, log_feature
from favor_np.kernels.gemm import project_two
from favor_np.kernels.jit import EXACT, jit
from favor_np.kernels.pack import QUERY_CENTER, center, heights, pack, pack_values, write_rows
from favor_np.kernels.simd import (
    VECTOR_BYTES,
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


@jit(fastmath=EXACT)
def step_token(
    par,
    q,
    q_row,
    k,
    k_row,
    v,
    v_row,
    fm,
    w,
    features,
    clock,
    c,
    s,
    z,
    slot,
    out,
    out_row,
    t,
):
    """Fold one key and value, then read with one query: a chunk of one, without its tiles."""
    lanes = VECTOR_BYTES // q.itemsize
    width, state = fm.key.shape[2], s[slot]
    half = z.shape[1] // par.signs
    pack(q, q_row, 1, 1, t.rows[1:2], par.limit, t.square[1:2])
    pack(k, k_row, 1, 1, t.rows[0:1], par.limit, t.square[0:1])
    pack_values(v, v_row, 1, 1, t.values[0:1], t.square, -1)
    if par.affine:
        center(t.rows[1:2], 1, fm.affine[w, QUERY_CENTER], t.square[1:2])
    heights(par, fm, w, 1, q.shape[1], t)
    height = splat(q, min(t.square[0], par.far) - (clock - math.floor(clock)))
    lift = splat(c, math.floor(clock))
    raised = False
    for b in range(half // width):
        project_two(t.rows, fm.key[w + b], t.raw, width, q.shape[1])
        queries = t.raw
        if par.affine:
            project_two(t.rows, fm.query[w + b], t.phi, width, q.shape[1])
            queries = t.phi
        for side in range(par.signs):
            turn = splat(q, 1 - 2 * side)
            for f in range(0, width, lanes):
                r = side * half + b * width + f
                x = load(t.raw, 0, f)
                y = log_feature(par, fma(turn, x, load(fm.bias, w + b, f))) - height
                old = load(c, slot, r) - lift
                top, by = old, splat(q, 1)
                if highest(nearest(y) - old) > RAISE_KEYS:
                    top, raised = maximum(old, nearest(y)), True
                    by = exp2(splat(q, 0), old - top)
                value = exp2(y, nearest(y) - top) * factor(par, x)
                store(c, slot, r, top + lift)
                store(z, slot, r, fma(load(z, slot, r), by, value))
                store(t.sums, 0, r, value)
                store(t.scale, 0, r, by)
                store(t.token, 0, r, turn * load(queries, 1, f))
    if t.square[0] == math.inf:
        for r in range(z.shape[1]):
            t.sums[0, r] = z[slot, r] = math.nan
    if raised:
        for r in range(z.shape[1]):
            for x in range(state.shape[1]):
                state[r, x] *= t.scale[0, r]
    level = splat(c, -8 * int(par.far))
    for side in range(par.signs):
        for r in range(side * half + features, (side + 1) * half):
            t.token[0, r] = -par.masked  # padding, no feature
    for r in range(0, z.shape[1], lanes):
        y = log_feature(par, load(t.token, 0, r))
        level = maximum(level, nearest(y) + load(c, slot, r))
    shift = splat(c, highest(level))
    for r in range(0, z.shape[1], lanes):
        x = load(t.token, 0, r)
        y = log_feature(par, x)
        value = exp2(y, nearest(y) + (load(c, slot, r) - shift))
        store(t.token, 0, r, value * factor(par, x))
    for side in range(par.signs):
        for r in range(side * half + features, (side + 1) * half):
            t.token[0, r] = 0
    den = splat(q, 0)
    for r in range(0, z.shape[1], lanes):
        den = fma(load(t.token, 0, r), load(z, slot, r), den)
    t.den[0, 0] = sum_lanes(den)
    t.top[0, 0] = highest(level)
    step_values(state, t.values, t.sums, t.token, t.num)
    write_rows(t.num, t.den[0], t.top[0], t.square[1:2], 1, out, out_row)


@jit(fastmath=EXACT)
def step_values(state, values, phi_k, phi_q, num):
    """``state[r] += phi_k[r] v`` and ``num = phi_q . state``, in one pass over the state."""
    lanes = VECTOR_BYTES // state.itemsize
    x = 0
    while x + 4 * lanes <= state.shape[1]:
        v0, v1 = load(values, 0, x), load(values, 0, x + lanes)
        v2, v3 = load(values, 0, x + 2 * lanes), load(values, 0, x + 3 * lanes)
        n0 = n1 = n2 = n3 = splat(state, 0)
        for r in range(state.shape[0]):
            a, b = splat(state, phi_k[0, r]), splat(state, phi_q[0, r])
            s0 = fma(v0, a, load(state, r, x))
            s1 = fma(v1, a, load(state, r, x + lanes))
            s2 = fma(v2, a, load(state, r, x + 2 * lanes))
            s3 = fma(v3, a, load(state, r, x + 3 * lanes))
            store(state, r, x, s0)
            store(state, r, x + lanes, s1)
            store(state, r, x + 2 * lanes, s2)
            store(state, r, x + 3 * lanes, s3)
            n0, n1, n2, n3 = fma(s0, b, n0), fma(s1, b, n1), fma(s2, b, n2), fma(s3, b, n3)
        store(num, 0, x, n0)
        store(num, 0, x + lanes, n1)
        store(num, 0, x + 2 * lanes, n2)
        store(num, 0, x + 3 * lanes, n3)
        x += 4 * lanes
    while x < state.shape[1]:
        v0, n0 = load(values, 0, x), splat(state, 0)
        for r in range(state.shape[0]):
            s0 = fma(v0, splat(state, phi_k[0, r]), load(state, r, x))
            store(state, r, x, s0)
            n0 = fma(s0, splat(state, phi_q[0, r]), n0)
        store(num, 0, x, n0)
        x += lanes
