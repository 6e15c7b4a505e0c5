"""Who attends to whom: tables of jobs, as functions of shapes, for both engines.

A job is a row of integers.  Its columns have the names below; a table ends with the last column
that its kernel reads.  They are frozen into machine code, so ``kernels.jit`` digests them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from favor_np.tables import kept

Array: TypeAlias = npt.NDArray[Any]
Shape: TypeAlias = tuple[int, ...]

#: Attention: the first rows of keys, values, mask and log2_bias (-1: there is none), how many keys;
#: the first block of the map's weights; the slot of the state (-1: there is none); how many
#: queries; the rows of W.  A slot of BACKWARDS: there is none, rows are numbered downwards, the
#: last so many queries read, and what they read is joined with the rows and denominators that are
#: there.
K_ROW, V_ROW, MASK_ROW, BIAS_ROW, KEYS, BLOCK, SLOT, QUERIES, ROWS = range(9)
BACKWARDS = -2
#: With a window so many positions are computed at a time, or one segment.
WAVE = 16_384
#: Its gradient besides: the side that reads (1: keys), the first rows of the head's queries, of its
#: results and of its gradients of keys and values, and the number of the job.
SIDE, Q_ROW, OUT_ROW, GRAD_ROW, NUMBER = range(9, 14)
#: Exact attention besides: the position of the first query.  Its gradient: the position of the
#: first key, how many positions further the next block of keys is, and the first row of the part's
#: dq; NUMBER is that of the problem.
START, STRIDE, DQ_ROW = range(14, 17)


@dataclass(frozen=True, eq=False)
class Jobs:
    """One job for each state, with the queries that read it and the rows that these write."""

    table: Array
    q_rows: Array
    out_rows: Array

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in vars(self).values())

    def take(self, rows: Any) -> Jobs:
        """Return some of the jobs."""
        return Jobs(self.table[rows], self.q_rows[rows], self.out_rows[rows])


def skip_rows(table: Array, start: Any) -> None:
    """Move the rows of keys and values, and of mask and log2_bias where there are such."""
    table[:, [K_ROW, V_ROW]] += np.reshape(start, (-1, 1))
    for column in (MASK_ROW, BIAS_ROW):
        table[:, column] += np.where(table[:, column] < 0, 0, start)


def jobs_without_rows(slots: int, rows: int) -> Jobs:
    """Return jobs that only fold the tail of each slot."""
    table = np.zeros((slots, ROWS + 1), np.int64)
    table[:, [MASK_ROW, BIAS_ROW]], table[:, SLOT], table[:, ROWS] = -1, np.arange(slots), rows
    nothing = np.empty((slots, 0), np.int64)
    return Jobs(table, nothing, nothing)


class Shapes(NamedTuple):
    """The shapes of arrays that broadcast (validated before), and of the batch of states, if any.

    If they are grouped the last of the leading axes holds the heads, and several query heads share
    one head of keys and values.
    """

    q: Shape
    k: Shape
    v: Shape
    mask: Shape | None = None
    log2_bias: Shape | None = None
    grouped: bool = False
    state: Shape | None = None


@kept(256, lambda of: of.nbytes)
def broadcast_jobs(
    shapes: Shapes, heads: int | None = None, blocks: int = 0, rows: int = 0
) -> Jobs:
    """Return the jobs for a map of so many heads, or for exact attention.

    Each head has so many blocks of weights, and its projection so many rows.
    """
    (q, q_length), (k, k_length) = ((x[:-2], x[-2]) for x in (shapes.q, shapes.k))
    v, state, grouped = shapes.v[:-2], shapes.state, shapes.grouped
    mask, log2_bias = (None if x is None else x[:-1] for x in (shapes.mask, shapes.log2_bias))
    of_heads = (heads,) if heads else ()
    state_shape = np.broadcast_shapes(k, v, mask or (), log2_bias or (), of_heads, state or ())
    q_full, state_full = q, state_shape
    if grouped:
        q_full = (*q[:-1], state_shape[-1], q[-1] // state_shape[-1])
        state_full = (*state_shape, 1)
    full = np.broadcast_shapes(q_full, state_full)
    count = math.prod(state_shape)

    def index(shape: Shape, into: Shape) -> Array:
        numbers = np.arange(math.prod(shape), dtype=np.int64).reshape(shape)
        return np.broadcast_to(numbers, into).ravel()

    group = math.prod(full) // max(count, 1)
    order = np.argsort(index(state_full, full), kind="stable").reshape(count, group)
    head = index((heads,), state_shape) if heads else np.zeros(count, np.int64)
    table = np.empty((count, ROWS + 1), np.int64)
    table[:, K_ROW] = index(k, state_shape) * k_length
    table[:, V_ROW] = index(v, state_shape) * k_length
    table[:, MASK_ROW] = -1 if mask is None else index(mask, state_shape) * k_length
    table[:, BIAS_ROW] = -1 if log2_bias is None else index(log2_bias, state_shape) * k_length
    table[:, KEYS], table[:, QUERIES] = k_length, q_length
    table[:, BLOCK], table[:, ROWS] = head * blocks, rows
    table[:, SLOT] = -1 if state is None else np.arange(count)
    return Jobs(
        table,
        np.ascontiguousarray(index(q_full, full)[order] * q_length),
        np.ascontiguousarray(order * max(q_length, 1)),  # without rows the head's number still
    )


def packed(of: Jobs, offsets: Array) -> Jobs:
    """Cut every job into one for each sequence offsets[i]:offsets[i + 1], the longest first.

    Slots are numbered state by state and, within each, sequence by sequence.
    """
    return cut(of, offsets[:-1], np.diff(offsets))


def cut(of: Jobs, starts: Array, lengths: Array) -> Jobs:
    """Cut every job into one for each of these runs of rows, as `packed` does."""
    count = len(starts)
    owner, sequence = np.divmod(np.arange(len(of.table) * count), count)
    start, length = starts[sequence], lengths[sequence]
    table = of.table[owner]
    skip_rows(table, start)
    for column in (KEYS, QUERIES):  # none where there were none
        table[:, column] = np.minimum(table[:, column], length)
    table[:, SLOT] = np.where(table[:, SLOT] < 0, -1, owner * count + sequence)
    q_rows, out_rows = of.q_rows[owner] + start[:, None], of.out_rows[owner] + start[:, None]
    order = np.argsort(-length, kind="stable")
    return Jobs(table, q_rows, out_rows).take(order[length[order] > 0])


class Segments(NamedTuple):
    """Runs of positions begin:end, one behind the other, as long as a window or the last ones.

    Those that are `later` have such a run before them, in the same sequence.
    """

    begin: Array
    end: Array
    later: Array

    @property
    def first(self) -> int:
        """The first position."""
        return int(self.begin[0])

    @property
    def last(self) -> int:
        """The position behind the last one."""
        return int(self.end[-1])


def segments(offsets: Array, window: int, most: int = WAVE) -> Iterator[Segments]:
    """Go through the segments of all sequences, some at a time: at most so many."""
    firsts = np.cumsum([0, *-(-np.diff(offsets) // window)])  # segments before each sequence
    step = max(1, min(WAVE // max(window, 8), most))
    for first in range(0, firsts[-1], step):
        number = np.arange(first, min(first + step, firsts[-1]))
        owner = np.searchsorted(firsts, number, side="right") - 1
        begin = offsets[owner] + (number - firsts[owner]) * window
        end = np.minimum(begin + window, offsets[owner + 1])
        yield Segments(begin, end, (number > firsts[owner]) & (window > 1))


def before(of: Jobs, run: Segments, window: int) -> Jobs:
    """Return the jobs of what queries see of the segment before their own: its end, backwards.

    The last query of a full segment sees none of it, the one before that only the last key, and so
    on: causal attention, rows being numbered downwards.
    """
    begin, length = run.begin[run.later], (run.end - run.begin)[run.later]
    owner, segment = np.divmod(np.arange(len(of.table) * len(begin)), max(len(begin), 1))
    table, start = of.table[owner], begin[segment]
    skip_rows(table, start - 1)
    table[:, KEYS], table[:, QUERIES] = window - 1, np.minimum(window - 1, length[segment])
    table[:, SLOT] = BACKWARDS
    top = (start + window - 2)[:, None]
    return Jobs(table, of.q_rows[owner] + top, of.out_rows[owner] + top)
