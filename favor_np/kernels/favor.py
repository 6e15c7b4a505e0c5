"""The fused FAVOR+ kernels: fold keys and values into a state, read it out with queries.

A state is ``(c, S, z)`` for each feature r: ``S[r] * 2**c[r] = sum_j phi_r(k_j) v_j`` and
``z[r] * 2**c[r] = sum_j phi_r(k_j)``.  The integer c[r] stays at the largest log2-feature seen or a
little below, so that nothing overflows and some key contributes at least 1/2 to each feature; moving
it is exact, and therefore no bit of an earlier output depends on a later key.

Everything happens on chunks of CHUNK positions and tiles of up to CHUNK features:

    keys    (C, d) -> pack -> project (C, F) -> activate -> phi_k (C, F)
    queries (C, d) -> pack -> project (F, C) -> activate -> phi_q (F, C)
    num (C, dv) += phi_q.T S + tril(phi_q.T phi_k.T) V,   then   S += phi_k.T V

Keys lie token-major and queries feature-major: then both maxima run along vectors.
Features are numbered sign-major: with antithetic pairs, row ``r`` of W is feature r and, with its
sign turned, feature ``half + r``; one product serves both.
"""

from __future__ import annotations

import math
from collections import namedtuple

import numpy as np

from favor_np.kernels.activate import (
    RAISE_KEYS,
    RAISE_QUERIES,
    activate_keys,
    activate_queries,
    lift_queries,
    measure_queries,
    raise_keys,
)
from favor_np.kernels.bfloat16 import words_along
from favor_np.kernels.gemm import Coming, gemm, gemm_t, gemm_t_fetching, soon
from favor_np.kernels.jit import jit
from favor_np.kernels.jobs import claim, enter, leave
from favor_np.kernels.pack import (
    CHUNK,
    Map,
    Result,
    cut,
    pack_keys,
    pack_queries,
    pack_values,
    write_rows,
)
from favor_np.kernels.products import (
    begin_unit,
    carve_planes,
    carve_words,
    end_unit,
    fold_keys,
    load_keys,
    load_state,
    project_keys,
    project_queries,
    read_blocks,
    turn_keys,
    turn_queries,
)
from favor_np.kernels.simd import (
    VECTOR_BYTES,
    load,
    store,
)
from favor_np.kernels.spread import (
    batch_of,
    carve_groups,
    count_shares,
    join_groups,
    keep_group,
    lift_squares,
)
from favor_np.kernels.step import step_token

#: What a kernel needs to know about the feature map and the call.
Parameters = namedtuple(
    "Parameters",
    "kind signs filled key_norm affine factored kernel_epsilon limit far masked idle span causal",
)
#: The same as an array of one: a tuple takes four times as long from Python to a kernel.
CONSTANTS = np.dtype(
    [(name, np.int64) for name in ("kind", "signs", "filled", "idle", "span")]
    + [(name, np.float64) for name in ("key_norm", "kernel_epsilon", "limit", "far", "masked")]
    + [(name, np.bool_) for name in ("affine", "factored", "causal")],
    align=True,
)
#: The tiles a thread works on, cut from its workspace.
Tiles = namedtuple(
    "Tiles",
    "rows columns raw phi values num spare scores keys height share den part others sums scale token "
    "square stretched top higher excess words planes",
)


@jit()
def parameters(constants):
    """The parameters that an array of CONSTANTS holds."""
    p = constants[0]
    return Parameters(p.kind, p.signs, p.filled, p.key_norm, p.affine, p.factored, p.kernel_epsilon,
                      p.limit, p.far, p.masked, p.idle, p.span, p.causal)  # fmt: skip


@jit()
def carve(par, unit, cut_weight, floats, ints, d, vcols, width, blocks):
    """Cut the tiles from one thread's workspace; ``plan.layout`` says how much they need."""
    lanes = VECTOR_BYTES // floats.itemsize
    dcols = -(-d // lanes) * lanes
    tiles = blocks * par.signs
    rows, at = cut(floats, 0, CHUNK, dcols)
    columns, at = cut(floats, at, dcols, CHUNK)
    raw, at = cut(floats, at, width, CHUNK)
    phi, at = cut(floats, at, width, CHUNK)
    values, at = cut(floats, at, CHUNK, vcols)
    num, at = cut(floats, at, CHUNK, vcols)
    spare, at = cut(floats, at, CHUNK, vcols)
    scores, at = cut(floats, at, CHUNK, CHUNK)
    flat, at = cut(floats, at, tiles * CHUNK, width)
    height, at = cut(floats, at, 1, CHUNK)
    share, at = cut(floats, at, 1, CHUNK)
    den, at = cut(floats, at, 1, CHUNK)
    part, at = cut(floats, at, 1, CHUNK)
    others, at = cut(floats, at, 1, CHUNK)
    sums, at = cut(floats, at, 1, tiles * width)
    scale, at = cut(floats, at, 1, tiles * width)
    token, at = cut(floats, at, 1, tiles * width)
    square, at = cut(floats, at, 1, CHUNK * 8 // floats.itemsize)
    stretched, at = cut(floats, at, CHUNK, dcols)
    top, mark = cut(ints, 0, 1, CHUNK)
    higher, mark = cut(ints, mark, 1, CHUNK)
    excess, mark = cut(ints, mark, CHUNK, lanes)
    words = carve_words(unit, cut_weight, floats, at, ints, mark, d, vcols, width, tiles)
    planes = carve_planes(cut_weight, floats, at, d)
    keys = flat.reshape(tiles, CHUNK, width)
    return Tiles(rows, columns, raw, phi, values, num, spare, scores, keys, height[0], share[0], den, part, others,
                 sums, scale, token, square[0].view(np.float64), stretched, top, higher, excess, words,
                 planes)  # fmt: skip


@jit()
def fold_chunk(par, words, keys, values, count, s, z, slot, sums, coming):
    """S += phi_k.T V and z += sum phi_k, while rows are fetched that are coming."""
    width, half = keys.shape[2], keys.shape[0] // par.signs * keys.shape[2]
    done = 0
    for t in range(keys.shape[0]):
        r0 = t % par.signs * half + t // par.signs * width
        state = s[slot, r0 : r0 + width]
        done = fold_keys(words, keys[t], values, count, state, coming, done)
    for r in range(z.shape[1]):
        z[slot, r] += sums[0, r]


@jit()
def read_chunk(
    par,
    q,
    row,
    count,
    fm,
    w,
    features_count,
    c,
    s,
    z,
    slot,
    keys,
    values,
    clean,
    out,
    out_row,
    spread,
    batch,
    groups,
    following,
    t,
):
    """One chunk of outputs: the state's part and, where par.causal, that of the chunk's own keys.

    So many queries are following, and are fetched meanwhile, with where their outputs go.
    """
    lanes = VECTOR_BYTES // q.itemsize
    cols = -(-count // lanes) * lanes
    rows = -(-count // 8) * 8
    d = q.shape[1]
    blocks, width = keys.shape[0] // par.signs, keys.shape[2]
    half = blocks * width
    pack_queries(par, q, row, 1, count, fm, w, t)
    turn_queries(t.planes, t)
    first, done = True, 0
    coming = Coming(q, row + count, out.rows, out_row + count, following)
    for b in range(blocks):
        features = min(par.filled, features_count - b * par.filled)
        project_queries(t.planes, t, fm.query, fm.query_planes, w + b, t.raw, cols, d)
        for side in range(par.signs):
            sign, r0 = 1 - 2 * side, side * half + b * width
            if first:
                measure_queries(par, sign, cols, t.raw, features, c, slot, r0, t.top)
            over = activate_queries(
                par, sign, cols, t.raw, features, c, z, slot, r0, t.top, t.phi, t.part
            )
            if over > RAISE_QUERIES:
                measure_queries(par, sign, cols, t.raw, features, c, slot, r0, t.higher)
                if spread is not None:
                    lift_squares(t.higher, t.top, cols, groups.squares)
                lift_queries(t.higher, t.top, cols, rows, t.den, t.num, t.scores)
                activate_queries(
                    par, sign, cols, t.raw, features, c, z, slot, r0, t.top, t.phi, t.part
                )
            for i in range(cols):
                t.den[0, i] = t.part[0, i] if first else t.den[0, i] + t.part[0, i]
            state = s[slot, r0 : r0 + width]
            done = gemm_t_fetching(t.phi, state, t.num, 0, rows, 0, state.shape[1], 0, width,
                                   not first, coming, done)  # fmt: skip
            if par.causal:
                tile = keys[b * par.signs + side]
                for i in range(0, cols, 2 * lanes):  # keys after these queries are not needed
                    end = min(i + 2 * lanes, cols)
                    middle = min(-(-(i + lanes) // 8) * 8, rows)
                    last = min(-(-end // 8) * 8, rows)
                    gemm(tile, t.phi, t.scores, 0, middle, i, end, 0, width, not first)
                    gemm(tile, t.phi, t.scores, middle, last, i + lanes, end, 0, width, not first)
            if spread is not None:
                count_shares(
                    par, count, first, keys[b * par.signs + side], t.phi, z, slot, r0, groups
                )
            first = False
        if spread is not None:
            if par.causal:
                own_keys(count, cols, rows, values, clean, t)
            keep_group(t, groups, b)
            first = True
    if spread is not None:
        join_groups(t, groups, count, out, out_row, spread, batch)
        return
    if par.causal:
        own_keys(count, cols, rows, values, clean, t)
    write_rows(t.num, t.den[0], t.top[0], t.square, count, out, out_row)


@jit()
def read_words(words, par, q, row, count, fm, w, clean, out, out_row, t):
    """The same in bfloat16, without error bars."""
    pack_queries(par, q, row, 1, count, fm, w, t)
    words_along(t.rows, CHUNK, t.rows.shape[1], words.rows)
    read_blocks(words, par, count, fm.query, w, t.keys.shape[0] // par.signs, clean, t)
    write_rows(t.num, t.den[0], t.top[0], t.square, count, out, out_row)


@jit()
def read(words, par, q, row, count, fm, w, features, c, s, z, slot, clean, out, out_row, spread, batch,
         groups, following, t):  # fmt: skip
    """Whether `words` is None is known to the compiler."""
    if words is None:
        read_chunk(par, q, row, count, fm, w, features, c, s, z, slot, t.keys, t.values, clean, out,
                   out_row, spread, batch, groups, following, t)  # fmt: skip
    else:
        soon(q, row + count, following)
        read_words(words, par, q, row, count, fm, w, clean, out, out_row, t)


@jit()
def own_keys(count, cols, rows, values, clean, t):
    """num and den of the chunk's own keys, from scores[j, i] = phi_k[j] . phi_q[i], j <= i."""
    lanes = VECTOR_BYTES // values.itemsize
    for j in range(rows):
        t.scores[j, : min(j, cols)] = 0
    for i in range(0, cols, lanes):
        total = load(t.den, 0, i)
        for j in range(min(i + lanes, rows)):
            total = total + load(t.scores, j, i)
        store(t.den, 0, i, total)
    own_values(t.scores, values, clean, count, t.num, t.spare)


@jit()
def own_values(scores, values, clean, count, num, spare):
    """``num[i] += sum_j<=i scores[j, i] values[j]``, scores[j, i] being zero for j > i."""
    if clean:
        for i in range(0, count, 8):
            gemm_t(scores, values, num, i, i + 8, 0, num.shape[1], 0, i + 8, True)
    else:  # zero times infinity must not reach the rows before it
        for i in range(count):
            block = i // 8 * 8
            gemm_t(scores, values, spare, block, block + 8, 0, num.shape[1], 0, i + 1, False)
            for x in range(num.shape[1]):
                num[i, x] += spare[i, x]


@jit()
def keys_chunk(par, k, row, count, mask, mask_row, fm, w, clock, rate, c, s, z, slot, t):
    """Pack and map the keys from row on, keeping c above them; how many of them were taken.

    Their log2-features are raised by clock, and from one to the next by rate: so earlier keys decay.
    """
    lift = pack_keys(par, k, row, count, mask, mask_row, fm, w, clock, rate, t)
    accepted = map_keys(par, count, k.shape[1], lift, fm.key, fm.key_planes, fm.bias, w, c, s, z, slot,
                        t)  # fmt: skip
    for i in range(accepted):
        if t.square[i] == math.inf and (mask_row < 0 or mask[mask_row + i]):
            t.keys[:, i] = math.nan
            t.sums[:] = math.nan
    return accepted


@jit()
def map_keys(par, count, d, lift, weight, cut_weight, bias, w, c, s, z, slot, t):
    """Features of the packed keys, of log2 less t.height and above it by lift; how many were taken."""
    rows = -(-count // 8) * 8
    blocks, width = t.keys.shape[0] // par.signs, t.keys.shape[2]
    half = blocks * width
    accepted = count
    fresh = c[slot, 0] <= -par.far * 3  # nothing folded yet: there is no maximum to try
    turn_keys(t.words, t.planes, t)
    for attempt in range(2):
        known = attempt == 1 or fresh  # else block by block, while it is in the nearest cache
        if known:
            for b in range(blocks):
                project_keys(t.words, t.planes, t, weight, cut_weight, w + b,
                             t.keys[b * par.signs], rows, d)  # fmt: skip
            accepted = raise_keys(
                par, rows, count, t.keys, t.height, lift, bias, w, c, s, z, slot, t.excess, t.scale
            )
            for i in range(accepted, rows):
                t.height[i] = par.masked
        over = 0
        for b in range(blocks):
            tile = b * par.signs
            if not known:
                project_keys(t.words, t.planes, t, weight, cut_weight, w + b, t.keys[tile], rows,
                             d)  # fmt: skip
            for side in range(par.signs - 1, -1, -1):
                r0 = side * half + b * width
                reach = activate_keys(
                    par, 1 - 2 * side, rows, t.keys[tile], t.height, lift, bias, w + b, c, slot, r0,
                    t.keys[tile + side], t.share, t.sums,
                )  # fmt: skip
                over = max(over, reach)
        if over <= RAISE_KEYS:
            break
    return accepted


@jit()
def begin(par, job, me, c, s, z, width):
    """The slot of a job's state; if it has none, that of this thread, without a key."""
    if job[5] >= 0:
        return job[5]
    tiles = c.shape[1] // width
    blocks = tiles // par.signs
    for b in range(tiles):
        features = min(par.filled, job[7] - b % blocks * par.filled)
        for r in range(width):
            c[me, b * width + r] = 4 * int(par.far) * (-1 if r < features else par.idle)
    s[me] = 0
    z[me] = 0
    return me


@jit()
def clock_of(clocks, job):
    """By how much the first key of a job is raised, and by how much more every further one."""
    if clocks.size > 0:
        return clocks[job, 0], clocks[job, 1]
    return 0.0, 0.0


@jit()
def attend_one(par, q, k, v, mask, fm, job, q_rows, out_rows, clock, rate, c, s, z, slot,
               out, spread, groups, t):  # fmt: skip
    """Everything for one problem: its keys and values, one state, its group of queries.

    Causal queries before position `unread` are another job's, which folds the same keys as this one.
    """
    k_row, v_row, mask_row, keys_count = job[0], job[1], job[2], job[3]
    w, queries_count, features, unread = job[4], job[6], job[7], job[8]
    batch = batch_of(spread, v, v_row)
    start = 0
    while start < keys_count:
        reads = par.causal and start >= unread
        count = min(CHUNK - start % CHUNK, keys_count - start)
        m_row = mask_row + start if mask_row >= 0 else -1
        taken = keys_chunk(par, k, k_row + start, count, mask, m_row, fm, w,
                           clock + start * rate, rate, c, s, z, slot, t)  # fmt: skip
        following = min(CHUNK, keys_count - start - count)
        coming = Coming(k, k_row + start + count, v, v_row + start + count, following)
        if t.words is not None:  # nothing below fetches
            soon(k, coming.a_row, following)
            soon(v, coming.b_row, following)
        clean = pack_values(v, v_row + start, 1, taken, t.values, mask, m_row)
        load_keys(t.words, reads, t, -(-count // 8) * 8, clean)
        if reads:
            load_state(t.words, par, features, c, s, z, slot, t.keys.shape[2])
            for g in range(q_rows.size):
                read(t.words, par, q, q_rows[g] + start, taken, fm, w, features, c, s, z, slot, clean,
                     out, out_rows[g] + start, spread, batch, groups, following, t)  # fmt: skip
        fold_chunk(par, t.words, t.keys, t.values, taken, s, z, slot, t.sums, coming)
        start += taken
    if not par.causal:
        load_state(t.words, par, features, c, s, z, slot, t.keys.shape[2])
        for g in range(q_rows.size):
            for start in range(0, queries_count, CHUNK):
                following = min(CHUNK, queries_count - start - CHUNK)
                read(t.words, par, q, q_rows[g] + start, min(CHUNK, queries_count - start), fm, w,
                     features, c, s, z, slot, True, out, out_rows[g] + start, spread, batch, groups,
                     following, t)  # fmt: skip


@jit()
def attend_jobs(par, q, k, v, mask, fm, jobs, q_rows, out_rows, clocks, out, room, spread, unit,
                c, s, z, floats, ints, ctl, n):  # fmt: skip
    """What all the kernels do; what of `spread`, `unit` and `fm` is None is known to the compiler.

    With a unit products are in bfloat16 or, if the map's weights are cut into planes, projections are
    products of planes.
    """
    me = enter(ctl)
    width = fm.key.shape[2]
    blocks = c.shape[1] // (width * par.signs)
    t = carve(par, unit, fm.key_planes, floats[me], ints[me], q.shape[1], s.shape[2], width, blocks)
    groups = carve_groups(spread, room, me, blocks, s.shape[2], width)
    finished = 0
    while True:
        job = claim(ctl)
        if job >= n:
            break
        row = jobs[job]
        slot = begin(par, row, me, c, s, z, width)
        clock, rate = clock_of(clocks, job)
        single = par.causal and row[3] <= 1 and row[2] < 0 and q_rows.shape[1] == 1
        if single and spread is None and t.words is None:
            step_token(par, q, q_rows[job, 0], k, row[0], v, row[1], fm, row[4], row[7], clock,
                       c, s, z, slot, out, out_rows[job, 0], t)  # fmt: skip
        else:
            begin_unit(unit)
            attend_one(par, q, k, v, mask, fm, row, q_rows[job], out_rows[job], clock, rate, c, s, z,
                       slot, out, spread, groups, t)  # fmt: skip
            end_unit(unit)
        finished += 1
    return leave(ctl, finished)


@jit(cache=True)
def attend(constants, q, k, v, mask, query, key, bias, affine, jobs, q_rows, out_rows, clocks,
           rows, weights, tops, c, s, z, floats, ints, ctl, n):  # fmt: skip
    """Take jobs until none is left; how many are finished by now."""
    fm = Map(query, key, bias, affine, None, None)
    return attend_jobs(parameters(constants), q, k, v, mask, fm, jobs, q_rows, out_rows, clocks,
                       Result(rows, weights, tops), None, None, None, c, s, z, floats, ints, ctl,
                       n)  # fmt: skip


@jit(cache=True)
def attend_spread(constants, q, k, v, mask, query, key, bias, affine, jobs, q_rows, out_rows, clocks,
                  rows, weights, tops, room, spread, c, s, z, floats, ints, ctl, n):  # fmt: skip
    """The same, and how far the groups of features are apart: each block of the map is one.

    There is room for them for each thread.
    """
    fm = Map(query, key, bias, affine, None, None)
    return attend_jobs(parameters(constants), q, k, v, mask, fm, jobs, q_rows, out_rows, clocks,
                       Result(rows, weights, tops), room, spread, None, c, s, z, floats, ints, ctl,
                       n)  # fmt: skip


@jit(cache=True)
def attend_words(constants, q, k, v, mask, query, key, bias, affine, unit, jobs, q_rows, out_rows,
                 clocks, rows, weights, tops, c, s, z, floats, ints, ctl, n):  # fmt: skip
    """The same as `attend`, its products in bfloat16: `query` and `key` are words."""
    fm = Map(query, key, bias, affine, None, None)
    return attend_jobs(parameters(constants), q, k, v, mask, fm, jobs, q_rows, out_rows, clocks,
                       Result(rows, weights, tops), None, None, unit, c, s, z, floats, ints, ctl,
                       n)  # fmt: skip


@jit(cache=True)
def attend_planes(constants, q, k, v, mask, query, key, bias, affine, query_planes, key_planes, unit,
                  jobs, q_rows, out_rows, clocks, rows, weights, tops, c, s, z, floats, ints, ctl,
                  n):  # fmt: skip
    """The same as `attend`, with projections from the matrix unit: no less exact, and faster."""
    fm = Map(query, key, bias, affine, query_planes, key_planes)
    return attend_jobs(parameters(constants), q, k, v, mask, fm, jobs, q_rows, out_rows, clocks,
                       Result(rows, weights, tops), None, None, unit, c, s, z, floats, ints, ctl,
                       n)  # fmt: skip
