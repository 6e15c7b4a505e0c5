"""The matrix products of a chunk: in the arrays' precision or, with tiles for words, in bfloat16.

Whether `words` is None the compiler knows.  If it is not, the map's weights are words, and what else a
product needs in words is made of the tiles of float32 as it is due; all else in a kernel is the same.
"""

from __future__ import annotations

import math
from collections import namedtuple

from favor_np.kernels.bfloat16 import (
    AMX,
    STEP,
    configure,
    gemm_words,
    gemm_words_t,
    release,
    turn_rows,
    words_along,
    words_down,
)
from favor_np.kernels.gemm import gemm, gemm_t, project_t
from favor_np.kernels.jit import jit
from favor_np.kernels.pack import CHUNK, across, cut
from favor_np.kernels.simd import VECTOR_BYTES

#: Tiles of words: packed rows and features, each as left and as right factor, and the right factors
#: values and state; key features as they are summed over features (`keys`) and positions (`folded`).
Words = namedtuple("Words", "rows columns phi phi_t keys values state folded folded_t")


@jit()
def carve_words(unit, floats, at, d, vcols, width, tiles):
    """Cut the tiles for words; ``plan.words_workspace`` says how much they need."""
    if unit is None:
        return None
    depth, features = -(-d // (2 * STEP)) * STEP, -(-width // (2 * STEP)) * STEP
    rows, at = cut(floats, at, CHUNK, depth)
    columns, at = cut(floats, at, depth, CHUNK)
    phi, at = cut(floats, at, features, CHUNK)
    phi_t, at = cut(floats, at, CHUNK, features)
    keys, at = cut(floats, at, tiles * CHUNK, features)
    values, at = cut(floats, at, CHUNK // 2, vcols)
    state, at = cut(floats, at, features, vcols)
    folded, at = cut(floats, at, CHUNK // 2, width)
    folded_t, at = cut(floats, at, width, CHUNK // 2)
    for padded in (rows, phi, keys, state):  # what is not written to, and another call may have
        padded[:] = 0
    return Words(rows, columns, phi, phi_t, keys, values, state, folded, folded_t)


@jit()
def begin_unit(unit):
    """Make the matrix unit ready, where it is used."""
    if unit is None:
        return
    if AMX:
        configure(unit)


@jit()
def end_unit(unit):
    """Leave it as it was."""
    if unit is None:
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
def turn_keys(words, t):
    """Turn the packed keys for `project_keys`."""
    if words is None:
        across(t.rows, t.columns)
    else:
        words_along(t.rows, CHUNK, t.rows.shape[1], words.rows)


@jit()
def project_keys(words, t, weight, target, rows, d):
    """The projections (C, F) of the packed keys, of one block of the map."""
    if words is None:
        project_t(t.columns, weight, target, rows, target.shape[1], d)
    else:
        gemm_words(words.rows, weight, target, CHUNK, target.shape[1], words.rows.shape[1], False)


@jit()
def load_queries(words, t):
    """Turn the packed queries for `project_queries`."""
    if words is None:
        across(t.rows, t.columns)
    else:
        turn_rows(t.rows, words.rows, words.columns)


@jit()
def project_queries(words, t, weight, cols, d):
    """The projections (F, C) of the packed queries, of one block of the map."""
    width = t.raw.shape[0]
    if words is None:
        project_t(weight, t.columns, t.raw, width, cols, d)
    else:
        gemm_words(weight, words.columns, t.raw, width, CHUNK, words.columns.shape[0], False)


@jit()
def load_keys(words, par, t, rows, clean):
    """Prepare values and features of a chunk of keys for the products below."""
    if words is None:
        return
    words_of_values(t.values, clean, words.values)
    for tile in range(t.keys.shape[0]):
        t.keys[tile, rows:] = 0  # of other chunks: with values of zero not even NaN may count
        if par.causal:
            at = tile * CHUNK
            words_along(t.keys[tile], CHUNK, t.keys.shape[2], words.keys[at : at + CHUNK])


@jit()
def read_state(words, t, s, rows, add):
    """num (C, dv) (+)= phi_q.T S for one tile of features, s being its rows."""
    width, vcols = s.shape
    if words is None:
        gemm_t(t.phi, s, t.num, 0, rows, 0, vcols, 0, width, add)
    else:
        words_down(s, width, vcols, words.state)
        gemm_words_t(t.phi, words.state, t.num, words.phi, words.phi_t, add)


@jit()
def read_keys(words, t, tile, rows, cols, add):
    """scores[j, i] (+)= phi_k[j] . phi_q[i], j <= i at least; after `read_state`."""
    width = t.phi.shape[0]
    if words is None:
        lanes = VECTOR_BYTES // t.phi.itemsize
        for i in range(0, cols, 2 * lanes):  # keys after these queries are not needed
            end = min(i + 2 * lanes, cols)
            last = min(-(-end // 8) * 8, rows)
            gemm(t.keys[tile], t.phi, t.scores, 0, last, i, end, 0, width, add)
    else:
        keys = words.keys[tile * CHUNK : (tile + 1) * CHUNK]
        gemm_words(keys, words.phi, t.scores, CHUNK, CHUNK, words.phi.shape[0], add)


@jit()
def fold_keys(words, keys, values, count, s):
    """S += phi_k.T V for one tile of features, s being its rows."""
    width, vcols = s.shape
    if words is None:
        gemm_t(keys, values, s, 0, width, 0, vcols, 0, count, True)
    else:
        gemm_words_t(keys, words.values, s, words.folded, words.folded_t, True)
