"""The gradient of exact softmax attention, from probabilities that are computed anew tile by tile.

With P = exp2(raw - top) / w from the denominators of the forward pass, delta_i = g_i . o_i and
dS = P * (g v^T - delta): a block of queries over the keys sums dq = scale dS k, a block of keys over
the queries sums dk = scale dS^T q and dv = P^T g.  Either block is a job that shares no sum with
another.
"""

from __future__ import annotations

import math
from collections import namedtuple

import numpy as np

from favor_np.kernels.gemm import gemm, gemm_t, project_t
from favor_np.kernels.jit import EXACT, jit
from favor_np.kernels.pack import CHUNK, across, cut, pack, pack_values
from favor_np.kernels.simd import VECTOR_BYTES, exp2, fetch_add, load, nearest, splat, store

LN2 = math.log(2)
#: Tiles of a block, which share the tiles that pass by.
GROUP = 8

#: What a query brings besides q and g, one number a row; inverse = 1 / w.
Rows = namedtuple("Rows", "inverse delta tops")
Gradients = namedtuple("Gradients", "q k v")
#: Packed rows q, g, k, v of one tile, those of a block transposed, and the sums of a block.
GradientTiles = namedtuple(
    "GradientTiles", "q g k v q_columns g_columns k_columns v_columns p ds dqk dv square c"
)


@jit()
def carve_gradient(floats, ints, d, dv):
    """Cut the tiles from one thread's workspace."""
    lanes = VECTOR_BYTES // floats.itemsize
    d, dv = -(-d // lanes) * lanes, -(-dv // lanes) * lanes
    q, at = cut(floats, 0, CHUNK, d)
    g, at = cut(floats, at, CHUNK, dv)
    k, at = cut(floats, at, CHUNK, d)
    v, at = cut(floats, at, CHUNK, dv)
    q_columns, at = cut(floats, at, GROUP * d, CHUNK)
    g_columns, at = cut(floats, at, GROUP * dv, CHUNK)
    k_columns, at = cut(floats, at, GROUP * d, CHUNK)
    v_columns, at = cut(floats, at, GROUP * dv, CHUNK)
    p, at = cut(floats, at, CHUNK, CHUNK)
    ds, at = cut(floats, at, CHUNK, CHUNK)
    dqk, at = cut(floats, at, GROUP * CHUNK, d)
    sums, at = cut(floats, at, GROUP * CHUNK, dv)
    square, at = cut(floats, at, 1, CHUNK * (8 // floats.itemsize))
    c, _ = cut(ints, 0, GROUP, CHUNK)
    return GradientTiles(
        q, g, k, v, q_columns.reshape(GROUP, d, CHUNK), g_columns.reshape(GROUP, dv, CHUNK),
        k_columns.reshape(GROUP, d, CHUNK), v_columns.reshape(GROUP, dv, CHUNK), p, ds,
        dqk.reshape(GROUP, CHUNK, d), sums.reshape(GROUP, CHUNK, dv), square[0].view(np.float64), c,
    )  # fmt: skip


@jit()
def pack_query_tile(par, q, q_row, g, g_row, count, mask, a, t):
    """Pack queries, scaled as in the forward pass, and their cotangents as tile a."""
    factor = q.dtype.type(par.scale)
    pack(q, q_row, count, t.q, par.limit, t.square)
    for i in range(count):
        for x in range(t.q.shape[1]):
            t.q[i, x] *= factor
    across(t.q, t.q_columns[a])
    pack_values(g, g_row, count, t.g, mask, -1)
    across(t.g, t.g_columns[a])


@jit()
def pack_key_tile(par, k, k_row, v, v_row, count, mask, mask_row, b, t):
    """Pack keys and values as tile b."""
    pack(k, k_row, count, t.k, par.limit, t.square)
    across(t.k, t.k_columns[b])
    pack_values(v, v_row, count, t.v, mask, mask_row)
    across(t.v, t.v_columns[b])
    for j in range(CHUNK):
        alive = j < count and (mask_row < 0 or mask[mask_row + j])
        t.c[b, j] = 0 if alive else -4 * int(par.far)


@jit(fastmath=EXACT)
def weigh(rows, row, count, diagonal, c, b, p, ds):
    """Logits in p and g v^T in ds become probabilities and dS, queries by keys.

    Exact zeros where a query may not see a key: its cotangent may be NaN.
    """
    lanes = VECTOR_BYTES // p.itemsize
    for i in range(count):
        end = i + 1 if diagonal else CHUNK
        inverse, delta = splat(p, rows.inverse[row + i]), splat(p, rows.delta[row + i])
        top = splat(c, rows.tops[row + i])
        for j in range(0, end, lanes):
            y = load(p, i, j)
            weight = exp2(y, nearest(y) + (load(c, b, j) - top)) * inverse
            store(p, i, j, weight)
            store(ds, i, j, weight * (load(ds, i, j) - delta))
        p[i, end:] = 0
        ds[i, end:] = 0


@jit()
def pair(par, rows, row, count, d, dv, diagonal, a, b, t):
    """P and dS of query tile a and key tile b."""
    padded = -(-count // 8) * 8
    project_t(t.q_columns[a], t.k_columns[b], t.p, padded, CHUNK, d)
    gemm_t(t.g_columns[a], t.v_columns[b], t.ds, 0, padded, 0, CHUNK, 0, dv, False)
    weigh(rows, row, count, diagonal, t.c, b, t.p, t.ds)


@jit()
def query_block(par, q, k, v, g, rows, mask, job, dq, t):
    """One block of queries over all keys they may see: dq."""
    q_row, k_row, v_row, mask_row, row = job[0], job[1], job[2], job[3], job[4]
    count, keys, offset = job[5], job[6], job[7]
    width = t.k.shape[1]
    for a in range(-(-count // CHUNK)):
        first = a * CHUNK
        here = min(CHUNK, count - first)
        pack_query_tile(par, q, q_row + first, g, row + first, here, mask, a, t)
        t.dqk[a] = 0
    for start in range(0, min(keys, offset + count) if par.causal else keys, CHUNK):
        depth = min(CHUNK, keys - start)
        m_row = mask_row + start if mask_row >= 0 else -1
        pack_key_tile(par, k, k_row + start, v, v_row + start, depth, mask, m_row, 0, t)
        for a in range(-(-count // CHUNK)):
            first = a * CHUNK
            here = min(CHUNK, count - first)
            if par.causal and offset + first < start:
                continue
            diagonal = par.causal and offset + first == start
            pair(par, rows, row + first, here, q.shape[1], v.shape[1], diagonal, a, 0, t)
            if diagonal:
                for i in range(0, here, 8):
                    gemm(t.ds, t.k, t.dqk[a], i, i + 8, 0, width, 0, min(i + 8, here), True)
            else:
                gemm(t.ds, t.k, t.dqk[a], 0, -(-here // 8) * 8, 0, width, 0, depth, True)
    factor = dq.dtype.type(par.scale * LN2)
    for i in range(count):
        for x in range(dq.shape[1]):
            dq[row + i, x] = t.dqk[i // CHUNK, i % CHUNK, x] * factor


@jit()
def key_block(par, q, k, v, g, rows, mask, job, q_rows, g_rows, dk, dv, t):
    """One block of keys over all queries that may see them: dk and dv."""
    owner, k_row, v_row, mask_row, row = job[0], job[1], job[2], job[3], job[4]
    count, queries, offset = job[5], job[6], job[7]
    width, value_width = t.q.shape[1], t.g.shape[1]
    for b in range(-(-count // CHUNK)):
        first = b * CHUNK
        here = min(CHUNK, count - first)
        m_row = mask_row + first if mask_row >= 0 else -1
        pack_key_tile(par, k, k_row + first, v, v_row + first, here, mask, m_row, b, t)
        t.dqk[b], t.dv[b] = 0, 0
    for h in range(q_rows.shape[1]):
        for start in range(offset if par.causal else 0, queries, CHUNK):
            depth = min(CHUNK, queries - start)
            g_row = g_rows[owner, h] + start
            pack_query_tile(par, q, q_rows[owner, h] + start, g, g_row, depth, mask, 0, t)
            for b in range(-(-count // CHUNK)):
                first = b * CHUNK
                here = min(CHUNK, count - first)
                if par.causal and start < offset + first:
                    continue
                diagonal = par.causal and start == offset + first
                pair(par, rows, g_row, depth, q.shape[1], v.shape[1], diagonal, 0, b, t)
                if diagonal:
                    for j in range(0, here, 8):
                        gemm_t(t.ds, t.q, t.dqk[b], j, j + 8, 0, width, j, depth, True)
                        gemm_t(t.p, t.g, t.dv[b], j, j + 8, 0, value_width, j, depth, True)
                else:
                    last = -(-here // 8) * 8
                    gemm_t(t.ds, t.q, t.dqk[b], 0, last, 0, width, 0, depth, True)
                    gemm_t(t.p, t.g, t.dv[b], 0, last, 0, value_width, 0, depth, True)
    factor = dk.dtype.type(LN2)  # q is packed with the scale and log2(e)
    for j in range(count):
        alive = mask_row < 0 or mask[mask_row + j]
        for x in range(dk.shape[1]):
            dk[row + j, x] = t.dqk[j // CHUNK, j % CHUNK, x] * factor if alive else 0
        for x in range(dv.shape[1]):
            dv[row + j, x] = t.dv[j // CHUNK, j % CHUNK, x] if alive else 0


@jit(cache=True)
def differentiate_exact(
    par, q, k, v, g, rows, mask, key_jobs, query_jobs, q_rows, g_rows, out, floats, ints, ctl, n
):
    """Take jobs until none is left; how many are finished by now."""
    me = fetch_add(ctl, 4, 1)
    t = carve_gradient(floats[me], ints[me], q.shape[1], v.shape[1])
    finished = 0
    while True:
        job = fetch_add(ctl, 0, 1)
        if job >= n:
            break
        if job < len(key_jobs):
            key_block(par, q, k, v, g, rows, mask, key_jobs[job], q_rows, g_rows, out.k, out.v, t)
        else:
            query_block(par, q, k, v, g, rows, mask, query_jobs[job - len(key_jobs)], out.q, t)
        finished += 1
    if finished == 0:
        return 0
    return fetch_add(ctl, 8, finished) + finished
