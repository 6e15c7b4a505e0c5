"""The matrix products of a chunk: in the arrays' precision or, with tiles for words, in bfloat16.

In the arrays' precision projections may be products of planes: `project_keys` and `project_queries`.

Whether `words` is None the compiler knows.  If it is not, the map's weights are words, and what else a
product needs in words is made of the tiles of float32 as it is due.  Queries are then read strip by strip,
query by query, for what lies between the products to stay in the nearest cache.
"""

from __future__ import annotations

import math
from collections import namedtuple

import numpy as np

from favor_np.cpu.kernels.activate import strip_features
from favor_np.cpu.kernels.bfloat16 import (
    AMX,
    PLANES,
    STRIP,
    add_spoiled,
    both,
    configure,
    cut_along,
    cut_down,
    finite_words,
    gemm_planes,
    gemm_words,
    release,
    turn_rows,
    turn_words,
    words_along,
    words_down,
    words_for,
)
from favor_np.cpu.kernels.gemm import gemm_t_fetching, project_t
from favor_np.cpu.kernels.jit import jit
from favor_np.cpu.kernels.pack import CHUNK, across, cut
from favor_np.cpu.kernels.simd import VECTOR_BYTES, load, store, sum_lanes

#: Tiles of words: packed rows as left factor; key features as right factor for scores (after `turned`),
#: and as `folded` for the state; values, of which `finite` are those that are if not all, and state as
#: right factors, with c and z of the features that queries read.  Of a strip: projections, features, and
#: their sums by lanes; and the bits that it keeps of the scores with its own keys and those after.
Words = namedtuple(
    "Words", "rows turned keys values finite state folded folded_t raw phi sums part z seen c"
)


#: Packed rows cut into planes, as left and as right factor.
Planes = namedtuple("Planes", "left right")


@jit()
def carve_planes(cut_weight, floats, at, d):
    """Cut the tiles for products with weights that are cut into planes, if they are."""
    if cut_weight is None:
        return None
    depth = PLANES * words_for(d)
    left, at = cut(floats, at, CHUNK, depth)
    right, at = cut(floats, at, depth, CHUNK)
    return Planes(left, right)


@jit()
def carve_words(config, cut_weight, floats, at, ints, mark, d, vcols, width, tiles):
    """Cut the tiles for words, if products are of these."""
    if config is None:
        return None
    if cut_weight is not None:
        return None
    lanes = VECTOR_BYTES // floats.itemsize
    depth, features = words_for(d), words_for(width)
    rows, at = cut(floats, at, CHUNK, depth)
    turned, at = cut(floats, at, CHUNK, features)
    keys, at = cut(floats, at, tiles * features, CHUNK)
    values, at = cut(floats, at, CHUNK // 2, vcols)
    finite, at = cut(floats, at, CHUNK // 2, vcols)
    state, at = cut(floats, at, tiles * features, vcols)
    folded, at = cut(floats, at, CHUNK // 2, width)
    folded_t, at = cut(floats, at, width, CHUNK // 2)
    raw, at = cut(floats, at, STRIP, CHUNK)
    phi, at = cut(floats, at, STRIP, CHUNK // 2)
    sums, at = cut(floats, at, CHUNK, lanes)
    part, at = cut(floats, at, STRIP, lanes)
    z, at = cut(floats, at, tiles, CHUNK)
    seen, at = cut(floats, at, STRIP, 2 * STRIP)
    c, mark = cut(ints, mark, tiles, CHUNK)
    for padded in (rows, turned, state, raw):  # what is not written to, and another call may have
        padded[:] = 0
    bits = seen.view(np.int32)
    for i in range(STRIP):
        for j in range(2 * STRIP):
            bits[i, j] = -1 if j <= i else 0
    return Words(rows, turned, keys, values, finite, state, folded, folded_t, raw, phi, sums, part, z, seen,
                 c)  # fmt: skip


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
def words_of_values(values, clean, target):
    """A tile of values as right factor."""
    if not clean:  # rounding is made for one NaN only: others might turn into numbers
        for j in range(CHUNK):
            for x in range(values.shape[1]):
                if math.isnan(values[j, x]):
                    values[j, x] = math.nan
    words_down(values, CHUNK, values.shape[1], target)


@jit()
def turn_keys(words, planes, t):
    """Turn the packed keys for `project_keys`."""
    if words is not None:
        words_along(t.rows, CHUNK, t.rows.shape[1], words.rows)
    elif planes is not None:
        cut_along(t.rows, CHUNK, t.rows.shape[1], planes.left)
    else:
        across(t.rows, t.columns)


@jit()
def project_keys(words, planes, t, weight, cut_weight, b, target, rows, d):
    """The projections (C, F) of the packed keys, of one block of the map."""
    if words is not None:
        depth = words.rows.shape[1]
        gemm_words(words.rows, weight[b], target, CHUNK, target.shape[1], depth, False)
    elif planes is not None:
        depth = planes.left.shape[1] // PLANES
        gemm_planes(planes.left, cut_weight[b], target, CHUNK, target.shape[1], depth, False)
    else:
        project_t(t.columns, weight[b], target, rows, target.shape[1], d)


@jit()
def turn_queries(planes, t):
    """Turn the packed queries for `project_queries`."""
    across(t.rows, t.columns)
    if planes is not None:
        cut_down(t.columns, t.columns.shape[0], CHUNK, planes.right)


@jit()
def project_queries(planes, t, weight, cut_weight, b, target, cols, d):
    """The projections (F, C) of the packed queries, of one block of the map."""
    if planes is None:
        project_t(weight[b], t.columns, target, target.shape[0], cols, d)
    else:
        depth = planes.right.shape[0] // PLANES
        gemm_planes(cut_weight[b], planes.right, target, target.shape[0], cols, depth, False)


@jit()
def load_keys(words, reads, keys, t, rows, clean):
    """Prepare values and features of a chunk of keys for the products below, and for causal reads."""
    if words is None:
        return
    words_of_values(t.values, clean, words.values)
    if reads and not clean:
        finite_words(t.values, t.spare, words.finite)
    features = words.turned.shape[1]
    for tile in range(keys.shape[0]):
        keys[tile, rows:] = 0  # of other chunks: with values of zero not even NaN may count
        if reads:
            turn_rows(keys[tile], words.turned, words.keys[tile * features :])


@jit()
def fold_keys(words, keys, values, count, s, next_rows, fetched):
    """``S = phi_k.T V`` for one tile of features, s being its rows; see `gemm_t_fetching`."""
    width, vcols = keys.shape[1], s.shape[1]
    if words is None:
        return gemm_t_fetching(
            keys, values, s, 0, width, 0, vcols, 0, count, False, next_rows, fetched
        )
    words_down(keys, CHUNK, width, words.folded)
    turn_words(words.folded, CHUNK // 2, width, words.folded_t)
    gemm_words(words.folded_t, words.values, s, width, vcols, CHUNK // 2, False)
    return fetched


@jit()
def load_state(words, par, features_count, c, s, z, slot, width):
    """Prepare a state for `read_blocks`, with c of no key where no query reads."""
    if words is None:
        return
    features, half = words.turned.shape[1], words.c.shape[0] // par.signs * width
    for tile in range(words.c.shape[0]):
        b, r0 = tile // par.signs, tile % par.signs * half + tile // par.signs * width
        filled = min(par.filled, features_count - b * par.filled)
        for f in range(CHUNK):
            words.c[tile, f], words.z[tile, f] = par.nothing, 0
        for f in range(filled):
            words.c[tile, f], words.z[tile, f] = c[slot, r0 + f], z[slot, r0 + f]
        words_down(s[slot, r0:], width, s.shape[2], words.state[tile * features :])


@jit()
def read_strip(words, par, i, query, b, new, t):
    """Add what a strip of queries reads with one block of the map; to nothing if it is new."""
    features, width = words.turned.shape[1], t.keys.shape[2]
    rows, raw = words.rows[i : i + STRIP], words.raw
    sums, num, scores = words.sums[i : i + STRIP], t.num[i : i + STRIP], t.scores[i : i + STRIP]
    gemm_words(rows, query, raw, STRIP, width, rows.shape[1], False)
    for side in range(par.signs):
        tile, first = b * par.signs + side, new and side == 0
        at = tile * features
        strip_features(par, 1 - 2 * side, raw, 2 * features, words.c[tile:], words.z[tile:], first,
                       t.top[0, i : i + STRIP], t.higher[0, :STRIP], sums, num, scores, words.phi,
                       words.part)  # fmt: skip
        gemm_words(words.phi, words.state[at:], num, STRIP, num.shape[1], features, not first)
        if par.causal:
            gemm_words(words.phi, words.keys[at:], scores, STRIP, seen_by(i), features, not first)


@jit()
def seen_by(i):
    """How many of the keys of its chunk the strip that begins there sees, in steps of the unit."""
    return min(CHUNK, 2 * words_for(i + STRIP))


@jit()
def read_blocks(words, par, count, query, w, blocks, clean, t):
    """num, den and top of a chunk of packed queries, of all blocks of the map.

    `load_state` and, where par.causal, `load_keys` have gone before.
    """
    words.sums[:] = 0
    for b in range(blocks):
        for i in range(0, count, STRIP):
            read_strip(words, par, i, query[w + b], b, b == 0, t)
    if par.causal:
        for i in range(0, count, STRIP):
            own_words(words, i, t.scores[i : i + STRIP], t.num[i : i + STRIP], t.values, clean)
    for i in range(count):
        t.den[0, i] = sum_lanes(load(words.sums, i, 0))


@jit()
def own_words(words, start, scores, num, values, clean):
    """Add the chunk's own keys, scores[i, j] = phi_q[i] . phi_k[j], j <= i, to a strip."""
    lanes = VECTOR_BYTES // scores.itemsize
    seen = seen_by(start)
    for i in range(STRIP):
        total = load(words.sums, start + i, 0)
        for j in range(0, start, lanes):
            total = total + load(scores, i, j)
        for j in range(start, seen, lanes):
            score = both(load(scores, i, j), load(words.seen, i, j - start))
            store(scores, i, j, score)
            total = total + score
        store(words.sums, start + i, 0, total)
    words_along(scores, STRIP, seen, words.phi)
    right = words.values if clean else words.finite
    gemm_words(words.phi, right, num, STRIP, num.shape[1], seen // 2, True)
    if not clean:
        add_spoiled(words.phi, start, num, True, words.raw, values)
