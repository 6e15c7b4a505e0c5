"""The matrix products of a chunk: in the arrays' precision or, with tiles for pairs, in bfloat16.

In the arrays' precision projections may be products of parts: `project_keys` and `project_queries`.

Whether `pairs` is None the compiler knows.  If it is not, the map's weights are pairs, and what
else a product needs in pairs is made of the tiles of float32 as it is due.  Queries are then read
strip by strip, query by query, for what lies between the products to stay in the nearest cache.
"""

from __future__ import annotations

import math

import numpy as np

from favor_np.cpu.kernels.activate import strip_features
from favor_np.cpu.kernels.bfloat16 import (
    AMX,
    add_nonfinite,
    bitwise_and,
    configure,
    finite_pairs,
    gemm_bf16x3,
    gemm_pairs,
    pairs_along,
    pairs_down,
    release,
    split_along,
    split_down,
    transpose_pairs,
    turn_rows,
)
from favor_np.cpu.kernels.gemm import gemm_t_fetching, project_t
from favor_np.cpu.kernels.jit import jit
from favor_np.cpu.kernels.pack import across
from favor_np.cpu.kernels.simd import load, store, sum_lanes
from favor_np.cpu.processor import VECTOR_BYTES
from favor_np.cpu.tiles import CHUNK, PARTS, STEP, STRIP


@jit()
def prepare_pairs(pairs):
    """Make the tiles of pairs ready, if there are any, whatever another call has left in them."""
    if pairs is None:
        return
    for padded in (pairs.rows, pairs.turned, pairs.state, pairs.raw):  # not all is written to
        padded[:] = 0
    bits = pairs.seen.view(np.int32)
    for i in range(STRIP):
        for j in range(2 * STRIP):
            bits[i, j] = -1 if j <= i else 0


@jit()
def load_tile_config(config):
    """Make the tiles of this thread ready, where they are used."""
    if config is None:
        return
    if AMX:
        configure(config)


@jit()
def release_tiles(config):
    """Leave it as it was."""
    if config is None:
        return
    if AMX:
        release()


@jit()
def pairs_of_values(values, clean, target):
    """A tile of values as right factor."""
    if not clean:  # rounding is made for one NaN only: others might turn into numbers
        for j in range(CHUNK):
            for x in range(values.shape[1]):
                if math.isnan(values[j, x]):
                    values[j, x] = math.nan
    pairs_down(values, CHUNK, values.shape[1], target)


@jit()
def turn_keys(pairs, parts, t):
    """Turn the packed keys for `project_keys`."""
    if pairs is not None:
        pairs_along(t.rows, CHUNK, t.rows.shape[1], pairs.rows)
    elif parts is not None:
        split_along(t.rows, CHUNK, t.rows.shape[1], parts.left)
    else:
        across(t.rows, t.columns)


@jit()
def project_keys(pairs, parts, t, weight, split_weight, b, target, rows, d):
    """The projections (C, F) of the packed keys, of one block of the map."""
    if pairs is not None:
        depth = pairs.rows.shape[1]
        gemm_pairs(pairs.rows, weight[b], target, CHUNK, target.shape[1], depth, False)
    elif parts is not None:
        depth = parts.left.shape[1] // PARTS
        gemm_bf16x3(parts.left, split_weight[b], target, CHUNK, target.shape[1], depth, False)
    else:
        project_t(t.columns, weight[b], target, rows, target.shape[1], d)


@jit()
def turn_queries(parts, t):
    """Turn the packed queries for `project_queries`."""
    across(t.rows, t.columns)
    if parts is not None:
        split_down(t.columns, t.columns.shape[0], CHUNK, parts.right)


@jit()
def project_queries(parts, t, weight, split_weight, b, target, cols, d):
    """The projections (F, C) of the packed queries, of one block of the map."""
    if parts is None:
        project_t(weight[b], t.columns, target, target.shape[0], cols, d)
    else:
        depth = parts.right.shape[0] // PARTS
        gemm_bf16x3(split_weight[b], parts.right, target, target.shape[0], cols, depth, False)


@jit()
def load_keys(pairs, reads, keys, t, rows, clean):
    """Stage values and features of a chunk of keys for the products below."""
    if pairs is None:
        return
    pairs_of_values(t.values, clean, pairs.values)
    if reads and not clean:
        finite_pairs(t.values, t.spare, pairs.finite)
    features = pairs.turned.shape[1]
    for tile in range(keys.shape[0]):
        keys[tile, rows:] = 0  # of other chunks: with values of zero not even NaN may count
        if reads:
            turn_rows(keys[tile], pairs.turned, pairs.keys[tile * features :])


@jit()
def fold_keys(pairs, keys, values, count, s, next_rows, fetched):
    """``S = phi_k.T V`` for one tile of features, s being its rows; see `gemm_t_fetching`."""
    width, vcols = keys.shape[1], s.shape[1]
    if pairs is None:
        return gemm_t_fetching(
            keys, values, s, 0, width, 0, vcols, 0, count, False, next_rows, fetched
        )
    pairs_down(keys, CHUNK, width, pairs.folded)
    transpose_pairs(pairs.folded, CHUNK // 2, width, pairs.folded_t)
    gemm_pairs(pairs.folded_t, pairs.values, s, width, vcols, CHUNK // 2, False)
    return fetched


@jit()
def load_state(pairs, par, features_count, c, s, z, slot, width):
    """Prepare a state for `read_blocks`, with c of no key where no query reads."""
    if pairs is None:
        return
    features, half = pairs.turned.shape[1], pairs.c.shape[0] // par.signs * width
    for tile in range(pairs.c.shape[0]):
        b, r0 = tile // par.signs, tile % par.signs * half + tile // par.signs * width
        filled = min(par.filled, features_count - b * par.filled)
        for f in range(CHUNK):
            pairs.c[tile, f], pairs.z[tile, f] = par.nothing, 0
        for f in range(filled):
            pairs.c[tile, f], pairs.z[tile, f] = c[slot, r0 + f], z[slot, r0 + f]
        pairs_down(s[slot, r0:], width, s.shape[2], pairs.state[tile * features :])


@jit()
def read_strip(pairs, par, i, query, b, new, t):
    """Add what a strip of queries reads with one block of the map; to nothing if it is new."""
    features, width = pairs.turned.shape[1], t.keys.shape[2]
    rows, raw = pairs.rows[i : i + STRIP], pairs.raw
    sums, num, scores = pairs.sums[i : i + STRIP], t.num[i : i + STRIP], t.scores[i : i + STRIP]
    gemm_pairs(rows, query, raw, STRIP, width, rows.shape[1], False)
    for side in range(par.signs):
        tile, first = b * par.signs + side, new and side == 0
        at = tile * features
        strip_features(
            par,
            1 - 2 * side,
            raw,
            2 * features,
            pairs.c[tile:],
            pairs.z[tile:],
            first,
            t.top[0, i : i + STRIP],
            t.higher[0, :STRIP],
            sums,
            num,
            scores,
            pairs.phi,
            pairs.part,
        )
        gemm_pairs(pairs.phi, pairs.state[at:], num, STRIP, num.shape[1], features, not first)
        if par.causal:
            gemm_pairs(pairs.phi, pairs.keys[at:], scores, STRIP, seen_by(i), features, not first)


@jit()
def seen_by(i):
    """How many of the keys of its chunk the strip that begins there sees, in steps of the unit."""
    return min(CHUNK, -(-(i + STRIP) // (2 * STEP)) * 2 * STEP)


@jit()
def read_blocks(pairs, par, count, query, w, blocks, clean, t):
    """num, den and top of a chunk of packed queries, of all blocks of the map.

    `load_state` and, where par.causal, `load_keys` have gone before.
    """
    pairs.sums[:] = 0
    for b in range(blocks):
        for i in range(0, count, STRIP):
            read_strip(pairs, par, i, query[w + b], b, b == 0, t)
    if par.causal:
        for i in range(0, count, STRIP):
            own_pairs(pairs, i, t.scores[i : i + STRIP], t.num[i : i + STRIP], t.values, clean)
    for i in range(count):
        t.den[0, i] = sum_lanes(load(pairs.sums, i, 0))


@jit()
def own_pairs(pairs, start, scores, num, values, clean):
    """Add the chunk's own keys, scores[i, j] = phi_q[i] . phi_k[j], j <= i, to a strip."""
    lanes = VECTOR_BYTES // scores.itemsize
    seen = seen_by(start)
    for i in range(STRIP):
        total = load(pairs.sums, start + i, 0)
        for j in range(0, start, lanes):
            total = total + load(scores, i, j)
        for j in range(start, seen, lanes):
            score = bitwise_and(load(scores, i, j), load(pairs.seen, i, j - start))
            store(scores, i, j, score)
            total = total + score
        store(pairs.sums, start + i, 0, total)
    pairs_along(scores, STRIP, seen, pairs.phi)
    right = pairs.values if clean else pairs.finite
    gemm_pairs(pairs.phi, right, num, STRIP, num.shape[1], seen // 2, True)
    if not clean:
        add_nonfinite(pairs.phi, start, num, -CHUNK, 1, pairs.raw, values)
