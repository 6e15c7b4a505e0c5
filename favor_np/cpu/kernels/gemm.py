"""Matrix products of tiles: every flop of the library that is not an activation is here.

All matrices are C-ordered; the ranges given must lie inside them, rows in multiples of 8 and
columns in whole vectors.  ``gemm`` computes ``c (+)= a @ b``, ``gemm_t`` computes ``c (+)= a.T @
b``.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any

from favor_np.cpu.kernels.jit import jit
from favor_np.cpu.kernels.simd import SHORT, TALL, gemm_tile, prefetch
from favor_np.cpu.processor import VECTOR_BYTES

_two, _two_one = gemm_tile(2, 4, transposed=False), gemm_tile(2, 1, transposed=False)

#: Projections are exponents: an error in them is one of the whole feature.  A chain of 64 sums in
#: float32 costs most of the accuracy (3.1e-6 at std 2, d = 64), two of 32 leave 1.9e-6.
SLICE = 32

#: Rows that are prefetched, as many of one array of the caller's as of another.
Prefetch = namedtuple("Prefetch", "a a_row b b_row count")
#: Bytes of each of them that are prefetched with a tile of a product.  All at once, they would be
#: waited for: a processor keeps some sixteen lines on their way.
FETCHED = 1024


@jit()
def prefetch_rows(source, row, count):
    """Ask for rows of an array of the caller's."""
    line = 64 // source.itemsize
    for i in range(row, row + count):
        for x in range(0, source.shape[1], line):
            prefetch(source, i, x)


@jit()
def prefetch_some(next_rows, fetched):
    """Prefetch some more of the next rows; how many have been by now."""
    if next_rows is None:
        return fetched
    row = next_rows.a.shape[1] * next_rows.a.itemsize
    count = min(max(FETCHED // row, 1), next_rows.count - fetched)
    prefetch_rows(next_rows.a, next_rows.a_row + fetched, count)
    prefetch_rows(next_rows.b, next_rows.b_row + fetched, count)
    return fetched + count


@jit()
def _tall_end(first, last):
    """Where rows first:last, cut into tall tiles and then as few short ones as fit, turn short."""
    end = last
    while (end - first) % TALL:
        end -= SHORT
    return end


def tiled_gemm(*, transposed: bool, **product: Any) -> Callable[..., Any]:
    """Make a product that covers the ranges of its result with tiles of `gemm_tile`.

    Meanwhile it prefetches `next_rows`, from number `fetched` on; it returns how many have been
    then.
    """
    tall, short, narrow = (
        gemm_tile(rows, vectors, transposed=transposed, **product)
        for rows, vectors in ((TALL, 2), (SHORT, 2), (8, 1))
    )

    @jit()
    def cover(a, b, c, row0, row1, col0, col1, first, last, add, next_rows, fetched):
        lanes = VECTOR_BYTES // c.itemsize
        turn = _tall_end(row0, row1)
        j = col0
        while j + 2 * lanes <= col1:
            for i in range(row0, turn, TALL):
                fetched = prefetch_some(next_rows, fetched)
                tall(a, i, b, j, c, first, last, add)
            for i in range(turn, row1, SHORT):
                fetched = prefetch_some(next_rows, fetched)
                short(a, i, b, j, c, first, last, add)
            j += 2 * lanes
        if j < col1:
            for i in range(row0, row1, 8):
                fetched = prefetch_some(next_rows, fetched)
                narrow(a, i, b, j, c, first, last, add)
        return fetched

    return cover  # type: ignore[no-any-return]  # jit has no types


#: ``c[row0:row1, col0:col1] (+)= a[K, row0:row1].T @ b[K, col0:col1]``, K = first:last.
gemm_t_fetching = tiled_gemm(transposed=True)
_gemm = tiled_gemm(transposed=False)


@jit()
def gemm(a, b, c, row0, row1, col0, col1, first, last, add):
    """``c[row0:row1, col0:col1] (+)= a[row0:row1, K] @ b[K, col0:col1]``, K = first:last."""
    _gemm(a, b, c, row0, row1, col0, col1, first, last, add, None, 0)


@jit()
def gemm_t(a, b, c, row0, row1, col0, col1, first, last, add):
    """``c[row0:row1, col0:col1] (+)= a[K, row0:row1].T @ b[K, col0:col1]``, K = first:last."""
    gemm_t_fetching(a, b, c, row0, row1, col0, col1, first, last, add, None, 0)


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
