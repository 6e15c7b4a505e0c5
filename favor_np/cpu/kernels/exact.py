"""Exact softmax attention by the same read: the keys of a tile are its features.

With one feature a key (phi_q[j] = exp2(q . k_j), S = V, z = 1) the read of ``favor`` is softmax
attention with a running maximum.  Blocks of queries pass over the keys tile by tile; nothing of
size L x L exists.
"""

from __future__ import annotations

import math
from collections import namedtuple

import numpy as np

from favor_np.cpu.kernels.activate import (
    RAISE_QUERIES,
    activate_queries,
    lift_queries,
    measure_queries,
    strip_features,
)
from favor_np.cpu.kernels.bfloat16 import (
    PARTS,
    STRIP,
    add_nonfinite,
    finite_pairs,
    gemm_bf16x3,
    gemm_pairs,
    pairs_along,
    pairs_down,
    pairs_for,
    split_along,
    split_down,
    turn_rows,
)
from favor_np.cpu.kernels.chunk import own_values
from favor_np.cpu.kernels.floats import flush_beside
from favor_np.cpu.kernels.gemm import gemm_t, prefetch_rows, project_t
from favor_np.cpu.kernels.jit import jit
from favor_np.cpu.kernels.jobs import TROUBLE, claim, enter, leave, report
from favor_np.cpu.kernels.pack import CHUNK, Result, across, cut, pack, pack_values, write_rows
from favor_np.cpu.kernels.products import load_tile_config, release_tiles, seen_by
from favor_np.cpu.kernels.simd import VECTOR_BYTES, load, sum_lanes
from favor_np.jobs import K_ROW, KEYS, MASK_ROW, OUT_ROW, Q_ROW, QUERIES, START, V_ROW

#: Query tiles that share one packed tile of keys.
GROUP = 16

#: ``kind`` and ``kernel_epsilon`` are what the activation of a positive map expects.
ExactParameters = namedtuple("ExactParameters", "kind kernel_epsilon scale limit far masked causal")
ExactTiles = namedtuple(
    "ExactTiles",
    "rows keys values raw phi across num spare den part ones longest square key_square "
    "c top higher pairs parts",
)
#: In bfloat16, query by query: packed queries and features as left factors, keys (first as `rows`)
#: and values as right ones; the sums of features by lanes, of all tiles of queries and of a strip.
ExactPairs = namedtuple("ExactPairs", "queries rows keys values phi sums part")
#: For logits from the matrix unit: packed queries as right factors and keys as left one, split into
#: parts.
ExactParts = namedtuple("ExactParts", "queries keys")


@jit()
def carve_exact_pairs(config, floats, at, d, vcols):
    """Cut the tiles for pairs, or none."""
    if config is None:
        return None
    lanes = VECTOR_BYTES // floats.itemsize
    depth = pairs_for(d)
    queries, at = cut(floats, at, GROUP * CHUNK, depth)
    rows, at = cut(floats, at, CHUNK, depth)
    keys, at = cut(floats, at, depth, CHUNK)
    values, at = cut(floats, at, CHUNK // 2, vcols)
    phi, at = cut(floats, at, STRIP, CHUNK // 2)
    sums, at = cut(floats, at, GROUP * CHUNK, lanes)
    part, at = cut(floats, at, STRIP, lanes)
    queries[:], rows[:] = 0, 0  # what is not written to, and another call may have
    return ExactPairs(queries, rows, keys, values, phi, sums, part)


@jit()
def carve_exact_parts(split_config, floats, at, d):
    """Cut the tiles for parts, or none."""
    if split_config is None:
        return None
    depth = PARTS * pairs_for(d)
    queries, at = cut(floats, at, GROUP * depth, CHUNK)
    keys, at = cut(floats, at, CHUNK, depth)
    return ExactParts(queries.reshape(GROUP, depth, CHUNK), keys)


@jit()
def carve_exact(floats, ints, config, split_config, d, vcols):
    """Cut the tiles from one thread's workspace."""
    lanes = VECTOR_BYTES // floats.itemsize
    dcols = -(-d // lanes) * lanes
    doubles = 8 // floats.itemsize
    rows, at = cut(floats, 0, CHUNK, dcols)
    keys, at = cut(floats, at, dcols, CHUNK)
    values, at = cut(floats, at, CHUNK, vcols)
    raw, at = cut(floats, at, CHUNK, CHUNK)
    phi, at = cut(floats, at, CHUNK, CHUNK)
    across, at = cut(floats, at, GROUP * dcols, CHUNK)
    num, at = cut(floats, at, GROUP * CHUNK, vcols)
    spare, at = cut(floats, at, CHUNK, vcols)
    den, at = cut(floats, at, GROUP, CHUNK)
    part, at = cut(floats, at, 1, CHUNK)
    ones, at = cut(floats, at, 1, CHUNK)
    longest, at = cut(floats, at, 1, CHUNK * doubles)  # in whole cache lines, as all the rest
    square, at = cut(floats, at, 1, GROUP * CHUNK * doubles)
    key_square, at = cut(floats, at, 1, CHUNK * doubles)
    pairs = carve_exact_pairs(config, floats, at, d, vcols)
    parts = carve_exact_parts(split_config, floats, at, d)
    c, mark = cut(ints, 0, 1, CHUNK)
    top, mark = cut(ints, mark, GROUP, CHUNK)
    higher, mark = cut(ints, mark, 1, CHUNK)
    return ExactTiles(
        rows, keys, values, raw, phi, across.reshape(GROUP, dcols, CHUNK),
        num.reshape(GROUP, CHUNK, vcols), spare, den, part, ones,
        longest[0].view(np.float64), square.view(np.float64).reshape(GROUP, CHUNK),
        key_square[0].view(np.float64), c, top, higher, pairs, parts,
    )  # fmt: skip


@jit()
def load_queries(pairs, parts, t, g):
    """Transpose the packed queries of tile g; their sums start at zero."""
    t.den[g] = 0
    t.num[g] = 0
    if pairs is not None:
        rows = slice(g * CHUNK, (g + 1) * CHUNK)
        pairs_along(t.rows, CHUNK, t.rows.shape[1], pairs.queries[rows])
        pairs.sums[rows] = 0
    else:
        across(t.rows, t.across[g])
    if parts is not None:
        split_down(t.across[g], t.rows.shape[1], CHUNK, parts.queries[g])


@jit()
def load_keys(pairs, parts, t):
    """The same of packed keys."""
    if pairs is not None:
        turn_rows(t.rows, pairs.rows, pairs.keys)
    elif parts is not None:
        split_along(t.rows, CHUNK, t.rows.shape[1], parts.keys)
    else:
        across(t.rows, t.keys)


@jit()
def logits(parts, g, cols, d, t):
    """The logits (F, C) of a tile of keys and one of queries."""
    if parts is None:
        project_t(t.keys, t.across[g], t.raw, CHUNK, cols, d)
    else:
        depth = parts.keys.shape[1] // PARTS
        gemm_bf16x3(parts.keys, parts.queries[g], t.raw, CHUNK, cols, depth, False)


@jit()
def load_values(pairs, t, clean):
    """Prepare a tile of values."""
    if pairs is None:
        return
    if clean:
        pairs_down(t.values, CHUNK, t.values.shape[1], pairs.values)
    else:
        finite_pairs(t.values, t.spare, pairs.values)


@jit()
def longest_of(squares, limit):
    """The largest finite squared norm; infinity if a row was longer than limit."""
    longest = 0.0
    for square in squares:
        if square < math.inf:
            longest = max(longest, square if square < limit * limit else math.inf)
    return longest


@jit()
def pack_queries(par, q, row, count, t):
    """Pack a block of queries, scaled and transposed; its sums start at zero."""
    factor = q.dtype.type(par.scale)
    for g in range(-(-count // CHUNK)):
        here = min(CHUNK, count - g * CHUNK)
        pack(q, row + g * CHUNK, 1, here, t.rows, par.limit, t.square[g])
        t.longest[g] = longest_of(t.square[g, :here], par.limit) * par.scale * par.scale
        for i in range(here):
            for x in range(t.rows.shape[1]):
                t.rows[i, x] *= factor
        load_queries(t.pairs, t.parts, t, g)


@jit()
def pack_keys(par, k, row, count, mask, mask_row, t):
    """Pack a tile of keys; the longest squared norm and the first key that is not finite."""
    pack(k, row, 1, count, t.rows, par.limit, t.key_square)
    bad = CHUNK
    for j in range(CHUNK):
        seen = j < count and (mask_row < 0 or mask[mask_row + j])
        if j < count and not seen:  # whatever it is: no logit of it may be large
            t.key_square[j] = 0
            for x in range(k.shape[1]):
                t.rows[j, x] = 0
        if seen and t.key_square[j] == math.inf:
            seen, bad = False, min(bad, j)
        t.ones[0, j] = 1 if seen else 0
        t.c[0, j] = 0 if seen else -4 * int(par.far)
    load_keys(t.pairs, t.parts, t)
    return longest_of(t.key_square[:count], par.limit), bad


@jit()
def read_tile(par, g, count, d, first, diagonal, clean, t):
    """Add a tile of keys to the sums of one tile of queries."""
    lanes = VECTOR_BYTES // t.rows.itemsize
    cols = -(-count // lanes) * lanes
    rows = -(-count // 8) * 8
    top, den, num = t.top[g : g + 1], t.den[g : g + 1], t.num[g]
    logits(t.parts, g, cols, d, t)
    if diagonal:
        for j in range(CHUNK):
            t.raw[j, : min(j, cols)] = -par.masked
    if first:
        measure_queries(par, 1, cols, t.raw, CHUNK, t.c, 0, 0, top)
    over = activate_queries(par, 1, cols, t.raw, CHUNK, t.c, t.ones, 0, 0, top, t.phi, t.part)
    if over > RAISE_QUERIES:
        measure_queries(par, 1, cols, t.raw, CHUNK, t.c, 0, 0, t.higher)
        lift_queries(t.higher, top, cols, 0, den, num, t.raw)
        activate_queries(par, 1, cols, t.raw, CHUNK, t.c, t.ones, 0, 0, top, t.phi, t.part)
    for i in range(count):
        den[0, i] += t.part[0, i]
    if diagonal:
        own_values(t.phi, t.values, clean, count, num, t.spare)
    else:
        gemm_t(t.phi, t.values, num, 0, rows, 0, num.shape[1], 0, CHUNK, True)


@jit()
def read_pairs(pairs, par, g, count, first, diagonal, clean, t):
    """The same in bfloat16, strip by strip."""
    top, num = t.top[g], t.num[g]
    depth = pairs.queries.shape[1]
    for i in range(0, count, STRIP):
        seen = seen_by(i) if diagonal else CHUNK
        raw, rows = t.raw[:STRIP], slice(g * CHUNK + i, g * CHUNK + i + STRIP)
        gemm_pairs(pairs.queries[rows], pairs.keys, raw, STRIP, seen, depth, False)
        if diagonal:
            for r in range(STRIP):
                raw[r, i + r + 1 : seen] = -par.masked
        sums, out = pairs.sums[rows], num[i : i + STRIP]
        strip_features(par, 1, raw, seen, t.c, t.ones, first, top[i : i + STRIP], t.higher[0, :STRIP],
                       sums, out, t.spare[:STRIP], pairs.phi, pairs.part)  # fmt: skip
        gemm_pairs(pairs.phi, pairs.values, out, STRIP, out.shape[1], seen // 2, True)
        if not clean:
            add_nonfinite(pairs.phi, i, out, diagonal, raw, t.values)


@jit()
def read(pairs, par, g, count, d, first, diagonal, clean, t):
    """Whether `pairs` is None is known to the compiler."""
    if pairs is None:
        read_tile(par, g, count, d, first, diagonal, clean, t)
    else:
        read_pairs(pairs, par, g, count, first, diagonal, clean, t)


@jit()
def add_lanes(pairs, count, g, t):
    """The denominators of a tile of queries, where they were summed by lanes."""
    if pairs is None:
        return
    for i in range(count):
        t.den[g, i] = sum_lanes(load(pairs.sums, g * CHUNK + i, 0))


@jit()
def exact_block(par, q, k, v, mask, job, out, t):
    """One block of up to GROUP tiles of queries against all keys they may see.

    False if a logit may be too large for this precision: the rows it belongs to are then wrong.
    """
    fits = True
    q_row, k_row, v_row, mask_row = job[Q_ROW], job[K_ROW], job[V_ROW], job[MASK_ROW]
    out_row, count, keys_count, offset = job[OUT_ROW], job[QUERIES], job[KEYS], job[START]
    pack_queries(par, q, q_row, count, t)
    bad = keys_count
    end = min(keys_count, offset + count) if par.causal else keys_count
    for start in range(0, end, CHUNK):
        here = min(CHUNK, keys_count - start)
        m_row = mask_row + start if mask_row >= 0 else -1
        longest, first_bad = pack_keys(par, k, k_row + start, here, mask, m_row, t)
        clean = pack_values(v, v_row + start, 1, here, t.values, mask, m_row)
        flush_beside(t.values, here, t.top, True)
        next_count = min(CHUNK, keys_count - start - here)
        prefetch_rows(k, k_row + start + here, next_count)
        prefetch_rows(v, v_row + start + here, next_count)
        load_values(t.pairs, t, clean)
        if first_bad < CHUNK:
            bad = min(bad, start + first_bad)
        for g in range(-(-count // CHUNK)):
            position = offset + g * CHUNK
            if par.causal and position < start:
                continue
            fits = fits and t.longest[g] * longest <= par.far * par.far
            read(t.pairs, par, g, min(CHUNK, count - g * CHUNK), k.shape[1], start == 0,
                 par.causal and position == start, clean, t)  # fmt: skip
    for g in range(-(-count // CHUNK)):
        here = min(CHUNK, count - g * CHUNK)
        add_lanes(t.pairs, here, g, t)
        for i in range(here):
            if bad < keys_count and (not par.causal or offset + g * CHUNK + i >= bad):
                t.square[g, i] = math.inf
            if t.square[g, i] == math.inf:  # in the gradient NaN passes through the denominator
                t.den[g, i] = math.nan
        write_rows(t.num[g], t.den[g], t.top[g], t.square[g], here, out, out_row + g * CHUNK)
    return fits


@jit()
def attend_blocks(par, q, k, v, mask, jobs, out, config, split_config, floats, ints, ctl, n):
    """The body of the kernels; how many jobs are finished by now.  Reports where float64 is needed.

    Which of `config` and `split_config` are None the compiler knows: each kernel below is this
    function with one of them, or with none.

    Parameters
    ----------
    par : ExactParameters
    q, k, v : (N, d), (N_k, d) and (N_k, dv) arrays
        The rows of all problems, one behind the other: where those of a job begin says the table.
    mask : (N_k,) array of bool
        Which keys take part, in jobs that have a MASK_ROW.
    jobs : (jobs, 14) array of int64
        Blocks of up to ``GROUP * CHUNK`` queries.  The columns are named in ``favor_np.jobs``.
    out : Result
        Rows (N, dv) and, unless these are empty, the denominators (N,) and their exponents.
    config, split_config : TILE_CONFIG or None
        With the first products are in bfloat16, with the second logits are products of three parts.
    floats, ints : (threads, ...) arrays
        Workspaces.
    ctl, n : array of int64, int
        The counters by which threads share the jobs, and how many jobs there are.
    """
    me, mode = enter(ctl)
    lanes = VECTOR_BYTES // q.itemsize
    t = carve_exact(
        floats[me], ints[me], config, split_config, q.shape[1], -(-v.shape[1] // lanes) * lanes
    )
    load_tile_config(config)
    load_tile_config(split_config)
    finished = 0
    while True:
        job = claim(ctl)
        if job >= n:
            break
        if not exact_block(par, q, k, v, mask, jobs[job], out, t):
            report(ctl, TROUBLE)
        finished += 1
    release_tiles(config)
    release_tiles(split_config)
    return leave(ctl, finished, mode)


@jit(cache=True)
def attend_exact(par, q, k, v, mask, jobs, rows, weights, tops, floats, ints, ctl, n):
    """In the precision of the arrays."""
    return attend_blocks(par, q, k, v, mask, jobs, Result(rows, weights, tops, ctl), None, None, floats,
                         ints, ctl, n)  # fmt: skip


@jit(cache=True)
def attend_exact_bf16(par, q, k, v, mask, jobs, rows, weights, tops, config, floats, ints, ctl, n):
    """In bfloat16."""
    return attend_blocks(par, q, k, v, mask, jobs, Result(rows, weights, tops, ctl), config, None, floats,
                         ints, ctl, n)  # fmt: skip


@jit(cache=True)
def attend_exact_bf16x3(
    par, q, k, v, mask, jobs, rows, weights, tops, config, floats, ints, ctl, n
):
    """As `attend_exact`, with logits from the matrix unit: no less exact, and faster."""
    return attend_blocks(par, q, k, v, mask, jobs, Result(rows, weights, tops, ctl), None, config, floats,
                         ints, ctl, n)  # fmt: skip
