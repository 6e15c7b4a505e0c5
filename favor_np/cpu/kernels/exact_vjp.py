"""The gradient of exact softmax attention, from probabilities that are computed anew tile by tile.

With P = exp2(raw - top) / w from the denominators of the forward pass, delta_i = g_i . o_i and
dS = P * (g v^T - delta), a block of keys passes over the queries and sums dv = P^T g,
dk = scale dS^T q and, into rows that its job alone adds to, dq = scale dS k.
"""

from __future__ import annotations

from favor_np.cpu.kernels.block import room_of
from favor_np.cpu.kernels.counters import claim, enter, leave
from favor_np.cpu.kernels.exact import WIDE, parameters, visible
from favor_np.cpu.kernels.floats import flush_beside
from favor_np.cpu.kernels.gemm import SLICE, gemm, gemm_t
from favor_np.cpu.kernels.jit import EXACT, jit
from favor_np.cpu.kernels.pack import across, pack, pack_values
from favor_np.cpu.kernels.simd import exp2, load, nearest, splat, store, view
from favor_np.cpu.processor import VECTOR_BYTES
from favor_np.cpu.tiles import CHUNK, KEY_TILES
from favor_np.jobs import (
    BIAS_ROW,
    DQ_ROW,
    GRAD_ROW,
    K_ROW,
    KEYS,
    MASK_ROW,
    NUMBER,
    QUERIES,
    START,
    STRIDE,
    V_ROW,
)
from favor_np.numerics import LN2


@jit()
def pack_key_block(par, call, k_row, v_row, count, mask_row, bias_row, t):
    """Pack a block of keys and values; its sums start at zero."""
    keys, c, dk, dv, share, dbias = t.k, t.c, t.dk, t.dv, t.share, t.dbias
    k, v, mask, exponents, shares = call.k, call.v, call.mask, call.exponents, call.shares
    for b in range(-(-count // CHUNK)):
        start = b * CHUNK
        here = min(CHUNK, count - start)
        m_row = mask_row + start if mask_row >= 0 else -1
        pack(k, k_row + start, 1, here, keys[b], par.limit, t.square)
        for j in range(here if mask_row >= 0 else 0):
            for x in range(k.shape[1] if not mask[m_row + j] else 0):
                keys[b, j, x] = 0
        across(keys[b], t.k_columns[b])
        pack_values(v, v_row + start, 1, here, t.v, mask, m_row)
        across(t.v, t.v_columns[b])
        for j in range(CHUNK):
            alive = j < here and (m_row < 0 or mask[m_row + j])
            c[b, j] = 0 if alive else par.hidden
        for j in range(here if bias_row >= 0 else 0):
            share[b, j] = shares[bias_row + start + j]
            if c[b, j] == 0:
                c[b, j] = exponents[bias_row + start + j]
            for x in range(k.shape[1]):  # what dq sums over; logits have the columns
                keys[b, j, x] *= share[b, j]
        dk[b], dv[b], dbias[b] = 0, 0, 0


@jit()
def pack_query_tile(par, q, q_row, g, g_row, count, mask, t):
    """Pack queries, scaled as in the forward pass, and their cotangents."""
    factor, rows = q.dtype.type(par.scale), t.q
    pack(q, q_row, 1, count, rows, par.limit, t.square)
    for i in range(count):
        for x in range(rows.shape[1]):
            rows[i, x] *= factor
    across(rows, t.q_columns)
    pack_values(g, g_row, 1, count, t.g, mask, -1)
    flush_beside(t.g, count, t.c, True)
    across(t.g, t.g_columns)


@jit(fastmath=EXACT)
def weigh(call, row, count, first, last, c, b, p, ds):
    """Logits in p and g v^T in ds become probabilities and dS, queries by keys.

    Both still lack the share of a biased key.  Exact zeros where a query may not see a key: its
    cotangent may be NaN.
    """
    inverses, deltas, tops = call.inverse, call.delta, call.tops
    lanes = VECTOR_BYTES // p.itemsize
    for i in range(count):
        begin, end = min(max(i + first, 0), CHUNK), min(max(i + last, 0), CHUNK)
        inverse, delta = splat(p, inverses[row + i]), splat(p, deltas[row + i])
        top = splat(c, tops[row + i])
        for j in range(begin // lanes * lanes, end, lanes):
            y = load(p, i, j)
            weight = exp2(y, nearest(y) + (load(c, b, j) - top)) * inverse
            store(p, i, j, weight)
            store(ds, i, j, weight * (load(ds, i, j) - delta))
        p[i, :begin] = 0
        ds[i, :begin] = 0
        p[i, end:] = 0
        ds[i, end:] = 0


@jit()
def add_bias(ds, count, sums, dbias, b):
    """Add dS of `count` queries to the gradient of the biases."""
    lanes = VECTOR_BYTES // ds.itemsize
    for j in range(0, CHUNK, lanes):
        total = splat(ds, 0)
        for i in range(count):
            total = total + load(ds, i, j)
        store(sums, 0, j, total)
    for j in range(CHUNK):
        dbias[b, j] += sums[0, j]


@jit()
def multiply(a, b, c, rows, depth, step, edge, first, last):
    """``c[:rows] = a[:depth].T @ b[:depth]``, summed by `step`; at an edge what some query sees."""
    wide = WIDE if edge else CHUNK
    for j in range(0, CHUNK, wide):
        begin, end = 0, rows
        if edge:
            begin = max(j - last + 1, 0) // 8 * 8
            end = min(-(-max(j + wide - first, 0) // 8) * 8, rows)
        for k in range(0, depth if begin < end else 0, step):
            gemm_t(a, b, c, begin, end, j, j + wide, k, min(k + step, depth), k > 0)


@jit()
def differentiate_tile(call, row, count, keys, first, last, biased, b, dq, t):
    """Add what the packed queries and key tile b give to dq, dk and dv."""
    q_rows, k_rows, edge = -(-count // 8) * 8, -(-keys // 8) * 8, first + count > 1 or last < CHUNK
    d_cols, dv_cols, d, dv = t.q.shape[1], t.g.shape[1], call.q.shape[1], call.v.shape[1]
    multiply(t.q_columns, t.k_columns[b], t.p, q_rows, d, SLICE, edge, first, last)
    multiply(t.g_columns, t.v_columns[b], t.ds, q_rows, dv, dv, edge, first, last)
    weigh(call, row, count, first, last, t.c, b, t.p, t.ds)
    if edge:
        for j in range(0, keys, 8):  # the queries that see the keys from j to j + 7
            begin, end = max(j - last + 1, 0), min(j + 8 - first, count)
            if begin < end:
                gemm_t(t.p, t.g, t.dv[b], j, j + 8, 0, dv_cols, begin, end, True)
                gemm_t(t.ds, t.q, t.dk[b], j, j + 8, 0, d_cols, begin, end, True)
        for i in range(0, count, 8):
            begin, end = max(i + first, 0), min(i + 7 + last, keys)
            if begin < end:
                gemm(t.ds, t.k[b], dq, i, i + 8, 0, d_cols, begin, end, True)
    else:
        gemm_t(t.p, t.g, t.dv[b], 0, k_rows, 0, dv_cols, 0, count, True)
        gemm_t(t.ds, t.q, t.dk[b], 0, k_rows, 0, d_cols, 0, count, True)
        gemm(t.ds, t.k[b], dq, 0, q_rows, 0, d_cols, 0, keys, True)
    if biased:
        add_bias(t.ds, count, t.sums, t.dbias, b)


@jit()
def write_key_block(call, mask_row, biased, count, row, t):
    """Write the rows of dk, dv and what is of the biases, zeros for masked keys."""
    mask, dk, dv, dk_tiles, dv_tiles = call.mask, call.dk, call.dv, t.dk, t.dv
    dbias = call.dbias
    for j in range(count):
        alive = mask_row < 0 or mask[mask_row + j]
        b, at = j // CHUNK, j % CHUNK
        share = t.share[b, at] if biased else dk.dtype.type(1)
        factor = dk.dtype.type(LN2) * share  # the packed q has the scale and log2(e)
        for x in range(dk.shape[1]):
            dk[row + j, x] = dk_tiles[b, at, x] * factor if alive else 0
        for x in range(dv.shape[1]):
            dv[row + j, x] = dv_tiles[b, at, x] * share if alive else 0
        if biased:
            dbias[row + j] = t.dbias[b, at] * share if alive else 0


@jit()
def differentiate_keys(par, call, job, offset, t):
    """One block of keys, from offset on, over all queries that may see them."""
    q, mask, biased = call.q, call.mask, job[BIAS_ROW] >= 0
    q_rows, g_rows, dq_rows = call.q_rows, call.out_rows, call.dq_rows
    owner, mask_row, queries = job[NUMBER], job[MASK_ROW], job[QUERIES]
    grad_row, count = job[GRAD_ROW] + offset, min(KEY_TILES * CHUNK, job[KEYS] - offset)
    m_row = mask_row + offset if mask_row >= 0 else -1
    l_row = job[BIAS_ROW] + offset if biased else -1
    pack_key_block(par, call, job[K_ROW] + offset, job[V_ROW] + offset, count, m_row, l_row, t)
    begin = max(offset - par.right, 0) // CHUNK * CHUNK
    for h in range(q_rows.shape[1]):
        for start in range(begin, min(queries, offset + count + par.left), CHUNK):
            here = min(CHUNK, queries - start)
            row = g_rows[owner, h] + start
            pack_query_tile(par, q, q_rows[owner, h] + start, call.g, row, here, mask, t)
            width = call.dq.shape[1]
            place = job[DQ_ROW] + dq_rows[owner, h] + start
            dq = view(call.dq, place * width, -(-here // 8) * 8, width)
            for b in range(-(-count // CHUNK)):
                first, last = visible(par, start, offset + b * CHUNK)
                keys = min(CHUNK, count - b * CHUNK)
                if here + last < 2 or first >= keys:
                    continue
                differentiate_tile(call, row, here, keys, first, last, biased, b, dq, t)
    write_key_block(call, m_row, biased, count, grad_row, t)


@jit()
def differentiate_exact(call):
    """Take jobs of `records.ExactPull` until none is left; how many are finished by now."""
    me, mode = enter(call.control)
    par, t = parameters(call.constants), room_of(call, me)
    finished = 0
    while True:
        index = claim(call.control)
        if index < 0:
            break
        job = call.jobs[index]
        for offset in range(job[START], job[KEYS], job[STRIDE]):
            differentiate_keys(par, call, job, offset, t)
        finished += 1
    return leave(call.control, finished, mode)
