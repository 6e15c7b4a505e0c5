"""Exact softmax attention by the same read: the keys of a tile are its features.

With one feature a key (phi_q[j] = exp2(q . k_j), S = V, z = 1) the read of ``favor`` is softmax
attention with a running maximum.  Blocks of queries pass over the keys tile by tile; nothing of
size L x L exists.

Query i sees the keys from i - left to i + right; causal attention has right = 0.  Tiles of keys
that no query of a tile sees are not even read.  In the others row i sees the keys
first + i <= j < last + i: only where that cuts into a tile, logits become minus infinity one by
one.

By bias and decay the weight of a key is multiplied with share * 2**c: the integer goes where those
of logits are, and the share, from 1/2 to 1, multiplies the value and counts in the denominator.
"""

from __future__ import annotations

import math

from favor_np.cpu.kernels.activate import RAISE_QUERIES, rescale_queries, strip_features
from favor_np.cpu.kernels.bfloat16 import (
    add_nonfinite,
    finite_pairs,
    gemm_bf16x3,
    gemm_pairs,
    pairs_along,
    pairs_down,
    split_along,
    split_down,
    turn_rows,
)
from favor_np.cpu.kernels.block import room_of
from favor_np.cpu.kernels.counters import claim, enter, leave, report
from favor_np.cpu.kernels.floats import flush_beside
from favor_np.cpu.kernels.gemm import SLICE, gemm_t, prefetch_rows, project_t
from favor_np.cpu.kernels.jit import EXACT, jit
from favor_np.cpu.kernels.pack import across, pack, pack_values, write_rows
from favor_np.cpu.kernels.products import load_tile_config, release_tiles, seen_by
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
from favor_np.cpu.processor import VECTOR_BYTES
from favor_np.cpu.records import TROUBLE, ExactParameters
from favor_np.cpu.tiles import CHUNK, PARTS, STRIP
from favor_np.jobs import BIAS_ROW, K_ROW, KEYS, MASK_ROW, OUT_ROW, Q_ROW, QUERIES, START, V_ROW

#: Queries of a tile that an edge cuts, of which keys that none of them sees are left out: of
#: weights, and of logits.
BLOCK = max(VECTOR_BYTES // 4, 8)
WIDE = 2 * BLOCK


@jit()
def parameters(constants):
    """The parameters that an array of EXACT_PARAMETERS holds."""
    p = constants[0]
    return ExactParameters(
        p.kind, p.kernel_epsilon, p.scale, p.limit, p.far, p.hidden, p.left, p.right
    )


@jit()
def visible(par, position, start):
    """Which keys of the tile at `start` row i of the one at `position` sees: its first + i and end.

    Both without i, and within one tile.
    """
    first, last = position - par.left - start, position + par.right - start + 1
    return min(max(first, -CHUNK), CHUNK), min(max(last, -CHUNK), CHUNK)


@jit()
def prepare_pairs(pairs):
    """Make the tiles of pairs ready, if there are any, whatever another call has left in them."""
    if pairs is None:
        return
    for padded in (pairs.queries, pairs.rows):  # not all is written to
        padded[:] = 0


@jit()
def load_queries(pairs, parts, t, g):
    """Transpose the packed queries of tile g; their sums start at zero."""
    den, num, top = t.den, t.num, t.top
    den[g] = 0
    num[g] = 0
    top[g] = 0
    if pairs is not None:
        rows = slice(g * CHUNK, (g + 1) * CHUNK)
        pairs_along(t.rows, CHUNK, t.rows.shape[1], pairs.queries[rows])
        sums = pairs.sums
        sums[rows] = 0
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
def seen_by_some(first, last, i, count):
    """The keys that some of so many queries of a tile, from i on, see: where they begin and end."""
    begin = max(i + first, 0)
    return begin, max(min(i + count - 1 + last, CHUNK), begin)


@jit()
def logits(parts, g, cols, d, edge, first, last, t):
    """The logits (F, C) of a tile of keys and one of queries; at an edge of those that count."""
    if parts is not None:
        depth = parts.keys.shape[1] // PARTS
        gemm_bf16x3(parts.keys, parts.queries[g], t.raw, CHUNK, cols, depth, False)
    elif edge:
        for i in range(0, cols, WIDE):
            begin, end = seen_by_some(first, last, i, WIDE)
            begin, end, stop = begin // 8 * 8, -(-end // 8) * 8, min(i + WIDE, cols)
            for k in range(0, d if begin < end else 0, SLICE):
                deep = min(k + SLICE, d)
                gemm_t(t.keys, t.across[g], t.raw, begin, end, i, stop, k, deep, k > 0)
    else:
        project_t(t.keys, t.across[g], t.raw, CHUNK, cols, d)
    for i in range(0, cols if edge else 0, BLOCK):
        begin, end = seen_by_some(first, last, i, BLOCK)
        for j in range(begin, end):
            for x in range(i, min(j - last + 1, i + BLOCK)):
                t.raw[j, x] = -math.inf
            for x in range(max(j - first + 1, i), i + BLOCK):
                t.raw[j, x] = -math.inf


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
    factor, longest, rows = q.dtype.type(par.scale), t.longest, t.rows
    for g in range(-(-count // CHUNK)):
        here = min(CHUNK, count - g * CHUNK)
        pack(q, row + g * CHUNK, 1, here, rows, par.limit, t.square[g])
        longest[g] = longest_of(t.square[g, :here], par.limit) * par.scale * par.scale
        for i in range(here):
            for x in range(rows.shape[1]):
                rows[i, x] *= factor
        load_queries(t.pairs, t.parts, t, g)


@jit()
def pack_keys(par, call, row, count, mask_row, bias_row, t):
    """Pack a tile of keys; the longest squared norm, and how many keys are not finite."""
    rows, square, ones, c, bad = t.rows, t.key_square, t.ones, t.c, 0
    k, mask, exponents, shares = call.k, call.mask, call.exponents, call.shares
    pack(k, row, 1, count, rows, par.limit, square)
    for j in range(CHUNK):
        seen = j < count and (mask_row < 0 or mask[mask_row + j])
        if j < count and not seen:  # whatever it is: no logit of it may be large
            square[j] = 0
            for x in range(k.shape[1]):
                rows[j, x] = 0
        if seen and square[j] == math.inf:
            seen, bad = False, bad + 1
        ones[0, j] = 1 if seen else 0
        c[0, j] = 0 if seen else par.hidden
        if seen and bias_row >= 0:
            ones[0, j], c[0, j] = shares[bias_row + j], exponents[bias_row + j]
    load_keys(t.pairs, t.parts, t)
    return longest_of(square[:count], par.limit), bad


@jit()
def weigh_values(call, bias_row, count, values):
    """Multiply packed values with the shares of their keys."""
    shares = call.shares
    for j in range(count if bias_row >= 0 else 0):
        for x in range(values.shape[1]):
            values[j, x] *= shares[bias_row + j]


@jit()
def spoil_rows(par, offset, count, start, here, t):
    """Mark the rows of a block of queries that see a key that is not finite."""
    square = t.square
    for j in range(start, start + here):
        if t.key_square[j - start] == math.inf:
            for i in range(max(j - par.right - offset, 0), min(j + par.left + 1 - offset, count)):
                square[i // CHUNK, i % CHUNK] = math.inf


@jit(fastmath=EXACT)
def measure(par, cols, first, last, t, top):
    """top = the largest logit of each query, or less than any where it sees none."""
    raw, c, lanes = t.raw, t.c, VECTOR_BYTES // t.raw.itemsize
    for i in range(0, cols, lanes):
        begin, end = seen_by_some(first, last, i // BLOCK * BLOCK, BLOCK)
        level = splat(top, 2 * par.hidden)
        for j in range(begin, end):
            level = maximum(level, nearest(load(raw, j, i)) + splat(c, c[0, j]))
        store(top, 0, i, level)


@jit(fastmath=EXACT)
def weigh(cols, first, last, t, top):
    """Logits to weights phi relative to 2**top, and their sums; how far the largest passes top."""
    raw, c, ones, phi, lanes = t.raw, t.c, t.ones, t.phi, VECTOR_BYTES // t.raw.itemsize
    worst = splat(c, 0)
    for i in range(0, cols, lanes):
        begin, end = seen_by_some(first, last, i // BLOCK * BLOCK, BLOCK)
        level, total = load(top, 0, i), splat(raw, 0)
        for j in range(begin, end):
            y = load(raw, j, i)
            n = nearest(y) + (splat(c, c[0, j]) - level)
            worst = maximum(worst, n)
            value = exp2(y, n)
            store(phi, j, i, value)
            total = fma(value, splat(raw, ones[0, j]), total)
        store(t.part, 0, i, total)
    return highest(worst)


@jit()
def seen_values(phi, values, clean, first, last, count, num, spare):
    """``num[i] += sum_j phi[j, i] values[j]`` over the keys that row i sees: phi of others is 0."""
    for i in range(0, count, 8):
        begin, end = max(i + first, 0), min(i + 7 + last, CHUNK)
        if begin < end and clean:
            gemm_t(phi, values, num, i, i + 8, 0, num.shape[1], begin, end, True)
    for i in range(0 if clean else count):  # zero times infinity must not reach other rows
        block, begin, end = i // 8 * 8, max(i + first, 0), min(i + last, CHUNK)
        if begin < end:
            gemm_t(phi, values, spare, block, block + 8, 0, num.shape[1], begin, end, False)
            for x in range(num.shape[1]):
                num[i, x] += spare[i, x]


@jit()
def read_tile(par, g, count, d, new, first, last, clean, t):
    """Add a tile of keys to the sums of one tile of queries."""
    lanes = VECTOR_BYTES // t.rows.itemsize
    cols = -(-count // lanes) * lanes
    rows = -(-count // 8) * 8
    edge = first + count > 1 or last < CHUNK
    top, den, num = t.top[g : g + 1], t.den[g : g + 1], t.num[g]
    logits(t.parts, g, cols, d, edge, first, last, t)
    if new:
        measure(par, cols, first, last, t, top)
    if weigh(cols, first, last, t, top) > RAISE_QUERIES:
        measure(par, cols, first, last, t, t.higher)
        rescale_queries(t.higher, top, cols, 0, den, num, t.raw)
        weigh(cols, first, last, t, top)
    for i in range(count):
        den[0, i] += t.part[0, i]
    if edge:
        seen_values(t.phi, t.values, clean, first, last, count, num, t.spare)
    else:
        gemm_t(t.phi, t.values, num, 0, rows, 0, num.shape[1], 0, CHUNK, True)


@jit()
def read_pairs(pairs, par, g, count, new, first, last, clean, t):
    """The same in bfloat16, strip by strip."""
    top, num = t.top[g], t.num[g]
    depth = pairs.queries.shape[1]
    for i in range(0, count, STRIP):
        seen = min(seen_by(max(i + last - 1, 0)), CHUNK)
        raw, rows = t.raw[:STRIP], slice(g * CHUNK + i, g * CHUNK + i + STRIP)
        gemm_pairs(pairs.queries[rows], pairs.keys, raw, STRIP, seen, depth, False)
        for r in range(i, i + STRIP):
            raw[r - i, : min(max(r + first, 0), seen)] = -math.inf
            raw[r - i, max(r + last, 0) : seen] = -math.inf
        sums, out = pairs.sums[rows], num[i : i + STRIP]
        strip_features(
            par,
            1,
            raw,
            seen,
            t.c,
            t.ones,
            new,
            top[i : i + STRIP],
            t.higher[0, :STRIP],
            sums,
            out,
            t.spare[:STRIP],
            pairs.phi,
            pairs.part,
        )
        gemm_pairs(pairs.phi, pairs.values, out, STRIP, out.shape[1], seen // 2, True)
        if not clean:
            add_nonfinite(pairs.phi, i, out, first, last, raw, t.values)


@jit()
def read(pairs, par, g, count, d, new, first, last, clean, t):
    """Whether `pairs` is None is known to the compiler."""
    if pairs is None:
        read_tile(par, g, count, d, new, first, last, clean, t)
    else:
        read_pairs(pairs, par, g, count, new, first, last, clean, t)


@jit()
def add_lanes(pairs, count, g, t):
    """The denominators of a tile of queries, where they were summed by lanes."""
    if pairs is None:
        return
    for i in range(count):
        t.den[g, i] = sum_lanes(load(pairs.sums, g * CHUNK + i, 0))


@jit()
def exact_block(par, call, job, t):
    """One block of up to QUERY_TILES tiles of queries against all keys they may see.

    False if a logit may be too large for this precision: the rows it belongs to are then wrong.
    """
    fits, k, v, mask = True, call.k, call.v, call.mask
    k_row, v_row, mask_row, bias_row = job[K_ROW], job[V_ROW], job[MASK_ROW], job[BIAS_ROW]
    out_row, count, keys_count, offset = job[OUT_ROW], job[QUERIES], job[KEYS], job[START]
    tiles = -(-count // CHUNK)
    pack_queries(par, call.q, job[Q_ROW], count, t)
    for start in range(first_tile(par, offset), min(keys_count, offset + count + par.right), CHUNK):
        here = min(CHUNK, keys_count - start)
        m_row = mask_row + start if mask_row >= 0 else -1
        l_row = bias_row + start if bias_row >= 0 else -1
        longest, bad = pack_keys(par, call, k_row + start, here, m_row, l_row, t)
        clean = pack_values(v, v_row + start, 1, here, t.values, mask, m_row)
        weigh_values(call, l_row, here, t.values)
        flush_beside(t.values, here, t.top, True)
        next_count = min(CHUNK, keys_count - start - here)
        prefetch_rows(k, k_row + start + here, next_count)
        prefetch_rows(v, v_row + start + here, next_count)
        load_values(t.pairs, t, clean)
        if bad > 0:
            spoil_rows(par, offset, count, start, here, t)
        for g in range(tiles):
            position, queries = offset + g * CHUNK, min(CHUNK, count - g * CHUNK)
            first, last = visible(par, position, start)
            if queries + last < 2 or first >= here:
                continue
            fits = fits and t.longest[g] * longest <= par.far * par.far
            new = start == first_tile(par, position)
            read(t.pairs, par, g, queries, k.shape[1], new, first, last, clean, t)
    square, den = t.square, t.den
    for g in range(tiles):
        here = min(CHUNK, count - g * CHUNK)
        add_lanes(t.pairs, here, g, t)
        for i in range(here):
            if square[g, i] == math.inf:  # in the gradient NaN passes through the denominator
                den[g, i] = math.nan
        write_rows(t.num[g], den[g], t.top[g], square[g], here, call, out_row + g * CHUNK)
    return fits


@jit()
def first_tile(par, position):
    """Where the first tile of keys begins that queries from `position` on see."""
    return max(position - par.left, 0) // CHUNK * CHUNK


@jit()
def attend_exact(call):
    """Take jobs of `records.Exact` until none is left; how many are finished by now.

    Reports where float64 is needed.  Variants: with products of pairs, or logits of parts.
    """
    me, mode = enter(call.control)
    par, t = parameters(call.constants), room_of(call, me)
    prepare_pairs(t.pairs)
    load_tile_config(call.config)
    finished = 0
    while True:
        job = claim(call.control)
        if job < 0:
            break
        if not exact_block(par, call, call.jobs[job], t):
            report(call.control, TROUBLE)
        finished += 1
    release_tiles(call.config)
    return leave(call.control, finished, mode)
