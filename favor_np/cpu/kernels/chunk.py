"""One chunk of positions: its keys are mapped and folded into a state, its queries read that.

A state is ``(c, S, z)`` for each feature r: ``S[r] * 2**c[r] = sum_j phi_r(k_j) v_j`` and ``z[r] *
2**c[r] = sum_j phi_r(k_j)``.  The integer c[r] stays at the largest log2-feature seen or a little
below, so that nothing overflows and some key contributes at least 1/2 to each feature; moving it is
exact, and therefore no bit of an earlier output depends on a later key.

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

from favor_np.cpu.kernels.activate import (
    RAISE_KEYS,
    RAISE_QUERIES,
    activate_block,
    activate_queries,
    measure_queries,
    raise_keys,
    rescale_queries,
)
from favor_np.cpu.kernels.bfloat16 import pairs_along
from favor_np.cpu.kernels.error_bars import (
    count_shares,
    join_groups,
    keep_group,
    rescale_squares,
)
from favor_np.cpu.kernels.floats import IEEE, float_mode, flush_beside, set_float_mode
from favor_np.cpu.kernels.gemm import Prefetch, gemm, gemm_t, gemm_t_fetching, prefetch_rows
from favor_np.cpu.kernels.jit import jit
from favor_np.cpu.kernels.pack import (
    join_rows,
    pack_keys,
    pack_queries,
    pack_values,
    write_rows,
)
from favor_np.cpu.kernels.products import (
    fold_keys,
    load_keys,
    load_state,
    project_keys,
    project_queries,
    read_blocks,
    turn_keys,
    turn_queries,
)
from favor_np.cpu.kernels.simd import (
    load,
    store,
)
from favor_np.cpu.kernels.state import add_rows, add_sums, holds_nothing
from favor_np.cpu.processor import VECTOR_BYTES
from favor_np.cpu.records import READ, WHOLE
from favor_np.cpu.tiles import CHUNK
from favor_np.jobs import (
    BACKWARDS,
    BIAS_ROW,
    BLOCK,
    K_ROW,
    KEYS,
    MASK_ROW,
    QUERIES,
    ROWS,
    SLOT,
    V_ROW,
)

#: Positions of a chunk that are tried together once its keys did not fit together: they may not
#: again.
PIECE = 8
#: A problem: the row of a job in the table, and what belongs to it.
Problem = namedtuple("Problem", "call row q_rows out_rows")


@jit()
def fold_chunk(par, pairs, keys, values, count, s, z, slot, sums, add, next_rows, spare):
    """``S (+)= phi_k.T V`` and ``z (+)= sum phi_k``, while the next rows are prefetched."""
    width, features, fetched, mode = keys.shape[2], sums.shape[1], 0, float_mode()
    for t in range(keys.shape[0]):
        set_float_mode(mode)
        r0 = t % par.signs * (features // par.signs) + t // par.signs * width
        more = spare if add else s[slot, r0 : r0 + width]
        fetched = fold_keys(pairs, keys[t], values, count, more, next_rows, fetched)
        set_float_mode(IEEE)  # whatever the values are: a pipeline adds sums without them
        if add:
            add_rows(s[slot], r0, features + r0, width, spare)
    if add:
        add_sums(z, slot, features, sums, 0, 0)
    else:
        for r in range(features):
            z[slot, r] = sums[0, r]


@jit()
def read_chunk(
    par,
    p,
    row,
    out_row,
    first_row,
    count,
    c,
    s,
    z,
    slot,
    keys,
    groups,
    clean,
    next_rows,
    t,
):
    """One chunk of outputs, from the state and, if par.causal, the chunk's own keys."""
    call, values, w, features_count = p.call, t.values, p.row[BLOCK], p.row[ROWS]
    lanes = VECTOR_BYTES // values.itemsize
    cols = -(-count // lanes) * lanes
    rows = -(-count // 8) * 8
    d = call.q.shape[1]
    blocks, width = keys.shape[0] // par.signs, keys.shape[2]
    half = blocks * width
    pack_queries(par, call, row, step_of(p), first_row, count, w, t)
    turn_queries(t.parts, t)
    first, fetched, empty = True, 0, par.causal and holds_nothing(z, slot, half * par.signs)
    for b in range(blocks):
        features = min(par.filled, features_count - b * par.filled)
        project_queries(t.parts, t, call.query, call.query_parts, w + b, t.raw, cols, d)
        for side in range(par.signs):
            sign, r0 = 1 - 2 * side, side * half + b * width
            if first:
                measure_queries(par, sign, cols, t.raw, features, c, slot, r0, t.top)
            over = activate_queries(
                par, sign, cols, t.raw, features, c, z, slot, r0, t.top, t.phi, t.part
            )
            if over > RAISE_QUERIES:
                measure_queries(par, sign, cols, t.raw, features, c, slot, r0, t.higher)
                if groups is not None:
                    rescale_squares(t.higher, t.top, cols, groups.squares)
                rescale_queries(t.higher, t.top, cols, rows, t.den, t.num, t.scores)
                activate_queries(
                    par, sign, cols, t.raw, features, c, z, slot, r0, t.top, t.phi, t.part
                )
            den, part = t.den, t.part
            for i in range(cols):
                den[0, i] = part[0, i] if first else den[0, i] + part[0, i]
            if not empty:
                state = s[slot, r0 : r0 + width]
                fetched = gemm_t_fetching(
                    t.phi,
                    state,
                    t.num,
                    0,
                    rows,
                    0,
                    state.shape[1],
                    0,
                    width,
                    not first,
                    next_rows,
                    fetched,
                )
            elif first:
                t.num[:] = 0
            if par.causal:
                tile = keys[b * par.signs + side]
                for i in range(0, cols, 2 * lanes):  # keys after these queries are not needed
                    end = min(i + 2 * lanes, cols)
                    middle = min(-(-(i + lanes) // 8) * 8, rows)
                    last = min(-(-end // 8) * 8, rows)
                    gemm(tile, t.phi, t.scores, 0, middle, i, end, 0, width, not first)
                    gemm(tile, t.phi, t.scores, middle, last, i + lanes, end, 0, width, not first)
            if groups is not None:
                count_shares(
                    par, count, first, keys[b * par.signs + side], t.phi, z, slot, r0, groups
                )
            first = False
        if groups is not None:
            if par.causal:
                own_keys(count, cols, rows, values, clean, t)
            keep_group(t, groups, b)
            first = True
    if groups is not None:
        batch = p.row[V_ROW] // int(call.error_bars[3])  # values that share variances
        join_groups(t, groups, count, call, out_row, batch)
        return
    if par.causal:
        own_keys(count, cols, rows, values, clean, t)
    finish_rows(p, out_row, first_row, count, t)


@jit()
def finish_rows(p, out_row, first, count, t):
    """Write the rows of a chunk, or join them with those that are there."""
    num, den, top, square, call = t.num, t.den[0], t.top[0], t.square, p.call
    if p.row[SLOT] == BACKWARDS:
        join_rows(num, den, top, square, -1, first, count, call, out_row)
    else:
        write_rows(num, den, top, square, count, call, out_row)


@jit()
def read_pairs(pairs, par, p, row, out_row, first_row, count, clean, t):
    """The same in bfloat16, without error bars."""
    call, w = p.call, p.row[BLOCK]
    pack_queries(par, call, row, step_of(p), first_row, count, w, t)
    pairs_along(t.rows, CHUNK, t.rows.shape[1], pairs.rows)
    read_blocks(pairs, par, count, call.query, w, t.keys.shape[0] // par.signs, clean, t)
    finish_rows(p, out_row, first_row, count, t)


@jit()
def step_of(p):
    """Which way a problem goes through its rows."""
    return -1 if p.row[SLOT] == BACKWARDS else 1


@jit()
def rows_ahead(step, row, distance, count):
    """The lowest of the next rows, `distance` further on."""
    return row + distance if step > 0 else row - distance - count + 1


@jit()
def read(
    pairs,
    par,
    p,
    g,
    start,
    first,
    count,
    c,
    s,
    z,
    slot,
    keys,
    clean,
    distance,
    next_count,
    t,
):
    """Whether `pairs` is None is known to the compiler; the first rows of a chunk may be left out.

    Meanwhile the next `next_count` queries, `distance` rows on, are prefetched, and the rows of
    their outputs.
    """
    call, step = p.call, step_of(p)
    row, out_row = p.q_rows[g] + step * start, p.out_rows[g] + step * start
    next_row = rows_ahead(step, row, distance, next_count)
    if pairs is None:
        next_out = rows_ahead(step, out_row, distance, next_count)
        next_rows = Prefetch(call.q, next_row, call.out, next_out, next_count)
        read_chunk(
            par, p, row, out_row, first, count, c, s, z, slot, keys, t.groups, clean, next_rows, t
        )
    else:
        prefetch_rows(call.q, next_row, next_count)
        read_pairs(pairs, par, p, row, out_row, first, count, clean, t)


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
def keys_chunk(par, call, row, step, count, mask_row, bias_row, w, c, s, z, slot, keys, t):
    """Pack and map the keys from row on, keeping c above them; how many of them were taken."""
    mask, sums = call.mask, t.sums
    pack_keys(par, call, row, step, count, mask_row, bias_row, w, t)
    accepted = map_keys(
        par, count, call.k.shape[1], call.key, call.key_parts, call.bias, w, c, s, z, slot, keys, t
    )
    for i in range(accepted):
        if t.square[i] == math.inf and (mask_row < 0 or mask[mask_row + i * step]):
            keys[:, i] = math.nan
            sums[:] = math.nan
    return accepted


@jit()
def map_keys(par, count, d, weight, split_weight, bias, w, c, s, z, slot, keys, t):
    """Map packed keys of log-norm t.log_norm, raised by t.bias_exponent; how many were taken."""
    rows, blocks, log_norm = -(-count // 8) * 8, keys.shape[0] // par.signs, t.log_norm
    accepted = count
    fresh = c[slot, 0] < par.nothing // 2  # nothing folded yet: there is no maximum to try
    turn_keys(t.pairs, t.parts, t)
    for attempt in range(2):
        known = attempt == 1 or fresh  # else block by block, while it is in the nearest cache
        if known:
            for b in range(blocks):
                project_keys(
                    t.pairs, t.parts, t, weight, split_weight, w + b, keys[b * par.signs], rows, d
                )
            accepted = raise_keys(
                par,
                rows,
                count,
                keys,
                0,
                blocks,
                log_norm,
                t.bias_exponent,
                bias,
                w,
                c,
                s,
                z,
                slot,
                t.excess,
                t.scale,
            )
            for i in range(accepted, rows):
                log_norm[i] = math.inf
        over = 0
        for b in range(blocks):
            for again in range(1 if known else 2):
                if not known:
                    project_keys(
                        t.pairs,
                        t.parts,
                        t,
                        weight,
                        split_weight,
                        w + b,
                        keys[b * par.signs],
                        rows,
                        d,
                    )
                if (
                    again == 1
                    and raise_keys(
                        par,
                        rows,
                        count,
                        keys,
                        b,
                        b + 1,
                        log_norm,
                        t.bias_exponent,
                        bias,
                        w,
                        c,
                        s,
                        z,
                        slot,
                        t.excess,
                        t.scale,
                    )
                    < count
                ):
                    break
                reach = activate_block(par, rows, keys, b, t, bias, w, c, slot)
                if reach <= RAISE_KEYS:
                    break
            over = max(over, reach)
        if over <= RAISE_KEYS:
            break
    return accepted


@jit()
def piece(start, end, split):
    """How many positions to take next: to the end of the chunk, or few where it had to be split."""
    count = min(CHUNK - start % CHUNK, end - start)
    return min(count, PIECE) if split else count


@jit()
def attend_chunk(par, p, what, start, count, distance, c, s, z, slot, keys, t):
    """Map the keys of a chunk and fold them, or read the chunk, or both; how many keys were taken.

    A FOLD is into a state of the chunk's own.  `distance`: how many rows on those are that are
    prefetched meanwhile.
    """
    call, row, step = p.call, p.row, step_of(p)
    k_row, v_row, w = row[K_ROW] + step * start, row[V_ROW] + step * start, row[BLOCK]
    mask_row = row[MASK_ROW] + step * start if row[MASK_ROW] >= 0 else -1
    bias_row = row[BIAS_ROW] + step * start if row[BIAS_ROW] >= 0 else -1
    reads = what == READ or (what == WHOLE and par.causal)
    next_count = min(CHUNK, row[KEYS] - start - distance)
    taken = count
    set_float_mode(IEEE)
    if what != READ:
        taken = keys_chunk(
            par, call, k_row, step, count, mask_row, bias_row, w, c, s, z, slot, keys, t
        )
    next_rows = Prefetch(
        call.k,
        rows_ahead(step, k_row, distance, next_count),
        call.v,
        rows_ahead(step, v_row, distance, next_count),
        next_count,
    )
    if t.pairs is not None:  # nothing below fetches
        prefetch_rows(call.k, next_rows.a_row, next_count)
        prefetch_rows(call.v, next_rows.b_row, next_count)
    clean = pack_values(call.v, v_row, step, taken, t.values, call.mask, mask_row)
    flush_beside(t.values, taken, c, True)
    load_keys(t.pairs, reads, keys, t, -(-count // 8) * 8, clean)
    first = max(row[KEYS] - row[QUERIES] - start, 0)
    if reads and first < taken:
        load_state(t.pairs, par, row[ROWS], c, s, z, slot, keys.shape[2])
        for g in range(p.q_rows.size):
            read(
                t.pairs,
                par,
                p,
                g,
                start,
                first,
                taken,
                c,
                s,
                z,
                slot,
                keys,
                clean,
                distance,
                next_count,
                t,
            )
    # What nobody reads need not be folded: the end of a sequence without a state.
    unread = what == WHOLE and reads and row[SLOT] < 0 and start + taken == row[KEYS]
    if what != READ and not unread:
        fold_chunk(
            par,
            t.pairs,
            keys,
            t.values,
            taken,
            s,
            z,
            slot,
            t.sums,
            what == WHOLE,
            next_rows,
            t.spare,
        )
    return taken
