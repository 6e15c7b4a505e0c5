"""Matrix products of tiles: every flop of the library that is not an activation is here.

All matrices are C-ordered; the ranges given must lie inside them, rows in multiples of 8 and columns
in whole vectors.  ``gemm`` computes ``c (+)= a @ b``, ``gemm_t`` computes ``c (+)= a.T @ b``.
"""

from __future__ import annotations

from favor_np.kernels.jit import jit
from favor_np.kernels.simd import SHORT, TALL, VECTOR_BYTES, gemm_tile

_tall, _tall_t = (gemm_tile(TALL, 2, transposed=t) for t in (False, True))
_short, _short_t = (gemm_tile(SHORT, 2, transposed=t) for t in (False, True))
_narrow, _narrow_t = (gemm_tile(8, 1, transposed=t) for t in (False, True))
_two, _two_one = gemm_tile(2, 4, transposed=False), gemm_tile(2, 1, transposed=False)

#: Projections are exponents: an error in them is one of the whole feature.  A chain of 64 sums in
#: float32 costs most of the accuracy (3.1e-6 at std 2, d = 64), two of 32 leave 1.9e-6.
SLICE = 32


@jit()
def _tall_end(first, last):
    """Where rows first:last, cut into tall tiles and then as few short ones as fit, turn short."""
    end = last
    while (end - first) % TALL:
        end -= SHORT
    return end


@jit()
def gemm(a, b, c, row0, row1, col0, col1, first, last, add):
    """``c[row0:row1, col0:col1] (+)= a[row0:row1, K] @ b[K, col0:col1]``, K = first:last."""
    lanes = VECTOR_BYTES // c.itemsize
    turn = _tall_end(row0, row1)
    j = col0
    while j + 2 * lanes <= col1:
        for i in range(row0, turn, TALL):
            _tall(a, i, b, j, c, first, last, add)
        for i in range(turn, row1, SHORT):
            _short(a, i, b, j, c, first, last, add)
        j += 2 * lanes
    if j < col1:
        for i in range(row0, row1, 8):
            _narrow(a, i, b, j, c, first, last, add)


@jit()
def gemm_t(a, b, c, row0, row1, col0, col1, first, last, add):
    """``c[row0:row1, col0:col1] (+)= a[K, row0:row1].T @ b[K, col0:col1]``, K = first:last."""
    lanes = VECTOR_BYTES // c.itemsize
    turn = _tall_end(row0, row1)
    j = col0
    while j + 2 * lanes <= col1:
        for i in range(row0, turn, TALL):
            _tall_t(a, i, b, j, c, first, last, add)
        for i in range(turn, row1, SHORT):
            _short_t(a, i, b, j, c, first, last, add)
        j += 2 * lanes
    if j < col1:
        for i in range(row0, row1, 8):
            _narrow_t(a, i, b, j, c, first, last, add)


@jit()
def project_t(a, b, c, rows, cols, depth):
    """``c[:rows, :cols] = a[:depth, :rows].T @ b[:depth, :cols]``, summed by SLICE."""
    for k in range(0, depth, SLICE):
        gemm_t(a, b, c, 0, rows, 0, cols, k, min(k + SLICE, depth), k > 0)


@jit()
def project_two(a, b, c, cols, depth):
    """``c[:2, :cols] = a[:2, :depth] @ b[:depth, :cols]``: the query and the key of one token."""
    lanes = VECTOR_BYTES // c.itemsize
    for k in range(0, depth, SLICE):
        last, j = min(k + SLICE, depth), 0
        while j + 4 * lanes <= cols:
            _two(a, 0, b, j, c, k, last, k > 0)
            j += 4 * lanes
        while j < cols:
            _two_one(a, 0, b, j, c, k, last, k > 0)
            j += lanes
